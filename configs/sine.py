"""sin(2 pi x) on [0, 1] split between two clients: the smallest problem on which averaging fails and FIPA does not."""

from fipa_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.task.name = "sine"
    config.precision = "float64"
    config.fipa.rounds = 300
    config.fipa.local.optimizer = "gauss_newton"
    config.fipa.local.lr = 1.0
    config.fipa.local.epochs = 1
    return config
