"""A run whose server sees sums alone: whole runs, what the config refuses, and what it says it has sent."""

import json

import jax
import pytest
from helpers.runs import tiny

from fipa_jax.run import experiment, whole_run

GRADIENTS = "fipa_sums_of_gradients:aggregator.trust=True:aggregator.relative=False:aggregator.damping=0.1"


@pytest.mark.slow
def test_runs_from_sums_of_gradients_and_of_trained_updates(tmp_path):
    """Both lower the loss, gradients in fixed point."""
    specs = f"{GRADIENTS}:aggregator.sums.bits=24", "fipa_sums:aggregator.sums.columns=8"
    whole_run.run(tiny(compare=specs, fipa={"rounds": 5}), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for spec in specs:
        of_run = [row for row in rows if row["run"] == spec]
        assert of_run[-1]["test_mse"] < of_run[0]["test_mse"]
        assert not any(row["skipped"] for row in of_run)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fipa:aggregator.name=sums", r"config\.fipa\.aggregator\.limits\.max_step: a sum shows no single client"),
        ("fipa_sums:late.share=0.5", r"config\.fipa\.late\.share: the rule 'sums' adds up products with one basis"),
        (
            "fipa_sums:aggregator.sums.form=gradient",
            r"local\.optimizer: .*'gradient' needs a local solver = 'gradient'",
        ),
        ("fipa_sums:local.optimizer=gradient", r"local\.optimizer: .*'galerkin' needs a local solver that trains"),
        (
            "fipa_sums:sketch.energy=0.9",
            r"config\.fipa\.sketch\.energy: is of eigenpairs, and under the rule 'sums' clients send none",
        ),
        ("fipa_sums:aggregator.past.kind=latest", r"past\.kind: 'latest' keeps messages of single clients"),
        ("fipa_sums:aggregator.sums.bits=5", r"sums\.bits: needs 0 for floating point"),
    ],
)
def test_what_a_sum_cannot_serve_names_its_field(spec, words):
    with pytest.raises(ValueError, match=words):
        experiment.build(tiny(compare=(spec,)))


@pytest.mark.slow
def test_the_traffic_is_the_basis_down_and_its_image_up(tmp_path):
    whole_run.run(
        tiny(compare=("fipa_sums:aggregator.sums.columns=4:aggregator.sums.fresh=1",), fipa={"rounds": 1}), tmp_path
    )
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    config = json.loads((tmp_path / "config.json").read_text())
    size, itemsize = row_size(tmp_path), {"float32": 4, "float64": 8}[config["precision"]]
    clients = config["task"]["num_clients"]
    assert row["bytes_up"] == clients * itemsize * size * (1 + 4)
    assert row["bytes_down"] == clients * (itemsize * size * (1 + 4) + 4)


def row_size(folder):
    """The model's parameters, of the file that holds them."""
    from flax import serialization

    tree = serialization.msgpack_restore(next(folder.glob("fipa_sums*.msgpack")).read_bytes())
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if getattr(leaf, "ndim", 0))
