"""42 patients, 5,875 recordings of their voice, two scores each: what a patient with few recordings gets from others.

draft
Command: python scripts/train.py --config=configs/parkinsons.py --config.task.file=DIR/parkinsons.npz
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.task.split = "own_data", "given"
    config.precision = "float64"
    config.chunk = 0
    recipes.levenberg_marquardt(config)
    config.model.widths = ()
    config.fipa.rounds = 8
    config.fipa.sketch.solver, config.fipa.sketch.rank = "auto", 40
    config.fipa.aggregator.trust = False
    config.fipa.aggregator.damping = config.fipa.local.weight_decay = 1.0
    config.compare = ("fipa",)
    config.personal.compare = ("global", "local", "finetune", "ditto", "curvature", "spread", "laplace")
    config.personal.own, config.personal.fit_steps = "bias", 1
    config.personal.lr, config.personal.steps = 0.001, (10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
    config.personal.newcomers, config.personal.examples = 1 / 3, (2, 5, 20)
    return config
