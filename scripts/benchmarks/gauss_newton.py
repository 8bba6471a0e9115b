"""How close does FIPA stay to centralised Gauss-Newton? `benchmark.py gauss_newton --config=configs/sine.py`.

Both integrate the damped Gauss-Newton flow, d theta/dt = -(H + beta I)^{-1} g, from the same start to the same horizon
in K rounds. In a round every client follows its own flow for the time horizon/K, in `substeps` linearised steps, and
FIPA merges the updates; the centralised run does the same with all data in one place. A client's flow leaves the pooled
one within a round, by an angle of the order of its length, so the gap at the horizon falls as O(1/K), which is what
Theorem 1 of arXiv 2601.13608 states. With one substep the clients' problems are solved exactly, and at full rank there
is no gap: the first table.

    gap = max_k |theta_k - theta_k^GN| / |theta_K^GN - theta_0|
"""

import argparse
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from fipa_jax import trees
from fipa_jax.config import recipes
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation.round import whole_round
from fipa_jax.reporting import plots
from fipa_jax.run import experiment as experiment_lib
from fipa_jax.run.phase_parts import make_rates

DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "sine.py"


def run(options: list[str]) -> dict:
    """Prints and returns the gaps by rank and number of rounds, with the fitted rate."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py gauss_newton", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(DEFAULT), help="a config file, for its task and network")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 5, 10, 20, 0], help="of the sketches; 0 for full")
    parser.add_argument("--rounds", type=int, nargs="+", default=[5, 10, 20, 40, 80])
    parser.add_argument("--substeps", type=int, default=8, help="of a client in a round")
    parser.add_argument("--horizon", type=float, default=2.0, help="of the flow; 1 is one undamped step")
    parser.add_argument("--damping", type=float, default=1e-2, help="beta")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="", help="a PNG for the gaps by round")
    args = parser.parse_args(options)
    file, _, variant = args.config.partition(":")
    config = runpy.run_path(file)["get_config"](*([variant] if variant else []))
    config.seed, config.precision, config.cohort = args.seed, "float64", 0
    config.warmup.rounds, config.fipa.rounds = 0, 1
    recipes.levenberg_marquardt(config)
    config.fipa.aggregator.trust, config.fipa.aggregator.damping = False, args.damping
    config.fipa.sketch.solver, config.fipa.sketch.gradient_scale = "rows", 0.0
    with jax.enable_x64(True):
        experiment = experiment_lib.build(config)
        size = trees.ravel(experiment.params).size
        ranks = [rank or size for rank in args.ranks]
        exact = [one_step(experiment, rank) for rank in ranks]
        print(f"{config.task.name}: {size} parameters, beta {args.damping:g}\n\none round with exact local solves")
        timing.table(exact)
        print(f"\ngap to the centralised flow after K rounds, horizon {args.horizon:g}, {args.substeps} substeps")
        given = args.substeps, args.horizon
        central = [trajectory(experiment, 1, K, *given, pooled=True) for K in args.rounds]
        gaps = {rank: [gap(trajectory(experiment, rank, len(c) - 1, *given), c) for c in central] for rank in ranks}
    rows = [row(rank, args.rounds, [path.max() for path in paths]) for rank, paths in gaps.items()]
    timing.table(rows)
    if args.plot:
        draw(gaps[ranks[-1]], args, Path(args.plot))
    return {"setting": vars(args), "one round": exact, "gaps": rows}


def one_step(experiment, rank: int) -> dict:
    """How far one FIPA round with exact local solves is from the centralised step."""
    paths = (trajectory(experiment, r, 1, 1, 1.0, pooled=pooled) for r, pooled in ((rank, False), (1, True)))
    return {"rank": rank, "relative difference": gap(*paths).max()}


def gap(fipa: np.ndarray, central: np.ndarray) -> np.ndarray:
    """[K + 1], |theta_k - theta_k^GN| beside the way of the centralised run, from both trajectories [K + 1, P]."""
    return np.linalg.norm(fipa - central, axis=1) / np.linalg.norm(central[-1] - central[0])


def trajectory(experiment, rank: int, K: int, substeps: int, horizon: float, *, pooled: bool = False) -> np.ndarray:
    """[K + 1, P], the parameters round by round; pooled, with one client, whose update passes whatever the rank."""
    if pooled:
        experiment = experiment_lib.pooled(experiment)
    settings = experiment.config.fipa.copy_and_resolve_references()
    settings.sketch.rank = rank
    settings.local.steps, settings.local.lr = substeps, horizon / (K * substeps)
    parts = experiment_lib.parts_of(experiment, settings)
    rates = make_rates(settings, experiment.config.precision)

    def body(state, _):
        state, _ = whole_round(parts, state, rates, *experiment.population, experiment.root)
        return state, trees.ravel(state.params)

    start = parts_lib.init(parts, experiment.params)
    path = jax.jit(lambda state: jax.lax.scan(body, state, length=K)[1])(start)
    return np.asarray(jnp.concatenate([trees.ravel(experiment.params)[None], path]))


def row(rank: int, rounds_: list[int], gaps: list[float]) -> dict:
    """A line of the table: the gaps, and the slope of log gap over log K; -1 is O(1/K)."""
    slope = np.polyfit(np.log(rounds_), np.log(gaps), 1)[0] if len(gaps) > 1 and min(gaps) > 0 else np.nan
    return {"rank": rank} | {f"K={K}": value for K, value in zip(rounds_, gaps, strict=True)} | {"slope": slope}


def draw(paths: list[np.ndarray], args, file: Path) -> None:
    """Draws the gap against the time of the flow, one line for each number of rounds."""
    with plots.picture(file, 5, 3.8) as (figure, ((axis,),)):
        for path in paths:
            time = np.linspace(0, args.horizon, path.size)
            axis.plot(time[1:], path[1:], label=f"K = {path.size - 1}")
        axis.set(xlabel="time of the flow", ylabel="gap to centralised Gauss-Newton", yscale="log")
        figure.legend(loc="outside right upper")
