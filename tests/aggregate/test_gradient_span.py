"""FIPA in the span of gradients, beside dense matrices of what clients were asked and what they said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fipa_jax.aggregate import INFO_OF_SPAN, Limits, SpanOptions, Uploads, from_span, receive, step_of
from fipa_jax.aggregate.gradient_span import BOUND, mean_core
from fipa_jax.curvature import Core, Image

SIZE, CLIENTS = 12, 2
PARAMS = {"w": np.zeros([3, 3]), "b": np.zeros([3])}  # "b" comes first, as jax.tree.leaves has it
NUMBERS = np.array([3, 5])
WEIGHTS = NUMBERS / 8
EXACT = {"bits": 0, "fresh": CLIENTS, "prior": 0.0}
UNBOUNDED = BOUND._replace(max_divergence=0.0)


class Federation:
    """Clients of quadratic losses (theta - c_m)^T H_m (theta - c_m) / 2, whose answers are exact."""

    def __init__(self, seed=0):
        draw = np.random.default_rng(seed)
        roots = draw.normal(size=(CLIENTS, SIZE, SIZE)) * np.geomspace(1, 0.05, SIZE)
        self.each = np.einsum("cpr,cqr->cpq", roots, roots)
        self.centres = draw.normal(size=(CLIENTS, SIZE))
        self.total = np.tensordot(WEIGHTS, self.each, 1)
        self.asked = []  # (Q [P, s], n) of each round

    def gradients(self, theta):
        return np.einsum("cpq,cq->cp", self.each, theta - self.centres)

    def answers(self, rule, state, theta, **changes):
        basis, active = rule.asks(state)
        basis = np.asarray(basis)[:, : int(active)]
        self.asked.append(basis)
        columns = state.basis.shape[1]
        cores = np.zeros((CLIENTS, columns, columns))
        cores[:, : int(active), : int(active)] = np.einsum("ps,cpq,qt->cst", basis, self.each, basis)
        deltas = jax.vmap(ravel_pytree(PARAMS)[1])(-jnp.asarray(self.gradients(theta)))
        return Uploads(deltas, NUMBERS, Core(jnp.asarray(cores)))._replace(**changes)

    def oracle(self, decay):
        """Hs [P, P] of all rounds asked about, with numpy alone."""
        said, often = np.zeros((2, SIZE, SIZE))
        for basis in self.asked:
            project = basis @ basis.T
            said = decay * said + 8 * project @ self.total @ project
            often = decay * often + 8 * project
        values, vectors = np.linalg.eigh(often)
        there = values > 1e-9
        root = (vectors[:, there] / np.sqrt(values[there])) @ vectors[:, there].T
        return root @ said @ root, there.sum()


def begin(columns=SIZE, *, damping=0.0, limits=UNBOUNDED, **fields):
    rule = from_span(span=SpanOptions(columns, **(EXACT | fields)), damping=damping, limits=limits)
    return rule, rule.init(PARAMS)


@functools.cache
def compiled(rule):
    def served(state, uploads):
        params = jax.tree.map(lambda leaf: leaf.astype(state.basis.dtype), PARAMS)
        received, screening = receive(uploads, params)
        return step_of(rule, received, state, params, screening)

    return jax.jit(served)


def one_round(rule, state, uploads):
    step, state, info, _ = compiled(rule)(state, uploads)
    return np.asarray(ravel_pytree(step)[0]), state, info


def run(rule, state, clients, rounds, rate=0.3):
    """(the parameters, the state, the last round's info, the last step)."""
    theta = np.zeros(SIZE)
    for _ in range(rounds):
        before = theta
        step, state, info = one_round(rule, state, clients.answers(rule, state, theta))
        theta = theta + rate * step
    return before, state, info, step


def dense(state):
    """(Hs [P, P] as the server has it, how many directions it knows)."""
    known = mean_core(state.core_sum, state.measured, state.active)
    directions = np.asarray(state.basis @ known.rotation)
    return (directions * np.asarray(known.values)) @ directions.T, int(known.count)


def test_with_all_directions_the_step_is_newtons_with_the_least_curvature_for_damping(x64):
    """Nothing of the past, decay = 0, and a basis of the whole space: H is known exactly."""
    clients = Federation()
    rule, state = begin(decay=0.0)
    theta, _, info, step = run(rule, state, clients, 10)
    values = np.linalg.eigvalsh(clients.total)
    gradient = WEIGHTS @ clients.gradients(theta)
    np.testing.assert_allclose(info["damping"], values[0], rtol=1e-9)
    np.testing.assert_allclose(info["spectrum"], values[::-1], rtol=1e-9)
    np.testing.assert_allclose(step, -np.linalg.solve(clients.total + values[0] * np.eye(SIZE), gradient), rtol=1e-7)
    np.testing.assert_allclose(info["explained"], 1, rtol=1e-9)
    assert set(INFO_OF_SPAN) <= set(info)


@pytest.mark.parametrize("rounds", [2, 4, 9])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_what_was_said_is_a_mean_direction_by_direction(x64, decay, rounds):
    """Also where directions come in one round after another, some of them known for long and others new."""
    clients = Federation()
    rule, state = begin(decay=decay)
    _, state, _, _ = run(rule, state, clients, rounds)
    want, count = clients.oracle(decay)
    got, known = dense(state)
    if rounds < 7:  # later on directions are dropped and asked about anew
        np.testing.assert_allclose(got, want, atol=1e-10 * np.linalg.norm(want))
        assert (
            known == count == {2: 2, 4: 4}[rounds]
        )  # the first step is zero, so that the second round has nothing new
    assert np.linalg.eigvalsh(got)[0] > -1e-12


def test_a_direction_counts_by_the_rounds_that_have_seen_it(x64):
    """A new direction, seen once, and an old one, seen nine times, both have their own curvature, not a tenth of it."""
    curvature = np.diag([3.0, 0.5])
    often = np.diag([10.0, 1.0])
    known = mean_core(jnp.asarray(np.sqrt(often) @ curvature @ np.sqrt(often)), jnp.asarray(often), 2)
    np.testing.assert_allclose(known.values, [3.0, 0.5], rtol=1e-12)
    assert known.count == 2


def test_directions_of_most_curvature_stay_and_those_of_gradients_come_in(x64):
    clients = Federation()
    rule, state = begin(columns=6)
    _, state, info, _ = run(rule, state, clients, 4)
    theta = np.full(SIZE, 0.3)
    said = clients.answers(rule, state, theta)
    best = np.linalg.eigh(clients.oracle(0.99)[0])[1][:, ::-1][:, :4]
    _, state, info = one_round(rule, state, said)
    basis = np.asarray(state.basis)
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(basis[:, :4] @ basis[:, :4].T, best @ best.T, atol=1e-10)
    gradients = clients.gradients(theta).T
    np.testing.assert_allclose(basis @ (basis.T @ gradients), gradients, atol=1e-12)
    assert info["columns"] == 6


def test_a_new_directions_curvature_is_guessed_from_the_gradients_along_it(x64):
    """By c, curvature over shares of squared gradients, as the directions that were new before turned out."""
    clients, prior = Federation(), 0.3
    rule, state = begin(prior=prior, decay=1.0)
    draw, found, shares, waiting = np.random.default_rng(1), 0.0, 0.0, 0.0
    for k in range(4):
        said = clients.answers(rule, state, theta := draw.normal(size=SIZE))
        new = np.asarray(state.basis)[:, int(state.active - state.new) : int(state.active)]
        _, after, _ = one_round(rule, state, said)
        if new.size:
            found = 0.9 * found + np.trace(new.T @ clients.total @ new)
            shares = 0.9 * shares + waiting
        fresh = np.asarray(after.basis)[:, int(after.active - after.new) : int(after.active)]
        along = (
            WEIGHTS
            @ (clients.gradients(theta) @ fresh) ** 2
            / (WEIGHTS @ np.sum(clients.gradients(theta) ** 2, axis=1))
        )
        waiting = along.sum()
        measured = np.asarray(after.basis @ after.measured @ after.basis.T)
        guessed = np.asarray(after.basis @ after.core_sum @ after.basis.T)
        for q, share in zip(fresh.T, along, strict=True):
            np.testing.assert_allclose(q @ measured @ q, prior * 8 * (k > 0), atol=1e-9)
            np.testing.assert_allclose(q @ guessed @ q, prior * 8 * share * found / shares if k else 0, atol=1e-9)
        state = after
    assert clients.asked[-1].shape[1] == 6 and new.shape[1] == 2


def test_outside_of_the_span_the_guess_stands_for_the_curvature(x64):
    clients = Federation()
    rule, state = begin(prior=0.0)
    theta, state, _, _ = run(rule, state, clients, 3)
    theta, state = theta + np.random.default_rng(1).normal(size=SIZE), state._replace(found=100 * state.found)
    known = np.asarray(state.basis)[:, : int(state.active)]
    step, after, info = one_round(rule, state, clients.answers(rule, state, theta))
    outside = WEIGHTS @ clients.gradients(theta)
    outside = outside - known @ (known.T @ outside)
    unit = outside / np.linalg.norm(outside)
    gradients = clients.gradients(theta)
    share = WEIGHTS @ (gradients @ unit) ** 2 / (WEIGHTS @ np.sum(gradients**2, axis=1))
    guess = float(after.found / after.shares) * share
    np.testing.assert_allclose(info["guess"], guess, rtol=1e-8)
    assert guess > info["damping"]
    np.testing.assert_allclose(step - known @ (known.T @ step), -outside / guess, rtol=1e-8)


def test_until_somebody_has_answered_there_is_no_step(x64):
    clients = Federation()
    rule, state = begin()
    step, state, info = one_round(rule, state, clients.answers(rule, state, np.zeros(SIZE)))
    assert not step.any() and info["columns"] == 0 and info["effective_rank"] == 0
    silent = clients.answers(rule, state, np.zeros(SIZE))
    step, state, info = one_round(rule, state, silent._replace(sketch=Core(0 * silent.sketch.values)))
    assert not step.any() and info["columns"] == CLIENTS
    step, state, info = one_round(rule, state, clients.answers(rule, state, np.zeros(SIZE)))
    assert step.any() and info["columns"] == CLIENTS  # the same gradients have shown nothing new


def test_a_client_that_sends_no_core_counts_by_its_gradient_alone(x64):
    clients = Federation()
    rule, state = begin()
    _, state, _, _ = run(rule, state, clients, 3)
    said = clients.answers(rule, state, np.zeros(SIZE))
    first = Core(said.sketch.values.at[1].set(0))
    _, after, _ = one_round(rule, state, said._replace(sketch=first))
    alone = said._replace(num_examples=NUMBERS * [1, 0])
    _, other, _ = one_round(rule, state, alone)
    (seen, _), (want, _) = dense(after), dense(other)
    np.testing.assert_allclose(seen, want, atol=1e-12)


def test_a_client_with_numbers_that_are_none_is_left_out(x64):
    clients = Federation()
    rule, state = begin()
    _, state, _, _ = run(rule, state, clients, 4)
    said = clients.answers(rule, state, np.zeros(SIZE))
    broken = [
        said._replace(sketch=Core(said.sketch.values.at[0, 0, 0].set(jnp.nan))),
        said._replace(sketch=Core(said.sketch.values.at[0, 0, 0].set(-1.0))),
        said._replace(sketch=Core(said.sketch.values.at[0, 0, 3].set(50.0 * said.sketch.values[0, 0, 0]))),
        said._replace(sketch=Core(said.sketch.values.at[0].set(1e200 * jnp.eye(SIZE)))),
        said._replace(delta=jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), said.delta)),
    ]
    absent = one_round(rule, state, said._replace(num_examples=NUMBERS * [0, 1]))[0]
    for uploads in broken:
        step, after, info = one_round(rule, state, uploads)
        np.testing.assert_allclose(step, absent, rtol=1e-10)
        assert list(info["rejected"]) == [True, False] and np.isfinite(after.core_sum).all()


def test_directions_about_which_nobody_has_answered_stay_whole(x64):
    """They are not mixed with columns that are not in use, which are zero, however seldom clients answer."""
    clients = Federation()
    rule, state = begin()
    for k in range(9):
        said = clients.answers(rule, state, np.full(SIZE, k / 9))
        said = said if k % 3 == 2 else said._replace(sketch=Core(0 * said.sketch.values))
        _, state, _ = one_round(rule, state, said)
        used = np.asarray(state.basis)[:, : int(state.active)]
        np.testing.assert_allclose(used.T @ used, np.eye(used.shape[1]), atol=1e-12)
        assert not np.asarray(state.basis)[:, int(state.active) :].any()


def test_the_basis_stays_orthonormal_in_float32_over_many_rounds():
    clients, draw = Federation(), np.random.default_rng(0)
    rule = from_span(span=SpanOptions(8, fresh=CLIENTS, bits=0))
    state = rule.init(jax.tree.map(np.float32, PARAMS))
    for _ in range(400):
        said = clients.answers(rule, state, draw.normal(size=SIZE))
        _, state, _ = one_round(rule, state, jax.tree.map(jnp.asarray, said))
    assert state.basis.dtype == jnp.float32
    np.testing.assert_allclose(state.basis.T @ state.basis, np.eye(8), atol=3e-6)


def test_a_round_of_nobody_changes_nothing(x64):
    clients = Federation()
    rule, state = begin()
    _, state, _, _ = run(rule, state, clients, 3)
    nobody = clients.answers(rule, state, np.zeros(SIZE))._replace(num_examples=0 * NUMBERS)
    step, after, _ = one_round(rule, state, nobody)
    assert not step.any()
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_step_is_shortened_to_its_bound_and_the_damping_has_a_floor(x64):
    clients = Federation()
    _, free = begin()
    theta, state, _, _ = run(begin()[0], free, clients, 5)
    said = clients.answers(begin()[0], state, theta)
    full, _, _ = one_round(begin()[0], state, said)

    def with_hyper(**numbers):
        names = {"damping": "damping", "bound": "limits.max_divergence"}
        changed = {names[name]: jnp.asarray(value) for name, value in numbers.items()}
        return state._replace(hyper=state.hyper | changed)

    step, _, info = one_round(begin()[0], with_hyper(bound=1e-3), said)
    np.testing.assert_allclose(info["divergence"], 1e-3, rtol=1e-9)
    np.testing.assert_allclose(step / np.linalg.norm(step), full / np.linalg.norm(full), atol=1e-9)
    step, _, info = one_round(begin()[0], with_hyper(damping=1e6), said)
    assert info["damping"] == 1e6
    mean = WEIGHTS @ clients.gradients(theta)
    np.testing.assert_allclose(step, -mean / 1e6, rtol=1e-3)


def test_it_goes_down_all_the_way_to_the_minimum(x64):
    clients = Federation()
    rule, state = begin(columns=8)
    theta, _, _, _ = run(rule, state, clients, 400, rate=0.5)
    minimum = np.linalg.solve(clients.total, np.einsum("c,cpq,cq->p", WEIGHTS, clients.each, clients.centres))
    start = minimum @ clients.total @ minimum
    assert (theta - minimum) @ clients.total @ (theta - minimum) < 1e-4 * start


def test_gradients_that_say_the_same_give_one_direction_and_known_ones_none(x64):
    """Made-up directions would have next to no curvature, which the damping would then be."""
    clients = Federation()
    rule, state = begin()
    for columns in (1, 1, 1):
        said = clients.answers(rule, state, np.zeros(SIZE))
        alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), said.delta)
        _, state, _ = one_round(rule, state, said._replace(delta=alike))
        used = np.asarray(state.basis)[:, : int(state.active)]
        np.testing.assert_allclose(used.T @ used, np.eye(used.shape[1]), atol=1e-12)
        assert used.shape[1] == columns
    _, state, _ = one_round(rule, state, clients.answers(rule, state, np.zeros(SIZE)))
    assert state.active == 2
    absent = clients.answers(rule, state, np.ones(SIZE))._replace(num_examples=NUMBERS * [0, 1])
    _, state, _ = one_round(rule, state, absent)
    assert state.active == 3


def test_the_basis_travels_in_few_bits_rounded_anew_each_round(x64):
    clients = Federation()
    exact, state = begin()
    _, state, _, _ = run(exact, state, clients, 3)
    rule, _ = begin(bits=8)
    sent, _ = rule.asks(state)
    largest = np.max(np.abs(state.basis), axis=0)
    assert np.all(np.abs(sent - state.basis) <= largest / 127) and np.any(sent != state.basis)
    again, _ = rule.asks(state._replace(round=state.round + 1))
    assert np.any(again != sent)
    np.testing.assert_array_equal(exact.asks(state)[0], state.basis)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"span": SpanOptions(columns=3, fresh=4)}, r"aggregator\.span\.fresh: needs at least 1, and at most columns"),
        ({"span": SpanOptions(fresh=0)}, r"aggregator\.span\.fresh"),
        ({"span": SpanOptions(decay=1.5)}, r"aggregator\.span\.decay: needs a number in \[0, 1\]"),
        ({"span": SpanOptions(prior=-1.0)}, r"span\.prior"),
        ({"span": SpanOptions(bits=1)}, r"aggregator\.span\.bits: needs 2 to 16 bits"),
        ({"limits": Limits(max_step=5.0)}, r"aggregator\.limits\.max_step: the rule 'span' bounds its step by"),
        ({"damping": -1.0}, r"damping"),
        ({"weighting": "no"}, r"aggregator\.weighting: unknown 'no'"),
    ],
)
def test_numbers_out_of_range_name_their_field(fields, words):
    with pytest.raises(ValueError, match=words):
        from_span(**fields)


def test_other_messages_and_late_clients_are_refused(x64):
    clients = Federation()
    rule, state = begin()
    said = clients.answers(rule, state, np.zeros(SIZE))
    with pytest.raises(ValueError, match=r"uploads\.sketch, a Core of values \[C, s, s\]"):
        one_round(rule, state, said._replace(sketch=Image(jnp.zeros([CLIENTS, SIZE, SIZE]))))
    with pytest.raises(ValueError, match=r"cores \[C, s, s\] with s = 12, all columns of `asks`, got \(2, 1, 1\)"):
        one_round(rule, state, said._replace(sketch=Core(said.sketch.values[:, :1, :1])))
    late = said._replace(age=jnp.ones(CLIENTS), moved=jax.tree.map(jnp.zeros_like, said.delta))
    received, screening = receive(late, PARAMS)
    with pytest.raises(ValueError, match="clients that are not late"):
        step_of(rule, received, state, PARAMS, screening)
