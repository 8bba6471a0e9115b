"""Fashion-MNIST, CNN, 100 clients, 5 a round, balanced Dirichlet 0.1: FedAvg warm-up, then FIPA on the whole model.

The recipe of configs/cifar10.py on a data set that trains in minutes; its FIPA settings are those tuned on CIFAR-10.
Hardware: two CPU cores, minutes. Expected: not measured here yet.
Data: python scripts/prepare_data.py fashion_mnist --data-dir=DIR
Command: python scripts/train.py --config=configs/fashion_mnist.py --config.data.dir=DIR
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.images("fashion_mnist", "cnn_23k")
    config.partition.alpha = 0.1
    config.warmup.rounds = 100
    config.fipa.rounds = 20
    recipes.whole_model(config)
    config.compare = ("fipa", "fedavg:server.lr=0.15:local.lr=0.1", "fedavg:server.lr=1:local.lr=0.1")
    return recipes.variant(config, variant)
