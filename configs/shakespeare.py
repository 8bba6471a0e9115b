"""64 speakers of Shakespeare's plays are the clients: a small causal transformer predicts the next character.

Reproduces: nothing published. After 25 rounds of FedAvg every rule goes on for five, on the whole model, on adapters
(LoRA) or on the last layer, at the best of its settings on held-out windows. `:whole`, `:lora` and `:head` run one of
these parts, `:tune` all settings that were tried. Hardware: two CPU cores, about five minutes. Expected: on the whole
model a test loss of 1.99 by tuned FedAvg, and FIPA not ahead of it, see docs/results/shakespeare.md.
Data: python scripts/prepare_data.py shakespeare --data-dir=DIR
Command: python scripts/train.py --config=configs/shakespeare.py --config.task.file=DIR/shakespeare.npz
"""

from fipa_jax import config as config_lib
from fipa_jax.lookup import lookup

PARTS = {  # of the model -> what a method says to train it alone
    "whole": "trainable=^(?!.*lora)",
    "lora": "trainable=lora",
    "head": "trainable=^head/:cache_body=True",
}
FEDAVG = "fedavg:{}:local.lr={}:server.lr={}"
FEDADAM = "fedavg:{}:server.optimizer=adam:local.lr={}:server.lr={}"
FIPA = "fipa:{}:local.lr={}:aggregator.damping={}:server.lr={}"
NATURAL = "fipa_memory:{}:aggregator.damping={}:aggregator.limits.max_divergence=0.02"
TRIED = {  # part -> rule -> the numbers of each setting: six settings for FedAvg, FedAdam, and FIPA's two ways together
    "whole": {
        FEDAVG: ((0.25, 1), (0.25, 0.5), (0.1, 1), (0.1, 0.5), (0.04, 1), (0.04, 0.7)),
        FEDADAM: ((0.25, 0.01), (0.25, 0.003), (0.1, 0.01), (0.1, 0.003), (0.04, 0.01), (0.04, 0.003)),
        FIPA: ((0.5, 0.5, 1), (0.25, 1, 0.7), (0.1, 1, 0.5)),
        NATURAL: ((1,), (0.2,), (0.1,)),
    },
    "head": {
        FEDAVG: ((0.5, 1), (0.5, 0.5), (0.2, 1), (0.2, 0.5), (0.1, 1), (0.1, 0.5)),
        FEDADAM: ((1, 0.01), (0.5, 0.01), (0.5, 0.003), (0.2, 0.01), (0.2, 0.003), (0.1, 0.003)),
        FIPA: ((0.5, 0.1, 0.5), (0.2, 0.1, 0.5), (0.1, 0.1, 0.5)),
        NATURAL: ((0.1,), (0.03,), (0.01,)),
    },
    "lora": {
        FEDAVG: ((4, 0.5), (4, 0.25), (2, 1), (2, 0.5), (1, 1), (1, 0.5)),
        FEDADAM: ((2, 0.01), (2, 0.003), (1, 0.01), (1, 0.003), (0.5, 0.01), (0.5, 0.003)),
        FIPA: ((4, 1, 0.5), (4, 1, 0.25), (2, 1, 1), (2, 1, 0.5), (1, 1, 1)),
        NATURAL: ((0.2,),),
    },
}
CHOSEN = {  # part -> the best setting of each rule on the held-out windows
    "whole": (FEDAVG, (0.1, 0.5), FEDADAM, (0.1, 0.003), FIPA, (0.1, 1, 0.5)),
    "lora": (FEDAVG, (2, 0.5), FEDADAM, (1, 0.01), FIPA, (2, 1, 0.5)),
    "head": (FEDAVG, (0.2, 0.5), FEDADAM, (0.5, 0.01), FIPA, (0.2, 0.1, 0.5)),
}


def get_config(variant: str = ""):
    config = config_lib.default()
    config.task.name, config.model.name, config.model.lora_rank = "text", "transformer", 2
    config.task.least_characters, config.task.holdout = 5000, 0.1
    config.cohort = 4
    config.warmup.rounds, config.fipa.rounds = 25, 5
    config.warmup.trainable = PARTS["whole"].removeprefix("trainable=")
    config.eval.every, config.eval.clients_every = 5, 0 if variant == "tune" else 5
    for phase in (config.warmup, config.fipa):
        phase.local.lr, phase.local.batch_size, phase.local.epochs, phase.local.clip_norm = 0.3, 20, 5, 1.0
    sketch, rule = config.fipa.sketch, config.fipa.aggregator
    sketch.solver, sketch.rank, sketch.examples, sketch.tolerance = "auto", 20, 32, 1e-2
    rule.relative, rule.past.rank = False, 100
    config.compare = lookup(_compared(), variant, "--config")
    return config


def _compared() -> dict:
    """{variant: its methods}: the best of every part, those of one part, or every setting that was tried."""
    chosen = {
        part: tuple(method.format(PARTS[part], *numbers) for method, numbers in zip(best[::2], best[1::2], strict=True))
        for part, best in CHOSEN.items()
    }
    tried = tuple(
        method.format(PARTS[part], *numbers)
        for part, methods in TRIED.items()
        for method, values in methods.items()
        for numbers in values
    )
    return {"": sum(chosen.values(), ()), **chosen, "tune": tried}
