"""Times this package beside others, on one core, in alternation.

python scripts/benchmark.py round --torch-python=OTHER/bin/python --out=round.json
python scripts/benchmark.py sketch --data-dir=DIR

`round`: one client's work in a round, one epoch of plain SGD on 500 images 32x32x3, against plain PyTorch.
`sketch`: errors of the sketch against the dense float64 GGN of a small CNN, and its time beside local training.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

LR = 0.1
NUM_CLASSES = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("torch-worker", help="the PyTorch half of `round`, started by it")
    worker.add_argument("spec", type=json.loads)
    one = commands.add_parser("round", help="one client's work in a round, beside PyTorch")
    one.add_argument("--model", default="cnn_23k", help="a CNN of fipa_jax.models")
    one.add_argument("--examples", type=int, default=500, help="of a client")
    one.add_argument("--batch", type=int, default=50)
    one.add_argument("--clients", type=int, default=5, help="clients of the stacked variants")
    one.add_argument("--repeats", type=int, default=7, help="of each variant, in turns")
    one.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on")
    one.add_argument("--torch-python", default=sys.executable, help="interpreter that can import torch")
    one.add_argument("--out", default="", help="JSON file for the results")
    other = commands.add_parser("sketch", help="the sketch against the dense matrix, and beside local training")
    other.add_argument("--data-dir", required=True, help="where TFDS has prepared CIFAR-10")
    other.add_argument(
        "--model", default="cnn_6k", help="a CNN of fipa_jax.models; its dense matrix must fit in memory"
    )
    other.add_argument("--examples", type=int, default=500, help="of a client")
    other.add_argument("--epochs", type=int, default=5, help="of local training")
    other.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on")
    args = parser.parse_args()
    if args.command == "sketch":
        use_one_core(args.cpu)
        return measure_sketch(args)
    if args.command == "torch-worker":
        return torch_worker(args.spec)
    use_one_core(args.cpu)
    report(time_round(args), args.out)


def use_one_core(cpu: int):
    """Pins this process and its children to a core, with one thread each; must come before jax or torch start."""
    from fipa_jax import config  # here, as the interpreter that has PyTorch may not have this package

    os.sched_setaffinity(0, {cpu})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    config.prepare_process()
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def time_round(args) -> dict:
    """Measures all variants of a client's work in turns; seconds are user CPU seconds for one client."""
    import jax

    from fipa_jax import models

    module = models.MODELS[args.model](None, NUM_CLASSES)
    spec = {"channels": list(module.channels), "hidden": module.hidden, "examples": args.examples, "batch": args.batch}
    variants, flops = jax_variants(module, args.examples, args.batch, args.clients)
    torch = subprocess.Popen(
        [args.torch_python, __file__, "torch-worker", json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    torch_version = torch.stdout.readline().strip()
    if torch_version:
        for layout in ("default", "channels_last"):
            variants[f"torch, {layout}"] = lambda layout=layout: ask(torch, layout)
    else:
        print("PyTorch is left out: name an interpreter that has it with --torch-python.")
    seconds = {name: [] for name in variants}
    for run in variants.values():
        run()  # compiles and warms up
    start = time.time()
    for _ in range(args.repeats):
        for name, run in variants.items():
            seconds[name].append(run())
    elapsed = time.time() - start
    torch.communicate("")
    versions = {"jax": jax.__version__, "torch": torch_version or None}
    setting = {"model": args.model, "examples": args.examples, "batch": args.batch, "clients": args.clients}
    return {
        "what": "user CPU seconds of one client's epoch, one core",
        "setting": setting,
        "versions": versions,
        "flops": flops,
        "elapsed": elapsed,
        "seconds": seconds,
    }


def measure_sketch(args):
    """Prints eigenvalue errors, subspace angles and seconds of the sketch at a trained model, for R = 5 and 20."""
    import jax
    import jax.numpy as jnp
    from scipy.linalg import eigh

    from fipa_jax import client, data, models, simulate, sketch, trees
    from fipa_jax.tasks import images

    train = {
        name: jnp.asarray(field[: args.examples])
        for name, field in data.load("cifar10", "train", args.data_dir).items()
    }
    mean, std = data.standardise("cifar10", np.asarray(train["image"]))
    task = images.classifier(models.MODELS[args.model](None, NUM_CLASSES), (32, 32, 3), mean, std, augmented=False)
    outputs = lambda params, batch: task.outputs(params, batch)[0]
    solve = client.first_order(task.loss, task.augment, batch_size=50, epochs=args.epochs)
    own = simulate.Client(jnp.arange(args.examples), jnp.asarray(args.examples))
    hyper = client.Hyper(lr=jnp.float32(LR), damping=jnp.float32(0), mu=jnp.float32(0))
    local = jax.jit(lambda params, key: solve(task.outputs, params, train, own, key, hyper, (), ()).delta)
    params = task.init(jax.random.key(0))
    params = jax.tree.map(jnp.add, params, local(params, jax.random.key(1)))
    training = timed(local, params, jax.random.key(2))

    logits = np.float64(jax.jit(outputs)(params, train))
    rows = jax.jit(
        lambda p, batch: jax.vmap(trees.ravel, in_axes=0)(jax.jacrev(lambda p: outputs(p, batch).ravel())(p))
    )
    chunks = [jax.tree.map(lambda field: field[i : i + 20], train) for i in range(0, args.examples, 20)]
    jacobian = np.concatenate([np.float64(rows(params, chunk)) for chunk in chunks])  # [N K, P]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    root = np.sqrt(p)[:, :, None] * (np.eye(p.shape[1]) - np.sqrt(p[:, :, None] * p[:, None, :]))  # L = root root^T
    scaled = np.einsum("nij,nip->njp", root, jacobian.reshape(*p.shape, -1)).reshape(jacobian.shape)
    dense = scaled.T @ scaled / args.examples
    size = dense.shape[0]
    values, vectors = eigh(dense, subset_by_index=[size - 20, size - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    print(f"{args.model}, P = {size}, {args.examples} examples; {args.epochs} local epochs take {training:.2f} s")
    print(
        f"{'solver':10}{'jacobian':12}{'R':>4}{'power steps':>12}"
        f"{'eigenvalue error':>18}{'sine of angle':>15}{'seconds':>9}{'to training':>13}"
    )
    settings = [("subspace", "rows", rank, steps) for rank in (5, 20) for steps in (2, 5)]
    settings += [("lanczos", "rows", rank, 2) for rank in (5, 20)] + [("subspace", "matrix_free", 5, 2)]
    for solver, jacobian_name, rank, steps in settings:
        options = {"rank": rank, "power_steps": steps, "micro_batch": 10, "jacobian": jacobian_name}
        run = jax.jit(sketch.make_sketch(outputs, task.loss, solver=solver, **options))
        found = run(jax.random.key(3), params, train)
        error = np.max(np.abs(np.asarray(found.eigenvalues) - values[:rank]) / values[:rank])
        basis = np.float64(found.basis)
        sine = np.linalg.norm(basis - vectors[:, :rank] @ (vectors[:, :rank].T @ basis), 2)
        seconds = timed(run, jax.random.key(3), params, train, repeats=1)
        print(
            f"{solver:10}{jacobian_name:12}{rank:4}{steps:12}{error:18.1e}{sine:15.1e}{seconds:9.2f}"
            f"{seconds / training:13.2f}",
            flush=True,
        )


def timed(function, *args, repeats: int = 3) -> float:
    """The median of the user CPU seconds of a compiled function."""
    import jax

    seconds = []
    for _ in range(repeats + 1):
        start = user_seconds()
        jax.block_until_ready(function(*args))
        seconds.append(user_seconds() - start)
    return statistics.median(seconds[1:])  # the first call compiles


def jax_variants(module, examples: int, batch: int, clients: int) -> tuple[dict, float]:
    """Our client's work run in several ways.

    Returns:
      {name: () -> user CPU seconds for one client}, and the floating-point operations of one client's matrix products.
    """
    import jax
    import jax.numpy as jnp

    from fipa_jax import client, simulate
    from fipa_jax.tasks import images

    train = {"image": jnp.asarray(pixels(examples * clients)), "label": jnp.asarray(labels(examples * clients))}
    half = np.full(3, 0.5)
    task = images.classifier(module, (32, 32, 3), half, half / 2, augmented=False)
    solve = client.first_order(task.loss, task.augment, batch_size=batch, epochs=1)
    owned = simulate.Client(
        indices=jnp.arange(examples * clients, dtype=jnp.int32).reshape(clients, examples),
        num_examples=jnp.full(clients, examples),
    )
    keys = jax.random.split(jax.random.key(0), clients)
    params = task.init(jax.random.key(1))
    hyper = client.Hyper(lr=jnp.float32(LR), damping=jnp.float32(0), mu=jnp.float32(0))

    def local(params, train, owned, key):
        return solve(task.outputs, params, train, owned, key, hyper, (), ()).delta

    def stacked(chunk):
        return lambda params, train, owned, keys: simulate.map_clients(local, (params, train), owned, keys, chunk=chunk)

    each = [(params, train, jax.tree.map(lambda leaf: leaf[c], owned), keys[c]) for c in range(clients)]
    programs = {
        "jax, client by client": (jax.jit(local), each),
        f"jax, {clients} clients by lax.map": (jax.jit(stacked(1)), [(params, train, owned, keys)]),
        f"jax, {clients} clients by vmap": (jax.jit(stacked(0)), [(params, train, owned, keys)]),
    }

    def timer(program, calls):
        def run():
            start = user_seconds()
            for call in calls:
                jax.block_until_ready(program(*call))
            return (user_seconds() - start) / clients

        return run

    first = {name: field[:batch] for name, field in train.items()}
    step = jax.make_jaxpr(jax.grad(lambda params: task.loss(task.outputs(params, first)[0], first).mean()))(params)
    return {name: timer(*program) for name, program in programs.items()}, product_flops(step) * examples / batch


def product_flops(jaxpr) -> float:
    """The floating-point operations of a program's matrix products, 2 for each multiplication and addition."""
    import jax

    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        # Calls hold their programs among their parameters.
        total += sum(product_flops(sub) for sub in jax.tree.leaves(list(eqn.params.values())) if hasattr(sub, "eqns"))
    return total


def torch_worker(spec: dict):
    """Trains the same network in PyTorch: for each layout read from stdin, writes the user CPU seconds of an epoch.

    The first line it writes is PyTorch's version; without PyTorch it ends at once.
    """
    try:
        import torch
        from torch import nn
    except ModuleNotFoundError:
        return

    torch.set_num_threads(1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            first, second = spec["channels"]
            self.conv1 = nn.Conv2d(3, first, 3, bias=False)
            self.conv2 = nn.Conv2d(first, second, 3, bias=False)
            self.dense1 = nn.Linear(second * 6 * 6, spec["hidden"], bias=False)
            self.dense2 = nn.Linear(spec["hidden"], NUM_CLASSES, bias=False)

        def forward(self, x):
            x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
            x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
            return self.dense2(torch.relu(self.dense1(x.flatten(1))))

    def epoch(layout):
        """Makes the epoch's function in a memory layout."""
        memory_format = {"default": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
        network = Network().to(memory_format=memory_format)
        x = torch.tensor(pixels(spec["examples"])).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        y = torch.tensor(labels(spec["examples"])).long()
        optimizer = torch.optim.SGD(network.parameters(), lr=LR)

        def run():
            for chosen in torch.randperm(len(y)).split(spec["batch"]):
                inputs = (x[chosen].float() / 255 - 0.5) / 0.25
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(inputs), y[chosen]).backward()
                optimizer.step()

        return run

    runs = {layout: epoch(layout) for layout in ("default", "channels_last")}
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        start = user_seconds()
        for _ in range(5):  # one epoch is too short for the clock
            runs[line.strip()]()
        print((user_seconds() - start) / 5, flush=True)


def ask(worker: subprocess.Popen, layout: str) -> float:
    """Has the worker train for an epoch and returns its user CPU seconds."""
    worker.stdin.write(layout + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, NUM_CLASSES, count, dtype=np.int32)


def user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def report(result: dict, out: str):
    """Prints the medians, and writes all that was measured to `out`."""
    seconds, flops = result["seconds"], result["flops"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baseline = medians.get("torch, default")
    described = ", ".join(f"{name} {value}" for name, value in {**result["setting"], **result["versions"]}.items())
    print(f"{result['what']}, {flops / 1e9:.2f} GFLOP in matrix products\n{described}")
    print(f"{'':36}{'median':>8}{'min':>8}{'max':>8}{'GFLOP/s':>9}" + ("  to torch, default" if baseline else ""))
    for name, median in medians.items():
        ratio = f"{median / baseline:19.2f}" if baseline else ""
        values = seconds[name]
        print(f"{name:36}{median:8.4f}{min(values):8.4f}{max(values):8.4f}{flops / median / 1e9:9.1f}{ratio}")
    if out:
        with open(out, "w") as file:
            json.dump({**result, "medians": medians}, file, indent=2)


if __name__ == "__main__":
    main()
