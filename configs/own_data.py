"""Your own arrays: regression on an .npz file, split over four clients by clusters of its inputs.

Reproduces: nothing published; FIPA beside FedAvg on your data (tanh MLP d-20-20-K), with the local Gauss-Newton step of
configs/gaussians_2d.py. The file holds x [N, d] and y [N] or [N, K], as np.savez("mine.npz", x=x, y=y) writes it; what
else may be in it is said in fipa_jax/tasks/own_data.py. Hardware: two CPU cores, about a minute for 2,000 examples of
five inputs. Expected: a test_mse below 1, that of the constant prediction, as y is standardised. Above it the model has
learned its examples' noise, as with few examples of many columns: lower the rounds or model.widths.
Command: python scripts/train.py --config=configs/own_data.py --config.task.file=mine.npz
"""

from fipa_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.task.name = "own_data"
    config.task.split = "kmeans"
    config.task.num_clients = 4
    config.model.widths = (20, 20)
    config.precision = "float64"
    config.warmup.rounds = 20
    config.fipa.rounds = 80
    config.fipa.sketch.solver = "lanczos"
    config.fipa.sketch.rank = 50
    config.fipa.aggregator.damping = 1e-6
    config.fipa.aggregator.limits.max_step = 1.0
    for phase in (config.warmup, config.fipa):
        phase.local.optimizer = "gauss_newton"
        phase.local.lr = 1.0
        phase.local.epochs = 1
        phase.local.damping = 1e-5
    return config
