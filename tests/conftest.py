"""What every test runs under; the environment is set before jax starts."""

from fipa_jax import config

config.prepare_process(devices=4)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """float64, for comparisons with dense oracles."""
    with jax.enable_x64(True):
        yield
