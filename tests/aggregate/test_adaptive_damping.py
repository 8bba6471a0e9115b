"""The damping that finds itself, beside dense matrices and finite differences of the steps that were taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import CLIENTS, SIZE, apply, as_tree, as_vector, assert_close, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import Limits, PastRounds
from fipa_jax.aggregate.adaptive_damping import RECALL, adaptive
from fipa_jax.curvature.sketch import Sketch

DECAY, FIRST, EVERYONE = 0.7, 0.3, 12
PAST = PastRounds("prior", rank=SIZE, decay=DECAY, adaptive=True)
COUNTS = np.array([5, 1, 3, 7])


@functools.cache
def _rule(bound=0.0, damping=FIRST, past=PAST):
    """(rule, the same compiled), with a bound on the step's divergence."""
    rule = aggregate.fipa("damped", damping=damping, relative=False, past=past, limits=Limits(0.0, bound, 0.0, 0.0))
    return rule, jax.jit(functools.partial(apply, rule))


def _losses(seed=0, scale=1.0):
    """(H_m, their eigenvalues, bases, minimisers) of all clients' losses |theta - best_m|^2_{H_m} / 2."""
    draw = np.random.default_rng(seed)
    roots = draw.normal(size=(EVERYONE, SIZE, SIZE)) * np.geomspace(1, 0.03, SIZE)
    each = scale * np.einsum("mpq,mrq->mpr", roots, roots)
    values, bases = np.linalg.eigh(each)
    return each, values[:, ::-1], bases[..., ::-1], draw.normal(size=(EVERYONE, SIZE))


def _cohorts(rounds, seed=1):
    draw = np.random.default_rng(seed)
    return [draw.permutation(EVERYONE)[:CLIENTS] for _ in range(rounds)]


def _upload(losses, ids, theta, beta):
    """What clients send who take a natural gradient step by their sketch, with the server's damping."""
    each, values, bases, best = (array[ids] for array in losses)
    gradients = np.einsum("mpq,mq->mp", each, theta - best)
    known = np.einsum("mpr,mr,mqr->mpq", bases, values, bases)
    steps = -np.linalg.solve(known + beta * np.eye(SIZE), gradients[..., None])[..., 0]
    return uploads_of(steps, COUNTS, values, bases)


def _run(losses, cohorts, **options):
    """(the parameters before each round and after the last, the infos) of the rule."""
    rule, compiled = _rule(**options)
    theta, state = np.zeros(SIZE), _rule(**options)[0].init(as_tree(np.zeros(SIZE)))
    visited, infos = [theta], []
    for ids in cohorts:
        beta = float(rule.announce(state)["damping"])
        step, state, info = compiled(_upload(losses, ids, theta, beta), state, as_tree(theta))
        theta = theta + as_vector(step)
        visited.append(theta)
        infos.append(jax.tree.map(np.asarray, info))
    return visited, infos, state


class Round:
    """A round by dense matrices: its merged H, the gradient that counts, and the step as a function of log beta."""

    def __init__(self, losses, ids, theta, curvature, weight, bound):
        each, _, _, best = (array[ids] for array in losses)
        weights, size = COUNTS / COUNTS.sum(), COUNTS.sum()
        share = 1 if weight == 0 else size / (size + DECAY * weight)
        self.curvature = share * np.tensordot(weights, each, 1) + (1 - share) * curvature
        self.weight = size / (1 - DECAY) if weight == 0 else size + DECAY * weight
        self.share = 1 - DECAY if weight == 0 else share
        self.gradient = np.einsum("m,mpq,mq->p", weights, each, theta - best)
        self.bound = bound

    def full(self, log_beta):
        return -self.share * np.linalg.solve(self.curvature + np.exp(log_beta) * np.eye(SIZE), self.gradient)

    def step(self, log_beta):
        full = self.full(log_beta)
        divergence = full @ self.curvature @ full / 2
        return full * min(1, np.sqrt(self.bound / divergence)) if self.bound else full

    def slope(self, log_beta, h=1e-5):
        return (self.step(log_beta + h) - self.step(log_beta - h)) / (2 * h)


@pytest.mark.parametrize("bound", [0.0, 0.02], ids=["free", "bounded"])
def test_it_descends_along_the_next_cohorts_loss(x64, bound):
    """Damping round by round, its derivatives those of finite differences; and the next cohort's loss itself."""
    losses, cohorts = _losses(), _cohorts(7)
    visited, infos, _ = _run(losses, cohorts, bound=bound)
    curvature, weight, beta, way, shortened = 0, 0, FIRST, np.zeros(SIZE), 0
    last, pace = np.zeros(SIZE), 1.0
    for k, (ids, info) in enumerate(zip(cohorts, infos, strict=True)):
        dense = Round(losses, ids, visited[k], curvature, weight, bound)
        np.testing.assert_allclose(info["damping"], beta, rtol=1e-5)
        assert_close(visited[k + 1] - visited[k], dense.step(np.log(beta)), 1e-8)
        metric, full = dense.curvature + beta * np.eye(SIZE), dense.full(np.log(beta))
        length = np.sqrt(way @ metric @ way)
        agreement = full @ metric @ way / (np.sqrt(full @ metric @ full) * length) if k else 0
        np.testing.assert_allclose(info["agreement"], agreement, atol=1e-5)
        if k == 1:  # the derivative of the next cohort's loss, by the damping of the step before
            assert_close(dense.gradient @ last, full @ metric @ way * pace / dense.share, 1e-5)
        last = dense.slope(np.log(beta))
        pace = np.sqrt(last @ metric @ last)
        way = RECALL * way - last / pace
        shortened += not np.allclose(dense.step(np.log(beta)), full)
        left_out = np.sum((COUNTS / COUNTS.sum()) ** 2 * losses[1][ids][:, -1])
        beta = beta * np.exp(-agreement) if k else left_out
        curvature, weight = dense.curvature, dense.weight
    assert (shortened > 3) == (bound > 0)


def test_no_unit_of_the_loss_matters(x64):
    """Losses in other units, and the same steps: but for the first damping, which is a number."""
    plain, _, _ = _run(_losses(), _cohorts(6))
    scaled, infos, _ = _run(_losses(scale=100.0), _cohorts(6), damping=100 * FIRST)
    assert_close(np.stack(scaled), np.stack(plain), 1e-8)
    assert infos[-1]["damping"] != infos[0]["damping"]


@functools.cache
def _many_rounds(adaptive, rounds=500, known=4):
    """first damping -> (mean excess loss of the last hundred rounds, their median damping); sketches know little."""
    each, values, bases, best = map(jnp.asarray, _losses())
    values, best = values[:, :known], best[:1] + 0.3 * best
    cohorts, counts = jnp.asarray(np.stack(_cohorts(rounds))), jnp.asarray(COUNTS)
    target = jnp.linalg.solve(each.mean(axis=0), jnp.einsum("mpq,mq->p", each, best) / EVERYONE)
    rule, _ = _rule(bound=0.02, past=PAST._replace(adaptive=adaptive))

    def one(carry, ids):
        theta, state = carry
        gradients = jnp.einsum("mpq,mq->mp", each[ids], theta[None] - best[ids])
        beta, basis = rule.announce(state)["damping"], bases[ids][..., :known]
        inverse = basis * (values[ids] / (values[ids] + beta))[:, None] @ basis.mT
        steps = -(gradients - (inverse @ gradients[..., None])[..., 0]) / beta
        upload = aggregate.Uploads(as_tree(steps), counts, Sketch(values[ids], basis))
        step, state, _ = apply(rule, upload, state, as_tree(theta))
        theta = theta + jnp.concatenate([step["a"].reshape(-1), step["b"]])
        return (theta, state), ((theta - target) @ each.mean(axis=0) @ (theta - target) / 2, beta)

    @jax.jit
    def run(damping):
        start = rule.init(as_tree(np.zeros(SIZE)))
        start = start._replace(hyper=start.hyper | {"damping": damping})
        _, (losses, dampings) = jax.lax.scan(one, (jnp.zeros(SIZE), start), cohorts)
        return jnp.mean(losses[-100:]), jnp.median(dampings[-100:])

    return lambda damping: [float(value) for value in run(jnp.asarray(damping))]


@pytest.mark.slow
def test_it_finds_the_same_damping_wherever_it_starts(x64):
    """Five hundred rounds of clients that differ, whose sketches know a third of the directions."""
    low, high = (_many_rounds(True)(damping) for damping in (1e-5, 1e4))
    fixed = {damping: _many_rounds(False)(damping)[0] for damping in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)}
    assert 1 / 3 < low[1] / high[1] < 3
    assert max(low[0], high[0]) < 2 * min(fixed.values())


def test_a_round_without_clients_leaves_it_as_it_is(x64):
    losses, cohorts = _losses(), _cohorts(3)
    rule, compiled = _rule()
    _, _, state = _run(losses, cohorts)
    upload = _upload(losses, cohorts[0], np.zeros(SIZE), FIRST)
    _, after, info = compiled(
        upload._replace(num_examples=jnp.zeros(CLIENTS, jnp.int64)), state, as_tree(np.zeros(SIZE))
    )
    np.testing.assert_array_equal(rule.announce(after)["damping"], rule.announce(state)["damping"])
    np.testing.assert_array_equal(after.solver[0].way, state.solver[0].way)
    assert np.isfinite(info["agreement"])


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (lambda: aggregate.pinv(), "'pinv' has no damping"),
        (lambda: adaptive(aggregate.damped(relative=False)), "wrap it once"),
        (lambda: aggregate.capped(aggregate.damped(relative=False)), "must be outside"),
        (lambda: aggregate.trust_region(aggregate.damped(relative=False)), "finds the damping already"),
    ],
)
def test_orders_that_would_not_do_what_they_say_are_refused(inner, words):
    with pytest.raises(ValueError, match=words):
        adaptive(inner())


def test_what_it_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"past\.adaptive: finds an absolute damping"):
        aggregate.fipa(past=PAST)
    for kind in ("targets", "none"):
        with pytest.raises(ValueError, match=rf"past\.adaptive: needs past\.kind = 'prior', got '{kind}'"):
            aggregate.fipa(relative=False, past=PAST._replace(kind=kind))
