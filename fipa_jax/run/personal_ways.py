"""In which ways can a client get a model of its own? `WAYS`: name -> what it is fitted by, and drawn to."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from fipa_jax.client import personal
from fipa_jax.client.first_order import first_order
from fipa_jax.client.local_solver import LocalResult, LocalSolver
from fipa_jax.client.personal import Prior
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.tasks.task import Task, unaugmented

BY_CURVATURE = ("curvature", "laplace", "spread")  # ways that the clients' sketches have a say in
OF_OTHERS = 3.0  # the strength of the curvature with which the models are fitted whose spread is a prior


class Way(NamedTuple):
    """A way to get a model of one's own."""

    local: LocalSolver
    start: dict  # the parameters that it starts from
    prior: Prior
    tried: tuple  # the numbers, strengths or steps, of which one is chosen
    field: str  # of `Hyper`, which is this number
    lr: float = 1.0


class Trained(NamedTuple):
    """What all ways start from, after a phase."""

    settings: ConfigDict  # config.personal
    task: Task
    first: dict  # the parameters before any training
    params: dict  # those of the trained model
    told: Sketch | None  # of the clients in training, stacked [C, ...]; for those of `BY_CURVATURE`
    num_examples: jax.Array  # [C], theirs
    moves_of: Callable[[Way], jax.Array]  # -> [C, P], how far models of theirs, by all they have, are from that model


def _stay(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
    """A local solver that changes nothing."""
    return LocalResult(optax.tree.zeros_like(params), store, jnp.zeros([]))


def _global(trained: Trained) -> Way:
    """The trained model as it is."""
    return Way(_stay, trained.params, personal.proximity(trained.params), (1.0,), "mu")


def _local(trained: Trained) -> Way:
    """A fit of its own examples alone, from the model before any training, drawn to zero."""
    prior = personal.proximity(trained.first, trained.settings.own)
    prior = prior._replace(anchor=jnp.zeros_like(prior.anchor))
    return Way(_fitter(trained), trained.first, prior, trained.settings.strengths, "mu")


def _finetune(trained: Trained) -> Way:
    """Gradient steps with momentum 0.9 from the trained model, on all own examples."""
    local = _descent(trained.task.loss)
    settings = trained.settings
    return Way(local, trained.params, personal.proximity(trained.params), settings.steps, "steps", settings.lr)


def _ditto(trained: Trained) -> Way:
    """A fit of its own examples, drawn to the trained model alike in all directions (Li et al. 2021)."""
    prior = personal.proximity(trained.params, trained.settings.own)
    return Way(_fitter(trained), trained.params, prior, trained.settings.strengths, "mu")


def _curvature(trained: Trained) -> Way:
    """A fit of its own examples, drawn to the trained model as the others' data ask for."""
    settings = trained.settings
    prior = personal.curvature(trained.params, trained.told, trained.num_examples, settings.damping, settings.own)
    return Way(_fitter(trained), trained.params, prior, settings.strengths, "mu")


def _laplace(trained: Trained) -> Way:
    """The same, each of the others' examples counting as one of its own: the posterior of one model for all."""
    return _curvature(trained)._replace(tried=(float(jnp.sum(trained.num_examples)),))


def _spread(trained: Trained) -> Way:
    """A fit of its own examples, drawn to the trained model as the others' models, by `_curvature`, differ from it."""
    moves = trained.moves_of(_curvature(trained)._replace(tried=(OF_OTHERS,)))
    prior = personal.spread(trained.params, moves)
    return Way(_fitter(trained), trained.params, prior, trained.settings.strengths, "mu")


@functools.cache
def _solver(loss, steps: int) -> LocalSolver:
    """One object for one loss and so many steps, so that what is compiled with it is found again."""
    return personal.fitter(loss, steps)


def _fitter(trained: Trained) -> LocalSolver:
    return _solver(trained.task.loss, trained.settings.fit_steps)


@functools.cache
def _descent(loss) -> LocalSolver:
    return first_order(loss, unaugmented, optimizer="momentum", batch_size=0)


WAYS: dict[str, Callable[[Trained], Way]] = {
    "curvature": _curvature,
    "ditto": _ditto,
    "finetune": _finetune,
    "global": _global,
    "laplace": _laplace,
    "local": _local,
    "spread": _spread,
}
