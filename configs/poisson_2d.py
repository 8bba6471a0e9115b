"""-Laplace u = f on [-1, 1]^2 with u = sin(pi x_1) + sin(pi x_2); each of four clients owns a strip of x_1.

Reproduces: the 2-D Poisson problem of arXiv 2601.13608 (400 points a client and 20 on each face, boundary weight 100).
Hardware: two CPU cores, about a minute. Expected: see docs/results/equations.md.
Command: python scripts/train.py --config=configs/poisson_2d.py
         python scripts/train.py --config=configs/poisson_2d.py:published     Adam as local solver and the form `pinv`
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.pde("poisson_2d", variant)
    if variant:
        config.fipa.server.lr = 0.3
    config.fipa.rounds = 200
    return config
