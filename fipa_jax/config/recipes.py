"""What the experiments in `configs/` share: each starts from one of these and says what is its own."""

import itertools
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from fipa_jax.config.defaults import default
from fipa_jax.lookup import lookup


def images(data: str, model: str) -> ConfigDict:
    """What the image experiments share: the local work of the published ones, 100 clients of which 5 take part."""
    config = default()
    config.task.name, config.data.name, config.model.name = "images", data, model
    config.partition.num_clients, config.cohort = 100, 5
    config.eval.clients_every = 10
    for phase in (config.warmup, config.fipa):
        phase.local.lr, phase.local.lr_decay, phase.local.micro_batch = 0.1, 0.998, -1
        phase.local.weight_decay, phase.local.clip_norm = 1e-3, 10.0
    return config


def pde(equation: str, variant: str) -> ConfigDict:
    """What the experiments with differential equations share: strips, network, points, and two ways to work.

    Args:
      equation: a key of `tasks.pde.EQUATIONS`.
      variant: "" for Levenberg-Marquardt shared by clients and server: one Gauss-Newton step a round with the server's
        damping, which follows the clients' losses. "published" for 300 steps of Adam and the form `pinv`.

    Raises:
      ValueError: the variant is not known.
    """
    config = default()
    config.task.name, config.task.equation = "pde", equation
    config.task.num_clients, config.task.examples_per_client = 4, 400
    config.model.widths = (20, 20)
    config.precision = "float64"
    config.eval.batch_size = config.task.test_points
    config.eval.clients_every = 0
    config.rounds_per_call = 20
    config.fipa.rounds = 100
    config.fipa.local.batch_size = 0
    config.fipa.sketch.solver, config.fipa.sketch.rank = "auto", 50
    lookup({"": levenberg_marquardt, "published": published}, variant, "--config")(config)
    return config


def published(config: ConfigDict) -> None:
    """Sets the FIPA phase to what is published for differential equations: 300 steps of Adam and the form `pinv`."""
    local, rule = config.fipa.local, config.fipa.aggregator
    local.optimizer, local.lr, local.steps = "adam", 1e-4, 300
    rule.form, rule.rcond, rule.limits.max_step = "pinv", 1e-5, 0.0
    config.fipa.server.lr = 0.5
    config.compare = ("fipa", "fedavg:server.lr=1")


def levenberg_marquardt(config: ConfigDict) -> None:
    """Sets the FIPA phase to the rule that is a centralised Levenberg-Marquardt step: see `aggregate.fipa`.

    One Gauss-Newton step a round on every client, with the server's damping, which follows the clients' losses. FedAvg
    beside it has the same local step with a damping of its own, and `centralised` is the ceiling.
    """
    local, rule = config.fipa.local, config.fipa.aggregator
    local.optimizer, local.lr, local.steps, local.matched = "gauss_newton", 1.0, 1, True
    rule.form, rule.trust, rule.relative, rule.damping, rule.limits.max_step = "damped", True, False, 0.1, 0.0
    config.compare = ("fipa", "fedavg", "centralised")


def whole_model(config: ConfigDict) -> None:
    """Sets the FIPA phase to the whole model of a small CNN, as tuned on CIFAR-10 (docs/results/cifar10.md)."""
    fipa = config.fipa
    fipa.local.lr = 0.003
    fipa.sketch.solver, fipa.sketch.rank, fipa.sketch.loss_rank = "auto", 50, 3
    fipa.sketch.examples, fipa.sketch.micro_batch = 250, 5
    fipa.aggregator.form, fipa.aggregator.relative, fipa.aggregator.damping = "tikhonov", False, 0.5
    fipa.server.lr = 0.1  # gamma beta


def head_alone(config: ConfigDict, trainable: str) -> None:
    """Sets the FIPA phase to the head, on features that are computed once, as published: rank 10, gamma 1, beta 0.01.

    Args:
      trainable: the pattern of the head's layers.
    """
    fipa = config.fipa
    fipa.trainable, fipa.cache_body, fipa.local.micro_batch = trainable, True, 0
    fipa.sketch.solver, fipa.sketch.rank = "auto", 10
    fipa.aggregator.form, fipa.aggregator.relative, fipa.aggregator.damping = "tikhonov", False, 0.01
    fipa.server.lr = 0.01  # gamma beta


def private(config: ConfigDict, rounds: int, steps: int, eigenpairs: int) -> None:
    """Sets the FIPA phase to client-level privacy of epsilon 8 at delta 1e-3, by plain steps on all of a client's data.

    Args:
      rounds, steps: how many, and the local steps in each.
      eigenpairs: of the public examples' curvature, at most.
    """
    config.warmup.rounds, config.eval.clients_every = 0, 0
    fipa = config.fipa
    fipa.rounds, fipa.privacy.epsilon, fipa.privacy.delta, fipa.privacy.eigenpairs = rounds, 8.0, 1e-3, eigenpairs
    fipa.local.batch_size, fipa.local.steps, fipa.local.lr_decay = 0, steps, 1.0
    fipa.local.weight_decay, fipa.local.clip_norm, fipa.local.micro_batch = 0.0, 0.0, 0


def every_setting(tried: Mapping[str, tuple]) -> tuple[str, ...]:
    """The methods of `config.compare` that are to be tuned: each with every combination of its numbers.

    Example:
      every_setting({"fedavg:local.lr={}:server.lr={}": ((0.1, 0.01), (1, 0.3))})  # four methods

    Args:
      tried: {a method with a {} for each of its numbers: the values of each}.
    """
    return tuple(method.format(*numbers) for method, values in tried.items() for numbers in itertools.product(*values))


def as_published(config: ConfigDict) -> None:
    """Sets the FIPA phase to what the authors' code does in every image experiment, where it is not said in the paper.

    Sketches are of augmented images, by subspace iteration from one start for all clients; the form is `tikhonov`.
    """
    fipa = config.fipa
    fipa.local.lr = config.warmup.local.lr  # whose schedule goes on
    fipa.sketch.solver, fipa.sketch.loss_rank, fipa.sketch.examples, fipa.sketch.micro_batch = "subspace", 0, 0, 0
    fipa.sketch.views = fipa.sketch.common_start = True
    fipa.aggregator.form, fipa.aggregator.relative = "tikhonov", False


def head_as_published(config: ConfigDict, trainable: str) -> None:
    """Sets the FIPA phase to the head as the authors' code has it: clients train all, but send the head's change.

    Args:
      trainable: the pattern of the head's layers.
    """
    fipa = config.fipa
    fipa.trainable, fipa.also_trained, fipa.cache_body = trainable, ".*", False
    fipa.sketch.rank, fipa.sketch.oversample, fipa.sketch.power_steps = 10, 10, 2
    fipa.aggregator.damping, fipa.server.lr = 0.01, 0.01  # beta, gamma beta with gamma 1


def variant(config: ConfigDict, name: str, **others: Callable[[ConfigDict], None]) -> ConfigDict:
    """The config itself for "", or shrunk for `debug`: a few rounds on a few images, to see that all parts run.

    Args:
      others: further variants by name, each a function that changes the config.

    Raises:
      ValueError: the name is not known.
    """
    lookup({"": unchanged, "debug": _debug, **others}, name, "--config")(config)
    return config


def unchanged(config: ConfigDict) -> None:
    """Leaves a config as it is."""


def _debug(config):
    """Shrinks a config."""
    config.data.train_split, config.data.test_split = "train[:400]", f"{config.data.test_split or 'test'}[:100]"
    config.data.holdout = 0.0
    config.partition.num_clients, config.cohort = 8, 2
    config.warmup.rounds = config.fipa.rounds = config.eval.clients_every = 2
    config.fipa.sketch.rank = min(config.fipa.sketch.rank, 5)
    config.compare = config.compare[:3]
    for phase in (config.warmup, config.fipa):
        phase.local.epochs = 1
