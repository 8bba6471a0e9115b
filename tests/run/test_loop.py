"""How a phase is run changes nothing: many rounds in one call, and all examples in one client's hands."""

from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from helpers import runs
from jax.flatten_util import ravel_pytree

from fipa_jax import config as config_lib
from fipa_jax import tasks
from fipa_jax.config import methods as compared
from fipa_jax.federation import round as rounds
from fipa_jax.federation.state import State
from fipa_jax.reporting import metrics
from fipa_jax.run import experiment, loop, whole_run
from fipa_jax.saving.journal import Rows
from fipa_jax.saving.model_files import load


def tiny(**fields):
    """Six rounds of three clients."""
    config = runs.tiny(precision="float64")
    config.task.num_clients, config.task.examples_per_client = 3, 6
    config.fipa.rounds = 6
    config.update(fields)
    return config


def _phase(config, monkeypatch, rule):
    """(rows, how often a round had been traced at each of them) of a compared method, and the parameters."""
    with jax.enable_x64(True):
        built = experiment.build(config)
        traces, whole_round = [0], rounds.whole_round

        def counted(*given):
            traces[0] += 1
            return whole_round(*given)

        class Counting(Rows):
            def write(self, row):
                self.append((row, traces[0]))

        monkeypatch.setattr(rounds, "whole_round", counted)
        settings, written = compared.method(config, rule), Counting()
        params = loop.run_phase(built, settings, rule, built.params, config.first_round, written)
        again = loop.run_phase(built, settings, rule, built.params, config.first_round, Rows())
        monkeypatch.undo()
        chex.assert_trees_all_equal(params, again)
        return [row for row, _ in written], [count for _, count in written] + traces, params


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("fipa:sketch.gradient_scale=0.03:term.name=scaffold:local.lr_decay=0.9", marks=pytest.mark.slow),
        "fipa_memory:sketch.gradient_scale=0.03:late.share=0.5:late.most=3",
    ],
)
@pytest.mark.slow
def test_many_rounds_in_a_call_are_the_same_rounds(monkeypatch, rule):
    """Rows, dues, bytes of ranks that adapt, controls or past rounds of a cohort, rates by the round; compiled once."""
    config = tiny(cohort=2, first_round=1)
    config.eval.every, config.eval.clients_every = 3, 2
    wanted, _, params = _phase(config, monkeypatch, rule)
    config.rounds_per_call = 4
    found, traces, same = _phase(config, monkeypatch, rule)
    assert traces[0] > 0 and len(set(traces)) == 1, "the second call's two rounds, or the same phase again, trace anew"
    chex.assert_trees_all_close(same, params, rtol=1e-9, atol=1e-12)
    assert [row["round"] for row in found] == [1, 2, 3, 4, 5, 6]
    plain = lambda row: {name: value for name, value in row.items() if not name.startswith("seconds_")}
    for mine, theirs in zip(map(plain, found), map(plain, wanted), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float | list):
                np.testing.assert_allclose(mine[name], value, rtol=1e-8, atol=1e-10, err_msg=name)
            else:
                assert mine[name] == value, name
    # The last round's figures are always due.
    assert [row["round"] for row in found if "test_mse" in row] == [3, 6]
    assert [row["round"] for row in found if "client_mse_mean" in row] == [2, 4, 6]
    assert all(row["seconds_round"] > 0 for row in found)
    assert len({row["bytes_up"] for row in found}) > 1, "no rank adapts: a test of nothing"


@pytest.mark.slow
def test_rounds_that_nobody_waits_for_are_the_same_rounds(monkeypatch):
    """Looked at when figures are due, to the bit what they are one by one; a time only for the round as a whole."""
    rule = "fipa:term.name=scaffold"
    config = tiny(cohort=2, first_round=1)
    config.eval.every, config.eval.clients_every = 3, 2
    wanted, _, params = _phase(config, monkeypatch, rule)
    config.stage_seconds = False
    found, _, same = _phase(config, monkeypatch, rule)
    chex.assert_trees_all_equal(same, params)
    plain = lambda row: {name: value for name, value in row.items() if not name.startswith("seconds_")}
    assert list(map(plain, found)) == list(map(plain, wanted))
    assert {name for row in found for name in row if name.startswith("seconds_")} == {"seconds_round"}
    stages = {f"seconds_{stage}" for stage in ("fetch", "train", "sketch", "aggregate", "evaluate")}
    assert all(stages <= set(row) and min(row[name] for name in stages) >= 0 for row in wanted)


@pytest.mark.parametrize("every", [0, 2])
def test_figures_are_due_by_the_rounds_number_and_in_the_last(every):
    settings = config_lib.default().eval
    settings.every, settings.clients_every = 3, every
    for due in (loop.due, jax.jit(lambda k, last: loop.due(settings, k, last))):
        given = (settings,) if due is loop.due else ()
        found = np.array([due(*given, k, 7) for k in range(8)]).T
        np.testing.assert_array_equal(np.flatnonzero(found[0]), [0, 3, 6, 7])
        np.testing.assert_array_equal(np.flatnonzero(found[1]), [0, 2, 4, 6, 7] if every else [])


@pytest.mark.slow
@pytest.mark.parametrize("per_call", [1, 4])
def test_a_phase_leaves_the_average_of_its_models(monkeypatch, per_call):
    """By the models of shorter runs; it is evaluated beside the last one, and no step is another."""
    rule, decay = "fipa:trainable=^Dense_1/", 0.5
    config = tiny(rounds_per_call=per_call)
    config.fipa.rounds = 3
    with jax.enable_x64(True):
        models = [experiment.build(config).params]
    for rounds_ in (1, 2, 3):
        wanted, _, params = _phase(config, monkeypatch, f"{rule}:rounds={rounds_}")
        models.append(params)
    found, _, left = _phase(config, monkeypatch, f"{rule}:server.average={decay}")
    weights = decay ** np.arange(3, -1, -1)
    mean = jax.tree.map(lambda *leaves: np.average(np.stack(leaves), axis=0, weights=weights), *models)
    chex.assert_trees_all_close(left, mean, rtol=1e-12, atol=1e-14)
    chex.assert_trees_all_equal(left["Dense_0"], models[0]["Dense_0"])
    with jax.enable_x64(True):
        built = experiment.build(config)
        figures = jax.device_get(loop.of_model(built, {"test": built.problem.test}, left))
    last = found[-1]
    np.testing.assert_allclose(last["test_average_mse"], figures["test_mse"], rtol=1e-9)
    np.testing.assert_allclose([row["test_mse"] for row in found], [row["test_mse"] for row in wanted], rtol=1e-9)
    assert abs(last["test_average_mse"] / last["test_mse"] - 1) > 1e-6


def test_figures_of_the_clients_own_models_that_fail_cost_no_row_and_no_model(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "own_models", fails)
    monkeypatch.setattr(loop, "result_of", lambda parts, state: None)
    built = SimpleNamespace(config=runs.tiny())
    phase = loop.Phase(built, built.config.fipa, SimpleNamespace(chunk=1), None, 0, 1, 0, lambda row, info: row)
    advance = lambda state, k, *_: (state._replace(round=k + 1), [({"round": k, "bytes_up": 0}, {})])
    journal, state = Rows(), State(*[()] * 5, round=0)
    assert loop.rounds_of(phase, "fedavg", advance, state, journal, {}).round == 2
    assert [row["round"] for row in journal] == [0, 1] and "own models" in caplog.text


def test_stores_on_the_host_and_many_rounds_in_a_call_do_not_go_together():
    """Which is said before anything runs."""
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"config\.rounds_per_call.*client_store = 'device'"):
        experiment.build(tiny(rounds_per_call=2, client_store="host"))


def test_past_rounds_without_room_is_refused_before_the_first_round(monkeypatch):
    config = tiny(compare=("fipa:aggregator.past.kind=prior",))
    with jax.enable_x64(True):
        experiment.build(config)
    monkeypatch.setattr(experiment, "host_bytes", lambda: 1000)
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match=r"aggregator\.past: the rule would keep .* GiB .*past\.rank"),
    ):
        experiment.build(config)


def test_pooled_is_one_client_that_owns_everything():
    """The same arrays as of a problem whose clients are one; in every round, whatever the cohort."""
    with jax.enable_x64(True):
        config = tiny(cohort=2)
        problem = tasks.build(config)
        pooled = experiment.pooled(experiment.build(config, problem))
        one = problem._replace(clients=[np.concatenate(problem.clients)])
        config.cohort = 0
        wanted = experiment.build(config, one)
        chex.assert_trees_all_equal(pooled.population, wanted.population)
        assert pooled.population.num_examples.tolist() == [18]
        assert experiment.parts_of(pooled, config.fipa).cohort == experiment.parts_of(wanted, config.fipa).cohort == 1


@pytest.mark.slow
def test_a_centralised_rule_takes_the_step_of_all_examples_and_those_beside_it_do_not(tmp_path):
    """Gauss-Newton, against the dense pooled step; cohort and clients are as they were for the other rule."""
    local = "local.optimizer=gauss_newton:local.lr=1:local.steps=1:local.damping=0.1"
    config = tiny(cohort=2, compare=(f"centralised:aggregator.name=mean:{local}", f"fedavg:{local}"))
    config.fipa.rounds = config.eval.clients_every = 1
    whole_run.run(config, tmp_path)
    pooled, split = metrics.read(tmp_path / "metrics.jsonl")
    assert pooled["bytes_down"] == pooled["bytes_up"] == 0 < split["bytes_down"], "nothing is sent"
    assert pooled["client_mse_std"] == 0 < split["client_mse_std"]

    with jax.enable_x64(True):
        built = experiment.build(config)
        before, unravel = ravel_pytree(built.params)
        data, outputs = built.population.data, built.problem.task.outputs
        error = lambda theta: (outputs(unravel(theta), data)[0] - data["y"])[:, 0]
        residual, rows = np.asarray(error(before)), np.asarray(jax.jit(jax.jacobian(error))(before))
        curvature, gradient = rows.T @ rows / residual.size, rows.T @ residual / residual.size
        wanted = -np.linalg.solve(curvature + 0.1 * np.eye(before.size), gradient)
        for name, is_it in (("centralised", True), ("fedavg", False)):
            after = load(next(tmp_path.glob(f"{name}*.msgpack")), built.params)
            moved = np.asarray(ravel_pytree(after)[0] - before)
            assert (np.linalg.norm(moved - wanted) < 1e-9 * np.linalg.norm(wanted)) == is_it
