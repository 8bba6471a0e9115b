"""-u'' + u (1 - u) = f on [-1, 1] with u = x^2 (1 - x); each of four clients owns a strip.

Reproduces: the Fisher-KPP problem of arXiv 2601.13608 (400 points a client, boundary weight 100).
Hardware: two CPU cores, about a minute. Expected: see docs/results/equations.md.
Command: python scripts/train.py --config=configs/fisher_kpp.py
         python scripts/train.py --config=configs/fisher_kpp.py:published     Adam as local solver and the form `pinv`
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.pde("fisher_kpp", variant)
    config.fipa.rounds = 200
    return config
