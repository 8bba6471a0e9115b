"""Programs for devices that are not there: each branch is traced, and what is lowered is what such a device can run."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fipa_jax import backend

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))


def test_a_function_is_traced_anew_for_another_kind_of_device():
    function = jax.jit(lambda x: 2 * x if backend.kind() == "tpu" else x)
    assert backend.kind() == jax.default_backend() == "cpu"
    assert function(jnp.float32(1)) == 1
    with backend.traced_for("tpu"):
        assert backend.kind() == "tpu"
        assert function(jnp.float32(1)) == 2
    assert function(jnp.float32(1)) == 1, "and neither is taken for the other"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sine", "cifar10", "tiny_imagenet"])
def test_every_stage_lowers_without_float64_or_python(name):
    """But for the merge of a run in float32 on a GPU, which has float64 and needs it; the sine task is float64."""
    from benchmarks import lowering

    rows = lowering.rows_of(name)
    assert {row["stage"] for row in rows} == {"draw", "train", "sketch", "serve"}
    for row in rows:
        merges_in_double = row["stage"] == "serve" and row["device"] == "gpu" and row["phase"].startswith("fipa")
        assert name == "sine" or (row["float64"] > 0) == merges_in_double, row
        assert not any("callback" in call or "lapack" in call for call in row["calls"]), row
