"""Runs at few bytes: what they say they have sent, and what the config refuses."""

import json

import numpy as np
import pytest
from helpers.runs import tiny

from fipa_jax.curvature import few_bits
from fipa_jax.curvature.common_basis import bytes_of_core
from fipa_jax.reporting import metrics
from fipa_jax.run import experiment, loop, whole_run

CLIENTS, ROUNDS, RANK, BITS = 4, 3, 3, 8
SPARING = f"fipa_few_bytes:sketch.rank={RANK}:sketch.bits={BITS}:sketch.share=0.25"


@pytest.mark.slow
def test_the_bytes_are_those_of_gradients_and_of_the_sketches_that_are_due(tmp_path):
    """All four clients in the first round, then one in each; the gradients in 12 bits."""
    spec = f"{SPARING}:local.compress.name=few_bits:local.compress.bits=12"
    config = tiny(compare=(spec,), fipa={"rounds": ROUNDS})
    config.task.num_clients = CLIENTS
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    size = 3 + 3 + 3 + 1  # of the network 1-3-1
    report = 4 + 1 + 4 + 4 + 8  # products, converged, trace and its error, eight flags
    pair = 4 + 4 + few_bits.bytes_of(size, BITS)  # eigenvalue, residual, vector
    for row, senders in zip(rows, [CLIENTS, 1, 1], strict=True):
        assert row["sketches_sent"] == senders
        gradients = CLIENTS * few_bits.bytes_of(size, 12)
        assert row["bytes_up"] == gradients + senders * report + row["sketch_pairs"] * pair
        assert 0 < row["sketch_pairs"] <= senders * RANK
    assert rows[-1]["test_mse"] < rows[0]["test_mse"]


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("", marks=pytest.mark.slow),
        pytest.param(":sketch.gradient_scale=0.03", marks=pytest.mark.slow),
        pytest.param(":sketch.budget=100", marks=pytest.mark.slow),
        pytest.param(":term.name=scaffold", marks=pytest.mark.slow),
    ],
)
def test_no_client_sends_more_than_its_link_carries_in_time(tmp_path, rest):
    """Two pairs of the three, beside the update, and controls or gradients; a budget buys among them."""
    size, itemsize = 10, 4
    sent = size * itemsize * (1 + ("scaffold" in rest) + ("gradient_scale" in rest))
    report = 4 + 1 + 4 + 4 + 8  # without the residuals, see above
    bytes_ = sent + report + 2 * (itemsize + 4 + size * itemsize)
    spec = f"fipa:sketch.rank={RANK}:sketch.link=0.008:sketch.deadline={bytes_ / 1000}{rest}"
    config = tiny(compare=(f"{spec}:most_bytes_up={ROUNDS * CLIENTS * bytes_}",), fipa={"rounds": ROUNDS})
    config.task.num_clients = CLIENTS
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == ROUNDS, "the link's bytes are the most that a round may take"
    for row in rows:
        assert 0 < row["bytes_up"] <= CLIENTS * bytes_
        if "gradient_scale" in rest or "budget" in rest:
            assert row["sketch_pairs"] <= 2 * CLIENTS
        else:
            assert row["sketch_pairs"] == 2 * CLIENTS and row["bytes_up"] == CLIENTS * bytes_


@pytest.mark.slow
@pytest.mark.parametrize(
    "rest", ["", ":sketch.share=0.75", ":sketch.gradient_scale=1000", ":sketch.share=0.75:sketch.gradient_scale=1000"]
)
def test_a_phase_keeps_to_its_budget_in_the_mean(tmp_path, rest):
    """One of the three pairs, in few bits, whoever is asked and whatever else cuts their number.

    Who sends no sketch sends no gradient for it either.
    """
    report, pair = 21, 4 + 4 + few_bits.bytes_of(10, BITS)
    budget = report + pair
    spec = f"fipa_few_bytes:sketch.rank={RANK}:sketch.bits={BITS}:sketch.budget={budget}{rest}"
    config = tiny(compare=(spec,), fipa={"rounds": 30})
    config.task.num_clients, config.rounds_per_call = CLIENTS, 30
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sent = [report * row["sketches_sent"] + pair * row["sketch_pairs"] for row in rows]
    others = [row["bytes_up"] - bytes_ for row, bytes_ in zip(rows, sent, strict=True)]
    assert others == [40 * (CLIENTS + row["sketches_sent"] * ("gradient_scale" in rest)) for row in rows]
    assert rows[0]["sketch_level"] == 0 < rows[1]["sketch_level"]
    least = 0.6 if rest.count("sketch") == 2 else 0.85  # few are asked, whose pairs are cut: nothing is left to buy
    assert least < sum(sent) / (30 * CLIENTS * budget) < 1.15


@pytest.mark.parametrize("bits", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_within_the_span_the_bytes_are_those_of_gradients_cores_and_the_columns_shown(tmp_path, bits):
    """At first four directions come in, of at most six; all clients are asked about those, half of them later on."""
    fields = f"aggregator.span.columns=6:aggregator.span.fresh=4:aggregator.span.bits={bits}:sketch.bits={bits}"
    spec = f"fipa_span:{fields}:sketch.share=0.5:local.compress.name={'few_bits' if bits else 'none'}"
    config = tiny(compare=(spec,), fipa={"rounds": 6})
    config.task.num_clients = CLIENTS
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    size, itemsize = 10, {"float32": 4, "float64": 8}[config.precision]

    assert [row["columns"] for row in (rows[0], rows[1], rows[-1])] == [0, 4, 6]
    assert [row["sketches_sent"] for row in rows[:2]] == [0, CLIENTS]
    for row in rows:
        columns, asked = row["columns"], row["sketches_sent"]
        core, vector = bytes_of_core(columns, bits, itemsize), few_bits.bytes_of(size, bits, itemsize)
        assert row["bytes_up"] == CLIENTS * vector + asked * core
        assert row["bytes_down"] == CLIENTS * itemsize * size + asked * columns * vector
    assert rows[-1]["test_mse"] < rows[0]["test_mse"]


def test_changes_in_two_bits_come_to_rest_and_whole_updates_do_not(tmp_path):
    """Clients differ, so that their updates stay long, and change less and less."""
    two = "fedavg:local.steps=20:term.name=varp:local.compress.bits=2:local.compress.name"
    specs = (f"{two}=change", f"{two}=few_bits")
    config = tiny(compare=specs, fipa={"rounds": 40})
    config.task.num_clients, config.eval.every = CLIENTS, 1
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    moves = [max(np.abs(np.diff([row["test_mse"] for row in rows if row["run"] == spec][-10:]))) for spec in specs]
    assert moves[0] < moves[1] / 4


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fipa_span:local.optimizer=sgd", r"config\.fipa\.local\.optimizer: the rule 'span' asks about directions"),
        ("fipa_span:late.share=0.5", r"config\.fipa\.late\.share: the rule 'span' asks about the present basis"),
        ("fipa:sketch.link=1", r"sketch\.deadline: a link and a deadline go together"),
        ("fedavg:sketch.deadline=1", r"sketch\.link: a link and a deadline go together"),
        ("fipa:sketch.link=1e-5:sketch.deadline=1", r"sketch\.deadline: until then the link carries 1 bytes"),
        ("fipa_span:sketch.link=1:sketch.deadline=1", r"sketch\.link: is of eigenpairs, and under the rule 'span'"),
        ("fipa_span:sketch.budget=100", r"config\.fipa\.sketch\.budget: is of eigenpairs, and under the rule 'span'"),
        ("fisher_diagonal:sketch.budget=100", r"sketch\.budget: is of eigenpairs, and under the rule 'diagonal'"),
        ("fedpm:sketch.link=1:sketch.deadline=1", r"sketch\.link: is of eigenpairs, and under the rule 'kronecker'"),
        ("fipa_span:sketch.store=bfloat16", r"sketch\.store: is of eigenpairs, .* set it to ''"),
        ("fipa_span:sketch.bits=1", r"sketch\.bits: needs 2 to 16 bits"),
        ("fipa_span:aggregator.limits.max_step=5", r"limits\.max_step: the rule 'span' bounds its step by"),
        ("fipa_few_bytes:local.optimizer=sgd", r"local\.optimizer: aggregator\.past\.kind = 'curvature' needs clients"),
        ("fipa_few_bytes:aggregator.relative=True", r"aggregator\.damping: past\.kind = 'curvature' divides gradients"),
        ("fipa_few_bytes:late.share=0.5", r"late\.share: past\.kind = 'curvature' takes gradients for those"),
        ("fedavg:local.compress.name=top_k", r"term\.name: local\.compress\.name = 'top_k' and the term 'feedback'"),
        ("fedavg:term.name=feedback", r"term\.name: local\.compress\.name = 'top_k' and the term 'feedback'"),
        ("fedavg:local.compress.name=change", r"term\.name: local\.compress\.name = 'change' needs 'varp', which"),
        ("fipa:sketch.share=1.5", r"sketch\.share: needs a share in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_names_its_field(spec, words):
    with pytest.raises(ValueError, match=words):
        experiment.build(tiny(compare=(spec,)))


SPAN = "fipa_span:aggregator.span.columns=10:aggregator.span.fresh=4:aggregator.span.bits=8:sketch.share=1"


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ({"rounds_per_call": 1}, {"stage_seconds": True})]


@pytest.mark.parametrize("how", [{"rounds_per_call": 50}, *SLOW])
def test_a_phase_ends_before_its_clients_send_too_much_and_is_evaluated_then(tmp_path, how):
    """However many rounds run before the host looks, and though the cores of the first rounds are small."""
    most, config = 4000, tiny(compare=("fedavg", SPAN), fipa={"rounds": 90})
    config.task.num_clients, config.eval.every, config.fipa.most_bytes_up = CLIENTS, 50, float(most)
    config.update(how)
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for method in config.compare:
        mine = [row for row in rows if row["run"] == method]
        sent = [row["bytes_up"] for row in mine]
        assert 5 < len(mine) < 90 and sum(sent) <= most < sum(sent) + max(sent)
        assert "test_mse" in mine[-1]


@pytest.mark.slow
def test_a_run_that_goes_on_knows_what_was_sent_before(tmp_path, monkeypatch):
    config = tiny(compare=(SPAN,), fipa={"rounds": 90})
    config.task.num_clients, config.fipa.most_bytes_up, config.checkpoint.seconds = CLIENTS, 4000.0, 0.0
    whole_run.run(config, tmp_path / "whole")
    calls = iter(range(4))
    monkeypatch.setattr(loop, "check_progress", lambda *_: next(calls))  # which ends it in the middle
    with pytest.raises(StopIteration):
        whole_run.run(config, tmp_path / "parts")
    monkeypatch.undo()
    whole_run.run(config, tmp_path / "parts")
    whole, parts = (
        [row["bytes_up"] for row in metrics.read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")
    )
    assert whole == parts


def test_bytes_that_do_not_suffice_for_a_round_are_refused(tmp_path):
    config = tiny(compare=(SPAN,))
    config.task.num_clients, config.fipa.most_bytes_up = CLIENTS, 100.0
    with pytest.raises(ValueError, match=r"most_bytes_up: a round may take \d+ bytes, got 100"):
        whole_run.run(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists(), "it shows before the first round"


@pytest.mark.slow
def test_asking_half_of_the_clients_keeps_the_way_down(tmp_path):
    """Each of four clients knows a part of the line, and what it has not seen looks flat to it: a guess is needed."""

    def ends(prior, seed):
        spec = f"fipa_span:aggregator.span.columns=6:aggregator.span.fresh=4:aggregator.span.prior={prior}"
        spec += ":aggregator.span.bits=8:sketch.share=0.5"
        config = tiny(compare=(spec,), fipa={"rounds": 60}, seed=seed)
        config.task.num_clients, config.rounds_per_call, config.eval.every = CLIENTS, 60, 5
        folder = tmp_path / f"{prior} {seed}"
        whole_run.run(config, folder)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return max(row["test_mse"] for row in rows[-20:] if "test_mse" in row)

    guessed, without = ([ends(prior, seed) for seed in range(3)] for prior in (0.3, 0.0))
    assert max(guessed) < 0.05 < max(without)


@pytest.mark.slow
def test_who_holds_all_examples_sends_nothing_and_takes_all_rounds(tmp_path):
    """The ceiling, beside a method that ends where the bytes are spent."""
    config = tiny(compare=("fedavg", "centralised:aggregator.name=mean"), fipa={"rounds": 8})
    config.task.num_clients, config.fipa.most_bytes_up = CLIENTS, CLIENTS * 40 * 3.5
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    of_each = {name: [row for row in rows if row["run"] == name] for name in config.compare}
    assert [len(of_each[name]) for name in config.compare] == [3, 8]
    assert all(row["bytes_up"] == row["bytes_down"] == 0 for row in of_each[config.compare[1]])
    assert all(row["bytes_up"] == CLIENTS * 40 for row in of_each["fedavg"])


@pytest.mark.slow
def test_the_server_of_a_run_knows_in_how_many_bits_vectors_come(tmp_path):
    """Three vectors of ten entries in 4 bits are far from orthogonal, and come from no client at fault."""
    config = tiny(compare=(f"fipa_few_bytes:sketch.rank={RANK}:sketch.bits=4",), fipa={"rounds": 6})
    config.task.num_clients = CLIENTS
    whole_run.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["clients_rejected"] for row in rows] == [0] * 6
