"""How do uploads become one step of the global model? Screening, averages, FIPA, past rounds, trust region."""

from fipa_jax.aggregate.rules import AGGREGATORS, Aggregator, FipaState, diagonal, fipa, fipa_step, mean
from fipa_jax.aggregate.uploads import REASONS, Uploads, collect

__all__ = [
    "AGGREGATORS", "REASONS", "Aggregator", "FipaState", "Uploads", "collect", "diagonal", "fipa", "fipa_step", "mean",
]  # fmt: skip
