"""What an accelerator makes of this code: numerics against float64 on the host, speed beside PyTorch, and a short run.

Some minutes on a GPU; --tiny takes the same paths in small, to rehearse on a CPU. scripts/device_check.sh runs it.

    numerics        sketches by every solver and merges by every method, with float64 switched off, beside dense NumPy
    speed           client-rounds a second of local training, one epoch, by chunk, beside PyTorch's bare loop there
    fipa            seconds of each stage of a FIPA round on a whole CNN
    tiny_imagenet   its config on random images: seconds a round of FedRCL on ResNet-18, and of FIPA on its head

PyTorch is measured where it is installed. Images are random: nothing is downloaded.
"""

import argparse
import functools
import json
import runpy
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setting, timing
from benchmarks.round import describe, problem
from fipa_jax import aggregate, curvature, trees
from fipa_jax.client.examples import Client
from fipa_jax.client.first_order import first_order
from fipa_jax.config import recipes
from fipa_jax.federation.parallel import map_clients
from fipa_jax.models import networks
from fipa_jax.run import experiment, loop, whole_run
from fipa_jax.saving.journal import Rows
from fipa_jax.tasks import Problem, classification, images

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "tiny_imagenet.py")


def run(options: list[str]) -> dict:
    """Runs the parts asked for, one after another; prints and returns what they have measured."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="numerics,speed,fipa,tiny_imagenet")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    args = parser.parse_args(options)
    results = {"device": timing.machine()}
    print(results["device"], flush=True)
    for name in args.parts.split(","):
        start = time.perf_counter()
        try:
            results[name] = PARTS[name](args.tiny)
        except Exception as error:  # the other parts are worth having
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            print(f"{name} FAILED: {results[name]['failed']}", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s in all\n", flush=True)
    return json.loads(json.dumps(results, default=float))


def numerics(tiny: bool) -> dict:
    """Errors of sketches and merged steps in float32 beside dense float64."""
    return {"sketch": sketch_errors(tiny), "merge": merge_errors(tiny)}


def sketch_errors(tiny: bool) -> dict:
    """{solver: {eigenvalues, residual}} of a softmax network's curvature, relative to its largest eigenvalue."""
    inputs, hidden, classes, examples, rank = (8, 6, 3, 20, 5) if tiny else (32, 64, 10, 400, 20)
    draw = np.random.default_rng(0)
    params = {"w1": draw.normal(size=(inputs, hidden)) / 3, "w2": draw.normal(size=(hidden, classes)) / 3}
    x = draw.normal(size=(examples, inputs)) * 0.8 ** np.arange(inputs)[None]  # of a spectrum that falls, as real ones
    dense = dense_curvature(params["w1"], params["w2"], x)
    values = np.linalg.eigvalsh(dense)[::-1][:rank]
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    batch = {"x": jnp.asarray(x, jnp.float32), "label": jnp.asarray(draw.integers(classes, size=examples))}

    def outputs(params, batch):
        return jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"]

    errors = {}
    for solver in ("subspace", "lanczos", "rows"):
        steps = {} if solver == "rows" else {"power_steps": 10, "tolerance": 1e-6}
        sketch = curvature.make_sketch(outputs, classification.loss, rank=rank, solver=solver, **steps)
        pairs = jax.device_get(jax.jit(sketch)(jax.random.key(0), params, batch))
        basis = pairs.basis.astype(float)
        residual = np.linalg.norm(dense @ basis - basis * pairs.eigenvalues[None], axis=0).max()
        error = np.abs(pairs.eigenvalues - values).max()
        errors[solver] = {"eigenvalues": error / values[0], "residual": residual / values[0]}
    timing.table([{"sketch": name} | row for name, row in errors.items()])
    return errors


def dense_curvature(w1: np.ndarray, w2: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[P, P], 1/N sum_n J_n^T (diag(p) - p p^T) J_n of the network tanh(x w1) w2, parameters row by row."""
    hidden = np.tanh(x @ w1)
    logits = hidden @ w2
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    inner = x[:, :, None, None] * (1 - hidden**2)[:, None, :, None] * w2[None, None]  # [N, d, H, K]
    outer = hidden[:, :, None, None] * np.eye(w2.shape[1])[None, None]  # [N, H, K, K]
    rows = np.concatenate([inner.reshape(len(x), -1, w2.shape[1]), outer.reshape(len(x), -1, w2.shape[1])], axis=1)
    weights = p[:, :, None] * np.eye(p.shape[1])[None] - p[:, :, None] * p[:, None, :]
    return np.einsum("npk,nkl,nql->pq", rows, weights, rows, optimize=True) / len(x)


def _step_of(rule, deltas, sketch):
    """The step of a rule by clients of equal weight, whose updates are vectors [C, P]."""
    uploads = aggregate.Uploads(deltas, jnp.ones(len(deltas)), sketch)
    received, screening = aggregate.receive(uploads, deltas[0])
    return aggregate.step_of(rule, received, rule.init(deltas[0]), deltas[0], screening)[0]


def merge_errors(tiny: bool) -> dict:
    """{method, damping: relative error of the damped step} of clients whose subspaces nearly coincide."""
    clients, size, rank = (3, 60, 4) if tiny else (8, 3000, 20)
    draw = np.random.default_rng(1)
    common = np.linalg.qr(draw.normal(size=(size, rank)))[0]
    bases = np.stack([np.linalg.qr(common + 0.01 * draw.normal(size=common.shape))[0] for _ in range(clients)])
    bases = bases.astype(np.float32).astype(float)
    values = -np.sort(-draw.uniform(0.1, 5, size=(clients, rank)), axis=1).astype(np.float32).astype(float)
    deltas = draw.normal(size=(clients, size)).astype(np.float32).astype(float)
    each = np.einsum("cpr,cr,cqr->cpq", bases, values, bases) / clients
    total = each.sum(axis=0)
    single = {name: jnp.asarray(x, jnp.float32) for name, x in (("e", values), ("b", bases), ("d", deltas))}
    sketch = curvature.Sketch(single["e"], single["b"])
    errors = {}
    for damping in (1e-2, 1e-4, 1e-6):
        beta = damping * np.linalg.eigvalsh(total)[-1]
        pull = np.einsum("cpq,cq->p", each, deltas) + beta * deltas.mean(axis=0)
        wanted = np.linalg.solve(total + beta * np.eye(size), pull)
        for method in ("gram", "qr", "tsqr"):
            limits = aggregate.Limits(max_step=0.0, explosion=0.0, trace_cap=0.0)
            rule = aggregate.fipa(damping=damping, merge=method, limits=limits)
            step = np.asarray(jax.jit(functools.partial(_step_of, rule))(single["d"], sketch), float)
            errors[f"{method}, beta {damping:g}"] = np.linalg.norm(step - wanted) / np.linalg.norm(wanted)
    timing.table([{"merge": name, "error": float(error)} for name, error in errors.items()])
    return errors


def speed(tiny: bool) -> dict:
    """{model: {way to run: client-rounds a second}}, one epoch of plain SGD in batches of 50."""
    models = {"cnn_6k": (100, 4)} if tiny else {"cnn_23k": (500, 64), "resnet18": (500, 8)}
    rates = {name: training_rates(name, examples, clients, tiny) for name, (examples, clients) in models.items()}
    ways = list(dict.fromkeys(way for rate in rates.values() for way in rate))
    timing.table([{"client-rounds/s": way} | {name: rates[name].get(way) for name in rates} for way in ways])
    return rates


def training_rates(model: str, examples: int, clients: int, tiny: bool) -> dict[str, float]:
    """{way to run: client-rounds a second} of a model."""
    args = argparse.Namespace(model=model, examples=examples, clients=clients, batch=50)
    module = setting.module(model)
    task, params, train = problem(args, module)
    solve = first_order(task.loss, task.augment, batch_size=50, epochs=1)
    indices = jnp.arange(examples * clients, dtype=jnp.int32).reshape(clients, examples)
    owned, keys = Client(indices, jnp.full(clients, examples)), jax.random.split(jax.random.key(0), clients)

    def local(params, train, owned, key):
        return solve(task.outputs, params, train, owned, key, setting.hyper(), (), ()).delta

    rates = {}
    for chunk in (1, 4) if tiny else (1, 8, 0):
        program = jax.jit(lambda *xs, chunk=chunk: map_clients(local, xs[:2], *xs[2:], chunk=chunk))
        _, seconds = timing.steady(program, params, train, owned, keys, repeats=3)
        rates[f"ours, chunk {chunk or 'all'}"] = clients / seconds
    return rates | torch_rates(args, module, params)


def torch_rates(args, module, params) -> dict[str, float]:
    """The same by PyTorch's bare loop, where it is installed."""
    try:
        import torch

        from benchmarks.round_workers import torch_worker
    except ImportError as error:
        print(f"PyTorch is left out: {error}")
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        spec = describe(args, module, params, Path(folder) / "weights.npz")
        networks_ = {layout: torch_worker.make_network(spec, layout).to(device) for layout in torch_worker.LAYOUTS}
    rates = {}
    for layout, network in networks_.items():
        data = [x.to(device) for x in torch_worker.tensors(args.examples, layout)]
        torch_worker.tensors = lambda examples, layout, data=data: data
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            torch_worker.train(network, spec, layout)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rates[f"torch {torch.__version__}, {layout}"] = 1 / statistics.median(seconds[1:])
    return rates


def fipa(tiny: bool) -> dict:
    """Median seconds of each stage of a round of `fipa_memory` on a whole CNN, ten clients."""
    config = recipes.images("cifar10", "cnn_6k" if tiny else "cnn_200k")
    config.partition.num_clients, config.cohort = (4, 2) if tiny else (20, 10)
    config.warmup.rounds, config.fipa.rounds, config.compare = 0, 3 if tiny else 6, ("fipa_memory",)
    config.fipa.sketch.solver, config.fipa.sketch.rank = "auto", 5 if tiny else 50
    config.fipa.sketch.micro_batch = 0
    config.fipa.sketch.examples, config.fipa.aggregator.past.rank = (8, 10) if tiny else (250, 250)
    config.eval.clients_every, config.eval.every = 0, 100
    return stages_of(config, random_problem(config, (12, 12, 3) if tiny else (32, 32, 3), 10, 20 if tiny else 500))


def short_run(tiny: bool) -> dict:
    """Median seconds of each stage of configs/tiny_imagenet.py, a few rounds of each phase, on random images."""
    config = runpy.run_path(CONFIG)["get_config"]("debug" if tiny else "")
    config.partition.num_clients, config.cohort = (4, 2) if tiny else (100, 5)
    config.warmup.rounds, config.fipa.rounds, config.compare = 3, 4, config.compare[:2]
    config.eval.clients_every, config.eval.every, config.eval.batch_size = 0, 100, 20 if tiny else 500
    for phase in (config.warmup, config.fipa):
        phase.local.micro_batch = 0
    classes, examples = (5, 20) if tiny else (200, 250)
    return stages_of(config, random_problem(config, (16, 16, 3) if tiny else (64, 64, 3), classes, examples))


def random_problem(config, shape: tuple, classes: int, examples: int) -> Problem:
    """Images without meaning: `examples` for each client, and as many to test on."""
    draw, clients = np.random.default_rng(0), config.partition.num_clients

    def some(number):
        image = draw.integers(0, 256, (number, *shape), dtype=np.uint8)
        return {"image": image, "label": draw.integers(0, classes, number, dtype=np.int32)}

    module = networks.build(config.model, num_outputs=classes)
    half = np.full(3, 0.5)
    task = images.classifier(module, shape, half, half / 2, True, config.data.rotation, config.data.flip)
    owned = np.split(np.arange(examples * clients), clients)
    return Problem(task, some(examples * clients), some(examples), None, owned)


def stages_of(config, problem_: Problem) -> dict:
    """{phase: {stage: median seconds of its rounds but the first two}}."""
    made, seconds = experiment.build(config, problem_), {}
    params, seen_by_head = made.params, {}
    for name, as_run in whole_run.configs_of(config).items():
        warmup = name == whole_run.WARMUP
        settings, rows = as_run.warmup if warmup else as_run.fipa, Rows()
        view = whole_run.view_of(made, settings, params, seen_by_head, warmup)
        after = loop.run_phase(view, settings, name, params, 0 if warmup else config.warmup.rounds, rows)
        params = after if warmup else params
        stages = [stage for stage in rows[-1] if stage.startswith("seconds_") and stage != "seconds_evaluate"]
        seconds[name] = {stage: statistics.median(row[stage] for row in rows[2:]) for stage in stages}
        seconds[name] |= {"first_round": sum(rows[0][stage] for stage in stages)}
        seconds[name] |= {"finite": all(row["local_loss"] is not None for row in rows)}
        print(name, {stage: round(value, 4) for stage, value in seconds[name].items()}, flush=True)
    size = sum(leaf.size for leaf in jax.tree.leaves(trees.select(made.params, ".*")))
    return {"parameters": size, "seconds": seconds}


PARTS = {"numerics": numerics, "speed": speed, "fipa": fipa, "tiny_imagenet": short_run}
