"""Handwritten digits, the last layer under the squared loss: one round is analytic federated learning, exactly.

Reproduces: the statement of AFL (He et al. 2025), that the ridge head of all data comes of one round, whatever the
split; here on 32 random features, by 5 clients, Dirichlet 0.1, in float64: what is divided by a damping of 1e-3 must be
exact. `fedpm` sends the head's input factor alone (561 numbers), `fipa` all 330 eigenpairs of its curvature; both end
where one client with all data does. FedAvg trains on. `:wide` is `fedpm` and FedAvg on 512 features, in float32.
Hardware: two CPU cores, a minute or two. Expected: 84.96 %, loss 0.208869047896 by all three from the first round on,
for 36 kB a round by `fedpm` and 4.4 MB by `fipa`; FedAvg, at a rate of 0.1, 55.7 % after three rounds.
Command: python scripts/train.py --config=configs/analytic.py
"""

from fipa_jax.config import recipes

HEAD = "trainable=^Dense_1/:cache_body=true"
EXACT = f"{HEAD}:local.lr=1:aggregator.damping=1e-3:aggregator.limits.max_step=0"
NATURAL = f"{EXACT}:local.matched=true:aggregator.relative=false:local.optimizer=natural_gradient"
FEDPM = f"fedpm:{EXACT}:local.steps=1:local.batch_size=0"
FEDAVG = f"fedavg:{HEAD}:local.lr=0.1"


def get_config(variant: str = ""):
    config = recipes.images("digits", "mlp")
    config.precision = "float64"
    config.data.augment, config.data.loss = False, "squared"
    config.model.widths, config.model.activation = (32,), "gelu"
    config.partition.num_clients, config.cohort = 5, 0
    config.warmup.rounds, config.fipa.rounds = 0, 3
    config.fipa.sketch.solver, config.fipa.sketch.rank = "rows", 330
    config.compare = (FEDPM, f"fipa:{NATURAL}", f"centralised:{NATURAL}", FEDAVG)
    return recipes.variant(config, variant, wide=_wide)


def _wide(config):
    """512 random features."""
    config.precision = "float32"
    config.model.widths = (512,)
    config.compare = (FEDPM, FEDAVG)
