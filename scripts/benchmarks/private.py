"""How good are private rules, each tuned on the same full grid? `benchmark.py private --config FILE`.

Every rule has the same number of settings: local steps x rounds x clip x local rate x a number of its own (the server's
rate of DP-FedAvg and DP-FedAdam, the damping of the whitened ones). A setting is chosen for each epsilon by the mean
over keys that the table does not see, on the holdout set where there is one; the table is of further keys, each with
its own initialisation, sampling and noise. All settings run in one program, as what they differ in is traced.
"""

import argparse
import ast
import contextlib
import itertools
import runpy
import time

import numpy as np

from benchmarks import timing
from fipa_jax import config as config_lib

config_lib.prepare_process()  # before jax starts

# rule -> (the method, what its own number is)
RULES = {
    "dp_fedavg": ("fedavg:privacy.whitening=none", "server.lr"),
    "dp_fedadam": ("fedavg:privacy.whitening=none:server.optimizer=adam", "server.lr"),
    "public": ("fedavg:privacy.whitening=public", "privacy.damping"),
    "release": ("fedavg:privacy.whitening=release", "privacy.damping"),
}


def run(options: list[str]) -> dict:
    """Prints and returns the tables of chosen settings, on keys that did not choose."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py private", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/sine.py:private")
    parser.add_argument("--set", nargs="*", default=[], help="further fields, such as partition.num_clients=1000")
    parser.add_argument("--rules", nargs="*", default=["dp_fedavg", "dp_fedadam", "public"], choices=RULES)
    parser.add_argument("--epsilons", nargs="*", type=float, default=[1, 3, 8])
    parser.add_argument("--rounds", nargs="*", type=int, default=[5, 10, 20, 40])
    parser.add_argument("--steps", nargs="*", type=int, default=[], help="local ones; none for those of the config")
    parser.add_argument("--clips", nargs="*", type=float, default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.01, 0.03, 0.1, 0.3], help="local, plain rules")
    parser.add_argument("--whitened-rates", nargs="*", type=float, default=[0.01, 0.03, 0.1, 0.3], help="lr * damping")
    parser.add_argument("--whitened-clips", nargs="*", type=float, default=None)
    parser.add_argument("--server-rates", nargs="*", type=float, default=[0.3, 1.0, 3.0], help="of DP-FedAvg")
    parser.add_argument("--adam-rates", nargs="*", type=float, default=[0.003, 0.01, 0.03], help="of DP-FedAdam")
    parser.add_argument("--dampings", nargs="*", type=float, default=[0.001, 0.01, 0.1], help="of public whitening")
    parser.add_argument("--release-dampings", nargs="*", type=float, default=[0.001, 0.01, 0.1])
    parser.add_argument("--figure", default="", help="of the test set, by which settings are chosen and shown")
    parser.add_argument("--choosing-keys", type=int, default=2)
    parser.add_argument("--keys", type=int, default=5, help="of the table")
    parser.add_argument("--batch", type=int, default=48, help="runs in one call")
    args = parser.parse_args(options)
    config = configured(args)
    lines = []
    for rule in args.rules:
        found, seconds = lines_of(rule, config, args)
        lines += found
        print(f"{rule}: {seconds:.0f} s")
        timing.table(found)
    print("\nmean and standard deviation over keys that chose nothing")
    timing.table(sorted(lines, key=lambda line: line["epsilon"]))
    return {"setting": vars(args), "lines": lines}


def configured(args):
    """The config, with what is set on the command line."""
    file, _, variant = args.config.partition(":")
    config = runpy.run_path(file)["get_config"](*([variant] if variant else []))
    config.fipa.rounds, config.warmup.rounds, config.eval.clients_every = max(args.rounds), 0, 0
    config.chunk = 0
    for given in args.set:
        path, _, value = given.partition("=")
        with contextlib.suppress(SyntaxError, ValueError):  # then it is a string
            value = ast.literal_eval(value)
        config.update_from_flattened_dict({path: value})
    return config


def grid_of(rule: str, args) -> list[tuple]:
    """(clip, local rate, own number) of every setting of a rule."""
    if rule in ("public", "release"):
        dampings = args.dampings if rule == "public" else args.release_dampings
        numbers = itertools.product(args.whitened_clips or args.clips, args.whitened_rates, dampings)
        return [(clip, rate / damping, damping) for clip, rate, damping in numbers]
    return list(itertools.product(args.clips, args.rates, args.adam_rates if "adam" in rule else args.server_rates))


def lines_of(rule: str, config, args) -> tuple[list[dict], float]:
    """(a line of the table for each epsilon, seconds of it all)."""
    import jax

    method, own = RULES[rule]
    config.compare, start = (method,), time.perf_counter()
    with jax.enable_x64(config.precision == "float64"):
        measures = []
        for steps in args.steps or [config.fipa.local.steps]:
            config.fipa.local.steps = steps
            measures.append(Measure(config, method, own, args))
        lines = [line_of(rule, own, epsilon, measures, args) for epsilon in args.epsilons]
    return lines, time.perf_counter() - start


def line_of(rule: str, own: str, epsilon: float, measures: list, args) -> dict:
    """The best setting of a rule at this epsilon, on keys that did not choose it."""
    settings, tried = grid_of(rule, args), []
    for measure, rounds in itertools.product(measures, args.rounds):
        runs = [(*setting, key) for setting in settings for key in range(args.choosing_keys)]
        values = measure(epsilon, rounds, runs)[0].reshape(len(settings), args.choosing_keys).mean(1)
        score = np.where(np.isfinite(values), measure.direction * values, -np.inf)
        place = int(np.argmax(score))
        tried.append((score[place], measure, rounds, settings[place]))
    _, measure, rounds, setting = max(tried, key=lambda one: one[0])
    shown = measure(epsilon, rounds, [(*setting, 1000 + key) for key in range(args.keys)])[1]
    noise = measure.plan(epsilon, rounds).noise
    line = {"epsilon": epsilon, "rule": rule, "mean": float(shown.mean())}
    line["std"] = float(shown.std(ddof=min(args.keys - 1, 1)))
    line |= {"rounds": rounds, "steps": measure.settings.local.steps}
    line |= dict(zip(("clip", "local.lr", "own"), (f"{number:.3g}" for number in setting), strict=True))
    return line | {"z": f"{noise:.3g}", "kappa": f"{noise * measure.size**0.5 / measure.expected:.2g}"}


class Measure:
    """Runs settings of one rule side by side: (figure to choose by, figure to show), [runs] each."""

    def __init__(self, config, method: str, own: str, args):
        import jax

        from fipa_jax import trees
        from fipa_jax.config import methods
        from fipa_jax.reporting import metrics
        from fipa_jax.run import experiment, phase_parts, private_run, whole_run

        self.built, self.settings, self.own, self.args = (
            experiment.build(config),
            methods.method(config, method),
            own,
            args,
        )
        self.view = whole_run.view_of(self.built, self.settings, self.built.params, {}, False)
        self.parts = experiment.parts_of(self.view, self.settings)
        self.rates = phase_parts.make_rates(self.settings, config.precision, self.view.problem.public)
        chosen = trees.select(self.built.params, self.settings.trainable)
        self.size, self.expected = trees.ravel(chosen).size, config.cohort or len(self.built.problem.clients)
        release = self.settings.privacy.whitening == "release"
        self.moments = private_run.second_moments(self.view, self.settings) if release else None
        self.compiled = jax.jit(self.final)
        figures = jax.eval_shape(self.on_test, self.built.params)
        show = args.figure or next(name for name in figures if "accuracy" in name or "mse" in name or "loss" in name)
        show = f"test_{show.removeprefix('test_').removeprefix('holdout_')}"
        held = show.replace("test_", "holdout_")
        self.names = held if held in figures else show, show
        self.direction = metrics.direction(show)

    def on_test(self, params):
        from fipa_jax.run import loop

        return loop.on_test(self.view, self.view.held, params)

    def plan(self, epsilon: float, rounds: int):
        from fipa_jax.run import private_run

        settings = self.settings.copy_and_resolve_references()
        settings.rounds, settings.privacy.epsilon = rounds, epsilon
        return private_run.plan_of(self.view, settings)

    def __call__(self, epsilon: float, rounds: int, runs: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
        plan, found = self.plan(epsilon, rounds), []
        dtype = self.rates.channel.privacy.clip.dtype
        for start in range(0, len(runs), self.args.batch):
            part = np.array([runs[min(start + i, len(runs) - 1)] for i in range(self.args.batch)])
            numbers = *part[:, :3].T.astype(dtype), part[:, 3].astype(np.int32)
            others = np.asarray([plan.noise, plan.rate, plan.released], dtype)
            both = self.compiled(*numbers, others, np.int32(rounds), self.view.population, self.view.held)
            found.append(np.stack(both)[:, : len(runs) - start])
        return tuple(np.concatenate(found, axis=1))

    def final(self, clips, local_rates, numbers, keys, others, rounds, people, held):
        import jax

        def one(clip, local_rate, number, key):
            return self.one(clip, local_rate, number, key, others, rounds, people, held)

        # One after another, its clients side by side: LAPACK's calls in a batch can wait for each other for ever.
        return jax.lax.map(lambda run: one(*run), (clips, local_rates, numbers, keys))

    def one(self, clip, local_rate, number, key, others, rounds, people, held):
        """(figure to choose by, figure to show) of one run; everything is traced."""
        import jax
        import jax.numpy as jnp

        from fipa_jax.federation import parts as parts_lib
        from fipa_jax.federation.round import whole_round
        from fipa_jax.privacy import mechanism
        from fipa_jax.privacy.noisy_sum import Spent
        from fipa_jax.run import loop

        noise, rate, released = others
        root = jax.random.key(key)
        damping = number if self.own == "privacy.damping" else jnp.ones_like(number)
        old = self.rates.channel.privacy
        privacy = old._replace(secret=jax.random.fold_in(root, 7), clip=clip, noise=noise, rate=rate, damping=damping)
        rates = self.rates._replace(
            local=self.rates.local._replace(lr=local_rate),
            server_lr=number if self.own == "server.lr" else self.rates.server_lr,
            channel=self.rates.channel._replace(privacy=privacy._replace(rounds=rounds)),
        )
        params = self.built.params
        if not self.built.config.init_from:
            drawn = self.built.problem.task.init(root)
            params = jax.tree.map(lambda new, old: new.astype(old.dtype), drawn, params)
        state = parts_lib.init(self.parts, params)
        frame = ()
        if self.moments is not None:
            frame = mechanism.released_frame(jax.random.fold_in(root, 9), self.moments, 1 / released, damping)
        state = state._replace(history=Spent(state.history.rounds, noise, frame))

        def body(_, state):
            return whole_round(self.parts, state, rates, *people, root)[0]

        state = jax.lax.fori_loop(0, rounds, body, state)
        figures = loop.on_test(self.view, held, state.params)
        return figures[self.names[0]], figures[self.names[1]]
