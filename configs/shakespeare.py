"""64 speakers of Shakespeare's plays are the clients: a small causal transformer predicts the next character.

Data: python scripts/prepare_data.py shakespeare --data-dir=DIR
Command: python scripts/train.py --config=configs/shakespeare.py --config.task.file=DIR/shakespeare.npz
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.model.name = "text", "transformer"
    config.task.least_characters, config.task.holdout = 5000, 0.1
    config.cohort = 8
    config.warmup.rounds, config.fipa.rounds = 20, 10
    config.eval.clients_every = 10
    for phase in (config.warmup, config.fipa):
        phase.local.lr, phase.local.batch_size, phase.local.epochs = 0.3, 20, 1
        phase.local.clip_norm = 1.0
    config.fipa.sketch.solver, config.fipa.sketch.rank = "auto", 20
    config.fipa.sketch.examples = 32
    config.compare = ("fedavg", "fipa_memory:aggregator.damping=0.01")
    return recipes.variant(config, variant)
