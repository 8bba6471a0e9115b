"""Four hospitals, 740 patients: sick or not by logistic regression, FIPA beside FedAvg and all data in one place.

Reproduces: Fed-Heart-Disease of FLamby (du Terrail et al. 2022), with its preprocessing and its split; inputs are
standardised by moments that the hospitals sum, where FLamby takes each hospital's own
(--config.task.standardise=client). Every hospital takes a Newton step and the server combines them without loss, so
that a round of FIPA is Newton's method on all patients. The weight decay was chosen by held-out training rows. `:mlp`
is a network with one hidden layer. Hardware: two CPU cores, half a minute. Expected: `fipa` is `centralised`, at a test
accuracy of 79.9 % (mean of the hospitals 80.5 %, AUC 0.881); FedAvg with the same local step 78.4 % (77.9 %, 0.870).
Data: python scripts/prepare_data.py heart_disease --data-dir=DIR
Command: python scripts/train.py --config=configs/heart_disease.py --config.task.file=DIR/heart_disease.npz
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes
from fipa_jax.lookup import lookup

WEIGHT_DECAY = 0.03


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.task.split = "own_data", "given"
    config.precision = "float64"
    recipes.levenberg_marquardt(config)
    lookup({"": _logistic, "mlp": _mlp}, variant, "--config")(config)
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
