"""u_t + u u_x = 0.03/pi u_xx, u(x, 0) = -sin(pi x): a front forms; four clients own strips of x.

Beyond the paper. Three times the usual viscosity: the usual 0.01/pi needs more of everything and takes minutes:
--config.task.equation=burgers "--config.model.widths=(20,20,20)" --config.task.examples_per_client=1000
Hardware: two CPU cores, about a minute. Expected: see docs/results/equations.md.
Command: python scripts/train.py --config=configs/burgers.py
"""

from fipa_jax.config import recipes


def get_config(variant: str = ""):
    config = recipes.pde("burgers_mild", variant)
    config.fipa.rounds = 400
    return config
