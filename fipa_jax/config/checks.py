"""Does a config make sense? All that can be said before data are loaded."""

import re

from ml_collections import ConfigDict

from fipa_jax.config import fields
from fipa_jax.config.defaults import default
from fipa_jax.config.methods import rule


def validate(config: ConfigDict) -> None:
    """Checks what can be checked without data.

    Raises:
      ValueError: names the field, what was needed and what arrived.
    """
    fields.check(config, default())
    _one_of("precision", config.precision, ("float32", "float64"))
    for field in ("examples_on", "client_memory"):
        _one_of(field, config[field], ("auto", "device", "host"))
    _at_least("seed", config.seed, 0)
    _at_least("cohort", config.cohort, 0)
    _at_least("chunk", config.chunk, -1)
    _at_least("rounds_per_call", config.rounds_per_call, 1)
    _at_least("devices", config.devices, 0)
    _at_least("first_round", config.first_round, 0)
    _at_least("checkpoint.seconds", config.checkpoint.seconds, 0)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    _at_least("eval.every", config.eval.every, 1)
    _at_least("eval.clients_every", config.eval.clients_every, 0)
    _at_least("eval.batch_size", config.eval.batch_size, 1)
    _at_least("task.num_clients", config.task.num_clients, 1)
    _at_least("task.examples_per_client", config.task.examples_per_client, 1)
    for field in ("boundary_points", "boundary_weight"):
        _at_least(f"task.{field}", config.task[field], 0)
    _at_least("task.test_points", config.task.test_points, 1)
    if not 0 < config.task.test_fraction < 1:
        raise ValueError(f"config.task.test_fraction: needs a fraction in (0, 1), got {config.task.test_fraction}")
    _at_least("task.column", config.task.column, 0)
    _at_least("task.seed", config.task.seed, 0)
    _at_least("partition.seed", config.partition.seed, 0)
    _at_least("partition.num_clients", config.partition.num_clients, 1)
    _at_least("model.widths", min(config.model.widths, default=1), 1)
    _at_least("model.head_width", config.model.head_width, 0)
    _one_of("model.compute_dtype", config.model.compute_dtype, ("", "bfloat16", "float16", "float32", "float64"))
    if not 0 <= config.data.holdout < 1:
        raise ValueError(f"config.data.holdout: needs a fraction in [0, 1), got {config.data.holdout}")
    _at_least("data.side", config.data.side, 0)
    if not 0 <= config.data.rotation <= 180:
        raise ValueError(f"config.data.rotation: needs degrees in [0, 180], got {config.data.rotation}")
    is_mnist = config.task.name == "images" and config.data.name.partition(":")[0] == "mnist"
    if is_mnist and config.data.augment and config.data.flip:
        raise ValueError("config.data.flip: a mirrored digit is no digit; with the data set 'mnist' set it to False")
    if config.task.name == "images" and config.cohort > config.partition.num_clients:
        raise ValueError(
            f"config.cohort: {config.cohort} is above the number of clients, {config.partition.num_clients}"
        )
    if not config.compare:
        raise ValueError(f"config.compare: needs a tuple of rules such as ('fipa', 'fedavg'), got {config.compare!r}")
    if len(set(config.compare)) != len(config.compare):
        raise ValueError(f"config.compare: names a rule twice: {config.compare}")
    _at_least("fipa.rounds", config.fipa.rounds, 0)
    _validate_phase("warmup", config.warmup, least_rounds=0)
    for spec in config.compare:
        settings = rule(config, spec)
        try:
            fields.check(settings, config.fipa, "config.fipa")
            _validate_phase("fipa", settings, least_rounds=min(config.fipa.rounds, 1))
        except ValueError as error:
            raise ValueError(f"{error} (in the rule {spec!r})") from None
    if config.warmup.rounds + config.fipa.rounds < 1:
        raise ValueError("config.warmup.rounds and config.fipa.rounds are both 0: nothing to run")


def _validate_phase(name, settings, least_rounds):
    _at_least(f"{name}.rounds", settings.rounds, least_rounds)
    try:
        re.compile(settings.trainable)
    except re.error as error:
        found = f"got {settings.trainable!r} ({error})"
        raise ValueError(f"config.{name}.trainable: needs a regular expression, {found}") from None
    _at_least(f"{name}.cache_views", settings.cache_views, 0)
    for group in ("local", "server"):
        if not 0 <= settings[group].momentum < 1:
            raise ValueError(
                f"config.{name}.{group}.momentum: needs a number in [0, 1), got {settings[group].momentum}"
            )
    for field in ("lr", "lr_decay", "weight_decay", "clip_norm", "batch_size", "steps", "damping"):
        _at_least(f"{name}.local.{field}", settings.local[field], 0)
    _at_least(f"{name}.local.micro_batch", settings.local.micro_batch, -1)
    for field in ("tries", "step_scale"):
        _at_least(f"{name}.local.{field}", settings.local[field], 0)
    _at_least(f"{name}.local.max_steps", settings.local.max_steps, 1)
    _at_least(f"{name}.local.cg_steps", settings.local.cg_steps, 1)
    if not settings.local.steps:
        _at_least(f"{name}.local.epochs", settings.local.epochs, 1)
    _at_least(f"{name}.term.mu", settings.term.mu, 0)
    if settings.term.name == "dyn" and not settings.term.mu:
        raise ValueError(f"config.{name}.term.mu: the term dyn divides by it and needs more than 0, got 0")
    _at_least(f"{name}.sketch.rank", settings.sketch.rank, 1)
    for field in ("oversample", "power_steps", "tolerance", "micro_batch", "loss_rank", "probes", "gradient_scale"):
        _at_least(f"{name}.sketch.{field}", settings.sketch[field], 0)
    for field in ("memory", "examples"):
        _at_least(f"{name}.sketch.{field}", settings.sketch[field], 0)
    if not 0 <= settings.sketch.energy <= 1:
        raise ValueError(f"config.{name}.sketch.energy: needs a share in [0, 1], got {settings.sketch.energy}")
    for field in ("damping", "rcond", "max_step", "max_divergence", "max_drift", "staleness", "explosion", "trace_cap"):
        _at_least(f"{name}.aggregator.{field}", settings.aggregator[field], 0)
    if not 0 <= settings.aggregator.memory_decay <= 1:
        raise ValueError(
            f"config.{name}.aggregator.memory_decay: needs a number in [0, 1], got {settings.aggregator.memory_decay}"
        )
    for field in ("memory_rank", "memory_length"):
        _at_least(f"{name}.aggregator.{field}", settings.aggregator[field], 1)
    _at_least(f"{name}.server.lr", settings.server.lr, 0)
    for field in ("least_clients", "max_skips"):
        _at_least(f"{name}.{field}", settings[field], 0)
    if not 0 <= settings.late.share <= 1:
        raise ValueError(f"config.{name}.late.share: needs a probability in [0, 1], got {settings.late.share}")
    _at_least(f"{name}.late.most", settings.late.most, 1)
    for field, value in settings.faults.items():
        _at_least(f"{name}.faults.{field}", value, 0)
        if value > 1 and field != "scale_by":
            raise ValueError(f"config.{name}.faults.{field}: needs a probability in [0, 1], got {value}")


def _at_least(field, value, least):
    if not value >= least:  # NaN is not
        raise ValueError(f"config.{field}: needs at least {least}, got {value}")


def _one_of(field, value, known):
    if value not in known:
        raise ValueError(f"config.{field}: unknown {value!r}; known: {', '.join(filter(None, known))}")
