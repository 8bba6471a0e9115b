"""A linear head under the squared loss: one round is analytic federated learning, ridge regression on all the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.centralised import rates

from fipa_jax import aggregate, tasks
from fipa_jax.aggregate.limits import Limits
from fipa_jax.client import first_order, second_order, terms
from fipa_jax.client.examples import Client
from fipa_jax.curvature import sketch
from fipa_jax.curvature.layer_factors import sketcher_of_layers
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation.parts import Parts
from fipa_jax.federation.round import whole_round
from fipa_jax.models.layers import tapped
from fipa_jax.tasks import classification

WIDTH, CLASSES, NUM, BETA = 4, 3, 24, 0.05
HEAD = nn.Dense(CLASSES, use_bias=False, param_dtype=float)
TASK = tasks.Task(
    lambda key: {"kernel": jnp.zeros([WIDTH, CLASSES])},
    lambda params, batch: (HEAD.apply({"params": params}, batch["x"]), ()),
    classification.squared,
    lambda out, batch: {},
)
UNBOUNDED = Limits(0.0, 0.0, 0.0, 0.0)


def _parts(message):
    """FIPA by eigenpairs of full rank, or by the layer's input factor alone; clients step with the server's damping."""
    if message == "eigenpairs":
        rule = aggregate.fipa(damping=BETA, relative=False, limits=UNBOUNDED)
        make = functools.partial(sketch.make_sketch, loss=TASK.loss, rank=WIDTH * CLASSES, solver="rows")
        sketcher, local = sketch.plain(lambda outputs, _: make(outputs)), second_order.natural_gradient
    else:
        rule = aggregate.kronecker(damping=BETA, relative=False, at="broadcast", limits=UNBOUNDED)
        sketcher = sketcher_of_layers(tapped, TASK.loss, inputs_alone=True)
        local = functools.partial(first_order.first_order, optimizer="kronecker", batch_size=0, steps=1)
    given = TASK, local(TASK.loss, TASK.augment), terms.none(), sketcher, rule
    server = parts_lib.optax.identity()
    return Parts(*given, server, num_clients=3, cohort=3, announce=rule.announce, sketch_first=True)


@pytest.mark.parametrize("message", ["eigenpairs", "layer_inputs"])
def test_one_round_is_the_ridge_head_of_all_data_whatever_the_split(x64, message):
    """AFL (He et al. 2025): W = (sum_m X_m^T X_m + N beta I)^-1 sum_m X_m^T Y_m."""
    draw = np.random.default_rng(0)
    x, label = draw.normal(size=(NUM, WIDTH)), draw.integers(0, CLASSES, NUM)
    wanted = np.linalg.solve(x.T @ x + NUM * BETA * np.eye(WIDTH), x.T @ np.eye(CLASSES)[label])
    parts, data = _parts(message), {"x": jnp.asarray(x), "label": jnp.asarray(label)}
    run = jax.jit(functools.partial(whole_round, parts))
    for order in (draw.permutation(NUM), np.argsort(label)):  # at random; by class
        indices, counts = np.zeros((3, 14), int), np.array([5, 14, 5])
        for own, part, count in zip(indices, np.split(order, [5, 19]), counts, strict=True):
            own[:count] = part
        clients = Client(jnp.asarray(indices), jnp.asarray(counts))
        state = parts_lib.init(parts, TASK.init(None))
        state, _ = run(state, rates(), data, clients, jax.random.key(0))
        np.testing.assert_allclose(state.params["kernel"], wanted, rtol=0, atol=1e-10)
