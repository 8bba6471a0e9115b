"""One client's round in fedjax: its federated averaging over its for_each_client, one client a round, a haiku model."""

import importlib.metadata

import haiku as hk
import jax
import numpy as np

if not hasattr(jax, "tree_map"):  # fedjax calls it by the name it had until jax 0.4.25
    jax.tree_map = jax.tree_util.tree_map

import fedjax

from benchmarks import setting
from benchmarks.round_workers import serve


def make_model(spec: dict):
    """The CNN of `fipa_jax.models`: 3x3 convolutions with pooling and ReLU, one hidden layer, no biases."""

    def forward(batch):
        x = (batch["x"].astype("float32") / 255 - 0.5) / 0.25
        for channels in spec["channels"]:
            x = hk.Conv2D(channels, 3, padding="VALID", with_bias=False)(x)
            x = jax.nn.relu(hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))
        x = jax.nn.relu(hk.Linear(spec["hidden"], with_bias=False)(hk.Flatten()(x)))
        return hk.Linear(spec["classes"], with_bias=False)(x)

    loss = lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits)
    return fedjax.create_model_from_haiku(hk.transform(forward), client(spec, 1).all_examples(), loss)


def client(spec: dict, examples: int):
    """A client's data set of random images."""
    batch = setting.random_images(examples)
    return fedjax.ClientDataset({"x": batch["image"], "y": batch["label"]})


def our_weights(spec: dict, model):
    """The weights in spec["weights"]: {path of `fipa_jax.trees.paths`: leaf} by np.savez, in the same order."""
    params = model.init(jax.random.PRNGKey(0))
    with np.load(spec["weights"]) as saved:
        leaves = [saved[path] for path in sorted(saved)]
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in jax.tree.leaves(params)]:
        raise RuntimeError("haiku's parameters have other shapes than ours")
    return jax.tree.unflatten(jax.tree.structure(params), map(jax.numpy.asarray, leaves))


def make_epochs(spec: dict, model, params):
    """count -> so many rounds of one client, one epoch each."""
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=spec["batch"], num_epochs=1)
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model), fedjax.optimizers.sgd(spec["lr"]), fedjax.optimizers.sgd(1.0), batches
    )
    state, owned = algorithm.init(params), client(spec, spec["examples"])

    def run(count: int):
        nonlocal state
        for k in range(count):
            state, _ = algorithm.apply(state, [(b"0", owned, jax.random.PRNGKey(k))])
        jax.block_until_ready(state.params)

    return run


if __name__ == "__main__":
    spec = serve.spec()
    model = make_model(spec)
    params = our_weights(spec, model)
    logits = model.apply_for_eval(params, client(spec, spec["examples"])[: spec["batch"]].all_examples()).tolist()
    versions = f"fedjax {importlib.metadata.version('fedjax')} on jax {jax.__version__}"
    serve.serve(versions, {"fedjax": make_epochs(spec, model, params)}, logits)
