"""Your own data: regression or classification on a table, split over four clients by clusters of its inputs.

Reproduces: nothing published; FIPA beside FedAvg and beside all data in one place (`centralised`), on your data. The
file is an .npz with x [N, d] and y [N] or [N, K], as np.savez("mine.npz", x=x, y=y) writes it, or a .csv or .parquet
(extra `tables`) whose column y is predicted from the others; what else may be in it: fipa_jax/data/own_arrays.py. Words
are classes; whole numbers are with --config.task.kind=classes. A tanh network d-20-20-K with weight decay is fitted by
Levenberg-Marquardt, shared by clients and server. Hardware: two CPU cores, about a minute for 2,000 examples. Expected:
with scikit-learn's diabetes, wine and breast cancer `fipa` is as good as `centralised`: a test_mse of 0.54 (1.0 to 1.3
for a constant), test accuracies of 99 and 98 %. Where it is not better than the constant answer that a run prints,
raise fipa.local.weight_decay, or lower model.widths.
Command: python scripts/train.py --config=configs/own_data.py --config.task.file=mine.npz
         with :private each client is protected (epsilon 8); its settings are to be tuned, see docs/results/private.md
"""

from fipa_jax import config as config_lib
from fipa_jax.config import recipes
from fipa_jax.lookup import lookup


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name = "own_data"
    config.task.split = "kmeans"
    config.task.num_clients = 4
    config.model.widths = (20, 20)
    config.precision = "float64"
    recipes.levenberg_marquardt(config)
    config.fipa.rounds = 60
    config.fipa.local.weight_decay = 0.03
    config.fipa.sketch.solver, config.fipa.sketch.rank = "auto", 50
    lookup({"": recipes.unchanged, "private": _private}, variant, "--config")(config)
    return config


def _private(config):
    """A linear model of clients that are each protected; the file says whose each example is, and holds x_public."""
    config.task.split, config.task.standardise = "given", "public"
    config.model.widths, config.precision = (), "float32"
    config.fipa.local.optimizer = "sgd"
    recipes.private(config, rounds=40, steps=1, eigenpairs=100)
    config.compare = (
        "fedavg:local.lr=1:privacy.clip=1",
        "fedavg:privacy.whitening=public:privacy.damping=0.1:local.lr=10:privacy.clip=1",
    )
