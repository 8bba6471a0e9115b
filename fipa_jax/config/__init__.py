"""All defaults, their checks, named runs, and the command line; no jax in here."""

from fipa_jax.config.checks import validate
from fipa_jax.config.defaults import default
from fipa_jax.config.process import prepare_process, user_cache

__all__ = ["default", "prepare_process", "user_cache", "validate"]
