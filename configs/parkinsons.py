"""42 patients, 5,875 recordings of their voices, two scores each: what is a federation worth to a patient who is new?

Reproduces: nothing published. A third of the patients is in no round. From the linear model that the others have made,
each of these gets one of its own by 2, 5 or 20 of its recordings, in several ways whose strength is chosen by
cross-validation within these recordings. Every patient has an offset of its own, the bias, that no prior holds;
`:plain` is without that, `:fedavg` with the models of FedAvg and FedProx instead, `:tune` how the weight decay was
found. Hardware: two CPU cores, half a minute. Expected, as mean of ten seeds: a squared error of 0.097, 0.049 and 0.027
with 2, 5 and 20 recordings for `spread`, 0.117, 0.068 and 0.028 for local only, 0.32, 0.13 and 0.037 for fine-tuning.
Data: python scripts/prepare_data.py parkinsons --data-dir=DIR
Command: python scripts/train.py --config=configs/parkinsons.py --config.task.file=DIR/parkinsons.npz
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes
from fipa_jax.lookup import lookup

FEDAVG = "fedavg:local.weight_decay=10.0:local.damping=10.0"
PROX = "fedavg:local.weight_decay=10.0:local.optimizer=lbfgs:local.steps=50:term.name=prox:term.mu=1"

FIPA = "fipa:local.weight_decay={0}:aggregator.damping={0}"


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.task.split = "own_data", "given"
    config.precision = "float64"
    config.chunk = 0
    recipes.levenberg_marquardt(config)
    config.model.widths = ()
    config.fipa.rounds, config.fipa.sketch.rank = 8, 40
    config.fipa.sketch.solver = "auto"
    config.fipa.aggregator.trust = False  # a round is Newton's step: damping is the weight decay alone
    config.compare = (FIPA.format(10.0),)
    config.personal.compare = ("global", "local", "finetune", "ditto", "curvature", "spread", "laplace")
    config.personal.newcomers, config.personal.examples = 1 / 3, (2, 5, 20)
    config.personal.own, config.personal.fit_steps = "bias", 1
    config.personal.lr, config.personal.steps = 0.001, (3, 10, 30, 60, 100, 200, 300, 600, 1000, 3000)
    known = {"": recipes.unchanged, "plain": _plain, "fedavg": _fedavg, "tune": _tune}
    lookup(known, variant, "--config")(config)
    return config


def _plain(config):
    """All parameters alike: every prior holds the bias too."""
    config.personal.own = ""


def _fedavg(config):
    """The models of FedAvg and FedProx, as they are and fine-tuned."""
    config.compare, config.fipa.rounds = (FEDAVG, PROX), 40
    config.personal.compare = ("global", "finetune", "ditto")


def _tune(config):
    """Weight decays of the common model, to be chosen by `chosen_curvature_*_loss`, on other seeds than those shown."""
    config.compare = tuple(FIPA.format(decay) for decay in (0.1, 1.0, 10.0, 100.0))
    config.personal.compare = ("ditto", "curvature", "spread")
