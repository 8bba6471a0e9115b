"""A step is judged by Nielsen's rule, a bad one is undone, and a good one is not touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import centralised
from helpers.centralised import COUNTS, TASK, dense, start
from helpers.rules import apply, shapes_of
from jax.flatten_util import ravel_pytree

from fipa_jax import aggregate
from fipa_jax import config as config_lib
from fipa_jax.aggregate.trust import follow, init, judge
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.federation.parts import Parts
from fipa_jax.run import phase_parts as phase

SIZE = 4


def _proposals(seed):
    """(loss, step, predicted decrease) of a run: mostly decreases, and what else there is."""
    draw = np.random.default_rng(seed)
    losses = 10 + np.cumsum(draw.normal(-0.3, 1.0, size=40))
    losses[[7, 8, 21]] = np.nan, np.inf, losses[20]  # the last one neither good nor bad
    predicted = draw.uniform(0.1, 2, size=40)
    predicted[13] = 0  # no step at all: nothing to judge
    return zip(losses, draw.normal(size=(40, SIZE)), predicted, strict=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_nielsens_rule(x64, seed):
    """Nielsen 1999: mu and nu, gain by gain, one round late; and a step to take instead of the proposed one."""
    judged, followed = jax.jit(judge), jax.jit(follow)
    state, damping, clients = init(SIZE, jnp.result_type(float)), jnp.asarray(0.5), jnp.int32(3)
    mu, nu, before, used = 0.5, 2.0, None, 0.0  # of the last step
    cases = set()
    for loss, step, predicted in _proposals(seed):
        verdict = judged(state, loss, damping, clients)
        taken, state = followed(state, verdict, loss, damping, step, predicted, clients)
        in_use, damping = mu, verdict.damping
        if before is None:
            case, wanted, before = "not judged", step, (loss, step, predicted)
        elif (gain := (before[0] - loss) / before[2]) > 0:
            mu, nu = mu * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2
            case, wanted, before = "accepted", step, (loss, step, predicted)
        else:
            mu, nu = max(mu, used) * nu, 2 * nu
            case, wanted, before = "undone", -before[1], None
        used = in_use
        if before and before[2] == 0:
            before = None
        cases.add(case)
        assert bool(verdict.accepted) == (case != "undone")
        np.testing.assert_array_equal(taken, wanted)
        np.testing.assert_allclose([damping, state.growth], [mu, nu], rtol=1e-12)
    assert cases == {"not judged", "accepted", "undone"}


def test_the_first_step_is_taken_at_its_word(x64):
    verdict = judge(init(SIZE, float), jnp.asarray(jnp.nan), jnp.asarray(0.5), jnp.int32(1))
    assert verdict.accepted and verdict.damping == 0.5 and verdict.growth == 2


@pytest.mark.parametrize(("gain", "dtype"), [(0.0, "float32"), (1.0, "float32"), (1.0, "float64")])
def test_damping_stays_where_it_can_come_back_from(gain, dtype):
    """Every step in vain, as at rounding level, or all as promised, as of a linear model: for ever."""
    with jax.enable_x64(dtype == "float64"):
        state, damping = init(1, dtype), jnp.asarray(1e-3, dtype)
        judged = jax.jit(judge)
        for _ in range(800):
            one = jnp.ones([], dtype)
            state = state._replace(loss=one, predicted=one)
            verdict = judged(state, one - gain, damping, jnp.int32(1))
            damping, state = verdict.damping, state._replace(growth=verdict.growth)
        assert 0 < damping < np.inf and state.growth < np.inf
        assert damping > 1e15 if gain == 0 else damping < 1e-30


def _uploads(theta, damping, **changes):
    """The clients' matched steps, exact sketches and losses, made densely."""
    parts = dense(theta)[:-1]
    losses, curvatures = np.array([loss for loss, *_ in parts]), np.stack([h for *_, h in parts])
    steps = np.stack([-np.linalg.solve(h + damping * np.eye(theta.size), g) for _, g, h in parts])
    eigenvalues, basis = np.linalg.eigh(curvatures)
    delta = jax.vmap(ravel_pytree(TASK.init(None))[1])(jnp.asarray(steps))
    sent = {"delta": delta, "loss": jnp.asarray(losses)} | changes
    sketches = Sketch(jnp.asarray(eigenvalues[:, ::-1]), jnp.asarray(basis[..., ::-1]), None)
    return aggregate.Uploads(num_examples=jnp.asarray(COUNTS), sketch=sketches, **sent)


UNBOUNDED = aggregate.Limits(max_step=0.0)
RULES = {on: aggregate.fipa(damping=0.3, relative=False, limits=UNBOUNDED, trust=on) for on in (True, False)}
APPLY = {on: jax.jit(functools.partial(apply, rule)) for on, rule in RULES.items()}


def _last(state):
    """What the trust region remembers of its last step."""
    return state.solver[0]


def _two_rounds(theta, **changes):
    """The rule's step from theta, then its answer to the clients at the parameters that it led to."""
    state = RULES[True].init(TASK.init(None))
    step, state, first = APPLY[True](_uploads(theta, 0.3), state, TASK.init(None))
    step = ravel_pytree(step)[0]
    sent = _uploads(theta + step, 0.3, **changes)
    answer, after, info = APPLY[True](sent, state, TASK.init(None))
    return np.asarray(step), state, np.asarray(ravel_pytree(answer)[0]), after, (first, info)


def test_good_steps_are_those_of_the_rule_without_trust(x64):
    theta = start()
    step, _, second, after, infos = _two_rounds(theta)
    assert not any(info["undone"] for info in infos) and infos[0]["gain"] == 1
    for found, at in ((step, theta), (second, theta + step)):
        wanted, *_ = APPLY[False](_uploads(at, 0.3), RULES[False].init(TASK.init(None)), TASK.init(None))
        np.testing.assert_array_equal(found, ravel_pytree(wanted)[0])
    before, now = (dense(at)[-1][0] for at in (theta, theta + step))
    assert now < before
    np.testing.assert_allclose(_last(after).loss, now, rtol=1e-12)


def test_it_predicts_what_the_quadratic_model_says(x64):
    theta = start()
    step, state, _, _, (_, info) = _two_rounds(theta)
    before, gradient, curvature = dense(theta)[-1]
    wanted = -(gradient @ step + step @ curvature @ step / 2)
    np.testing.assert_allclose(_last(state).predicted, wanted, rtol=1e-9)
    np.testing.assert_allclose(info["gain"], (before - dense(theta + step)[-1][0]) / wanted, rtol=1e-9)


@pytest.mark.parametrize("lost", [[], [1], [0, 1, 2]], ids=["loss", "one", "all"])
def test_a_step_that_led_to_nan_is_undone(x64, lost):
    """Loss alone, or an update: clients that are set aside, without whom the mean loss may be lower, or nobody's."""
    theta = start()
    changes = {"loss": jnp.array([jnp.nan, 0.0, 0.0])}
    if lost:
        delta = jax.tree.map(jnp.zeros_like, _uploads(theta, 0.3).delta)
        changes = {"loss": jnp.zeros(3).at[jnp.array(lost)].set(jnp.nan), "delta": delta}
        changes["delta"]["v"] = delta["v"].at[jnp.array(lost)].set(jnp.nan)
    step, _, answer, after, (_, info) = _two_rounds(theta, **changes)
    assert info["undone"] and np.flatnonzero(info["rejected"]).tolist() == (lost or [0])
    np.testing.assert_array_equal(answer, -step)
    np.testing.assert_allclose(
        [after.hyper["damping"], _last(after).growth, _last(after).predicted], [0.6, 4, 0], rtol=1e-12
    )


def test_a_client_that_never_has_sense_undoes_nothing(x64):
    theta, state = start(), RULES[True].init(TASK.init(None))
    for _ in range(3):
        sent = _uploads(theta, 0.3)
        delta = sent.delta | {"b": sent.delta["b"].at[1].set(jnp.nan)}
        sent = sent._replace(delta=delta, loss=sent.loss.at[1].set(jnp.nan))
        step, state, info = APPLY[True](sent, state, TASK.init(None))
        assert info["rejected"][1] and not info["undone"]
        theta = theta + np.asarray(ravel_pytree(step)[0]) / 3


def test_a_bad_step_of_a_round_is_undone_and_the_loss_never_rises(x64):
    """The first damping is outlandish: the step leads far away. It is back to that step's rounding."""
    visited, infos = centralised.run(1e-7, 14)
    undone = np.array([info["undone"] for info in infos])
    assert not undone[0] and undone[1] and not undone.all()
    for k in np.flatnonzero(undone):
        rounding = 4 * np.finfo(float).eps * np.abs(visited[k]).max()
        np.testing.assert_allclose(visited[k + 1], visited[k - 1], rtol=0, atol=rounding)
        assert np.linalg.norm(visited[k] - visited[k - 1]) > 1e3 * rounding
    losses = np.array([dense(theta)[-1][0] for theta in visited[:-1]])
    accepted = losses[~undone]
    assert np.all(np.diff(accepted) <= 1e-12 * accepted[0]) and accepted[-1] < accepted[0]
    assert losses.max() > losses[0], "all steps are good: a test of nothing"


def _settings(**fields):
    config = config_lib.default()
    config.fipa.local.optimizer, config.fipa.aggregator.relative = "gauss_newton", False
    config.fipa.update(fields)
    return config


@pytest.mark.parametrize(
    ("fields", "cohort", "message"),
    [
        ({"aggregator": {"trust": True}, "server": {"average": 0.9}}, 0, "aggregator.trust: .*no server.average"),
        ({"aggregator": {"trust": True}}, 2, "aggregator.trust: needs the losses of all clients.*config.cohort = 0"),
        ({"aggregator": {"trust": True}, "server": {"optimizer": "adam"}}, 0, "server.optimizer = 'sgd'"),
        ({"aggregator": {"trust": True}, "local": {"optimizer": "sgd"}, "term": {"name": "dyn"}}, 0, "and a term that"),
        ({"aggregator": {"trust": True, "form": "pinv"}}, 0, "aggregator.trust: 'pinv' has no damping"),
        ({"local": {"matched": True}, "aggregator": {"relative": True}}, 0, "local.matched: needs an absolute damping"),
        ({"local": {"matched": True, "optimizer": "sgd"}}, 0, "local.matched: needs local.optimizer = 'gauss_newton'"),
    ],
)
def test_what_does_not_fit_is_said(fields, cohort, message):
    config = _settings(**fields)
    config.cohort = cohort
    with pytest.raises(ValueError, match=message):
        phase.make_parts(config, config.fipa, TASK, 3)


def test_what_fits_becomes_the_parts_of_a_round():
    """A cohort of all clients by its number; and what is asked of FIPA alone is not asked of the mean beside it."""
    config = _settings(aggregator={"trust": True}, local={"matched": True})
    config.cohort = 3
    rule, nothing = RULES[True].init(TASK.init(None)), Parts._field_defaults["announce"]
    parts = phase.make_parts(config, config.fipa, TASK, 3)
    assert parts.announce(rule) == {"damping": rule.hyper["damping"]} and parts.aggregator.needs.loss
    config.fipa.aggregator.name = "mean"
    config.fipa.server.optimizer = "adam"
    parts = phase.make_parts(config, config.fipa, TASK, 3)
    assert parts.announce is nothing and not parts.aggregator.needs.loss


def test_losses_are_needed(x64):
    sent = _uploads(start(), 0.3)._replace(loss=None)
    with pytest.raises(ValueError, match=r"trust needs uploads\.loss"):
        shapes_of(RULES[True], sent, RULES[True].init(TASK.init(None)), TASK.init(None))
