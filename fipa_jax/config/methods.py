"""Which rules can a run compare? Their names, and what each changes in the FIPA phase."""

from ml_collections import ConfigDict

from fipa_jax.config import fields

# Cohort and rounds stay the same for all, and so does local work, but for that of `fipa_memory`.
RULES = {
    "fipa": {},
    "fipa_memory": {
        "local.optimizer": "natural_gradient",
        "local.matched": True,
        "local.lr": 1.0,
        "local.lr_decay": 1.0,
        "aggregator.form": "damped",
        "aggregator.relative": False,
        "aggregator.damping": 0.1,
        "aggregator.memory": "prior",
        "aggregator.max_divergence": 0.005,
        "server.optimizer": "sgd",
        "server.lr": 1.0,
    },
    "fedavg": {"aggregator.name": "mean", "aggregator.mix": False, "aggregator.staleness": 0.0},
    "fedbuff": {"aggregator.name": "mean", "aggregator.mix": False},
    "fedasync": {"aggregator.name": "mean", "aggregator.mix": True},
    "fisher_diagonal": {"aggregator.name": "diagonal"},
    "centralised": {"pooled": True, "least_clients": 1, "late.share": 0.0},
    "fipa_pinv": {"aggregator.form": "pinv"},
    "fipa_tikhonov": {"aggregator.form": "tikhonov"},
    "fipa_damped": {"aggregator.form": "damped"},
}


def rule(config: ConfigDict, spec: str) -> ConfigDict:
    """The FIPA phase as changed by a compared rule, `NAME` or `NAME:field=value:field=value`.

    Example:
      rule(config, "fedavg:server.lr=0.3").

    Raises:
      ValueError: the rule or a field is not known, or a value is not of the field's type.
    """
    name, *overrides = spec.split(":")
    if name not in RULES:
        raise ValueError(f"config.compare: unknown rule {name!r}; known: {', '.join(sorted(RULES))}")
    changed = config.fipa.copy_and_resolve_references()
    for path, value in RULES[name].items():
        group, field = fields.find(changed, path)
        group[field] = value
    for override in overrides:
        path, found, text = override.partition("=")
        if not found:
            raise ValueError(f"config.compare: {spec!r} needs NAME:field=value, got {override!r}")
        try:
            group, field = fields.find(changed, path)
            group[field] = fields.parse(text, group[field])
        except (KeyError, ValueError) as error:
            raise ValueError(f"config.compare: {spec!r}, {path!r}: {error.args[0]}") from None
    return changed
