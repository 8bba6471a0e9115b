"""FIPA's step at a large network's size, in a process of its own, for its peak memory: -m benchmarks.merge_size SPEC.

The uploads are made in place, block by block; columns are of unit length, not orthogonal, which changes neither time
nor memory. The parameters are a tree of many leaves, as a network's are. What the process holds without the uploads,
Python, XLA and the compiled step, is read first.
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path

LEAVES = 60  # of the parameters, about as many as a ResNet-18 has
ROWS = 2**14  # of the basis, made at a time


def main(spec: dict) -> dict:
    """What screening and the rule take, in GiB, in seconds, and beside one read and one copy of the uploads."""
    import jax
    import jax.numpy as jnp

    from benchmarks import timing
    from fipa_jax import aggregate
    from fipa_jax.curvature import sketch

    size, clients, rank = spec["size"], spec["clients"], spec["rank"]
    rule = aggregate.fipa(merge=spec["method"])
    params = leaves_of(lambda count: jnp.zeros(count, jnp.float32), size)
    state, fill = rule.init(params), jax.jit(lambda key: random_rows(key, clients, size, rank, spec["store"]))
    delta = leaves_of(lambda count: jnp.full([clients, count], 1e-3, jnp.float32), size)

    def uploads_with(basis):
        eigenvalues = jnp.tile(10.0 ** -jnp.linspace(0, 3, rank), (clients, 1))
        return aggregate.Uploads(delta, jnp.full(clients, 500), sketch.Sketch(eigenvalues, basis))

    def apply(uploads, state, params):
        received, info = aggregate.receive(uploads, params)
        step, state, info, _ = aggregate.step_of(rule, received, state, params, info)
        return step, state, info

    start = time.perf_counter()
    shape = jax.ShapeDtypeStruct([clients, size, rank], jnp.dtype(spec["store"]))
    program = jax.jit(apply).lower(uploads_with(shape), state, params).compile()
    compile_seconds = time.perf_counter() - start
    started = resident() - sum(leaf.nbytes for leaf in jax.tree.leaves((delta, params)))
    uploads = uploads_with(jax.block_until_ready(fill(jax.random.key(0))))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(uploads))
    before = peak()
    first = timing.wall_seconds(program, uploads, state, params)
    after = peak()
    read = jax.jit(lambda uploads: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(uploads)))
    copy = jax.jit(lambda uploads: jax.tree.map(jnp.copy, uploads))
    runs = {
        "apply": lambda: timing.wall_seconds(program, uploads, state, params),
        "read": lambda: timing.wall_seconds(read, uploads),
        "copy": lambda: timing.wall_seconds(copy, uploads),
    }
    timing.in_turns({name: runs[name] for name in ("read", "copy")}, 1)  # compiles
    seconds = {
        name: sorted(values)[len(values) // 2] for name, values in timing.in_turns(runs, spec["repeats"]).items()
    }
    width, gib = clients * rank, 2**30
    return {
        "uploads GiB": total / gib,
        "started GiB": started / gib,
        "before": before / total,
        "after": after / total,
        "temporaries": program.memory_analysis().temp_size_in_bytes / total,  # by XLA's own count
        "after - started": (after - started) / total,
        "compile s": compile_seconds,
        "first s": first,
        "apply s": seconds["apply"],
        "read s": seconds["read"],
        "copy s": seconds["copy"],
        "apply / read": seconds["apply"] / seconds["read"],
        "apply / copy": seconds["apply"] / seconds["copy"],
        "floor GFLOP": 2 * size * width**2 / 1e9,
        "floor GB": 2 * uploads.sketch.basis.nbytes / 1e9,
        "GFLOP/s": 2 * size * width**2 / 1e9 / seconds["apply"],
    }


def leaves_of(make, size: int) -> dict:
    """{name: make(entries)} for leaves that have `size` entries in all."""
    ends = [size * i // LEAVES for i in range(LEAVES + 1)]
    return {f"leaf_{i:02}": make(end - begin) for i, (begin, end) in enumerate(itertools.pairwise(ends))}


def random_rows(key, clients: int, size: int, rank: int, store: str):
    """[C, P, R], written block by block into one array; columns of about unit length."""
    import jax
    import jax.numpy as jnp

    rows = min(ROWS, size)

    def add(i, basis):
        part = jax.random.normal(jax.random.fold_in(key, i), [clients, rows, rank]) / jnp.sqrt(size)
        return jax.lax.dynamic_update_slice(basis, part.astype(store), (0, jnp.minimum(i * rows, size - rows), 0))

    return jax.lax.fori_loop(0, -(-size // rows), add, jnp.zeros([clients, size, rank], store))


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
