"""-u'' = f on [-1, 1] with u = sin(pi x); each of four clients owns a strip, only the outer two see a boundary.

Reproduces: the 1-D Poisson problem of arXiv 2601.13608 (400 points a client, boundary weight 100, tanh MLP 1-20-20-1,
float64).
Hardware: two CPU cores, about a minute. Expected: see docs/results/equations.md.
Command: python scripts/train.py --config=configs/poisson_1d.py
         python scripts/train.py --config=configs/poisson_1d.py:published     Adam as local solver and the form `pinv`
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.pde("poisson_1d", variant)
    config.fipa.rounds = 200
    return config
