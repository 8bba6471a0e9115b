"""Runs at few bytes: what they say they have sent, and what the config refuses."""

import json

import pytest
from helpers.runs import tiny

from fipa_jax.curvature import few_bits
from fipa_jax.run import experiment, whole_run

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
    report = 4 * RANK + 4 + 1 + 4 + 4 + 8  # residuals, products, converged, trace and its error, eight flags
    pair = 4 + few_bits.bytes_of(size, BITS)
    for row, senders in zip(rows, [CLIENTS, 1, 1], strict=True):
        assert row["sketches_sent"] == senders
        gradients = CLIENTS * few_bits.bytes_of(size, 12)
        assert row["bytes_up"] == gradients + senders * report + row["sketch_pairs"] * pair
        assert 0 < row["sketch_pairs"] <= senders * RANK
    assert rows[-1]["test_mse"] < rows[0]["test_mse"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fipa_few_bytes:local.optimizer=sgd", r"local\.optimizer: aggregator\.past\.kind = 'curvature' needs clients"),
        ("fipa_few_bytes:aggregator.relative=True", r"aggregator\.damping: past\.kind = 'curvature' divides gradients"),
        ("fipa_few_bytes:late.share=0.5", r"late\.share: past\.kind = 'curvature' takes gradients for those"),
        ("fedavg:local.compress.name=top_k", r"term\.name: local\.compress\.name = 'top_k' and the term 'feedback'"),
        ("fedavg:term.name=feedback", r"term\.name: local\.compress\.name = 'top_k' and the term 'feedback'"),
        ("fipa:sketch.share=1.5", r"sketch\.share: needs a share in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_names_its_field(spec, words):
    with pytest.raises(ValueError, match=words):
        experiment.build(tiny(compare=(spec,)))
