"""sin(2 pi x) on [0, 1] split between two clients: averaging stops far from the solution and FIPA does not.

Reproduces: the 1-D regression of arXiv 2601.13608 (test loss about 1e-5, where FedAvg degrades).
Hardware: two CPU cores, less than a minute. Expected: see docs/results/sine.md.
Command: python scripts/train.py     Levenberg-Marquardt shared by clients and server
         python scripts/train.py --config=configs/sine.py:gauss_newton     clients choose their own damping
         python scripts/train.py --config=configs/sine.py:sgd     plain gradient descent as the local solver
         python scripts/train.py --config=configs/sine.py:private     100 clients, each protected: epsilon 8
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes
from fipa_jax.lookup import lookup


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name = "sine"
    config.precision = "float64"
    config.rounds_per_call = 50
    for phase in (config.warmup, config.fipa):
        phase.local.batch_size = 0
    known = {"": _shared_damping, "gauss_newton": _gauss_newton, "sgd": _sgd, "private": _private}
    lookup(known, variant, "--config")(config)
    return config


def _shared_damping(config):
    """Levenberg-Marquardt shared by clients and server."""
    config.fipa.rounds = 300
    recipes.levenberg_marquardt(config)


def _gauss_newton(config):
    """Clients choose their own damping."""
    _warmed_up(config)
    config.fipa.aggregator.damping = 1e-6
    for phase in (config.warmup, config.fipa):
        phase.local.optimizer, phase.local.lr, phase.local.epochs = "gauss_newton", 1.0, 1


def _sgd(config):
    """Plain gradient descent as the local solver."""
    _warmed_up(config)
    config.fipa.aggregator.damping = 1e-4
    for phase in (config.warmup, config.fipa):
        phase.local.steps = 500


def _warmed_up(config):
    """From a random start the Gauss-Newton model of the loss does not hold as far as the step: first some averaging."""
    config.warmup.rounds, config.fipa.rounds = 30, 270
    config.fipa.aggregator.limits.max_step = 1.0


def _private(config):
    """Differential privacy of each of 100 clients, with and without curvature at points that are nobody's, tuned.

    Expected: a test_mse of about 5e-6 with curvature, 0.05 by DP-FedAvg, 0.01 by DP-FedAdam (docs/results/private.md).
    """
    config.task.num_clients, config.task.examples_per_client, config.eval.clients_every = 100, 10, 0
    config.precision = "float32"
    fipa = config.fipa
    fipa.rounds, fipa.privacy.epsilon, fipa.privacy.delta = 160, 8.0, 1e-3
    fipa.privacy.clip_decay = 0.03 ** (1 / 159)  # to 3 % of the first clip
    fipa.local.steps = 1
    config.compare = (
        "fedavg:privacy.whitening=public:privacy.damping=0.01:local.lr=300:privacy.clip=1.5",
        "fedavg:local.lr=1:privacy.clip=0.1:server.lr=30",
        "fedavg:local.lr=0.3:privacy.clip=0.6:server.optimizer=adam:server.lr=0.1",
    )
