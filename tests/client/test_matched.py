"""With the server's damping in the clients' steps a round is the centralised step; and steps that adapt to sketches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import centralised
from helpers.centralised import COUNTS, TASK, dense, levenberg_marquardt, start
from jax.flatten_util import ravel_pytree

from fipa_jax import aggregate, tasks
from fipa_jax.aggregate.limits import Limits
from fipa_jax.client import first_order as client
from fipa_jax.client import second_order
from fipa_jax.client.local_solver import adaptive_steps, steps_for
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import Sketch, plain
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation.parts import Parts
from fipa_jax.federation.population import Cohort
from fipa_jax.federation.server import serve


@pytest.mark.parametrize(("damping", "num_rounds"), [(1.0, 8), (1e-3, 14)])
def test_rounds_are_the_centralised_levenberg_marquardt_method(x64, damping, num_rounds):
    """Step by step, whatever the damping; the smaller one's first steps are too long and are undone."""
    found, infos = centralised.run(damping, num_rounds)
    wanted = levenberg_marquardt(start(), damping, num_rounds)
    assert any(info["undone"] for info in infos) == (damping < 0.1)
    assert len({float(info["damping"]) for info in infos}) > 3
    for k, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-8 * np.abs(theirs).max(), err_msg=f"round {k}")
    assert dense(found[-1])[-1][0] < 0.9 * dense(found[0])[-1][0]


UNBOUNDED = Limits(max_step=0.0)
RULE = aggregate.fipa(relative=False, limits=UNBOUNDED)


@jax.jit
def _by_rule(uploads, damping, like):
    received, screening = aggregate.receive(uploads, like)
    state = RULE.init(like)
    state = state._replace(hyper=state.hyper | {"damping": damping})
    return aggregate.step_of(RULE, received, state, like, screening)[0]


def _step(theta, damping, rank, of_clients):
    """(FIPA's step by sketches of this rank, the centralised one, the bound on their distance).

    With the rank's remainders E_m of the clients' curvatures, 0 <= E_m <= lam_{R+1} I, and s the centralised step,

        step - s = (H - E + beta I)^{-1} sum_m w_m E_m (s - delta_m),
        |step - s| <= sum_m w_m lam_{R+1} |s - delta_m| / beta.
    """
    *parts, (_, gradient, curvature) = dense(theta)
    regular = lambda h, beta: h + beta * np.eye(theta.size)
    wanted = -np.linalg.solve(regular(curvature, damping), gradient)
    deltas = np.stack([-np.linalg.solve(regular(h, of_clients), g) for _, g, h in parts])
    eigenvalues, basis = (x[..., ::-1] for x in np.linalg.eigh(np.stack([h for *_, h in parts])))
    cut = jnp.asarray(np.where(np.arange(theta.size) < rank, eigenvalues, 0))
    like = TASK.init(None)
    delta = jax.vmap(ravel_pytree(like)[1])(jnp.asarray(deltas))
    uploads = aggregate.Uploads(delta, jnp.asarray(COUNTS), Sketch(cut, jnp.asarray(basis), None))
    found = np.asarray(ravel_pytree(_by_rule(uploads, jnp.asarray(damping, float), like))[0])
    left = np.maximum(eigenvalues[:, rank], 0)
    distances = np.linalg.norm(wanted - deltas, axis=1)
    return found, wanted, COUNTS / COUNTS.sum() @ (left * distances) / damping


def test_a_rank_costs_no_more_than_the_eigenvalues_it_leaves_out(x64):
    theta, errors = start(), {}
    for damping in (0.01, 0.1, 1.0):
        for rank in range(1, 7):
            found, wanted, bound = _step(theta, damping, rank, damping)
            errors[damping, rank] = error = np.linalg.norm(found - wanted)
            assert error <= bound + 1e-9 * np.linalg.norm(wanted), (damping, rank)
            assert rank == 6 or error > 1e-9 * bound
        assert errors[damping, 6] < 1e-9 * np.linalg.norm(wanted) < errors[damping, 2] < errors[damping, 1]
    assert errors[1.0, 2] < errors[0.1, 2] < errors[0.01, 2]


@pytest.mark.parametrize(("rank", "store"), [(1, ""), (3, ""), (3, "bfloat16")])
def test_the_server_undoes_natural_gradients_at_any_rank(x64, rank, store):
    """The step is -(H + beta I)^{-1} g with the sketches' H, however much of the curvature they leave out or round."""
    beta, lr = 0.2, 0.7

    def make(outputs, features):
        of_client = sketch.make_sketch(outputs, TASK.loss, rank=rank, solver="rows")
        return sketch.stored_as(of_client, store) if store else of_client

    parts = centralised.parts()._replace(
        local=second_order.natural_gradient(TASK.loss, TASK.augment),
        sketcher=plain(make),
        aggregator=aggregate.fipa(relative=False, damping=beta, limits=UNBOUNDED),
        sketch_first=True,
    )
    data, clients = centralised.problem()
    state, cohort = parts_lib.init(parts, TASK.init(None)), Cohort(jnp.arange(len(COUNTS)), clients, data)
    work = rounds.by_clients(parts, functools.partial(rounds.train, parts), functools.partial(rounds.sketch, parts))

    @jax.jit
    def one(state):
        results, sketches = work(state, centralised.rates(lr), cohort, jax.random.key(0))
        after, _ = serve(parts, state, centralised.rates(lr), cohort, results, sketches)
        return results, sketches, after.params

    results, sketches, after = jax.device_get(one(state))
    *parts, (_, gradient, _) = dense(start())
    weights, deltas = COUNTS / COUNTS.sum(), jax.vmap(lambda tree: ravel_pytree(tree)[0])(results.delta)
    basis = sketches.basis.astype(float)
    each = np.einsum("cpr,cr,cqr->cpq", basis, sketches.eigenvalues, basis)
    regular = beta * np.eye(start().size)
    for m, (loss, own, _) in enumerate(parts):
        np.testing.assert_allclose(deltas[m], -lr * np.linalg.solve(each[m] + regular, own), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(results.loss[m], loss)
    wanted = -lr * np.linalg.solve(np.tensordot(weights, each, 1) + regular, gradient)
    np.testing.assert_allclose(np.asarray(ravel_pytree(after)[0]) - start(), wanted, rtol=1e-8, atol=1e-12)


def test_with_a_damping_of_their_own_it_is_another_step(x64):
    """Which is why the clients' damping is matched: sketches of full rank do not help."""
    found, wanted, bound = _step(start(), 0.1, 6, 1e-4)
    assert np.linalg.norm(found - wanted) > 0.1 * np.linalg.norm(wanted) > bound


def test_the_smallest_eigenvalue_is_that_of_a_kept_pair():
    for eigenvalues, wanted in (([3.0, 2.0, 0.5], 0.5), ([3.0, 2.0, 0.0], 2), ([0.0, 0.0], 0), ([np.nan, 0.0], 0)):
        assert sketch.smallest(jnp.array(eigenvalues)) == wanted


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_steps_are_those_of_the_published_rule(x64, scale):
    most, least = 200, np.geomspace(1e-6, 9.9, 200)
    found = steps_for(jnp.asarray(least), jnp.asarray(0.1), scale, most)
    wanted = np.clip(np.ceil(-scale / np.log1p(-0.1 * least)), 1, most)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == jnp.int32 and (scale > 1 or found[-1] == 1) and found[0] == most


def test_steps_at_the_ends_of_the_rule():
    """One step solves it, or overshoots; nothing is kept, so that no number is enough."""
    steps = lambda least, lr=0.5, scale=0.01: int(steps_for(jnp.float32(least), jnp.float32(lr), scale, 70))
    assert steps(2.0) == steps(100.0) == steps(2.0, scale=30.0) == 1
    assert steps(0.0) == steps(1.0, lr=0.0) == steps(1e-30) == steps(0.0, scale=1e30) == 70
    # In float32, 1 - lr lam would be off by a tenth here.
    assert steps(2e-6, lr=0.25, scale=2e-5) == 40


def test_clients_take_as_many_steps_as_their_sketches_say(x64):
    """Gradient descent on a quadratic, for which any number of steps has a closed form; one client has no examples."""
    linear = tasks.Task(
        lambda key: {"w": jnp.array([[1.0], [-2.0]])},
        lambda params, batch: (batch["x"] @ params["w"], ()),
        TASK.loss,
        TASK.metrics,
    )
    lr, scale, most = 0.1, 1.0, 2000
    counts = np.array([6, 0, 5])
    data, clients = centralised.problem()
    data["x"] = data["x"].at[12:, 0].mul(0.6)  # the last client's weakest direction is weaker
    clients = clients._replace(num_examples=jnp.asarray(counts))
    local = client.first_order(linear.loss, linear.augment, batch_size=0, epochs=1)
    parts = centralised.parts()._replace(
        task=linear,
        local=adaptive_steps(local, scale, most),
        sketcher=centralised.sketcher(rank=2),
        aggregator=aggregate.fipa(),
        announce=Parts._field_defaults["announce"],
        sketch_first=True,
    )
    train, find = (jax.jit(functools.partial(stage, parts)) for stage in (rounds.train, rounds.sketch))
    state, cohort = parts_lib.init(parts, linear.init(None)), Cohort(jnp.arange(3), clients, data)
    order = []
    clock = lambda stage, result: order.append(stage) or result
    work = rounds.by_clients(parts, train, find, clock)
    results, _ = work(state, centralised.rates(lr), cohort, jax.random.key(0))
    assert order == ["sketch", "train"]
    theta, taken = np.array([1.0, -2.0]), []
    for m in (0, 2):
        own = np.asarray(clients.indices)[m, : counts[m]]
        x, y = np.asarray(data["x"])[own], np.asarray(data["y"])[own, 0]
        curvature, best = x.T @ x / counts[m], np.linalg.lstsq(x, y, rcond=None)[0]
        taken.append(int(np.ceil(-scale / np.log(1 - lr * np.linalg.eigvalsh(curvature)[0]))))
        contraction = np.linalg.matrix_power(np.eye(2) - lr * curvature, taken[-1])
        found = np.asarray(results.delta["w"])[m, :, 0]
        np.testing.assert_allclose(found, (np.eye(2) - contraction) @ (best - theta), rtol=1e-9)
    assert 1 < taken[0] < taken[1] < most
    np.testing.assert_array_equal(results.delta["w"][1], 0)
