"""Whole runs in this process: what does not depend on the plan of execution, and what is never lost."""

import json
import sys
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import tiny

from fipa_jax import aggregate
from fipa_jax.aggregate.aggregator import Needs
from fipa_jax.aggregate.screening import REASONS
from fipa_jax.client import terms
from fipa_jax.client.local_solver import LocalResult
from fipa_jax.config.methods import method
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import Sketcher
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation.state import State
from fipa_jax.reporting import console as report
from fipa_jax.reporting import metrics
from fipa_jax.run import estimate, experiment, programs, whole_run
from fipa_jax.saving.model_files import export, load
from fipa_jax.tasks import task


def figures(workdir):
    """The rows without the seconds."""
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


@pytest.mark.slow
def test_the_number_of_devices_changes_nothing(tmp_path):
    for devices in (1, 2):
        whole_run.run(tiny(devices=devices), tmp_path / str(devices))
    assert figures(tmp_path / "1") == figures(tmp_path / "2")


@pytest.fixture
def broken(monkeypatch):
    """The second client's last input is NaN."""
    build = task.build

    def spoilt(config):
        problem = build(config)
        problem.train["x"][problem.clients[1][-1]] = np.nan
        return problem

    monkeypatch.setattr(task, "build", spoilt)


@pytest.mark.slow
def test_a_client_of_nan_is_reported_and_every_rule_goes_on_without_it(tmp_path, broken, caplog):
    """Whatever its curvature is seen by: the head's closed form that `auto` picks, a diagonal, and with an own rank."""
    rules = (
        "fipa:sketch.solver=auto:trainable=Dense_1/",
        "fisher_diagonal",
        "fipa:sketch.solver=rows:sketch.gradient_scale=0.1:sketch.store=bfloat16:trainable=Dense_1/",
    )
    whole_run.run(tiny(compare=rules), tmp_path)
    rows = {row["run"]: row for row in figures(tmp_path)}
    assert list(rows) == list(rules)
    for name, row in rows.items():
        assert row["test_mse"] > 0 and row["clients_rejected"] == 1
        assert row.get("sketches_not_finite") == (None if name == "fisher_diagonal" else 1)
        assert not {"flags", "rejected", "ids"} & set(row)
        assert f"{name}, round 0: clients [1]: left out: its update is not finite" in caplog.text
    assert caplog.text.count(f"clients [1]: {sketch.FLAGS['not_finite']}") == 2 * 2  # rules with sketches, rounds


def _info(**flags):
    blank = {name: np.zeros(3, bool) for name in sketch.FLAGS}
    return {
        "ids": np.array([7, 8, 9]),
        "rejected": np.zeros(3, bool),
        "flags": blank | flags,
        "captured": np.float32(0.5),
    }


@pytest.mark.parametrize("flag", sketch.FLAGS)
def test_a_flag_is_counted_in_the_row_and_warned_of_in_words(flag, caplog):
    info = _info(**{flag: np.array([True, False, True])})
    row = report.figures(info)
    assert row == {"captured": 0.5, "clients_rejected": 0} | {
        f"sketches_{name}": 2 * (name == flag) for name in sketch.FLAGS
    }
    report.warn("fipa", 4, info, Counter())
    wanted = f"fipa, round 4: clients [7, 9]: {sketch.FLAGS[flag]}"
    assert (wanted in caplog.text) == (flag not in sketch.EXPECTED)


@pytest.mark.parametrize("reason", REASONS)
def test_a_client_left_out_is_counted_and_named_with_its_reason(reason, caplog):
    there = np.array([False, True, True])
    blank = {name: np.zeros(3, bool) for name in REASONS}
    info = _info() | {"rejected": there, "reasons": blank | {reason: there}, "absent": ~there, "capped": ~there}
    row = report.figures(info)
    assert {name: row[f"rejected_{name}"] for name in REASONS} == {n: 2 * (n == reason) for n in REASONS}
    assert row["clients_rejected"] == 2 and row["clients_absent"] == row["clients_capped"] == 1
    assert not {"reasons", "absent", "capped"} & set(row)
    report.warn("fipa", 4, info, Counter())
    assert f"fipa, round 4: clients [8, 9]: left out: {REASONS[reason]}" in caplog.text
    assert "round 4: clients [7]: take no part" in caplog.text and "clients [7]: eigenvalues scaled" in caplog.text
    assert len(caplog.records) == 3


def test_a_fallback_and_a_skipped_round_are_said(caplog):
    for fallback, words in ((1, "the damped form with a larger damping is taken"), (2, "the mean is taken")):
        report.warn("fipa", 4, _info() | {"fallback": np.int32(fallback), "skipped": np.bool_(False)}, Counter())
        assert words in caplog.records[-1].message
    assert len(caplog.records) == 2
    report.warn("fipa", 5, _info() | {"fallback": np.int32(0), "skipped": np.bool_(True)}, Counter())
    assert "fipa, round 5: skipped: too few clients" in caplog.records[-1].message and len(caplog.records) == 3


def test_rounds_in_order_are_not_warned_of(caplog):
    report.warn("fipa", 4, _info(), Counter())
    report.warn("fedavg", 4, {"ids": np.arange(3), "rejected": np.zeros(3, bool)}, Counter())
    assert not caplog.records


def test_a_flag_that_comes_every_round_is_not_said_for_ever_and_silences_no_other(caplog):
    said = Counter()
    for k in range(3 * report.REPEATS):
        report.warn("fipa", k, _info(empty=np.array([True, False, False])), said)
    report.warn("fipa", 99, _info(asymmetric=np.array([False, True, False])), said)
    assert caplog.text.count(sketch.FLAGS["empty"]) == report.REPEATS
    assert caplog.text.count("all cases are in metrics.jsonl") == 1
    assert f"round 99: clients [8]: {sketch.FLAGS['asymmetric']}" in caplog.text


def test_bytes_count_the_pairs_that_are_kept_and_what_their_choice_takes():
    clients, size, rank = 2, 10, 4
    eigenvalues = jnp.array([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0]])  # four of eight
    params = {"a": jnp.zeros([6]), "b": jnp.zeros([4])}
    delta = {name: jnp.zeros([clients, *leaf.shape]) for name, leaf in params.items()}
    results = LocalResult(delta, (), jnp.zeros(clients))
    state = State(params, (), (), (), (), jnp.int32(0))
    rule, plain = aggregate.mean(), Sketcher(of_client=None)
    parts = parts_lib.Parts(None, None, terms.none(), plain, rule, None, num_clients=clients, cohort=clients)
    model = clients * size * 4

    def up(sketches, **changes):
        has_pairs = isinstance(sketches, sketch.Sketch)
        kept = {"sketch_pairs": jnp.sum(sketches.eigenvalues > 0), "sketches_sent": clients} if has_pairs else {}
        traffic = programs.traffic_of(state, results, sketches, parts._replace(**changes))(kept)
        assert traffic["bytes_down"] == model
        return traffic["bytes_up"]

    assert up(None) == model
    assert up(sketch.Diagonal(jnp.zeros([clients, size]))) == 2 * model
    for dtype, bytes_each in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        sent = sketch.Sketch(eigenvalues, jnp.zeros([clients, size, rank], dtype))
        assert up(sent) == model + 4 * (4 + size * bytes_each)
        assert up(sent, sketcher=plain._replace(sends_gradient=True)) == 2 * model + 4 * (4 + size * bytes_each)
    small = sketch.Report(jnp.zeros([clients, rank]), *[jnp.zeros(clients, jnp.int32)] * 4, {})
    assert up(sketch.Sketch(0 * eigenvalues, sent.basis, small)) == model + clients * 4 * 4
    with_residuals = model + clients * 4 * 4 + 4 * (4 + 4 + size * 2)
    assert up(sketch.Sketch(eigenvalues, sent.basis, small)) == with_residuals
    results = results._replace(before=jnp.zeros(clients), damping=jnp.zeros(clients))  # sent to a rule that asks
    assert up(None) == model
    for needs, numbers in ((Needs(loss=True), 1), (Needs(damping=True), 1), (Needs(loss=True, damping=True), 2)):
        assert up(None, aggregator=rule._replace(needs=needs)) == model + numbers * clients * 4


def test_bytes_kept_are_those_of_rule_optimiser_and_what_the_server_remembers_of_clients():
    params = {"a": jnp.zeros([6]), "b": jnp.zeros([4])}
    results = LocalResult(jax.tree.map(lambda leaf: leaf[None], params), (), jnp.zeros(1))

    def kept(term, aggregator=(), server=()):
        state = State(params, aggregator, server, (), term.init(params), jnp.int32(0))
        parts = parts_lib.Parts(None, None, term, None, aggregate.mean(), None, num_clients=7, cohort=1)
        return programs.traffic_of(state, results, None, parts)({})["bytes_kept"]

    assert kept(terms.none()) == kept(terms.scaffold()) == 0
    assert kept(terms.none(), jnp.zeros(5), jnp.zeros(3)) == 4 * (5 + 3)
    assert kept(terms.varp(), jnp.zeros(5)) == 4 * (5 + 7 * 10)


@pytest.mark.slow
def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "photo.png").write_text("a picture")
    for name in ("curves.png", "summary.json", "report.html", "bytes.svg", "fipa.msgpack", "fedavg.png"):
        (tmp_path / name).write_text("of others")
        with pytest.raises(ValueError, match=f"--workdir: the run would write over '{name}'"):
            whole_run.run(tiny(compare=("fipa", "fedavg")), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "photo.png", name}
        (tmp_path / name).unlink()
    for seed in (1, 3):  # the second one moves the first one's files aside
        whole_run.run(tiny(compare=("fedavg",), seed=seed), tmp_path)
    assert (tmp_path / "previous-1").is_dir() and (tmp_path / "thesis.tex").read_text() == "years of work"


def test_no_result_hangs_on_what_is_shown(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise OverflowError("log ticks")

    for name in ("describe", "draw_split", "draw_prediction", "warn", "table", "progress"):
        monkeypatch.setattr(report, name, fails)
    for name in ("draw_curves", "say_if_long", "write_start"):
        monkeypatch.setattr(whole_run, name, fails)
    long = "fipa:server.lr=" + "1" * 20 + "e-19" + ":local.lr=0.1" * 20
    whole_run.main(tiny(compare=(long, "fedavg")), tmp_path)
    assert list(json.loads((tmp_path / "summary.json").read_text())["runs"]) == [long, "fedavg"]
    assert len(list(tmp_path.glob("*.msgpack"))) == 2 and len(metrics.read(tmp_path / "metrics.jsonl")) == 4
    for what in ("the description", "split.png", "curves.png", "fedavg.png", "a warning", "the progress", "the table"):
        assert f"{what} cannot be shown (OverflowError: log ticks)" in caplog.text


def test_a_rule_that_diverges_leaves_its_summary_and_those_after_it_run(tmp_path):
    config = tiny(compare=("fedavg:local.lr=1e37:local.epochs=1", "fedavg:local.epochs=1"), precision="float64")
    config.fipa.rounds = 6
    runs = whole_run.run(config, tmp_path)["runs"]
    rows = [row for row in metrics.read(tmp_path / "metrics.jsonl") if row["run"] == config.compare[0]]
    assert any((row["test_mse"] or np.inf) > 1e100 for row in rows)  # else this would be no test
    assert list(runs) == list(config.compare) == list(json.loads((tmp_path / "summary.json").read_text())["runs"])


@pytest.mark.slow
def test_summary_and_curves_are_refreshed_while_a_phase_runs(tmp_path, monkeypatch):
    seen, refresh = [], whole_run.refresh

    def watching(phases, workdir):
        summary = refresh(phases, workdir)
        seen.append((len(metrics.read(workdir / "metrics.jsonl")), list(summary["runs"])))
        return summary

    monkeypatch.setattr(whole_run, "refresh", watching)
    monkeypatch.setattr(whole_run, "AT_FIRST", 0.0)
    monkeypatch.setattr(whole_run, "SELDOM", 0)
    settings = dict(pytest.importorskip("matplotlib").rcParams)  # the back end too
    whole_run.run(tiny(compare=("fipa", "fedavg"), checkpoint={"seconds": 0.0, "keep": 3}), tmp_path)
    assert settings == dict(sys.modules["matplotlib"].rcParams) and (tmp_path / "report.html").is_file()
    assert seen == [(1, ["fipa"]), (2, ["fipa"]), (3, ["fipa", "fedavg"]), (4, ["fipa", "fedavg"])]


def test_a_run_of_days_says_so_first_and_what_is_shorter(monkeypatch, caplog):
    config = tiny(smaller="a smaller one")
    made = experiment.build(config)
    monkeypatch.setattr(estimate, "operations_a_second", lambda: 1e5)
    estimate.say_if_long(made, [config.fipa])
    assert not caplog.text
    config.fipa.rounds *= 10**9
    least = estimate.least_operations(made, config.fipa)
    # Two clients with 8 examples, one epoch, layers of 1 x 3 and 3 x 1: forward 2 x 6, and twice as much backward.
    assert least == config.fipa.rounds * 2 * 8 * config.fipa.local.epochs * 3 * 2 * 6
    in_one_pass = method(config, "fipa_memory:local.epochs=5")
    assert estimate.least_operations(made, in_one_pass) == config.fipa.rounds * 2 * 8 * 3 * 2 * 6
    estimate.say_if_long(made, [config.fipa])
    days = least / 1e5 / jax.device_count() / 86400
    assert f"({days:.1f} days)" in caplog.text and "Shorter: a smaller one" in caplog.text


def test_memory_is_what_the_control_group_allows(tmp_path):
    whole = experiment.os.sysconf("SC_PAGE_SIZE") * experiment.os.sysconf("SC_PHYS_PAGES")
    assert experiment.host_bytes(tmp_path) == whole, "no control groups at all, as on macOS"
    group = tmp_path / "sys/fs/cgroup/job/step"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    assert experiment.cgroup_limits(tmp_path) == []
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1024\n")
    assert experiment.cgroup_limits(tmp_path) == [1024]
    old = tmp_path / "sys/fs/cgroup/memory/docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("512\n")
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/docker\n0::/job/step\n")
    assert experiment.cgroup_limits(tmp_path) == [512, 1024]
    assert experiment.host_bytes(tmp_path) == 512 and 0 < experiment.host_bytes() <= whole


def test_rules_share_a_program_only_where_their_numbers_are_traced(tmp_path, monkeypatch):
    """A rule that closes over a number is compiled for each of its values; FIPA keeps its numbers in its state."""

    def scaled(limits):
        mean = aggregate.mean()

        def apply(received, state, params):
            step, state, info = mean.apply(received, state, params)
            return {path: limits.max_step * leaf for path, leaf in step.items()}, state, info

        return mean._replace(apply=apply)

    monkeypatch.setitem(aggregate.AGGREGATORS, "scaled", scaled)
    config = tiny(compare=("fipa:aggregator.name=scaled:aggregator.limits.max_step=0", "fipa:aggregator.name=scaled"))
    still, moved = whole_run.run(config, tmp_path)["runs"].values()
    assert still["final"] != moved["final"]

    fipa = experiment.build(tiny(compare=("fipa", "fipa:aggregator.damping=0.5", "fipa:aggregator.limits.max_step=1")))
    assert len(fipa.compiled) == 1


def test_parameters_may_be_any_pytree(tmp_path):
    params = ({"w": jnp.arange(3.0)}, [jnp.ones((2, 2)), jnp.zeros(())])
    export(tmp_path / "model.msgpack", params)
    found = load(tmp_path / "model.msgpack", params)
    assert isinstance(found, tuple) and isinstance(found[1], list)
    np.testing.assert_array_equal(found[0]["w"], params[0]["w"])


def test_double_precision_outside_its_scope_is_an_error():
    with pytest.raises(ValueError, match=r"config\.precision: float64 needs"):
        experiment.build(tiny(precision="float64"))


@pytest.mark.parametrize("name", ["test", "holdout"])
def test_a_set_without_examples_is_refused_before_a_round(name):
    config = tiny()
    problem = task.build(config)
    nothing = {field: array[:0] for field, array in problem.test.items()}
    with pytest.raises(ValueError, match=f"problem.{name}: needs an example at least"):
        experiment.build(config, problem._replace(**{name: nothing}))


def misfits(problem):
    """(what is wrong, the problem, the error) of each."""
    number, made = len(problem.train["x"]), problem.task
    mask = np.arange(number) < number // 2
    out = made.outputs
    yield "masks", problem._replace(clients=[mask, ~mask]), "clients: needed the indices .* got bool .* of a mask take"
    yield (
        "beyond",
        problem._replace(clients=[np.arange(number + 1)]),
        rf"clients: `train` has the examples 0 to {number - 1}",
    )
    yield "padding", problem._replace(clients=[np.array([0, -1])]), "clients: `train` has .* those from -1 to 0"
    yield "floats", problem._replace(clients=[np.array([0.0, 1.0])]), "clients: needed the indices .* got float64"
    yield "of tests", problem._replace(test_clients=[np.array([10**6])]), "test_clients: `test` has the examples"
    yield "no test", problem._replace(test=None), "problem.test: needed"
    uneven = {**problem.train, "y": problem.train["y"][1:]}
    yield "uneven", problem._replace(train=uneven), "problem.train: needed as many examples in every array"
    alone = made._replace(outputs=lambda params, batch: out(params, batch)[0])
    yield "no pair", problem._replace(task=alone), r"task\.outputs: needed a pair"
    scalar = made._replace(metrics=lambda out, batch: {"mse": jnp.zeros(())})
    yield "a mean", problem._replace(task=scalar), r"task\.metrics: needed an axis of examples, \[B, \.\.\.\], of 'mse'"
    counter = made._replace(init=lambda key: {"net": made.init(key), "n": jnp.int32(3)})
    yield "a counter", problem._replace(task=counter), r"task\.init: needed floating-point arrays, got int32 .*'n'"


def test_a_problem_of_ones_own_that_does_not_fit_together_is_refused():
    config = tiny()
    for what, problem, words in misfits(task.build(config)):
        with pytest.raises(ValueError, match=words):
            experiment.build(config, problem)
            pytest.fail(what)


@pytest.mark.slow
def test_a_phase_on_cached_features_is_the_same_phase(tmp_path):
    """Rule by rule, to rounding; and the other rules of the run, on the whole network, go on as before."""
    head = "trainable=^Dense_1/:sketch.solver"
    specs = [
        f"fipa:{head}=head",
        f"fipa:{head}=head:cache_body=true",
        "fedavg",
        "fedavg:trainable=^Dense_1/:cache_body=true",
    ]
    config = tiny(compare=tuple(specs), precision="float64")
    config.warmup.rounds = 1
    runs = whole_run.run(config, tmp_path)["runs"]
    plain, cached = (runs[spec]["final"] for spec in specs[:2])
    assert plain != runs["fedavg"]["final"]
    for name, value in plain.items():
        np.testing.assert_allclose(cached[name], value, rtol=1e-9, err_msg=name)
    with jax.enable_x64(True):
        like = experiment.build(config).params
        files = tmp_path / "warmup.msgpack", *tmp_path.glob("fedavg*cache_body*.msgpack")
        before, after = (load(file, like) for file in files)
    chex.assert_trees_all_equal(before["Dense_0"], after["Dense_0"])
    assert not np.array_equal(before["Dense_1"]["kernel"], after["Dense_1"]["kernel"])


@pytest.mark.parametrize("trainable", [".*", "Dense_0/"])
def test_features_are_cached_for_the_head_alone(trainable):
    config = tiny()
    config.fipa.cache_body, config.fipa.trainable = True, trainable
    with pytest.raises(
        ValueError, match=r"cache_body needs config\.fipa\.trainable .*Dense_1.* selects 'Dense_0/bias'"
    ):
        experiment.build(config)


@pytest.mark.slow
def test_every_term_learns_under_every_rule(tmp_path):
    """Those that need neither labels nor the features of a network; every file of the run is that of one pair."""
    rules, names = ("fedavg", "fipa", "fisher_diagonal"), ("dyn", "mifa", "prox", "varp")
    pairs = [f"{rule}:term.name={term}" for rule in rules for term in names]
    config = tiny(compare=tuple(pairs))
    config.fipa.rounds, config.fipa.term.mu, config.fipa.local.lr = 6, 0.1, 0.05
    whole_run.run(config, tmp_path)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    for pair in pairs:
        losses = [row["test_mse"] for row in rows if row["run"] == pair]
        assert losses[-1] < losses[0], pair
