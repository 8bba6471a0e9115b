"""The setting that the measurements share: a client of CIFAR-10, or random images of its shape, and a trained CNN."""

import numpy as np

from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import Hyper
from fipa_jax.saving.model_files import load

SHAPE = (32, 32, 3)
NUM_CLASSES = 10
LR = 0.1
BATCH = 50


def cifar(model: str = "cnn_23k", examples: int = 500, data_dir: str = "", init_from: str = "", epochs: int = 5):
    """A classifier's task, parameters at which its curvature is that of a trained network, and examples.

    Args:
      model: a CNN of `fipa_jax.models`.
      examples: N, the first ones of CIFAR-10's training set.
      data_dir: where TFDS has prepared CIFAR-10; empty for random images and labels.
      init_from: a saved model; empty to train a fresh one on the examples.
      epochs: of that training, plain SGD.

    Returns:
      (task, params, batch): a `tasks.Task`, its parameter pytree, {image: [N, 32, 32, 3] uint8, label: [N] int32}.
    """
    import jax
    import jax.numpy as jnp

    from fipa_jax.data import loading as data
    from fipa_jax.tasks import images

    batch = data.load("cifar10", "train", data_dir) if data_dir else random_images(examples)
    batch = {name: jnp.asarray(field[:examples]) for name, field in batch.items()}
    mean, std = data.standardise("cifar10", np.asarray(batch["image"]))
    task = images.classifier(module(model), SHAPE, mean, std, augmented=False)
    params = task.init(jax.random.key(0))
    if init_from:
        return task, load(init_from, params), batch
    delta = jax.jit(local_training(task, examples, epochs))(params, batch, jax.random.key(1))
    return task, jax.tree.map(jnp.add, params, delta), batch


def module(model: str):
    """A CNN or ResNet of `fipa_jax.models` for the setting's classes; the ResNets' head is one layer."""
    from ml_collections import ConfigDict

    from fipa_jax.models import networks as models

    return models.build(ConfigDict({"name": model, "head_width": 0, "compute_dtype": ""}), NUM_CLASSES)


def local_training(task, examples: int, epochs: int = 5, batch_size: int = BATCH):
    """(params, batch, key) -> delta: one client's local epochs of plain SGD on all of the batch."""
    import jax.numpy as jnp

    from fipa_jax.client import first_order as client

    solve = client.first_order(task.loss, task.augment, batch_size=batch_size, micro_batch=-1, epochs=epochs)
    owned = Client(jnp.arange(examples, dtype=jnp.int32), jnp.asarray(examples))
    return lambda params, batch, key: solve(task.outputs, params, batch, owned, key, hyper(), (), ()).delta


def hyper(lr: float = LR):
    """The traced hyper-parameters of plain SGD."""
    import jax.numpy as jnp

    return Hyper(lr=jnp.float32(lr), damping=jnp.float32(0), mu=jnp.float32(0))


def random_images(count: int) -> dict[str, np.ndarray]:
    """{image [N, 32, 32, 3] uint8, label [N] int32}, the same for every reader."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, NUM_CLASSES, count, dtype=np.int32)}
