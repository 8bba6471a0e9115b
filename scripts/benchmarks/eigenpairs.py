"""Multiple eigenvalues: what every iterative solver finds, and whether it says so, against dense float64.

Columns: `error`, the largest of an eigenvalue over the keys, in units of the largest; `claims`, the share of keys that
report convergence; `wrong`, how many of these are off by more than the tolerance; `products`, their mean number.
`lanczos, best start` begins from the true vectors, `wrong start` from those that follow the top R.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks import timing
from fipa_jax.curvature.sketch import make_sketch

FEATURES, EXAMPLES = 64, 300
MOST_ENTRIES = 2**26  # of explicit rows
SOLVERS = {
    "lanczos": {"solver": "lanczos"},
    "lanczos, rows": {"solver": "lanczos", "jacobian": "rows"},
    "head": {"solver": "head"},
    "subspace": {"solver": "subspace", "power_steps": 5},
    "lanczos, best start": {"solver": "lanczos"},
    "lanczos, wrong start": {"solver": "lanczos"},
    "subspace, wrong start": {"solver": "subspace", "oversample": 0},
}


class Case(NamedTuple):
    """A model with its data, and the exact eigenpairs of its Gauss-Newton matrix in float64."""

    outputs: Callable
    loss: Callable
    params: Any
    batch: Any
    eigenvalues: np.ndarray  # [P], from the largest
    vectors: np.ndarray  # [P, 2 R] or more
    is_head: bool = False


def run(options: list[str]) -> dict:
    """Prints and returns the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py eigenpairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[10])
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS), metavar="SOLVER")
    args = parser.parse_args(options)
    rows = []
    for name in args.cases:
        case = CASES[name]()
        for rank in args.ranks:
            found = measure(case, rank, args.keys, args.tolerance, args.solvers)
            rows += [{"case": name, "R": rank} | row for row in found]
        timing.table([row for row in rows if row["case"] == name])
    return {"setting": vars(args), "eigenpairs": rows}


def measure(case: Case, rank: int, keys: int, tolerance: float, solvers=tuple(SOLVERS)) -> list[dict]:
    """A line for each solver that the case can have."""
    exact, rows = case.eigenvalues[:rank], []
    for name in solvers:
        chosen, start = SOLVERS[name], None
        if "start" in name:
            first = rank if "wrong" in name else 0
            start = jnp.asarray(case.vectors[:, first : first + rank], jnp.float32)
        if (name == "head" and not case.is_head) or (chosen.get("jacobian") == "rows" and rows_of(case) > MOST_ENTRIES):
            continue
        features = (lambda params, batch: batch["x"]) if name == "head" else None
        sketch = make_sketch(
            case.outputs, case.loss, rank=rank, tolerance=tolerance, features=features, probes=0, **chosen
        )

        @jax.jit
        def all_keys(params, batch, start, sketch=sketch):
            one = lambda key: sketch(key, params, batch, None, start)
            found = jax.lax.map(one, jax.random.split(jax.random.key(0), keys))
            return found.eigenvalues, found.report.converged, found.report.products

        values, claims, products = map(np.asarray, all_keys(case.params, case.batch, start))
        error = np.max(np.abs(np.float64(values) - exact), axis=1) / exact[0]
        rows.append(
            {
                "solver": name,
                "error": float(error.max()),
                "claims": float(claims.mean()),
                "wrong": int(np.sum(claims & (error > tolerance))),
                "products": float(products.mean()),
            }
        )
    return rows


def rows_of(case: Case) -> int:
    """Entries of the explicit rows [N K, P]."""
    return jax.eval_shape(case.outputs, case.params, case.batch).size * len(case.vectors)


def inputs(number: int = EXAMPLES, seed: int = 0) -> np.ndarray:
    """[N, 64], of a spectrum that falls like that of a network's features."""
    draw = np.random.default_rng(seed).normal(size=(number, FEATURES))
    return np.float32(draw / np.sqrt(1 + np.arange(FEATURES))).astype(float)


def linear(params, batch):
    return batch["x"] @ params["w"]


def softmax(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])


def head_at_zero(classes: int) -> Case:
    """Uniform predictions: H = Phi kron (I / K - 1 1^T / K^2), each eigenvalue K - 1 times."""
    x = inputs()
    batch = {"x": x, "label": np.arange(len(x)) % classes}
    block = np.eye(classes) / classes - 1 / classes**2
    return kron(softmax, batch, block)


def targets(number: int, gap: float = 0.0) -> Case:
    """Regression: H = Phi kron L, L the identity, or its eigenvalues so far apart."""
    weights = 1 + gap * np.arange(number)
    loss = lambda out, batch: jnp.sum(jnp.asarray(weights, out.dtype)[None] * (out - batch["y"]) ** 2, axis=1) / 2
    batch = {"x": inputs(), "y": np.zeros([EXAMPLES, number])}
    return kron(loss, batch, np.diag(weights))


def kron(loss, batch, block) -> Case:
    """A linear layer without a bias whose examples all have the same loss Hessian."""
    ours, theirs = np.linalg.eigh(batch["x"].T @ batch["x"] / len(batch["x"])), np.linalg.eigh(block)
    order = np.argsort(-np.outer(ours[0], theirs[0]).ravel())
    first, second = np.unravel_index(order[:200], (len(ours[0]), len(theirs[0])))
    vectors = np.einsum("fi,ki->fki", ours[1][:, first], theirs[1][:, second]).reshape(-1, len(first))
    eigenvalues = np.outer(ours[0], theirs[0]).ravel()[order]
    params = {"w": jnp.zeros([FEATURES, len(block)])}
    return Case(linear, loss, params, single(batch), eigenvalues, vectors, is_head=True)


def single(batch):
    """Floats in float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else jnp.int32), batch)


def dense(outputs, loss, params, batch, is_head=False) -> Case:
    """Any model: its Gauss-Newton matrix by dense Jacobians in float64."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.float64(x) if x.dtype.kind == "f" else x), tree)
        params64, batch64 = wide(jax.tree.map(np.asarray, (params, batch)))
        flat, unravel = ravel_pytree(params64)
        out = outputs(params64, batch64)
        jacobian = np.asarray(jax.jit(jax.jacrev(lambda p: outputs(unravel(p), batch64)))(flat))
        one = lambda out, example: loss(out[None], jax.tree.map(lambda x: x[None], example))[0]
        hessians = np.asarray(jax.vmap(jax.hessian(one))(out, batch64))
    curved = np.einsum("nkl,nlp->nkp", hessians, jacobian)
    matrix = np.tensordot(jacobian, curved, [[0, 1], [0, 1]]) / len(out)
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return Case(outputs, loss, params, batch, values[::-1], vectors[:, ::-1], is_head)


def trained_head(classes: int = 10) -> Case:
    """An ordinary spectrum: a head after 100 steps of gradient descent."""
    x = inputs()
    label = np.random.default_rng(1).integers(classes, size=len(x))
    x = x + np.random.default_rng(2).normal(size=(classes, FEATURES))[label] / np.sqrt(1 + np.arange(FEATURES))
    batch = single({"x": x, "label": label})
    params = descend(linear, softmax, {"w": jnp.zeros([FEATURES, classes])}, batch)
    return dense(linear, softmax, params, batch, is_head=True)


def network(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]) @ params["out"]


def trained_network(hidden: int = 12, classes: int = 10) -> Case:
    """An ordinary spectrum: a small network after 100 steps of gradient descent."""
    draw = np.random.default_rng(3)
    x = inputs()
    batch = single({"x": x, "label": np.argmax(x @ draw.normal(size=(FEATURES, classes)), axis=1)})
    params = {"in": draw.normal(size=(FEATURES, hidden)), "out": draw.normal(size=(hidden, classes)) / 3}
    return dense(network, softmax, descend(network, softmax, single(params), batch), batch)


def descend(outputs, loss, params, batch):
    """The parameters after 100 steps of gradient descent."""
    gradient = jax.grad(lambda params: jnp.mean(loss(outputs(params, batch), batch)))
    step = lambda _, params: jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient(params))
    return jax.jit(lambda params: jax.lax.fori_loop(0, 100, step, params))(params)


def equal_clients() -> Case:
    """Two clients with the same examples and a head each, in one matrix: every eigenvalue twice."""
    one = trained_head()

    def outputs(params, batch):
        both = jnp.einsum("nf,nfk->nk", batch["x"], params["w"][batch["client"]])
        return both

    params = {"w": jnp.stack([one.params["w"]] * 2)}
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), one.batch)
    batch["client"] = jnp.arange(2 * EXAMPLES) // EXAMPLES
    return dense(outputs, softmax, params, batch)


def symmetric_network(branches: int = 8, hidden: int = 4) -> Case:
    """Equal branches with an output each: every eigenvalue eight times."""
    draw = np.random.default_rng(4)
    one = single({"in": draw.normal(size=(FEATURES // 4, hidden)), "out": draw.normal(size=hidden)})
    params = jax.tree.map(lambda x: jnp.stack([x] * branches), one)
    batch = single({"x": inputs()[:, : FEATURES // 4], "y": np.zeros([EXAMPLES, branches])})

    def outputs(params, batch):
        inner = jnp.tanh(jnp.einsum("nf,bfh->nbh", batch["x"], params["in"]))
        return jnp.einsum("nbh,bh->nb", inner, params["out"])

    return dense(outputs, lambda out, batch: jnp.sum((out - batch["y"]) ** 2, axis=1) / 2, params, batch)


CASES = {
    "zero_head_10": lambda: head_at_zero(10),
    "zero_head_50": lambda: head_at_zero(50),
    "zero_head_200": lambda: head_at_zero(200),
    "targets_5": lambda: targets(5),
    "targets_20": lambda: targets(20),
    "targets_20_gap_1e-3": lambda: targets(20, 1e-3),
    "targets_20_gap_1e-5": lambda: targets(20, 1e-5),
    "targets_20_gap_1e-8": lambda: targets(20, 1e-8),
    "equal_clients": equal_clients,
    "symmetric_network": symmetric_network,
    "trained_head": trained_head,
    "trained_network": trained_network,
}
