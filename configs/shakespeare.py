"""64 speakers of Shakespeare's plays are the clients: a small causal transformer predicts the next character.

Data: python scripts/prepare_data.py shakespeare --data-dir=DIR
Command: python scripts/train.py --config=configs/shakespeare.py --config.task.file=DIR/shakespeare.npz
"""

import itertools

from fipa_jax import config as config_lib
from fipa_jax.lookup import lookup

FEDAVG = "fedavg:{}:local.lr={}:server.lr={}"
FEDADAM = "fedavg:{}:server.optimizer=adam:local.lr={}:server.lr={}"
FIPA = "fipa_memory:{}:aggregator.damping={}:aggregator.limits.max_divergence={}"
PARTS = {  # of the model: what a method says to train it alone, and the local learning rates that were tried
    "whole": ("trainable=^(?!.*lora)", (0.25, 0.1)),
    "lora": ("trainable=lora", (0.5, 0.2)),
    "head": ("trainable=^head/:cache_body=True", (0.5, 0.2)),
}
TRIED = {  # method -> the values of its second number, or of both
    FEDAVG: (1, 0.5),
    FEDADAM: (0.003, 0.001),
    FIPA: ((0.1, 0.03), (0.02, 0.1)),
}


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.model.name, config.model.lora_rank = "text", "transformer", 2
    config.task.least_characters, config.task.holdout = 5000, 0.1
    config.cohort = 4
    config.warmup.rounds, config.fipa.rounds = 25, 10
    config.warmup.trainable = "^(?!.*lora)"
    config.eval.every, config.eval.clients_every = 5, 10
    for phase in (config.warmup, config.fipa):
        phase.local.lr, phase.local.batch_size, phase.local.epochs, phase.local.clip_norm = 0.3, 20, 5, 1.0
    sketch, rule = config.fipa.sketch, config.fipa.aggregator
    sketch.solver, sketch.rank, sketch.examples, sketch.tolerance = "auto", 20, 32, 1e-2
    rule.relative, rule.past.rank = False, 100
    lookup({"": _chosen, "tune": _tune}, variant, "--config")(config)
    return config


def _chosen(config):
    config.compare = ("fedavg", "fipa")


def _tune(config):
    """Every setting that was tried, four of each method and part."""
    config.compare = tuple(
        method.format(part, *numbers)
        for part, rates in PARTS.values()
        for method, values in TRIED.items()
        for numbers in itertools.product(*(values if method is FIPA else (rates, values)))
    )
    config.fipa.rounds = config.eval.every = 5
    config.eval.clients_every = 0
