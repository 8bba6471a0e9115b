"""One client's round in fedjax: its federated averaging over its for_each_client, one client a round, a haiku model."""

import importlib.metadata

import haiku as hk
import jax

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


def make_epochs(spec: dict):
    """count -> so many rounds of one client, one epoch each."""
    model = make_model(spec)
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=spec["batch"], num_epochs=1)
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model), fedjax.optimizers.sgd(spec["lr"]), fedjax.optimizers.sgd(1.0), batches
    )
    state, owned = algorithm.init(model.init(jax.random.PRNGKey(0))), client(spec, spec["examples"])

    def run(count: int):
        nonlocal state
        for k in range(count):
            state, _ = algorithm.apply(state, [(b"0", owned, jax.random.PRNGKey(k))])
        jax.block_until_ready(state.params)

    return run


if __name__ == "__main__":
    variants = {"fedjax": make_epochs(serve.spec())}
    serve.serve(f"fedjax {importlib.metadata.version('fedjax')} on jax {jax.__version__}", variants)
