"""A surface of six anisotropic Gaussians on [0, 1]^2; each of six clients owns one cell of a 2 x 3 grid.

Reproduces: the 2-D regression of arXiv 2601.13608 (400 points a client, tanh MLP 2-20-20-1), with a local Gauss-Newton
step. Hardware: two CPU cores. Command: python scripts/train.py --config=configs/gaussians_2d.py
"""

from fipa_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.task.name = "gaussians_2d"
    config.task.examples_per_client = 400
    config.model.widths = (20, 20)
    config.precision = "float64"
    config.fipa.rounds = 200
    config.fipa.local.optimizer = "gauss_newton"
    config.fipa.local.lr = 1.0
    config.fipa.local.epochs = 1
    config.fipa.sketch.rank = 50
    config.fipa.aggregator.damping = 1e-5
    config.fipa.aggregator.max_step = 2.0
    return config
