"""CIFAR-100, ResNet-20, 100 clients, 5 a round, balanced Dirichlet 0.3: FedAvg warm-up, then FIPA on the last layer.

Reproduces: the two-phase recipe of arXiv 2601.13608 (5 local epochs of SGD, 0.1 x 0.998^k, batch 50, weight decay 1e-3,
gradients clipped at norm 10), last layer only: rank 10, gamma = 1, beta = 0.01, on features that are computed once.
Hardware: one GPU; on two CPU cores a warm-up round takes a minute. Expected: not measured here yet.
Data: python scripts/prepare_data.py cifar100 --data-dir=DIR
Command: python scripts/train.py --config=configs/cifar100.py --config.data.dir=DIR
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.images("cifar100", "resnet20")
    config.partition.alpha = 0.3
    config.data.rotation = 10.0
    config.warmup.rounds = 1000
    config.smaller = "--config=configs/cifar100.py:debug takes a minute, and only shows that all parts run"

    config.fipa.rounds = 100
    recipes.head_alone(config, "^head/")
    config.compare = ("fipa", "fedavg:server.lr=1", "fedavg:server.lr=0.3")
    return recipes.variant(config, variant)
