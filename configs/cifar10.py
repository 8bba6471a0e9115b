"""CIFAR-10, 100 clients, 5 a round, balanced Dirichlet 0.1, CNN of 23.7k parameters: FedAvg warm-up, then FIPA.

Reproduces: the two-phase recipe of arXiv 2601.13608 (5 local epochs of SGD 0.1 x 0.998^k, batch 50, weight decay 1e-3,
gradient clipping at norm 10), with the step sizes of the FIPA phase tuned (see README, results).
Hardware: two CPU cores. Needs CIFAR-10 as prepared by TFDS under --config.data.dir.
Command: python scripts/train.py --config=configs/cifar10.py --config.data.dir=DIR
"""

from fipa_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.task.name = "images"
    config.data.name = "cifar10"
    config.partition.alpha = 0.1
    config.cohort = 5
    config.model.name = "cnn_23k"
    for phase in (config.warmup, config.fipa):
        phase.local.lr_decay = 0.998
        phase.local.weight_decay = 1e-3
        phase.local.clip_norm = 10.0
    config.warmup.rounds = 300
    config.eval.clients_every = 10
    config.fipa.rounds = 20
    config.fipa.sketch.jacobian = "rows"
    config.fipa.sketch.micro_batch = 50
    return config
