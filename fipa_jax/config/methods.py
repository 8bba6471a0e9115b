"""Which methods can a run compare? Their names, and what each changes in the FIPA phase."""

from ml_collections import ConfigDict

from fipa_jax.config import fields
from fipa_jax.lookup import lookup

MEMORY = {
    "local.optimizer": "natural_gradient",
    "local.views": False,
    "local.matched": True,
    "local.lr": 1.0,
    "local.lr_decay": 1.0,
    "aggregator.form": "damped",
    "aggregator.relative": False,
    "aggregator.damping": 0.1,
    "aggregator.trust": False,
    "aggregator.past.kind": "prior",
    "aggregator.limits.max_divergence": 0.005,
    "server.optimizer": "sgd",
    "server.lr": 1.0,
}
# What FIPA does with its sketches, and sums do not; nor do the others, which have no trust region either.
OF_SUMS = {
    "aggregator.own_damping": False,
    "aggregator.past.adaptive": False,
    "aggregator.late.max_drift": 0.0,
    "sketch.bits": 0,
    "sketch.store": "",
    "sketch.energy": 0.0,
    "sketch.gradient_scale": 0.0,
    "sketch.budget": 0.0,
    "sketch.link": 0.0,
    "sketch.deadline": 0.0,
}
WITHOUT_SKETCHES = OF_SUMS | {"aggregator.trust": False}
ONLY_NOW = WITHOUT_SKETCHES | {"aggregator.form": "damped", "aggregator.past.kind": "none"}  # nor remember anything
# Cohort and rounds stay the same for all, and so does local work, but for that of `fipa_memory` and the like.
METHODS = {
    "fipa": {},
    "fipa_memory": MEMORY,
    "fipa_auto": MEMORY | {"aggregator.past.adaptive": True},
    "fipa_few_bytes": {
        "local.optimizer": "gradient",
        "local.views": False,
        "local.clip_norm": 0.0,
        "local.matched": False,
        "aggregator.form": "damped",
        "aggregator.relative": False,
        "aggregator.damping": 0.1,
        "aggregator.trust": False,
        "aggregator.past.kind": "curvature",
        "aggregator.past.decay": 0.99,
        "aggregator.past.adaptive": False,
        "aggregator.limits.max_step": 0.0,
        "aggregator.limits.max_divergence": 0.5,
        "server.optimizer": "sgd",
        "server.lr": 0.1,
        "sketch.rank": 5,
        "sketch.bits": 8,
    },
    "fipa_span": ONLY_NOW
    | {
        "local.optimizer": "gradient",
        "local.views": False,
        "local.clip_norm": 0.0,
        "local.matched": False,
        "local.compress.name": "few_bits",
        "sketch.bits": 8,
        "sketch.share": 0.2,
        "aggregator.name": "span",
        "aggregator.span.bits": 4,
        "aggregator.damping": 1e-3,
        "aggregator.limits.max_step": 0.0,
        "aggregator.limits.explosion": 0.0,
        "aggregator.limits.trace_cap": 0.0,
        "aggregator.limits.max_divergence": 0.5,
        "server.optimizer": "sgd",
        "server.lr": 0.1,
    },
    "fipa_sums": OF_SUMS
    | {
        "aggregator.name": "sums",
        "aggregator.form": "damped",
        "aggregator.limits.max_step": 0.0,
        "aggregator.limits.explosion": 0.0,
        "aggregator.limits.trace_cap": 0.0,
    },
    "fipa_sums_of_gradients": OF_SUMS
    | {
        "aggregator.name": "sums",
        "aggregator.sums.form": "gradient",
        "aggregator.form": "damped",
        "aggregator.limits.max_step": 0.0,
        "aggregator.limits.explosion": 0.0,
        "aggregator.limits.trace_cap": 0.0,
        "local.optimizer": "gradient",
        "local.views": False,
        "local.clip_norm": 0.0,
        "local.matched": False,
        "server.optimizer": "sgd",
        "server.lr": 1.0,
    },
    "fedavg": {"aggregator.name": "mean", "aggregator.late.mix": False, "aggregator.late.staleness": 0.0},
    "fedbuff": {"aggregator.name": "mean", "aggregator.late.mix": False},
    "fedasync": {"aggregator.name": "mean", "aggregator.late.mix": True},
    "fisher_diagonal": ONLY_NOW | {"aggregator.name": "diagonal"},
    "fedpm": WITHOUT_SKETCHES
    | {
        "aggregator.name": "kronecker",
        "aggregator.at": "broadcast",
        "aggregator.form": "damped",
        "aggregator.relative": False,
        "aggregator.limits.max_step": 0.0,
        "local.optimizer": "kronecker",
        "local.matched": True,
    },
    "fedfisher_kfac": WITHOUT_SKETCHES
    | {
        "aggregator.name": "kronecker",
        "aggregator.layers.kind": "kfac",
        "aggregator.limits.max_step": 0.0,
    },
    "fedivon": ONLY_NOW | {"aggregator.name": "posterior", "local.optimizer": "ivon", "local.weight_decay": 0.0},
    "ivon_admm": ONLY_NOW
    | {
        "aggregator.name": "posterior",
        "aggregator.posterior.form": "admm",
        "local.optimizer": "ivon",
        "local.weight_decay": 0.0,
        "term.name": "duals",
    },
    "regmean": WITHOUT_SKETCHES
    | {
        "aggregator.name": "kronecker",
        "aggregator.layers.kind": "regmean",
        "aggregator.form": "pinv",
        "aggregator.limits.max_step": 0.0,
    },
    "centralised": {"pooled": True, "least_clients": 1, "late.share": 0.0},
    "fipa_pinv": {
        "aggregator.form": "pinv",  # which has no damping
        "aggregator.trust": False,
        "aggregator.own_damping": False,
        "aggregator.past.adaptive": False,
        "local.matched": False,
    },
    "fipa_tikhonov": {"aggregator.form": "tikhonov"},
    "fipa_damped": {"aggregator.form": "damped"},
}


def method(config: ConfigDict, spec: str) -> ConfigDict:
    """The FIPA phase as changed by a compared method, `NAME` or `NAME:field=value:field=value`.

    Example:
      method(config, "fedavg:server.lr=0.3").

    Raises:
      ValueError: the method or a field is not known, or a value is not of the field's type.
    """
    name, *overrides = spec.split(":")
    changes = lookup(METHODS, name, "config.compare")
    changed = config.fipa.copy_and_resolve_references()
    for path, value in changes.items():
        group, field = fields.find(changed, path)
        group[field] = value
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"config.compare: {spec!r} needs NAME:field=value, got {override!r}")
        try:
            group, field = fields.find(changed, path)
            group[field] = fields.parse(text, group[field])
        except (KeyError, ValueError) as error:
            raise ValueError(f"config.compare: {spec!r}, {path!r}: {error.args[0]}") from None
    return changed


def overrides(config: ConfigDict, spec: str, changed: ConfigDict) -> list[str]:
    """Paths of the FIPA phase's fields that are other in `changed`, its `method`, than for NAME alone."""
    name, *texts = spec.split(":")
    usual = method(config, name) if texts else changed
    paths = dict.fromkeys(text.partition("=")[0] for text in texts)
    return [path for path in paths if fields.value(changed, path) != fields.value(usual, path)]
