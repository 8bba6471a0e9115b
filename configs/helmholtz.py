"""Laplace u + u = f on [-1, 1]^2 with u = sin(pi x_1) sin(4 pi x_2); each of four clients owns a strip of x_1.

Beyond the paper: a known hard case of physics-informed networks (Wang et al. 2021), with a small one.
Hardware: two CPU cores, about a minute. Expected: see docs/results/equations.md.
Command: python scripts/train.py --config=configs/helmholtz.py
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.pde("helmholtz", variant)
    config.fipa.rounds = 400
    return config
