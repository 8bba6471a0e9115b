"""Four hospitals, 740 patients: sick or not by logistic regression, FIPA beside FedAvg and all data in one place.

Reproduces: Fed-Heart-Disease of FLamby (du Terrail et al. 2022), with its preprocessing and its split; inputs are
standardised by moments that the hospitals sum, where FLamby takes each hospital's own
(--config.task.standardise=client). Every hospital takes a Newton step and the server combines them without loss, so
that a round of FIPA is Newton's method on all patients. The weight decay was chosen by held-out training rows. `:mlp`
is a network with one hidden layer. `:flamby` takes FLamby's budget and standardisation, 15 rounds of 100 local steps on
four patients each, and its rules, tuned by `:flamby_tune`. Hardware: two CPU cores, half a minute. Expected: `fipa` is
`centralised`, at a test accuracy of 79.9 % (mean of the hospitals 80.5 %, AUC 0.881); FedAvg with the same local step
78.4 % (77.9 %, 0.870).
Data: python scripts/prepare_data.py heart_disease --data-dir=DIR
Command: python scripts/train.py --config=configs/heart_disease.py --config.task.file=DIR/heart_disease.npz
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes
from fipa_jax.lookup import lookup

WEIGHT_DECAY = 0.03
LOCAL, SERVER = (0.1, 0.03, 0.01, 0.003), (1, 0.3, 0.1)
NEWTON = "fipa:local.optimizer=gauss_newton:local.lr=1:local.steps=1:local.matched=True"
TRIED = {  # method -> the values of its two numbers
    f"{NEWTON}:aggregator.damping={{}}:server.lr={{}}": (
        (0.1, 0.03, 0.01, 0.003),
        (1, 0.5, 0.25),
    ),
    "fedavg:local.lr={}:server.lr={}": (LOCAL, SERVER),
    "fedavg:term.name=prox:local.lr={}:term.mu={}": (LOCAL, (1, 0.1, 0.01)),
    "fedavg:term.name=scaffold:local.lr={}:server.lr={}": (LOCAL, SERVER),
    "fedavg:server.optimizer=adam:local.lr={}:server.lr={}": (LOCAL, (0.1, 0.03, 0.01)),
    "fedavg:server.optimizer=yogi:local.lr={}:server.lr={}": (LOCAL, (0.1, 0.03, 0.01)),
    "fedavg:server.optimizer=adagrad:local.lr={}:server.lr={}": (LOCAL, (1, 0.3, 0.1)),
    "centralised:local.lr={}:server.lr={}": (LOCAL, SERVER),
}
CHOSEN = ((0.03, 0.25), (0.03, 1), (0.03, 0.01), (0.03, 0.3), (0.03, 0.03), (0.03, 0.03), (0.03, 0.3), (0.03, 1))


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.task.split = "own_data", "given"
    config.precision = "float64"
    recipes.levenberg_marquardt(config)
    lookup({"": _logistic, "mlp": _mlp, "flamby": _flamby, "flamby_tune": _flamby_tune}, variant, "--config")(config)
    config.fipa.sketch.solver = "auto"
    return config


def _logistic(config):
    """A round is Newton's step: damping is the weight decay alone."""
    config.model.widths = ()
    config.fipa.rounds, config.fipa.sketch.rank = 8, 14
    config.fipa.aggregator.trust = False
    config.fipa.aggregator.damping = config.fipa.local.weight_decay = WEIGHT_DECAY


def _mlp(config):
    """A trust region finds the damping."""
    config.model.widths = (16,)
    config.fipa.rounds, config.fipa.sketch.rank = 40, 50
    config.fipa.local.weight_decay = WEIGHT_DECAY


def _flamby(config):
    """FLamby's budget and standardisation, 15 rounds of 100 local steps on four patients each, no weight decay."""
    _logistic(config)
    config.fipa.rounds, config.task.standardise = 15, "client"
    local = config.fipa.local
    local.optimizer, local.steps, local.batch_size, local.weight_decay, local.matched = "sgd", 100, 4, 0.0, False
    config.compare = tuple(method.format(*numbers) for method, numbers in zip(TRIED, CHOSEN, strict=True))


def _flamby_tune(config):
    """Every setting that was tried, to be judged by the loss of held-out training rows."""
    _flamby(config)
    config.compare = recipes.every_setting(TRIED)
