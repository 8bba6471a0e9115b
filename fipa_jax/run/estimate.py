"""How long will a run take, at least? Said before it begins, where that is longer than a night."""

import math
import timeit

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from fipa_jax.curvature.products import forward_flops
from fipa_jax.run.experiment import Experiment

ONE_PASS = ("gradient", "natural_gradient")  # solvers that see a client's examples once
LONG = 12 * 3600.0  # seconds of a run that a person wants to know of before


def say_if_long(experiment: Experiment, phases: list[ConfigDict]) -> None:
    """Warns of a run that takes longer than `LONG` on this machine, and says what is shorter, `config.smaller`.

    Args:
      phases: the fields of each phase that runs.
    """
    operations = sum(least_operations(experiment, settings) for settings in phases)
    seconds = operations / operations_a_second() / jax.device_count()
    if seconds > LONG:
        shorter = experiment.config.smaller or "lower the rounds, config.cohort or local.epochs"
        logging.warning(
            "local training alone will take at least %.0f hours (%.1f days) on this %s. Shorter: %s. Ctrl-C ends it",
            seconds / 3600,
            seconds / 86400,
            jax.default_backend(),
            shorter,
        )


def least_operations(experiment: Experiment, settings: ConfigDict) -> float:
    """Floating-point operations of a phase's local training: passes through the network, and no sketches.

    A step takes a forward pass, and where all is trained two as dear for the gradient. 0 where the body is cached.
    """
    if settings.cache_body:
        return 0.0
    config, problem = experiment.config, experiment.problem
    one = {name: jax.ShapeDtypeStruct((1, *field.shape[1:]), field.dtype) for name, field in problem.train.items()}
    backward = 2 if ".*" in (settings.trainable, settings.also_trained) else 0
    passes = (1 + backward) * forward_flops(problem.task.outputs, experiment.params, one)
    everyone, local = len(problem.clients), settings.local
    clients, owners = (1, 1) if settings.pooled else (config.cohort or everyone, everyone)
    own = sum(map(len, problem.clients)) / owners  # examples of a client, on average
    in_a_round = local.steps * min(local.batch_size or math.inf, own) if local.steps else local.epochs * own
    in_a_round = own if local.optimizer in ONE_PASS else in_a_round
    return settings.rounds * clients * in_a_round * passes


def operations_a_second() -> float:
    """Floating-point operations a second of a device in a product of two matrices, the fastest thing that it does."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    square, product = jnp.ones([side, side], jnp.float32), jax.jit(jnp.matmul)

    def once():
        jax.block_until_ready(product(square, square))

    once()  # compiles
    return 2 * side**3 / min(timeit.repeat(once, number=1, repeat=3))
