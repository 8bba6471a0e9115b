"""A surface of six anisotropic Gaussians on [0, 1]^2; each of six clients owns one cell of a 2 x 3 grid.

Reproduces: the 2-D regression of arXiv 2601.13608 (400 points a client, tanh MLP 2-20-20-1).
Hardware: two CPU cores, about two minutes. Expected: see docs/results/gaussians.md.
Command: python scripts/train.py --config=configs/gaussians_2d.py     Levenberg-Marquardt by clients and server
         python scripts/train.py --config=configs/gaussians_2d.py:adaptive     published: rank and local steps adapt
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes
from fipa_jax.lookup import lookup


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name = "gaussians_2d"
    config.task.examples_per_client = 400
    config.model.widths = (20, 20)
    config.precision = "float64"
    config.eval.every, config.eval.clients_every = 20, 0  # on a grid of 65,536 points
    config.eval.batch_size = 1024
    config.rounds_per_call = 20
    config.fipa.rounds = 200
    config.fipa.sketch.solver, config.fipa.sketch.rank = "lanczos", 50
    config.fipa.local.batch_size = 0
    lookup({"": recipes.levenberg_marquardt, "adaptive": _adaptive}, variant, "--config")(config)
    return config


def _adaptive(config):
    """As published: rank and local steps adapt."""
    config.fipa.rounds = 1000
    config.fipa.local.lr, config.fipa.local.adaptive.scale, config.fipa.local.steps = 0.1, 0.01, 200
    config.fipa.sketch.gradient_scale = 1.0
