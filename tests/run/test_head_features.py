"""Features of the body, computed once: they are the body's own, of plain examples and of random views."""

import types
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import tasks
from fipa_jax.federation.population import OnHost, Resident
from fipa_jax.run import head_features as cache

NUM_EXAMPLES, VIEWS = 7, 3


class Stub(NamedTuple):
    """What `cached` looks at of an experiment."""

    config: types.SimpleNamespace
    problem: types.SimpleNamespace
    population: Resident
    held: dict
    root: jax.Array
    evaluate: object = None
    evaluate_drawn: object = None
    compiled: object = None


class Problem(NamedTuple):
    task: tasks.Task
    public: dict | None = None


def _stub():
    """Features: the square of a shifted input; a view shifts by a random number, which no two share."""

    def outputs(params, batch):
        body = (batch["image"] + params["shift"][None]) ** 2
        return body @ params["head"], types.SimpleNamespace(body=body)

    task = tasks.Task(
        init=None,
        outputs=outputs,
        loss=None,
        metrics=lambda out, batch: {"mean": out[:, 0]},
        augment=lambda key, batch: {**batch, "image": batch["image"] + jax.random.uniform(key, batch["image"].shape)},
        head=lambda params, body: (body @ params["head"], types.SimpleNamespace(body=body)),
    )
    image = jnp.arange(2.0 * NUM_EXAMPLES).reshape(NUM_EXAMPLES, 2)
    data = {"image": image, "label": jnp.arange(NUM_EXAMPLES)}
    config = types.SimpleNamespace(eval=types.SimpleNamespace(batch_size=3), devices=1)
    return Stub(config, Problem(task), Resident(data, None), {"test": data}, jax.random.key(0))


PARAMS = {"shift": jnp.array([1.0, 2.0]), "head": jnp.ones([2, 1])}


def test_what_lives_on_the_host_stays_there():
    """Features and views are as large as the examples, which did not fit on the device."""
    stub = _stub()
    data = jax.tree.map(np.asarray, stub.population.data)
    people = OnHost(data, [np.arange(3), np.arange(3, NUM_EXAMPLES)], 1, jax.device_put)
    on_host = stub._replace(population=people)
    found, wanted = (cache.cached(each, PARAMS, VIEWS).population.data for each in (on_host, stub))
    assert all(isinstance(field, np.ndarray) for field in found.values())
    chex.assert_trees_all_close(found, jax.device_get(wanted), rtol=1e-6)
    shapes = lambda data: {name: (field.shape, field.dtype) for name, field in data.items()}
    assert shapes(cache.cached(on_host, PARAMS, VIEWS, by_shapes=True).population.data) == shapes(found)


@pytest.mark.parametrize("num_views", [0, VIEWS])
def test_the_body_is_that_of_plain_examples(num_views):
    seen = cache.cached(_stub(), PARAMS, num_views)
    wanted = (_stub().population.data["image"] + PARAMS["shift"][None]) ** 2
    for data in (seen.population.data, seen.held["test"]):
        assert "image" not in data
        np.testing.assert_allclose(data["body"], wanted, rtol=1e-6)
        out, _ = seen.problem.task.outputs(PARAMS, data)
        np.testing.assert_allclose(out, wanted.sum(axis=1, keepdims=True), rtol=1e-6)
    assert set(seen.population.data) - set(seen.held["test"]) == ({"views"} if num_views else set())


def test_views_are_the_bodys_features_of_views_no_two_alike():
    seen = cache.cached(_stub(), PARAMS, VIEWS)
    views = np.asarray(seen.population.data["views"])
    assert views.shape == (NUM_EXAMPLES, VIEWS, 2)
    moved = np.sqrt(views) - np.asarray(_stub().population.data["image"] + PARAMS["shift"][None])[:, None]
    assert np.all((-1e-5 < moved) & (moved < 1 + 1e-5))
    assert len(np.unique(np.round(moved.ravel(), 4))) > 0.9 * moved.size


def test_training_draws_every_view_of_its_own_example():
    task = cache.cached(_stub(), PARAMS, VIEWS).problem.task
    numbers = jnp.arange(NUM_EXAMPLES * VIEWS).reshape(NUM_EXAMPLES, VIEWS, 1)
    batch = {"views": numbers, "body": -jnp.ones([NUM_EXAMPLES, 1])}
    drawn = np.stack([task.augment(jax.random.key(seed), batch)["body"][:, 0] for seed in range(30)])
    np.testing.assert_array_equal(drawn // VIEWS, np.tile(np.arange(NUM_EXAMPLES), (30, 1)))
    assert set(drawn.ravel()) == set(range(NUM_EXAMPLES * VIEWS))


def test_shapes_alone_cost_nothing():
    seen = cache.cached(_stub(), PARAMS, VIEWS, by_shapes=True)
    assert isinstance(seen.population.data["views"], jax.ShapeDtypeStruct)
    assert seen.population.data["views"].shape == (NUM_EXAMPLES, VIEWS, 2)
