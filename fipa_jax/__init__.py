"""Federated learning in JAX where the server knows which parameters each client's data pins down.

Implements FIPA, Fisher-Informed Parameterwise Aggregation (arXiv 2601.13608), as pure functions. Nothing is imported
here: take what you need, e.g. `from fipa_jax import aggregate`.
"""

__version__ = "0.1.0"
