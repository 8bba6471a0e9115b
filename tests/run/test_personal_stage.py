"""Clients get models of their own after a phase: chosen without test examples, the same after a resume."""

import json

import jax
import numpy as np
import pytest
from helpers.runs import tiny

from fipa_jax import config as config_lib
from fipa_jax.reporting import console, metrics
from fipa_jax.run import experiment, personal_stage, personal_ways, whole_run
from fipa_jax.tasks.task import Problem

CLIENTS, N, TESTS, INPUTS = 5, 9, 4, 3
WAYS = ("local", "curvature")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Linear data of clients, each with an offset of its own."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "clients.npz"
    client = np.repeat(np.arange(CLIENTS), N + TESTS)
    x = rng.normal(size=[client.size, INPUTS])
    y = x.sum(axis=1) + rng.normal(size=CLIENTS)[client] + 0.1 * rng.normal(size=client.size)
    test = np.tile(np.arange(N + TESTS) >= N, CLIENTS)
    parts = {"": ~test, "_test": test}
    np.savez(
        path, **{f"{k}{end}": v[rows] for end, rows in parts.items() for k, v in dict(x=x, y=y, client=client).items()}
    )
    return path


def config_of(file, **fields):
    config = tiny(precision="float64", compare=("fipa",), chunk=0)
    config.task.name, config.task.split, config.task.file = "own_data", "given", str(file)
    config.task.examples_per_client = config_lib.default().task.examples_per_client
    config.task.standardise, config.eval.clients_every = "none", 0
    config.model.widths = ()
    config.fipa.local.optimizer, config.fipa.local.lr, config.fipa.local.steps = "gauss_newton", 1.0, 1
    config.fipa.sketch.solver, config.fipa.sketch.rank = "rows", INPUTS + 1
    config.personal.compare, config.personal.newcomers, config.personal.examples = WAYS, 0.4, (3, 6)
    config.personal.strengths, config.personal.steps, config.personal.folds = (0.1, 1.0), (5, 50), 3
    config.personal.fit_steps = 1
    config.personal.update(fields)
    return config


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """(work directory, summary) of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        return folder, whole_run.run(config_of(file), folder)


def quickly(patch):
    for module, name in ((whole_run, "draw_curves"), (console, "draw_split"), (console, "draw_prediction")):
        patch.setattr(module, name, lambda *_: None)


def test_every_way_has_figures_over_clients_for_every_number_of_examples(whole):
    last = metrics.read(whole[0] / "metrics.jsonl")[-1]
    final = whole[1]["runs"]["fipa"]["final"]
    for way in WAYS:
        for number in (3, 6):
            for over in ("mean", "worst_decile", "std"):
                name = f"personal_{way}_{number}_mse_{over}"
                assert last[name] == final[name] >= 0
            assert last[f"chosen_{way}_{number}_loss"] >= 0
    assert "seconds_personal" in last
    assert not [name for name in metrics.read(whole[0] / "metrics.jsonl")[0] if "personal" in name]
    text = console.personal_table(whole[1])
    assert text.count("own examples") == 2 and all(text.count(f"  {way} ") == 2 for way in WAYS)
    assert "own examples" in (whole[0] / "report.html").read_text()


def test_local_is_ridge_regression_on_the_examples_drawn_and_tests_have_no_say(whole, file):
    """Dense, in float64: cross-validation over the clients' own training examples, then the fit of all of these."""
    last, seed = metrics.read(whole[0] / "metrics.jsonl")[-1], 0
    with np.load(file) as arrays:
        data = {name: arrays[name] for name in arrays}
    new = np.sort(np.random.default_rng([seed, CLIENTS]).permutation(CLIENTS)[:2])
    rows, left = np.column_stack([np.ones(len(data["x"])), data["x"]]), data["y"]

    def fit(own, strength):
        system = rows[own].T @ rows[own] + strength * np.eye(INPUTS + 1)
        return np.linalg.solve(system, rows[own].T @ left[own])

    held, tests = {}, {}
    for strength in (0.1, 1.0):
        losses = []
        for place, client in enumerate(new):
            order = np.random.default_rng([seed, place]).permutation(np.flatnonzero(data["client"] == client))[:6]
            fold = np.arange(6) % 3
            errors = [
                left[order[fold == f]] - rows[order[fold == f]] @ fit(order[fold != f], strength) for f in range(3)
            ]
            losses.append(np.mean(np.concatenate(errors) ** 2) / 2)
            own = data["client_test"] == client
            answer = np.column_stack([np.ones(own.sum()), data["x_test"][own]]) @ fit(order, strength)
            tests.setdefault(strength, []).append(np.mean((answer - data["y_test"][own]) ** 2))
        held[strength] = np.mean(losses)
    chosen = min(held, key=held.get)
    assert last["chosen_local_6"] == chosen
    np.testing.assert_allclose(last["chosen_local_6_loss"], held[chosen], rtol=1e-6)
    np.testing.assert_allclose(last["personal_local_6_mse_mean"], np.mean(tests[chosen]), rtol=1e-6)
    np.testing.assert_allclose(last["personal_local_6_mse_std"], np.std(tests[chosen]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(), (4,)])
def test_all_ways_give_figures_and_those_with_strong_priors_stay_where_they_are(file, tmp_path, monkeypatch, widths):
    quickly(monkeypatch)
    config = config_of(file, compare=tuple(personal_ways.WAYS), strengths=(1e9,), steps=(1,), lr=1e-9, damping=1e9)
    config.model.widths, config.personal.fit_steps = widths, 5
    final = whole_run.run(config, tmp_path)["runs"]["fipa"]["final"]
    for number in (3, 6):
        mse = {way: final[f"personal_{way}_{number}_mse_mean"] for way in personal_ways.WAYS}
        staying = [mse[way] for way in ("finetune", "ditto", "curvature", "laplace", "spread")]
        np.testing.assert_allclose(staying, mse["global"], rtol=1e-3)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_the_stage_ends_as_one_that_is_not(whole, file, tmp_path, monkeypatch):
    quickly(monkeypatch)
    figures = personal_stage.figures

    def stopped(*_):
        raise KeyboardInterrupt

    config = config_of(file)
    config.checkpoint.seconds = 0.0
    monkeypatch.setattr(personal_stage, "figures", stopped)
    with pytest.raises(KeyboardInterrupt):
        whole_run.run(config, tmp_path)
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1
    monkeypatch.setattr(personal_stage, "figures", figures)
    again = whole_run.run(config, tmp_path)
    assert again["runs"]["fipa"]["final"] == whole[1]["runs"]["fipa"]["final"]
    assert (
        json.loads((tmp_path / "summary.json").read_text())["runs"]["fipa"]["final"] == again["runs"]["fipa"]["final"]
    )


def test_folds_hold_each_example_out_once_and_draws_are_nested():
    owned = [np.arange(10, 17), np.arange(20, 22)]
    few, more = (personal_stage.folds_of(owned, number, 5, folds=3, seed=1) for number in (2, 5))
    own = [np.asarray(more.fit.indices[3])[:5], np.asarray(more.fit.indices[7])[:2]]  # the last of each has all
    for client, rows in enumerate(own):
        assert len(set(rows)) == len(rows) and set(rows) <= set(owned[client])
        held = []
        for fold in range(3):
            at = 4 * client + fold
            fit, apart = (np.asarray(part.indices[at])[: part.num_examples[at]] for part in (more.fit, more.held))
            assert sorted([*fit, *apart]) == sorted(rows)
            held += [*apart]
        assert sorted(held) == sorted(rows) and more.held.num_examples[4 * client + 3] == 0
        assert [*few.fit.indices[4 * client + 3][:2]] == [*rows[:2]]
        assert set(np.asarray(more.fit.indices[4 * client : 4 * client + 4]).ravel()) <= set(owned[client])


def problem_of(tests):
    clients = [np.arange(3 * i, 3 * i + 3) for i in range(4)]
    return Problem(None, {}, {}, None, clients, test_clients=tests)


def test_newcomers_are_in_no_round_and_alone_get_models():
    config = tiny().personal
    config.compare, config.newcomers = ("ditto",), 0.5
    tests = [np.arange(2), np.arange(0), np.arange(2, 4), np.arange(4, 5)]
    problem, people = personal_stage.set_apart(problem_of(tests), config, seed=3)
    trained, new = ({int(rows[0]) // 3 for rows in of} for of in (problem.clients, people.owned))
    assert len(trained) == 2 and not trained & new and all(len(rows) for rows in people.tests)
    config.newcomers = 0.0
    problem, people = personal_stage.set_apart(problem_of(tests), config, seed=3)
    assert len(problem.clients) == 4 and [rows[0] for rows in people.owned] == [0, 6, 9]  # the second has no tests


def test_newcomers_without_test_examples_are_refused_before_anything_is_trained():
    config = tiny().personal
    config.compare, config.newcomers = ("ditto",), 0.25
    tests = [np.arange(0)] * 4
    with pytest.raises(ValueError, match=r"config\.personal\.newcomers: none of the 1 clients that are kept apart has"):
        personal_stage.set_apart(problem_of(tests), config, seed=3)
    config.newcomers = 0.0
    with pytest.raises(ValueError, match=r"config\.personal\.compare: none of the clients has test examples"):
        personal_stage.set_apart(problem_of(tests), config, seed=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compare": ("nonesuch",)}, r"config.personal.compare: unknown 'nonesuch'"),
        ({"newcomers": 0.01}, r"config.personal.newcomers: 0 of 5 clients"),
        ({"compare": (), "newcomers": 0.5}, r"config.personal.newcomers: keeps clients out"),
        ({"own": "nonesuch"}, r"config.personal.own: .*no parameter path matches 'nonesuch'"),
        *(({name: ()}, f"config.personal.{name}: needs one number") for name in ("examples", "steps", "strengths")),
    ],
)
def test_a_mistake_shows_before_anything_is_trained(file, fields, message):
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        experiment.build(config_of(file, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rank": 20}, r"sketch.rank: 20 is above"), ({"energy": 0.9, "probes": 0}, r"sketch.energy: needs the trace")],
)
def test_sketches_that_fail_show_before_anything_is_trained_where_a_way_takes_them(file, fields, message):
    """After a rule that has no sketches of its own."""
    config = config_of(file, compare=("ditto", "curvature"))
    config.compare = ("fedavg",)
    config.fipa.sketch.update(fields)
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match=rf"{message}.*personal.compare: 'curvature' takes the clients' sketches"):
            experiment.build(config)
        config.personal.compare = ("ditto",)
        experiment.build(config)


def test_clients_without_test_examples_of_their_own_are_refused():
    config = tiny()
    config.personal.compare = ("ditto",)
    with pytest.raises(ValueError, match=r"config.personal.compare: needs clients with test examples of their own"):
        experiment.build(config)
