"""All defaults, their checks, named runs, and the command line; no jax in here."""

from fipa_jax import installed

installed.check("experiments", "fipa_jax.config", "ml_collections")


from fipa_jax.config.checks import validate  # noqa: E402
from fipa_jax.config.defaults import default  # noqa: E402
from fipa_jax.config.process import prepare_process, user_cache  # noqa: E402

__all__ = ["default", "prepare_process", "user_cache", "validate"]
