"""-Laplace u = f on [-1, 1]^3 with u = sum_i sin(pi x_i); each of four clients owns a strip of x_1.

Beyond the paper, which stops at two dimensions: the same network and points.
Hardware: two CPU cores, about a minute. Not measured here yet.
Command: python scripts/train.py --config=configs/poisson_3d.py
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.pde("poisson_3d", variant)
    config.fipa.rounds = 400
    return config
