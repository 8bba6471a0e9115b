"""A surface of six anisotropic Gaussians on [0, 1]^2; each of six clients owns one cell of a 2 x 3 grid.

Reproduces: the 2-D regression of arXiv 2601.13608 (400 points a client, tanh MLP 2-20-20-1), with a local Gauss-Newton
step. Hardware: two CPU cores, about two minutes. Expected: see README, Results.
Command: python scripts/train.py --config=configs/gaussians_2d.py
"""

from fipa_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.task.name = "gaussians_2d"
    config.task.examples_per_client = 400
    config.model.widths = (20, 20)
    config.precision = "float64"
    config.eval.every = 10  # on a grid of 65,536 points
    config.warmup.rounds = 20
    config.fipa.rounds = 180
    config.fipa.sketch.solver = "lanczos"
    config.fipa.sketch.rank = 50
    config.fipa.aggregator.damping = 1e-6
    config.fipa.aggregator.max_step = 1.0
    for phase in (config.warmup, config.fipa):
        phase.local.optimizer = "gauss_newton"
        phase.local.lr = 1.0
        phase.local.epochs = 1
        phase.local.damping = 1e-5
    return config
