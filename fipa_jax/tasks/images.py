"""Image classification: labelled uint8 images, a classifier, and a split of the training set over clients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fipa_jax import data, models, partition
from fipa_jax.tasks import Problem, Task

PADDING = 4  # pixels on each side that a random crop may reach over


def build(config) -> Problem:
    """Builds the task from the data set `config.data`, its split `config.partition` and the model `config.model`.

    Args:
      config: fields read are config.data.{name, dir, cache_dir, test_split, holdout, augment},
        config.partition.{name, num_clients, alpha, shards_per_client, seed} and config.model.

    Returns:
      The problem, its arrays in NumPy: image [N, H, W, C] uint8, label [N] int32.

    Raises:
      FileNotFoundError: the data set is not prepared in config.data.dir.
      ValueError: a field of the config does not fit the data.
    """
    train = data.load(config.data.name, "train", config.data.dir, config.data.cache_dir)
    test = data.load(config.data.name, config.data.test_split, config.data.dir, config.data.cache_dir)
    mean, std = data.standardise(config.data.name, train["image"])
    train, holdout = set_apart(train, config.data.holdout, config.partition.seed)
    clients = partition.partition(
        config.partition.name,
        train["label"],
        config.partition.num_clients,
        config.partition.seed,
        alpha=config.partition.alpha,
        shards_per_client=config.partition.shards_per_client,
    )
    module = models.build(config.model, num_outputs=data.num_classes(config.data.name, config.data.dir))
    task = classifier(module, train["image"].shape[1:], mean, std, augmented=config.data.augment)
    return Problem(task=task, train=train, test=test, holdout=holdout, clients=clients)


def classifier(module, image_shape: tuple[int, int, int], mean: np.ndarray, std: np.ndarray, augmented: bool) -> Task:
    """Makes the task of classifying uint8 images by softmax cross-entropy.

    Args:
      module: flax module from float images [B, H, W, C] to (logits [B, K], features).
      image_shape: (H, W, C).
      mean: [C] channel means of image / 255.
      std: [C] channel standard deviations of image / 255.
      augmented: whether training batches are cropped and flipped at random.

    Returns:
      The task, on batches {image: [B, H, W, C] uint8, label: [B] int}.
    """

    def init(key):
        return module.init(key, jnp.zeros([1, *image_shape]))["params"]

    def outputs(params, batch):
        dtype = jnp.result_type(*jax.tree.leaves(params))
        scale = jnp.asarray(1 / (255 * std), dtype)[None, None, None]  # [1, 1, 1, C]
        shift = jnp.asarray(-mean / std, dtype)[None, None, None]
        return module.apply({"params": params}, batch["image"].astype(dtype) * scale + shift)

    def augment(key, batch):
        return {**batch, "image": crop_and_flip(key, batch["image"], fill)}

    fill = np.round(255 * mean).astype(np.uint8)
    head = functools.partial(models.apply_head, module.head_layers)
    task = Task(init, outputs, loss, metrics, head=head, head_pattern=f"^({'|'.join(module.head_layers)})/")
    return task._replace(augment=augment) if augmented else task


def loss(outputs: jax.Array, batch: dict) -> jax.Array:
    """Returns the softmax cross-entropy [B] of logits [B, K] and `batch["label"]` [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])


def metrics(outputs: jax.Array, batch: dict) -> dict[str, jax.Array]:
    """Returns the accuracy (0 or 1) and the loss of each example, both [B]."""
    correct = jnp.argmax(outputs, axis=-1) == batch["label"]
    return {"accuracy": correct.astype(outputs.dtype), "loss": loss(outputs, batch)}


def crop_and_flip(key: jax.Array, images: jax.Array, fill: np.ndarray) -> jax.Array:
    """Shifts each image by up to `PADDING` pixels each way and mirrors it with probability 1/2, all at random.

    The border is filled with the channel mean, which normalises to zero: the margin then says nothing, as in a
    convolution's own zero padding, whereas black would be a dark edge. The published recipe also rotates by up to
    10 degrees, which is left out here.

    Args:
      key: the batch's key.
      images: [B, H, W, C] uint8.
      fill: [C] uint8, the border's colour.

    Returns:
      [B, H, W, C] uint8.
    """
    num_images, height, width, channels = images.shape
    shift_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, [2, num_images, 1], 0, 2 * PADDING + 1)
    flip = jax.random.bernoulli(flip_key, shape=[num_images, 1])
    rows = shift[0] + jnp.arange(height)[None]  # [B, H]
    columns = shift[1] + jnp.where(flip, jnp.arange(width)[None, ::-1], jnp.arange(width)[None])  # [B, W]
    padded = jnp.broadcast_to(fill, [num_images, height + 2 * PADDING, width + 2 * PADDING, channels])
    padded = padded.at[:, PADDING:-PADDING, PADDING:-PADDING].set(images)
    # One gather does it all. Under `scan` over steps and `vmap` over clients it is 30 times faster on a CPU than a
    # vmapped dynamic_slice and a flip, and unlike a loop over images it is one kernel on an accelerator.
    at = padded.at[jnp.arange(num_images)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return at.get(mode="promise_in_bounds")


def set_apart(train: dict, fraction: float, seed: int) -> tuple[dict, dict | None]:
    """Draws a holdout from the training set, before any client owns an example of it.

    Args:
      train: {field: [N, ...]}.
      fraction: the holdout's share of the N examples, in [0, 1).
      seed: seed of the draw.

    Returns:
      The examples that stay and those set apart, in their order; all and None if the share is zero.

    Raises:
      ValueError: the share is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"config.data.holdout: needs a fraction of the training set in [0, 1), got {fraction}")
    num_examples = len(train["label"])
    num_apart = round(fraction * num_examples)
    if num_apart == 0:
        return train, None
    # A stream of its own, [seed, 1]: the split over clients draws from `seed`.
    order = np.random.default_rng([seed, 1]).permutation(num_examples)
    stay, apart = np.sort(order[num_apart:]), np.sort(order[:num_apart])
    return {k: v[stay] for k, v in train.items()}, {k: v[apart] for k, v in train.items()}
