"""One merge of `benchmark.py scaling --parts merge`, in a process with so many virtual devices."""

import hashlib
import json
import sys

from fipa_jax import config


def main(spec: dict) -> dict:
    """Memory of one device as compiled; and, where `runs`, seconds and the hash of the step."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from fipa_jax import aggregate
    from fipa_jax.aggregate.row_blocks import Spread, padded
    from fipa_jax.curvature import Sketch
    from fipa_jax.federation.parallel import make_mesh

    clients, size, rank, mesh = spec["clients"], spec["size"], spec["rank"], make_mesh(spec["devices"])
    rule = aggregate.fipa(damping=1e-3, spread=Spread(mesh))
    rows = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, "clients"))
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def step(delta, counts, values, basis):
        params = jnp.zeros(size)
        received, info = aggregate.receive(aggregate.Uploads(delta, counts, Sketch(values, basis)), params, mesh)
        return aggregate.step_of(rule, received, rule.init(params), params, info)[0]

    placed = None if mesh is None else (whole, whole, whole, rows)
    program = jax.jit(step, in_shardings=placed, out_shardings=whole) if mesh else jax.jit(step)
    shapes = (clients, size), (clients,), (clients, rank), (clients, padded(size), rank)
    compiled = program.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    memory = compiled.memory_analysis()
    found = {"bases GiB": 4 * clients * padded(size) * rank / spec["devices"] / 2**30}
    held = {"arguments GiB": memory.argument_size_in_bytes, "temporaries GiB": memory.temp_size_in_bytes}
    found |= {name: value / 2**30 for name, value in held.items()}
    if not spec["runs"]:
        return found
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(padded(size), rank)).astype(np.float32))[0]
    basis = np.stack([np.roll(basis, 97 * place, axis=0) for place in range(clients)])
    basis[:, size:] = 0
    delta = draw.normal(size=(clients, size)).astype(np.float32)
    values = np.float32(10.0 ** -np.linspace(0, 3, rank)) * np.ones([clients, 1], np.float32)
    given = delta, np.full(clients, 500, np.float32), values, basis
    given = jax.device_put(given, placed) if mesh else jax.device_put(given)
    from benchmarks import timing

    seconds = timing.steady(compiled, *given, repeats=spec["repeats"])[1]
    found |= {"s": seconds, "hash": hashlib.sha256(np.asarray(compiled(*given)).tobytes()).hexdigest()[:12]}
    return found | (parts_of(spec, seconds) if spec.get("parts") else {})


def parts_of(spec: dict, whole: float) -> dict:
    """Seconds of what a merge that took `whole` reads by rows, of its reduced system, and of a step from sums."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import timing
    from fipa_jax import aggregate

    width, draw = spec["clients"] * spec["rank"], np.random.default_rng(0)
    with jax.enable_x64(True):
        rows = draw.normal(size=(2 * width, width))
        reduced = timing.steady(jax.jit(jnp.linalg.eigh), jnp.asarray(rows.T @ rows), repeats=spec["repeats"])[1]
    solver = aggregate.sum_solver(aggregate.SumOptions(columns=spec["rank"], fresh=min(5, spec["rank"])))
    state = solver.init(jnp.zeros(spec["size"]))
    curved = state.basis * jnp.asarray(np.float32(10.0 ** -np.linspace(0, 3, spec["rank"])))[None]
    total = aggregate.row_of(500.0, curved, jnp.asarray(draw.normal(size=spec["size"]), jnp.float32))
    step = jax.jit(lambda total, state: solver.solve(total, state)[:2])
    of_sums = timing.steady(step, total, state, repeats=spec["repeats"])[1]
    return {"rows s": max(whole - reduced, 0.0), "reduced s": reduced, "sums s": of_sums}


if __name__ == "__main__":
    SPEC = json.loads(sys.argv[1])
    config.prepare_process(devices=SPEC["devices"])
    print(json.dumps(main(SPEC)))
