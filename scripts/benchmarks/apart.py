"""How far apart are the clients' curvatures, and their data? `benchmark.py apart --run=runs/digits`.

Of the model with which a run's warm-up ended, averaged over pairs of clients m, n:

    angles       1 - |U_m^T U_n|^2 / k, the mean squared sine of the principal angles between the top k eigenvectors
    eigenvalues  the root mean square of log (lam_m + beta) - log (lam_n + beta) over the top k
    jbld         log det ((A + B) / 2) - (log det A + log det B) / 2, the Jensen-Bregman LogDet divergence
    affine       |log A^{-1/2} B A^{-1/2}|, the affine-invariant distance

A = H_m + beta I and B = H_n + beta I are taken in the merged basis, the top eigenvectors of H = sum_m w_m H_m. Beside
them what needs no curvature:

    gradients    1 - |sum_m w_m g_m|^2 / sum_m w_m |g_m|^2
    labels       the total variation between two clients' shares of the classes
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from benchmarks import timing


def run(options: list[str]) -> dict:
    """Prints and returns the distances."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py apart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run with a warm-up")
    parser.add_argument("--rank", type=int, default=50, help="of the clients' sketches")
    parser.add_argument("--top", type=int, default=10, help="k, eigenvectors whose angles are measured")
    parser.add_argument("--basis", type=int, default=100, help="width of the merged basis")
    parser.add_argument("--damping", type=float, default=0.01, help="beta")
    parser.add_argument("--pairs", type=int, default=300, help="at most so many pairs of clients, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    args = parser.parse_args(options)
    sketches, gradients, labels, weights = of_clients(args.run, args.rank)
    found = distances(sketches, args) | {"gradients": diversity(gradients, weights)}
    if labels is not None:
        found["labels"] = float(np.mean([np.abs(labels[m] - labels[n]).sum() / 2 for m, n in pairs(len(labels), args)]))
    timing.table([{"distance": name, "mean": value} for name, value in found.items()])
    return {"setting": vars(args) | {"run": str(args.run)}, "distances": found}


def of_clients(folder: Path, rank: int) -> tuple:
    """((eigenvalues [T, R], bases [T, P, R]), gradients [T, P], shares of the classes [T, K] or None, weights [T])."""
    import jax

    from fipa_jax import trees
    from fipa_jax.client.examples import gather, present
    from fipa_jax.curvature.products import make_gradient
    from fipa_jax.federation.parts import init
    from fipa_jax.federation.round import sketch
    from fipa_jax.run import experiment as experiment_lib
    from fipa_jax.run.phase_parts import make_rates

    config = config_of(json.loads((folder / "config.json").read_text()))
    config.init_from, config.cohort, config.compare = str(folder / "warmup.msgpack"), 0, ("fipa",)
    config.warmup.rounds, config.fipa.trainable, config.fipa.cache_body = 0, ".*", False
    config.fipa.sketch.solver, config.fipa.sketch.rank = "auto", rank
    with jax.enable_x64(config.precision == "float64"):
        experiment = experiment_lib.build(config)
        parts, task = experiment_lib.parts_of(experiment, config.fipa), experiment.problem.task
        state, people = init(parts, experiment.params), experiment.population
        cohort = people.cohort(np.arange(parts.num_clients))
        rates = make_rates(config.fipa, config.precision)
        found = jax.jit(lambda cohort: sketch(parts, state, rates, cohort, None, experiment.root))(cohort)
        slope = make_gradient(lambda params, batch: task.outputs(params, batch)[0], task.loss)

        def gradient(client):
            return slope(state.params, gather(cohort.data, client.indices), present(client))

        gradients = jax.jit(lambda clients: jax.lax.map(gradient, clients))(cohort.clients)
        gradients = np.stack(
            [trees.ravel(jax.tree.map(lambda leaf, m=m: leaf[m], gradients)) for m in range(parts.num_clients)]
        )
    counts = np.asarray(people.num_examples, float)
    return (*_float64(found.eigenvalues, found.basis),), gradients, shares(experiment.problem), counts / counts.sum()


def config_of(saved: dict):
    """The config that a run has saved."""
    from fipa_jax.config import fields
    from fipa_jax.config.defaults import default

    config = default()

    def put(group, prefix):
        for name, value in group.items():
            if isinstance(value, dict):
                put(value, f"{prefix}{name}.")
            else:
                place, field = fields.find(config, f"{prefix}{name}")
                place[field] = tuple(value) if isinstance(value, list) else value

    put(saved, "")
    return config


def _float64(*arrays):
    return [np.asarray(array, float) for array in arrays]


def shares(problem) -> np.ndarray | None:
    """[T, K], each client's shares of the classes; None where the task has none."""
    if "label" not in problem.train:
        return None
    labels = np.asarray(problem.train["label"])
    counts = [np.bincount(labels[np.asarray(own)], minlength=labels.max() + 1) for own in problem.clients]
    return np.array([row / row.sum() for row in counts])


def pairs(clients: int, args) -> list[tuple[int, int]]:
    """Pairs of clients, all or some at random."""
    every = list(itertools.combinations(range(clients), 2))
    if len(every) <= args.pairs:
        return every
    chosen = np.random.default_rng(args.seed).choice(len(every), args.pairs, replace=False)
    return [every[place] for place in chosen]


def distances(sketches, args) -> dict[str, float]:
    """The means over pairs, in float64; equal weights, as the statistics are of pairs."""
    values, bases = sketches  # [T, R], [T, P, R]
    factor = np.concatenate([basis * np.sqrt(value) for basis, value in zip(bases, values, strict=True)], axis=1)
    squares, inside = np.linalg.eigh(factor.T @ factor / len(values))
    keep = np.argsort(squares)[::-1][: args.basis]
    keep = keep[squares[keep] > 1e-10 * squares[keep[0]]]
    merged = factor @ inside[:, keep] / np.sqrt(len(values) * squares[keep])  # [P, D]
    small = [(merged.T @ basis) * np.sqrt(value) for basis, value in zip(bases, values, strict=True)]
    matrices = [part @ part.T + args.damping * np.eye(len(keep)) for part in small]
    log_dets = [np.linalg.slogdet(matrix)[1] for matrix in matrices]
    rows = []
    for m, n in pairs(len(values), args):
        tops = bases[m][:, : args.top], bases[n][:, : args.top]
        logs = [np.log(values[client, : args.top] + args.damping) for client in (m, n)]
        middle = np.linalg.slogdet((matrices[m] + matrices[n]) / 2)[1]
        half = np.linalg.inv(np.linalg.cholesky(matrices[m]))
        ratios = np.linalg.eigvalsh(half @ matrices[n] @ half.T)
        rows.append(
            {
                "angles": 1 - np.sum((tops[0].T @ tops[1]) ** 2) / args.top,
                "eigenvalues": np.sqrt(np.mean((logs[0] - logs[1]) ** 2)),
                "jbld": middle - (log_dets[m] + log_dets[n]) / 2,
                "affine": np.sqrt(np.sum(np.log(ratios) ** 2)),
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def diversity(gradients: np.ndarray, weights: np.ndarray) -> float:
    """1 - |mean gradient|^2 / mean squared length: 0 for clients that agree."""
    return float(1 - np.sum((weights @ gradients) ** 2) / (weights @ np.sum(gradients**2, axis=1)))
