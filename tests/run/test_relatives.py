"""Runs of FIPA's relatives, and what a config of theirs refuses."""

import json

import pytest
from helpers.runs import tiny

from fipa_jax.run import experiment, whole_run

RUNS = (
    "fedpm:local.lr=0.1:aggregator.damping=1",
    "fedpm:local.lr=0.1:aggregator.layers.kind=kfac:aggregator.damping=1:aggregator.past.kind=prior",
    "fedfisher_kfac:aggregator.damping=0.1",
    "fedivon:local.lr=0.1:aggregator.posterior.start=10",
    "ivon_admm:local.lr=0.1:aggregator.posterior.start=10",
    "fedavg:server.optimizer=eve",
)


@pytest.mark.slow
def test_runs_lower_the_loss(tmp_path):
    whole_run.run(tiny(compare=RUNS, fipa={"rounds": 6}), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for spec in RUNS:
        of_run = [row for row in rows if row["run"] == spec]
        assert of_run[-1]["test_mse"] < of_run[0]["test_mse"], spec
        assert not any(row["skipped"] for row in of_run)
    update, inputs, outputs = 10, 3 + 10, 6 + 1  # numbers of a client: 1-3-1 with biases, halves of the layers' factors
    for spec, factors in zip(RUNS, (inputs, inputs + outputs, inputs + outputs, update, update, 0), strict=True):
        sent = next(row["bytes_up"] for row in rows if row["run"] == spec)
        assert sent == 2 * 4 * (update + factors), spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fipa:local.optimizer=kronecker", r"local\.optimizer: 'kronecker' steps by the client's layer factors"),
        ("fedpm:aggregator.at=local", r"local\.optimizer: 'kronecker' .*aggregator\.at = 'broadcast'"),
        ("fedpm:aggregator.relative=True", r"local\.matched: needs an absolute damping"),
        ("fedpm:aggregator.past.kind=latest", r"past\.kind: 'kronecker' remembers decayed sums"),
        ("fipa:local.optimizer=ivon", r"'ivon' and aggregator\.name = 'posterior' need each other"),
        ("fedivon:term.name=duals", r"term\.name: 'duals' and aggregator\.posterior\.form = 'admm' need each other"),
        ("fedivon:term.name=prox", r"term\.name: 'ivon' takes the term 'duals' or 'none'"),
        ("ivon_admm:late.share=0.5", r"posterior\.form: 'admm' needs all clients in every round"),
    ],
)
def test_what_does_not_fit_names_its_field(spec, words):
    with pytest.raises(ValueError, match=words):
        experiment.build(tiny(compare=(spec,)))
