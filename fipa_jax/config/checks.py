"""Does a config make sense? All that can be said before data are loaded."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from fipa_jax import files
from fipa_jax.config import fields
from fipa_jax.config.defaults import default
from fipa_jax.config.methods import method, overrides
from fipa_jax.lookup import lookup


class Range(NamedTuple):
    """The numbers that a field takes."""

    low: float
    high: float = math.inf
    noun: str = "number"  # for the error
    brackets: str = "[]"  # a round one leaves its end out


POSITIVE, NOT_NEGATIVE = Range(1), Range(0)  # for whole numbers, for all
PROBABILITY, MOMENTUM = Range(0, 1, "probability"), Range(0, 1, brackets="[)")

PATHS = ("data.cache_dir", "data.dir", "init_from", "partition.file", "task.file")  # read by `files.local`
RUN = {
    "seed": NOT_NEGATIVE,
    "cohort": NOT_NEGATIVE,
    "chunk": Range(-1),
    "rounds_per_call": POSITIVE,
    "devices": NOT_NEGATIVE,
    "first_round": NOT_NEGATIVE,
    "checkpoint.seconds": NOT_NEGATIVE,
    "checkpoint.keep": POSITIVE,
    "eval.every": POSITIVE,
    "eval.clients_every": NOT_NEGATIVE,
    "eval.samples": POSITIVE,
    "eval.batch_size": POSITIVE,
    "task.num_clients": POSITIVE,
    "task.examples_per_client": POSITIVE,
    "task.boundary_points": NOT_NEGATIVE,
    "task.boundary_weight": NOT_NEGATIVE,
    "task.test_points": POSITIVE,
    "task.test_fraction": Range(0, 1, "fraction", "()"),
    "task.column": NOT_NEGATIVE,
    "task.window": POSITIVE,
    "task.least_characters": POSITIVE,
    "task.seed": NOT_NEGATIVE,
    "partition.seed": NOT_NEGATIVE,
    "personal.newcomers": Range(0, 1, "share", "[)"),
    "personal.examples": NOT_NEGATIVE,
    "personal.folds": Range(2),
    "personal.strengths": Range(0, brackets="(]"),
    "personal.steps": POSITIVE,
    "personal.lr": NOT_NEGATIVE,
    "personal.damping": Range(0, brackets="(]"),
    "personal.fit_steps": POSITIVE,
    "partition.num_clients": POSITIVE,
    "model.widths": POSITIVE,
    "model.head_width": NOT_NEGATIVE,
    "model.width": POSITIVE,
    "model.layers": POSITIVE,
    "model.heads": POSITIVE,
    "model.lora_rank": NOT_NEGATIVE,
    "data.holdout": Range(0, 1, "fraction", "[)"),
    "task.holdout": Range(0, 1, "fraction", "[)"),
    "data.side": NOT_NEGATIVE,
    "data.rotation": Range(0, 180, "number of degrees"),
}
NOT_EMPTY = ("personal.examples", "personal.steps", "personal.strengths")
PHASE = {
    "rounds": NOT_NEGATIVE,
    "cache_views": NOT_NEGATIVE,
    "least_clients": NOT_NEGATIVE,
    "most_bytes_up": NOT_NEGATIVE,
    "max_skips": NOT_NEGATIVE,
    "local.lr": NOT_NEGATIVE,
    "local.lr_decay": NOT_NEGATIVE,
    "local.momentum": MOMENTUM,
    "local.weight_decay": NOT_NEGATIVE,
    "local.clip_norm": NOT_NEGATIVE,
    "local.batch_size": NOT_NEGATIVE,
    "local.micro_batch": Range(-1),
    "local.steps": NOT_NEGATIVE,
    "local.damping": NOT_NEGATIVE,
    "local.compress.bits": Range(1, 16),
    "local.compress.share": Range(0, 1, "share", "(]"),
    "local.adaptive.scale": NOT_NEGATIVE,
    "local.adaptive.max_steps": POSITIVE,
    "local.gauss_newton.tries": NOT_NEGATIVE,
    "local.gauss_newton.cg_steps": POSITIVE,
    "term.mu": NOT_NEGATIVE,
    "sketch.rank": POSITIVE,
    "sketch.oversample": NOT_NEGATIVE,
    "sketch.power_steps": NOT_NEGATIVE,
    "sketch.tolerance": NOT_NEGATIVE,
    "sketch.micro_batch": NOT_NEGATIVE,
    "sketch.loss_rank": NOT_NEGATIVE,
    "sketch.probes": NOT_NEGATIVE,
    "sketch.energy": Range(0, 1, "share"),
    "sketch.gradient_scale": NOT_NEGATIVE,
    "sketch.examples": NOT_NEGATIVE,
    "sketch.samples": NOT_NEGATIVE,
    "sketch.bits": Range(0, 16),
    "sketch.share": Range(0, 1, "share", "(]"),
    "sketch.budget": NOT_NEGATIVE,
    "sketch.link": NOT_NEGATIVE,
    "sketch.deadline": NOT_NEGATIVE,
    "sketch.full": NOT_NEGATIVE,
    "aggregator.damping": NOT_NEGATIVE,
    "aggregator.rcond": NOT_NEGATIVE,
    "aggregator.faulty": Range(0, 0.5, "share", brackets="[)"),
    "aggregator.past.decay": Range(0, 1),
    "aggregator.past.rank": POSITIVE,
    "aggregator.past.length": POSITIVE,
    "aggregator.layers.iterations": POSITIVE,
    "aggregator.layers.shrink": Range(0, 1, "factor"),
    "aggregator.posterior.prior": Range(0, brackets="(]"),
    "aggregator.posterior.start": NOT_NEGATIVE,
    "aggregator.posterior.rho": Range(0, brackets="(]"),
    "aggregator.sums.columns": POSITIVE,
    "aggregator.sums.fresh": NOT_NEGATIVE,
    "aggregator.sums.tail": NOT_NEGATIVE,
    "aggregator.sums.bits": Range(0, 32),
    "aggregator.sums.seed": NOT_NEGATIVE,
    "aggregator.span.columns": POSITIVE,
    "aggregator.span.fresh": POSITIVE,
    "aggregator.span.decay": Range(0, 1),
    "aggregator.span.prior": NOT_NEGATIVE,
    "aggregator.span.bits": Range(0, 16),
    "aggregator.span.seed": NOT_NEGATIVE,
    "aggregator.limits.max_step": NOT_NEGATIVE,
    "aggregator.limits.max_divergence": NOT_NEGATIVE,
    "aggregator.limits.explosion": NOT_NEGATIVE,
    "aggregator.limits.trace_cap": NOT_NEGATIVE,
    "aggregator.late.staleness": NOT_NEGATIVE,
    "aggregator.late.max_drift": NOT_NEGATIVE,
    "server.momentum": MOMENTUM,
    "server.lr": NOT_NEGATIVE,
    "server.average": Range(0, 1),
    "late.share": PROBABILITY,
    "late.most": POSITIVE,
    "faults.drop": PROBABILITY,
    "faults.straggle": PROBABILITY,
    "faults.nan": PROBABILITY,
    "faults.flip": PROBABILITY,
    "faults.scale": PROBABILITY,
    "faults.scale_by": NOT_NEGATIVE,
    "privacy.epsilon": NOT_NEGATIVE,
    "privacy.delta": Range(0, 1, "probability", "()"),
    "privacy.clip": Range(0, brackets="(]"),
    "privacy.clip_decay": Range(0, 1, "factor", "(]"),
    "privacy.noise_multiplier": NOT_NEGATIVE,
    "privacy.damping": Range(0, brackets="(]"),
    "privacy.eigenpairs": POSITIVE,
    "privacy.release_share": Range(0, 1, "share", "()"),
}
# Which tasks and models read a field: those of the others leave it as it is by default. Of `data` the folders are free.
FUNCTIONS, OF_USERS = ("sine", "gaussians_2d"), ("own_data", "text")
TASKS, RESNETS = (*FUNCTIONS, "pde", *OF_USERS, "images"), ("resnet20", "resnet18")
MODELS = ("mlp", "cnn_6k", "cnn_23k", "cnn_200k", *RESNETS, "transformer")
SPLITS = tuple(f"partition.{name}" for name in ("name", "num_clients", "alpha", "shards_per_client", "file", "seed"))
IMAGES = tuple(f"data.{name}" for name in ("name", "train_split", "test_split", "holdout", "side", "loss", "augment"))
IMAGES += tuple(f"data.{name}" for name in ("rotation", "flip", "public", "public_split"))
READ_BY_TASKS = {  # names -> the fields that they read
    ("images",): (*IMAGES, *SPLITS),
    ("sine", "pde", "own_data"): ("task.num_clients",),
    (*FUNCTIONS, "pde"): ("task.examples_per_client",),
    ("pde",): ("task.equation", "task.boundary_points", "task.boundary_weight", "task.test_points"),
    OF_USERS: ("task.file", "task.test_fraction", "task.holdout"),
    ("own_data",): tuple(
        f"task.{name}" for name in ("targets", "inputs", "client", "kind", "split", "column", "standardise")
    ),
    ("text",): ("task.window", "task.least_characters"),
}
READ_BY_MODELS = {
    ("mlp",): ("model.widths", "model.activation"),
    RESNETS: ("model.head_width", "model.compute_dtype"),
    ("transformer",): ("model.width", "model.layers", "model.heads", "model.lora_rank"),
}
# Fields of a method that nothing reads where all these choices are so; `aggregator.late` a deployment reads. Which ones
# a part never takes is said by its own parameters: `run.phase_parts`.
NOT_DAMPED, NOT_REMEMBERED = {"aggregator.form": ("pinv",)}, {"aggregator.past.kind": ("none",)}
OTHER_RULES = ("diagonal", "kronecker", "mean", "posterior", "span", "sums")  # than FIPA's
OTHER_RULES += ("geometric_median", "krum", "median", "multi_krum", "trimmed_mean")
OWN_LENGTH = {"local.optimizer": ("gradient", "lbfgs")}
WITHOUT_VIEWS = ("gauss_newton", "lbfgs")  # solvers that see examples as they are
BY_GRADIENTS = ("adam", "gradient", "ivon", "lbfgs", "momentum", "nesterov", "sgd", "yogi")
UNREAD_WHERE = (
    ("cache_views", {"cache_body": (False,)}),
    ("cache_views", {"local.views": (False,), "sketch.views": (False,)}),
    ("local.epochs", {"local.steps": POSITIVE}),
    ("local.lr", OWN_LENGTH),
    ("local.lr_decay", OWN_LENGTH),
    ("local.momentum", {"local.optimizer": ("adam", "kronecker", "sgd", "yogi")}),
    ("local.damping", {"local.optimizer": BY_GRADIENTS}),
    ("local.matched", {"local.optimizer": BY_GRADIENTS}),
    ("local.views", {"local.optimizer": WITHOUT_VIEWS}),
    ("local.adaptive.max_steps", {"local.adaptive.scale": (0,)}),
    ("local.gauss_newton.tries", {"local.matched": (True,)}),
    ("local.gauss_newton.cg_steps", {"local.gauss_newton.system": ("gram",)}),
    ("local.compress.bits", {"local.compress.name": ("none", "top_k")}),
    ("local.compress.share", {"local.compress.name": ("none", "few_bits", "change")}),
    ("term.mu", {"term.name": ("duals", "feedback", "mifa", "none", "scaffold", "varp")}),
    ("sketch.full", {"sketch.share": (1,)}),
    ("sketch.jacobian", {"sketch.solver": ("head", "rows")}),
    ("sketch.power_steps", {"sketch.solver": ("rows",)}),
    ("sketch.probes", {"sketch.solver": ("rows",), "sketch.loss_rank": (0,)}),
    ("sketch.samples", {"aggregator.layers.kind": ("foof", "regmean")}),
    ("aggregator.layers.iterations", {"aggregator.layers.kind": ("foof", "regmean")}),
    ("aggregator.layers.shrink", {"aggregator.layers.kind": ("foof", "kfac")}),
    ("aggregator.posterior.rho", {"aggregator.posterior.form": ("sum",)}),
    ("aggregator.rcond", {"aggregator.form": ("damped", "tikhonov")}),
    ("aggregator.damping", NOT_DAMPED),
    ("aggregator.relative", NOT_DAMPED),
    ("aggregator.past.decay", NOT_REMEMBERED),
    ("aggregator.past.rank", NOT_REMEMBERED),
    ("aggregator.past.rank", {"aggregator.name": ("kronecker", "sums")}),
    ("aggregator.past.length", {"aggregator.past.kind": ("none", "prior", "latest", "curvature")}),
    ("aggregator.late.transport", {"aggregator.name": OTHER_RULES}),
    ("aggregator.late.max_drift", {"aggregator.name": OTHER_RULES}),
    ("aggregator.late.mix", {"aggregator.name": ("diagonal", "fipa", "kronecker", "posterior")}),
    ("server.momentum", {"server.optimizer": ("eve", "exp", "sgd")}),
    ("late.most", {"late.share": (0,)}),
    ("faults.scale_by", {"faults.scale": (0,)}),
)
PLACES = ("auto", "device", "host")
CHOICES = {
    "precision": ("float32", "float64"),
    "examples_on": PLACES,
    "client_store": PLACES,
    "model.compute_dtype": ("", "bfloat16", "float16", "float32", "float64"),
}


def validate(config: ConfigDict) -> None:
    """Checks what can be checked without data.

    Raises:
      ValueError: names the field, what was needed and what arrived.
    """
    usual = default()
    fields.check(config, usual)
    for path, known in CHOICES.items():
        lookup(dict.fromkeys(known), fields.value(config, path), f"config.{path}")
    for path in PATHS:
        files.local(fields.value(config, path), f"config.{path}")
    _check_ranges("config", config, RUN)
    for path in NOT_EMPTY:
        if not fields.value(config, path):
            raise ValueError(f"config.{path}: needs one number at least, got ()")
    _check_read(config, usual, "task.name", TASKS, READ_BY_TASKS)
    _check_read(config, usual, "model.name", MODELS, READ_BY_MODELS)
    if config.init_paths and not config.init_from:
        raise ValueError(f"config.init_paths: of config.init_from, which is not set; got {config.init_paths!r}")
    _check_images(config)
    _check_compare(config)
    _check_phase("config.warmup", config.warmup)
    _check_ranges("config.fipa", config.fipa, {"rounds": NOT_NEGATIVE})
    for spec in config.compare:
        _check_method(config, spec)
    if config.warmup.rounds + config.fipa.rounds < 1:
        raise ValueError("config.warmup.rounds and config.fipa.rounds are both 0: nothing to run")


def check_unread(settings: ConfigDict, paths: Iterable[str]) -> None:
    """Refuses fields, `paths`, that a phase's other choices leave without effect, with a ValueError."""
    for path in paths:
        for where in [where for name, where in UNREAD_WHERE if name == path]:
            chosen = {choice: fields.value(settings, choice) for choice in where}
            if all(_among(value, where[choice]) for choice, value in chosen.items()):
                words = " and ".join(f"{choice} = {value!r}" for choice, value in chosen.items())
                raise ValueError(f"config.fipa.{path}: nothing reads it with {words}; leave it out")


def _among(value, these: tuple | Range) -> bool:
    """Whether a value is one of these, or in this range."""
    return holds(these, value) if isinstance(these, Range) else value in these


def holds(numbers: Range, value: float) -> bool:
    """Whether a value is in a range; NaN is in none."""
    above = value > numbers.low if numbers.brackets[0] == "(" else value >= numbers.low
    below = value < numbers.high if numbers.brackets[1] == ")" else value <= numbers.high
    return above and below


def _in_words(numbers):
    """Which numbers a range holds."""
    if numbers.high == math.inf:
        return f"{'more than' if numbers.brackets[0] == '(' else 'at least'} {numbers.low}"
    return f"a {numbers.noun} in {numbers.brackets[0]}{numbers.low}, {numbers.high}{numbers.brackets[1]}"


def _check_compare(config):
    """Refuses a comparison of no methods, or of one twice: each has files of its name."""
    if not config.compare:
        raise ValueError(f"config.compare: needs a tuple of methods such as ('fipa', 'fedavg'), got {config.compare!r}")
    if len(set(config.compare)) != len(config.compare):
        raise ValueError(f"config.compare: names a method twice: {config.compare}")


def _check_read(config, usual, choice, known, read_by):
    """Refuses a field that is set and that the chosen task, or model, does not read; one of a user's own may read all.

    Args:
      usual: the config as it is by default.
      choice: the field that names it.
      known: the names of this package's own.
      read_by: {some of these names: the fields that they alone read}.
    """
    chosen = fields.value(config, choice)
    for names, paths in read_by.items():
        for path in paths if chosen in known and chosen not in names else ():
            value, left = fields.value(config, path), fields.value(usual, path)
            if value != left:
                raise ValueError(
                    f"config.{path}: {choice} = {chosen!r} does not read it; leave it at {left!r}, got {value!r}"
                )


def _check_images(config):
    """Refuses what does not fit together in the data set of the task `images` and its split."""
    if config.task.name != "images":
        return
    name = config.data.name.partition(":")[0]
    if name in ("digits", "mnist") and config.data.augment and config.data.flip:
        raise ValueError(f"config.data.flip: a mirrored digit is no digit; with the data set {name!r} set it to False")
    if config.cohort > config.partition.num_clients:
        raise ValueError(
            f"config.cohort: {config.cohort} is above the number of clients, {config.partition.num_clients}"
        )


def _check_method(config, spec):
    """Checks the FIPA phase of one of the compared methods, which can skip its rounds only where the others do."""
    settings = method(config, spec)
    try:
        fields.check(settings, config.fipa, "config.fipa")
        _check_phase("config.fipa", settings)
        _check_ranges("config.fipa", settings, {"rounds": Range(min(config.fipa.rounds, 1))})
        check_unread(settings, overrides(config, spec, settings))
    except ValueError as error:
        raise ValueError(f"{error} (in the method {spec!r})") from None


def _check_phase(name, settings):
    """Checks the fields of a phase, `name` being its path."""
    _check_ranges(name, settings, PHASE)
    for field in ("trainable", "also_trained"):
        try:
            re.compile(settings[field])
        except re.error as error:
            text = f"got {settings[field]!r} ({error})"
            raise ValueError(f"{name}.{field}: needs a regular expression, {text}") from None
    if not settings.local.steps:
        _check_ranges(name, settings, {"local.epochs": POSITIVE})
    if settings.term.name == "dyn" and not settings.term.mu:
        raise ValueError(f"{name}.term.mu: the term dyn divides by it and needs more than 0, got 0")


def _check_ranges(name, group, ranges):
    """Checks all fields of a table {path below the group: `Range`}; of a tuple each part."""
    for path, numbers in ranges.items():
        value = fields.value(group, path)
        for number in value if isinstance(value, tuple) else (value,):
            if not holds(numbers, number):
                raise ValueError(f"{name}.{path}: needs {_in_words(numbers)}, got {number}")
