from fipa_jax.config import recipes

DAMPING = {f"fipa_memory:aggregator.damping={b}:aggregator.limits.max_divergence={d}" for b in (1, 2) for d in (3, 4)}


def get_config(variant: str = ""):
    config = recipes.images("digits", "cnn_6k")
    config.data.augment = False
    config.data.holdout = 0.1
    config.partition.num_clients, config.cohort, config.partition.alpha = 20, 4, 0.1
    config.warmup.rounds = 20
    config.fipa.rounds = 40
    config.fipa.sketch.solver, config.fipa.sketch.rank = "auto", 50
    if variant == "tune":
        config.compare = (
            *(
                f"fipa_memory:aggregator.damping={b}:aggregator.limits.max_divergence={d}"
                for b in (0.1, 0.03, 0.01, 0.003)
                for d in (0.002, 0.005, 0.02)
            ),
            *(f"fedavg:local.lr={l}:server.lr={s}" for l in (0.3, 0.1, 0.03) for s in (1, 0.3, 0.1, 0.03)),
            *(
                f"fedavg:term.name=scaffold:local.lr={l}:server.lr={s}"
                for l in (0.3, 0.1, 0.03)
                for s in (1, 0.3, 0.1, 0.03)
            ),
            *(
                f"fedavg:server.optimizer=adam:local.lr={l}:server.lr={s}"
                for l in (0.3, 0.1, 0.03)
                for s in (0.03, 0.01, 0.003, 0.001)
            ),
        )
    return config
