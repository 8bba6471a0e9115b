"""What a client says of its curvature: seconds and bytes of each message, for a CNN, a ResNet-20, a transformer.

Beside the update, of the same examples, compiled before: the top eigenpairs of two ranks, the diagonal, both Kronecker
factors of each layer (all directions of the outputs, or some random sums of them), the input factors alone. Seconds are
the processor's, of the fastest repeat, and memory is XLA's temporaries, without what is sent.
"""

import argparse
import time

from benchmarks import setting, timing

MODELS = ("cnn_23k", "resnet20", "transformer")
SYMBOLS, WINDOW = 65, 32  # of the transformer's texts


def run(options: list[str]) -> dict:
    """Measures every message of every model asked for."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py messages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--examples", type=int, default=100, help="N, of the client")
    parser.add_argument("--ranks", type=int, nargs="+", default=[5, 50], help="R of the eigenpairs")
    parser.add_argument("--samples", type=int, default=10, help="random sums of the outputs' directions")
    parser.add_argument("--micro-batch", type=int, default=10, help="examples at a time")
    parser.add_argument("--most-directions", type=int, default=100, help="K, or T K, up to which all are taken")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(options)
    rows = [row for name in args.models for row in _of_model(name, args)]
    timing.table(rows)
    return {"setting": vars(args), "messages": rows}


def _of_model(name: str, args) -> list[dict]:
    import jax

    from fipa_jax import trees

    outputs, loss, params, batch, directions = _text(args) if name == "transformer" else _images(name, args)
    size, rows = trees.ravel(params).size, []
    for label, message in _messages(outputs, loss, directions, args).items():
        given = jax.random.key(1), params, batch
        compiled = jax.jit(message).lower(*given).compile()
        sent = jax.block_until_ready(compiled(*given))
        numbers = trees.nbytes(sent._replace(report=None) if hasattr(sent, "report") else sent) // 4
        seconds = min(_processor_seconds(compiled, *given) for _ in range(args.repeats))
        cells = {"message": label, "seconds": seconds, "times the update": numbers / size}
        cells["temporary MiB"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        rows.append({"model": f"{name}, {size}"} | cells)
        print(rows[-1], flush=True)
    return rows


def _processor_seconds(function, *args) -> float:
    """The processor's seconds of one call, until its arrays are there: what else the machine does is not in them."""
    import jax

    start = time.process_time()
    jax.block_until_ready(function(*args))
    return time.process_time() - start


def _messages(outputs, loss, directions: int, args) -> dict:
    """{words: (key, params, batch) -> message}."""
    from fipa_jax.curvature.layer_factors import make_layer_factors
    from fipa_jax.curvature.sketch import make_diagonal, make_sketch
    from fipa_jax.models.layers import tapped

    few = {"micro_batch": args.micro_batch}
    found = {
        f"{rank} eigenpairs": make_sketch(outputs, loss, rank=rank, solver="auto", probes=0, **few)
        for rank in args.ranks
    }
    if directions <= args.most_directions:
        found["diagonal"] = make_diagonal(outputs, loss, **few)
        found["both factors, exact"] = make_layer_factors(tapped, outputs, loss, **few)
    sampled = make_layer_factors(tapped, outputs, loss, samples=args.samples, **few)
    found[f"both factors, {args.samples} samples"] = sampled
    found["input factors"] = make_layer_factors(tapped, outputs, loss, inputs_alone=True, **few)
    return found


def _images(name: str, args):
    """(outputs, loss, params, batch, K) of random images in CIFAR-10's shape, on fresh parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fipa_jax.data import loading
    from fipa_jax.tasks import images

    batch = {field: jnp.asarray(array) for field, array in setting.random_images(args.examples).items()}
    mean, std = loading.standardise("cifar10", np.asarray(batch["image"]))
    task = images.classifier(setting.module(name), setting.SHAPE, mean, std, augmented=False)
    params = jax.jit(task.init)(jax.random.key(0))
    return lambda theta, some: task.outputs(theta, some)[0], task.loss, params, batch, setting.NUM_CLASSES


def _text(args):
    """(outputs, loss, params, batch, T K) of random symbols."""
    import jax

    from fipa_jax.models import networks
    from fipa_jax.tasks import text

    module = networks.Transformer(SYMBOLS, 32, 2, 4)
    x = jax.random.randint(jax.random.key(2), (args.examples, WINDOW + 1), 0, SYMBOLS)
    batch = {"x": x[:, :-1], "y": x[:, 1:]}
    params = jax.jit(module.init)(jax.random.key(0), batch["x"])["params"]
    outputs = lambda theta, some: module.apply({"params": theta}, some["x"])[0]
    return outputs, text.loss, params, batch, WINDOW * SYMBOLS
