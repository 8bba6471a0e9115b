"""The top R eigenpairs of a trained CNN's curvature: seconds and errors of our solvers and of others, from cold.

Errors are those against the same matrix in float64, whose rows are put together by numpy from the network's Jacobian
and the closed form of the loss's root, diag(p) - p p^T = B B^T with B = diag(sqrt p) (I - sqrt p sqrt p^T).

`eigenvalue error` is the largest relative one of the R; `sine` that of the largest angle between the two spaces;
`captured` the share of the matrix's trace. Peers, each at the fewest products that reach --tolerance: matfree's Lanczos
on plain jvp-vjp products of all examples, and on ours; jax's lobpcg on ours; curvlinops with scipy's eigsh.
"""

import argparse
import bisect
import hashlib
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from benchmarks import curvlinops_worker, products, setting, timing
from fipa_jax import trees
from fipa_jax.curvature import products as curvature
from fipa_jax.curvature import sketch

# Ladders of settings, each step dearer and more exact than the one before it. In units of R: matfree's number of
# products; eigsh's ncv, whose default is 2, beside its tol. lobpcg's iterations take 4 R products each.
MATVECS = (1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4, 5, 6, 8)
SPACES = (*((space, 1e-1) for space in (1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4)), (4, 1e-2), (4, 1e-3), (4, 1e-4))
ITERATIONS = (1, 2, 3, 4, 5, 6, 8, 10)


class Found(NamedTuple):
    """What a solver gives."""

    eigenvalues: Any  # [R], from the largest
    basis: Any  # [P, R]
    products: Any  # columns that it multiplied by the matrix


class Reference(NamedTuple):
    """The exact eigenpairs in float64."""

    eigenvalues: np.ndarray  # [top], from the largest
    vectors: np.ndarray  # [P, top]
    trace: np.ndarray  # []


def run(options: list[str]) -> dict:
    """Prints and returns seconds and errors of every method."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py sketch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    products.add_setting(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--matrix-free-rank", type=int, default=20, help="the largest with peers and matrix-free runs")
    parser.add_argument("--micro-batch", type=int, default=5, help="examples at a time, in ours")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="eigenvalue error that a peer must reach")
    parser.add_argument("--reference", default="", help="an .npz file that keeps the exact eigenpairs between calls")
    parser.add_argument("--repeats", type=int, default=5, help="of each method, in turns")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; a method that took more is not repeated")
    args = parser.parse_args(options)

    problem = setting.cifar(args.model, args.examples, args.data_dir, args.init_from)
    products.describe(*problem)
    exact = reference(*problem, max(args.ranks), args.reference)
    peaks = products.measure_peaks()
    result = {"setting": vars(args), "peaks": peaks, "ranks": {}}
    for rank in args.ranks:
        result["ranks"][rank] = measure(problem, rank, exact, args) | {"floors": products.floors(problem, rank, peaks)}
    return result


def measure(problem, rank: int, exact: Reference, args) -> dict:
    """All methods at one rank."""
    methods, peer = ours(problem, rank, args), None
    if rank <= args.matrix_free_rank:
        reached = lambda found: error(found.eigenvalues, exact) <= args.tolerance
        others, peer = peers(problem, rank, reached, args)
        methods |= others
    first, found = {}, {}
    for name, method in methods.items():
        first[name] = timing.wall_seconds(lambda: found.update({name: method()}) or found[name])
    turns = {name: lambda method=method: timing.wall_seconds(method) for name, method in methods.items()}
    seconds = timing.in_turns(turns, args.repeats, args.budget)
    if peer:
        peer.close()
    steady = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name in methods:
        times = {"first call s": first[name], "steady s": steady[name], "to auto": steady[name] / steady["auto"]}
        size = {"": name, "R": rank, "products": int(found[name].products)}
        rows.append(size | times | quality(found[name], exact))
    timing.table(rows)
    about = peer.about if peer else None
    return {"methods": rows, "seconds": seconds, "agreement": agreement(found), "curvlinops": about}


def ours(problem, rank: int, args) -> dict:
    """{name: () -> Found}, each a program of its own."""
    task, params, batch = problem
    published = {"oversample": 50, "power_steps": 5}
    settings = {
        "auto": {"solver": "auto"},
        "lanczos, rows": {"solver": "lanczos", "jacobian": "rows"},
        "lanczos, rows, loss_rank 5": {"solver": "lanczos", "jacobian": "rows", "loss_rank": 5},
        "lanczos, rows, loss_rank 3": {"solver": "lanczos", "jacobian": "rows", "loss_rank": 3},
        "subspace s=50 q=5, rows": {"solver": "subspace", "jacobian": "rows", **published},
        "rows (exact)": {"solver": "rows"},
    }
    if rank <= args.matrix_free_rank:
        settings["lanczos, matrix_free"] = {"solver": "lanczos"}
        settings["subspace s=50 q=5, matrix_free"] = {"solver": "subspace", **published}

    def method(**chosen):
        outputs = lambda params, batch: task.outputs(params, batch)[0]
        run = jax.jit(sketch.make_sketch(outputs, task.loss, rank=rank, micro_batch=args.micro_batch, **chosen))

        def measured():
            found = run(jax.random.key(3), params, batch)
            return Found(found.eigenvalues, found.basis, found.report.products)

        return measured

    return {name: method(**chosen) for name, chosen in settings.items()}


def peers(problem, rank: int, reached, args):
    """({name: () -> Found}, the curvlinops worker or None): the peers that are installed, at their best settings."""
    task, params, batch = problem
    outputs = lambda params, batch: task.outputs(params, batch)[0]
    plain = products.plain_product(task)
    rows = curvature.make_ggn(outputs, task.loss, micro_batch=args.micro_batch, jacobian="rows")
    matrix_free = curvature.make_ggn(outputs, task.loss, micro_batch=args.micro_batch)

    def column(matrix):
        return lambda vector: matrix.product(vector[:, None])[:, 0]

    tried = {
        "matfree lanczos, plain": (MATVECS, matfree_lanczos, lambda *at: lambda vector: plain(*at, vector)),
        "matfree lanczos, our matrix_free": (MATVECS, matfree_lanczos, lambda *at: column(matrix_free(*at))),
        "matfree lanczos, our rows": (MATVECS, matfree_lanczos, lambda *at: column(rows(*at))),
        "jax lobpcg, our matrix_free": (ITERATIONS, lobpcg, lambda *at: matrix_free(*at).product),
    }
    methods = {}
    for name, (ladder, solver, make_product) in tried.items():
        try:
            build = lambda step, solver=solver, make=make_product: solver(make, params, batch, rank, step)
            methods[name] = climb(name, ladder, build, reached)
        except ImportError as failure:
            print(f"{name} is left out: {failure}")
    peer = curvlinops_worker.start(args.torch_python, *products.exported(params, batch))
    if peer:
        build = lambda step: lambda: Found(*peer.eigsh(rank, round(step[0] * rank), step[1]))
        methods["curvlinops + eigsh"] = climb("curvlinops + eigsh", SPACES, build, reached)
    return {name: method for name, method in methods.items() if method}, peer


def climb(name: str, ladder, build, reached):
    """The method at the first step of the ladder whose eigenvalues are good enough, built anew; None if none are."""
    first = bisect.bisect_left(ladder, True, key=lambda step: reached(build(step)()))
    if first == len(ladder):
        print(f"{name} is left out: it does not reach the tolerance by {ladder[-1]}", flush=True)
        return None
    print(f"{name}: reaches the tolerance at {ladder[first]}, step {first + 1} of its ladder", flush=True)
    return build(ladder[first])


def matfree_lanczos(make_product, params, batch, rank: int, step: float):
    """() -> Found by matfree's Lanczos with full reorthogonalisation and step * R products, as one program."""
    from matfree import decomp, eig

    matvecs = round(step * rank)
    solve = eig.eigh_partial(decomp.tridiag_sym(matvecs, reortho="full"))

    @jax.jit
    def run(key, params, batch):
        start = jax.random.normal(key, [trees.ravel(params).size])
        eigenvalues, vectors = solve(make_product(params, batch), start)
        return Found(eigenvalues[::-1][:rank], vectors[::-1][:rank].T, matvecs)

    return lambda: run(jax.random.key(3), params, batch)


def lobpcg(make_product, params, batch, rank: int, iterations: int):
    """() -> Found by jax's lobpcg_standard with a block of R, as one program; its own stopping rule is off."""
    from jax.experimental.sparse import linalg

    @jax.jit
    def run(key, params, batch):
        start = jax.random.normal(key, [trees.ravel(params).size, rank])
        eigenvalues, vectors, done = linalg.lobpcg_standard(make_product(params, batch), start, m=iterations, tol=0.0)
        return Found(eigenvalues, vectors, rank * (1 + 4 * done))

    return lambda: run(jax.random.key(3), params, batch)


def quality(found: Found, exact: Reference) -> dict:
    """How good the eigenpairs are."""
    eigenvalues, basis = np.float64(found.eigenvalues), np.linalg.qr(np.float64(found.basis))[0]
    vectors = exact.vectors[:, : len(eigenvalues)]
    return {
        "eigenvalue error": error(eigenvalues, exact),
        "sine": float(np.linalg.norm(basis - vectors @ (vectors.T @ basis), 2)),
        "captured": float(eigenvalues.sum() / exact.trace),
    }


def error(eigenvalues, exact: Reference) -> float:
    wanted = exact.eigenvalues[: len(eigenvalues)]
    return float(np.max(np.abs(np.float64(eigenvalues) - wanted) / wanted))


def agreement(found: dict) -> dict:
    """Prints the largest relative difference of the peers' eigenvalues from those of `auto`."""
    own = np.float64(found["auto"].eigenvalues)
    names = [name for name in found if name.startswith(("matfree", "curvlinops", "jax"))]
    differences = {name: float(np.max(np.abs(np.float64(found[name].eigenvalues) / own - 1))) for name in names}
    for name, difference in differences.items():
        print(f"eigenvalues of auto and of {name} differ by {difference:.1e} at most")
    return differences


def reference(task, params, batch, top: int, file: str) -> Reference:
    """The exact eigenpairs, from the file if it holds those of these parameters and examples."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves((params, batch))]
    of = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    if file and Path(file).is_file():
        with np.load(file) as saved:
            if saved["of"] == of and len(saved["eigenvalues"]) >= top:
                return Reference(saved["eigenvalues"], saved["vectors"], saved["trace"])
    rows = exact_rows(task, params, batch)
    gram = rows @ rows.T
    trace, size = np.trace(gram), len(gram)
    squares, left = scipy.linalg.eigh(gram, subset_by_index=[size - top, size - 1], overwrite_a=True)
    exact = Reference(squares[::-1], (rows.T @ left / np.sqrt(squares))[:, ::-1], trace)
    if file:
        np.savez(file, of=of, **exact._asdict())
    return exact


def exact_rows(task, params, batch, chunk: int = 10) -> np.ndarray:
    """A [N K, P] with H = A^T A in float64: B_n^T J_n / sqrt(N)."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.float64(leaf)), params)
        single = lambda params, example: task.outputs(params, jax.tree.map(lambda x: x[None], example))[0][0]
        jacobian = jax.jit(jax.vmap(jax.jacrev(single), in_axes=(None, 0)))
        logits = np.asarray(jax.jit(lambda params, batch: task.outputs(params, batch)[0])(params, batch))
        examples, classes = logits.shape
        rows = np.empty([examples, classes, trees.ravel(params).size])
        for i in range(0, examples, chunk):
            leaves = jax.tree.leaves(jacobian(params, jax.tree.map(lambda x: x[i : i + chunk], batch)))
            rows[i : i + chunk] = np.concatenate([np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in leaves], 2)
    q = np.exp((logits - logits.max(1, keepdims=True)) / 2)
    q /= np.linalg.norm(q, axis=1, keepdims=True)  # sqrt p
    for n in range(examples):
        root = q[n][:, None] * (np.eye(classes) - np.outer(q[n], q[n]))
        rows[n] = root.T @ rows[n] / np.sqrt(examples)
    return rows.reshape(examples * classes, -1)
