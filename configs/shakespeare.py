"""64 speakers of Shakespeare's plays are the clients: a small causal transformer predicts the next character.

Data: python scripts/prepare_data.py shakespeare --data-dir=DIR
Command: python scripts/train.py --config=configs/shakespeare.py --config.task.file=DIR/shakespeare.npz
"""

import itertools

from fipa_jax import config as config_lib
from fipa_jax.lookup import lookup

FEDAVG = "fedavg:local.lr={}:server.lr={}"
FEDADAM = "fedavg:server.optimizer=adam:local.lr={}:server.lr={}"
FIPA = "fipa:aggregator.damping={}"
NATURAL = "fipa_memory:aggregator.damping={}:aggregator.limits.max_divergence={}"
TRIED = {  # method -> the values of its numbers; six settings for each of FedAvg, FedAdam and FIPA
    FEDAVG: ((1, 0.5, 0.25), (1, 1.5)),
    FEDADAM: ((0.5, 0.25), (0.01, 0.003, 0.001)),
    FIPA: ((1, 0.3),),
    NATURAL: ((0.3, 0.1), (0.005, 0.02)),
}


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.model.name = "text", "transformer"
    config.task.least_characters, config.task.holdout = 5000, 0.1
    config.cohort = 6
    config.warmup.rounds, config.fipa.rounds = 60, 10
    config.eval.every, config.eval.clients_every = 5, 10
    for phase in (config.warmup, config.fipa):
        phase.local.lr, phase.local.batch_size, phase.local.epochs, phase.local.clip_norm = 0.3, 20, 1, 1.0
    sketch, rule = config.fipa.sketch, config.fipa.aggregator
    sketch.solver, sketch.rank, sketch.examples, sketch.tolerance = "auto", 20, 16, 1e-2
    rule.relative, rule.past.rank = False, 100
    part, _, tune = variant.partition("_")
    lookup({"": _adapters, "lora": _adapters, "head": _head, "whole": _whole}, part, "--config")(config)
    lookup({"": _chosen, "tune": _tune}, tune, "--config")(config)
    return config


def _adapters(config):
    """LoRA adapters of rank 2 beside the blocks' layers, on a body that the warm-up has trained without them."""
    config.model.lora_rank = 2
    config.warmup.trainable, config.fipa.trainable = "^(?!.*lora)", "lora"


def _head(config):
    """The last layer, on features that are computed once."""
    config.fipa.trainable, config.fipa.cache_body = "^head/", True
    config.fipa.sketch.rank, config.fipa.sketch.examples = 50, 64


def _whole(config):
    """All of the model."""


def _chosen(config):
    config.compare = ("fedavg", "fipa")


def _tune(config):
    """Every setting that was tried."""
    config.compare = tuple(
        method.format(*numbers) for method, values in TRIED.items() for numbers in itertools.product(*values)
    )
    config.eval.clients_every = 0
