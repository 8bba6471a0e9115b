"""How good are private rules, each tuned on one full grid? `benchmark.py private --config FILE`.

One grid for all: local steps x rounds x clips x how far the clip falls x rates x as many values of a number of the
rule's own (the server's rate of DP-FedAvg and DP-FedAdam, the damping beta of the whitened ones, whose rates are in
units of 1 / beta). For each epsilon all settings run with one key, the best tenth with further ones, and the mean over
these keys chooses, on the holdout set where there is one. The table is of further keys, each with its own
initialisation and noise; `edge` names what was chosen at an end of its list. kappa is z sqrt(P) / (q T), of one round,
and `of_run` that over the root of their number. `--parts accountant` times the accountant.
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


WHITENED = ("public", "release")


def run(options: list[str]) -> dict:
    """Prints and returns the tables of chosen settings, on keys that did not choose."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py private", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", default=["rules"], choices=["rules", "accountant"])
    parser.add_argument("--config", default="configs/sine.py:private")
    parser.add_argument("--set", nargs="*", default=[], help="further fields, such as partition.num_clients=1000")
    parser.add_argument("--rules", nargs="*", default=["dp_fedavg", "dp_fedadam", "public"], choices=RULES)
    parser.add_argument("--epsilons", nargs="*", type=float, default=[1, 3, 8])
    parser.add_argument("--rounds", nargs="*", type=int, default=[40, 160])
    parser.add_argument("--steps", nargs="*", type=int, default=[1], help="local ones")
    parser.add_argument("--clips", nargs="*", type=float, default=[0.1, 0.25, 0.6, 1.5, 4.0])
    parser.add_argument(
        "--ends", nargs="*", type=float, default=[1.0, 0.1, 0.03], help="the last round's clip over the first"
    )
    parser.add_argument("--rates", nargs="*", type=float, default=[0.3, 1.0, 3.0], help="local.lr; whitened: * beta")
    parser.add_argument("--server-rates", nargs="*", type=float, default=[1.0, 3.0, 10.0, 30.0], help="of DP-FedAvg")
    parser.add_argument("--adam-rates", nargs="*", type=float, default=[0.01, 0.03, 0.1, 0.3], help="of DP-FedAdam")
    parser.add_argument("--dampings", nargs="*", type=float, default=[0.01, 0.03, 0.1, 0.3], help="of whitened ones")
    parser.add_argument("--figure", default="", help="of the test set, by which settings are chosen and shown")
    parser.add_argument("--further-keys", type=int, default=3, help="that choose among the best tenth")
    parser.add_argument("--keys", type=int, default=5, help="of the table")
    parser.add_argument("--batch", type=int, default=24, help="runs in one call")
    args = parser.parse_args(options)
    result = {"setting": vars(args)}
    if "accountant" in args.parts:
        result["accountant"] = accountant()
    if "rules" in args.parts:
        result["lines"] = rules(args)
    return result


def rules(args) -> list[dict]:
    """A line for each rule and epsilon."""
    if len({len(own_numbers(rule, args)) for rule in args.rules}) > 1:
        raise SystemExit("--server-rates, --adam-rates, --dampings: every rule tries the same number of settings")
    config, lines = configured(args), []
    tried = len(settings_of(args.rules[0], args)) * len(args.rounds) * len(args.steps)
    print(f"{tried} settings of every rule; {-(-tried // 10)} of them with {1 + args.further_keys} keys")
    for rule in args.rules:
        found, seconds = lines_of(rule, config, args)
        lines += found
        print(f"{rule}: {seconds:.0f} s")
        timing.table(found)
    print("\nmean and standard deviation over keys that chose nothing")
    timing.table(sorted(lines, key=lambda line: line["epsilon"]))
    return lines


def accountant() -> list[dict]:
    """Seconds of one core that the accountant takes at epsilon 8 and delta 1e-3."""
    from fipa_jax.privacy import accounting

    lines, plan = [], accounting.Plan(noise=0.0, delta=1e-3)
    for rate, rounds in itertools.product((1.0, 0.2), (10, 40)):
        start = time.process_time()
        noise = accounting.noise_for(8.0, rounds, plan._replace(rate=rate))
        middle = time.process_time()
        spent = accounting.epsilon_of(plan._replace(rate=rate, noise=noise), rounds)
        line = {"rate": rate, "rounds": rounds, "z": f"{noise:.4g}", "epsilon": f"{spent:.4g}"}
        line |= {"noise_for_s": f"{middle - start:.2g}", "epsilon_of_s": f"{time.process_time() - middle:.2g}"}
        lines.append(line)
    timing.table(lines)
    return lines


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


def own_numbers(rule: str, args) -> list[float]:
    """What a rule tries of its own number."""
    if rule in WHITENED:
        return args.dampings
    return args.adam_rates if rule == "dp_fedadam" else args.server_rates


def settings_of(rule: str, args) -> list[tuple]:
    """(clip, its end, rate, own number) of every setting of a rule."""
    return list(itertools.product(args.clips, args.ends, args.rates, own_numbers(rule, args)))


def as_run(rule: str, rounds: int, setting: tuple, key: int) -> tuple:
    """(clip, local rate, own number, decay of the clip, key) of a setting."""
    clip, end, rate, own = setting
    return clip, rate / own if rule in WHITENED else rate, own, end ** (1 / max(rounds - 1, 1)), key


def lines_of(rule: str, config, args) -> tuple[list[dict], float]:
    """(a line of the table for each epsilon, seconds of it all)."""
    import jax

    method, own = RULES[rule]
    config.compare, start = (method,), time.perf_counter()
    with jax.enable_x64(config.precision == "float64"):
        measures = []
        for steps in args.steps:
            config.fipa.local.steps = steps
            measures.append(Measure(config, method, own, args))
        lines = [line_of(rule, epsilon, measures, args) for epsilon in args.epsilons]
    return lines, time.perf_counter() - start


def line_of(rule: str, epsilon: float, measures: list, args) -> dict:
    """The best setting of a rule at this epsilon, on keys that did not choose it."""
    settings = settings_of(rule, args)
    places = [(m, rounds) for m in range(len(measures)) for rounds in args.rounds]

    def scores(place, chosen, keys) -> np.ndarray:
        """[settings, keys], the larger the better."""
        measure, rounds = measures[place[0]], place[1]
        runs = [as_run(rule, rounds, setting, key) for setting in chosen for key in keys]
        values = measure(epsilon, rounds, runs)[0].reshape(len(chosen), len(keys))
        return np.where(np.isfinite(values), measure.direction * values, -np.inf)

    first = np.stack([scores(place, settings, [0])[:, 0] for place in places])  # [places, settings]
    best, tried = np.sort(first.ravel())[-max(-(-first.size // 10), 1)], []
    for place, row in zip(places, first, strict=True):
        kept = np.flatnonzero(row >= best)
        if kept.size:
            more = scores(place, [settings[i] for i in kept], range(1, 1 + args.further_keys))
            tried += [((row[i] + more[n].sum()) / (1 + args.further_keys), place, i) for n, i in enumerate(kept)]
    _, place, chosen = max(tried)
    return shown(rule, epsilon, measures[place[0]], place[1], settings[chosen], args)


def shown(rule: str, epsilon: float, measure, rounds: int, setting: tuple, args) -> dict:
    """The line of a chosen setting, by fresh keys."""
    runs = [as_run(rule, rounds, setting, 1000 + key) for key in range(args.keys)]
    values, noise = measure(epsilon, rounds, runs)[1], measure.plan(epsilon, rounds).noise
    lists = {"rounds": args.rounds, "steps": args.steps, "clip": args.clips, "end": args.ends, "rate": args.rates}
    lists["own"] = own_numbers(rule, args)
    chosen = dict(zip(lists, (rounds, measure.settings.local.steps, *setting), strict=True))
    line = {"epsilon": epsilon, "rule": rule, "mean": float(values.mean())}
    line |= {"std": float(values.std(ddof=min(args.keys - 1, 1)))} | {k: f"{v:.3g}" for k, v in chosen.items()}
    at_end = [name for name, tried in lists.items() if len(tried) > 1 and chosen[name] in (min(tried), max(tried))]
    kappa = noise * measure.size**0.5 / measure.expected
    line |= {"z": f"{noise:.3g}", "kappa": f"{kappa:.2g}", "of_run": f"{kappa / rounds**0.5:.2g}"}
    return line | {"edge": " ".join(at_end) or "-"}


class Measure:
    """Runs settings of one rule side by side: (figure to choose by, figure to show), [runs] each."""

    def __init__(self, config, method: str, own: str, args):
        import jax

        from fipa_jax import trees
        from fipa_jax.config import methods
        from fipa_jax.privacy import noisy_sum
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
        self.public = self.settings.privacy.whitening == "public"
        if self.public:  # the channel would compute the frame of a round twice, for the clients and for the server
            channel = noisy_sum.private(float(self.expected), frame_of=noisy_sum.released_frame)
            self.parts = self.parts._replace(channel=channel)
        self.compiled = jax.jit(self.final)
        figures = jax.eval_shape(self.on_test, self.built.params)
        show = args.figure or next(name for name in figures if "accuracy" in name or "mse" in name or "loss" in name)
        show = f"test_{show.removeprefix('test_').removeprefix('holdout_')}"
        held = show.replace("test_", "holdout_")
        self.names = held if held in figures else show, show
        self.direction = metrics.direction(show)

    def on_test(self, params):
        from fipa_jax.run import loop

        return loop.of_model(self.view, self.view.held, params)

    def frame(self, state, rates):
        """The round's coordinates by public inputs, as the run computes them."""
        from fipa_jax import trees
        from fipa_jax.run import private_run

        chosen, rank = trees.select(state.params, self.settings.trainable), self.settings.privacy.eigenpairs
        return private_run.public_frame(self.view.problem.task, rank, chosen, None, rates.channel.privacy)

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
            numbers = *part[:, :4].T.astype(dtype), part[:, 4].astype(np.int32)
            others = np.asarray([plan.noise, plan.rate, plan.released], dtype)
            both = self.compiled(*numbers, others, np.int32(rounds), self.view.population, self.view.held)
            found.append(np.stack(both)[:, : len(runs) - start])
        return tuple(np.concatenate(found, axis=1))

    def final(self, clips, local_rates, numbers, decays, keys, others, rounds, people, held):
        import jax

        def one(clip, local_rate, number, decay, key):
            return self.one((clip, local_rate, number, decay), key, others, rounds, people, held)

        # One after another, its clients side by side: LAPACK's calls in a batch can wait for each other for ever.
        return jax.lax.map(lambda run: one(*run), (clips, local_rates, numbers, decays, keys))

    def one(self, setting, key, others, rounds, people, held):
        """(figure to choose by, figure to show) of one run; everything is traced."""
        import jax
        import jax.numpy as jnp

        from fipa_jax.federation import parts as parts_lib
        from fipa_jax.federation.round import whole_round
        from fipa_jax.privacy import mechanism
        from fipa_jax.privacy.noisy_sum import Spent
        from fipa_jax.run import loop

        noise, rate, released = others
        clip, local_rate, number, decay = setting
        root = jax.random.key(key)
        damping = number if self.own == "privacy.damping" else jnp.ones_like(number)
        old = self.rates.channel.privacy
        privacy = old._replace(
            secret=jax.random.fold_in(root, 7), clip=clip, clip_decay=decay, noise=noise, rate=rate, damping=damping
        )
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
        frame = self.frame(state, rates) if self.public else frame
        state = state._replace(history=Spent(state.history.rounds, state.history.plan, frame))

        def body(_, state):
            if self.public:
                state = state._replace(history=state.history._replace(frame=self.frame(state, rates)))
            return whole_round(self.parts, state, rates, *people, root)[0]

        state = jax.lax.fori_loop(0, rounds, body, state)
        figures = loop.of_model(self.view, held, state.params)
        return figures[self.names[0]], figures[self.names[1]]
