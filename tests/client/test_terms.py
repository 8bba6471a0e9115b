"""Terms of the clients' objective and optimisers of the server, against plain loops, NumPy and closed forms."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fipa_jax import aggregate, tasks
from fipa_jax.aggregate import server_optimizers as server
from fipa_jax.aggregate.screening import Received
from fipa_jax.client import first_order as client_lib
from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import Hyper, LocalResult
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation.channel import FAULTS, Channel, ChannelRates, FaultRates, faulty
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.server import remember
from fipa_jax.models import networks as models

NUM_CLIENTS, NUM_EXAMPLES, WIDTH = 4, 6, 3


def _local(**fields):
    """A `Local` with the given fields, the others None."""
    return terms.Local(**dict.fromkeys(terms.Local._fields) | fields)


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _contrast(positive, others, temperature):
    top = np.exp(positive / temperature)
    return -np.log(top / (top + sum(np.exp(other / temperature) for other in others)))


def _rcl_by_hand(levels, label, mask):
    """FedRCL's two parts in loops over pairs, after the published description."""
    total, there = 0.0, np.flatnonzero(mask)
    for level in levels:
        unit = level / np.linalg.norm(level, axis=1, keepdims=True)
        similarity = unit @ unit.T
        for n in there:
            mates = [similarity[n, j] for j in there if label[j] == label[n]]
            others = sorted(similarity[n, j] for j in there if label[j] != label[n])[::-1][:2]
            apart = [similarity[n, j] for j in there if label[j] == label[n] and j != n]
            close = min(apart) if apart and min(apart) >= 0.7 else -1.0
            total += _contrast(min(mates), others, 0.05) + _contrast(1.0, [close], 0.05)
    return total / len(levels) / len(there)


@pytest.mark.parametrize("case", ["random", "one_class", "all_different", "close"])
def test_rcl_equals_numpy(x64, case):
    """On random features, without negatives, without class mates, and with mates above the threshold."""
    size, mask = 8, np.array([True] * 6 + [False] * 2)
    label = {"one_class": np.zeros(size, int), "all_different": np.arange(size)}.get(case, np.arange(size) % 3)
    levels = [_draw(i, size, 5) for i in range(2)]
    if case == "close":
        levels = [np.eye(5)[label] + 0.1 * level for level in levels]
    features = models.Features(tuple(jnp.asarray(level) for level in levels), None, None)
    term = terms.rcl()

    def penalty(features):
        local = _local(features=features, batch={"label": jnp.asarray(label)}, mask=jnp.asarray(mask), mu=1.0)
        return term.penalty(local)

    value, gradient = jax.value_and_grad(penalty)(features)
    wanted = _rcl_by_hand(levels, label, mask)
    np.testing.assert_allclose(value, wanted, rtol=1e-10, atol=1e-12)
    for level, slope in zip(levels, gradient.levels, strict=True):
        assert np.all(np.isfinite(slope))
        np.testing.assert_array_equal(slope[6:], 0, err_msg="padding pulls")
        nudge = 1e-6 * _draw(9, *level.shape)
        other = [level + nudge if each is level else each for each in levels]
        if case != "close":  # whose minimum may switch between pairs; the value is checked all the same
            change = _rcl_by_hand(other, label, mask) - wanted
            np.testing.assert_allclose(np.vdot(slope, nudge), change, rtol=1e-3, atol=1e-10)


def test_moon_equals_numpy(x64):
    z = {"now": _draw(0, 5, 4), "there": _draw(1, 5, 4), "past": _draw(2, 5, 4)}
    outputs = lambda params, batch: (None, models.Features((), None, jnp.asarray(z[params])))
    mask = np.array([True, True, False, True, True])
    features = models.Features((), None, jnp.asarray(z["now"]))
    local = _local(
        features=features, outputs=outputs, anchor="there", store="past", mask=jnp.asarray(mask), mu=2.0, batch={}
    )
    cosine = lambda a, b: np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    wanted = _contrast(cosine(z["now"], z["there"]), [cosine(z["now"], z["past"])], 0.5)[mask].mean()
    np.testing.assert_allclose(terms.moon().penalty(local), 2 * wanted, rtol=1e-10)


def test_logit_adjustment_is_the_loss_of_shifted_logits(x64):
    out, label, own = _draw(0, 5, 3), np.array([0, 1, 2, 0, 1]), np.array([0, 0, 1, 2, 2, 2, 1])
    present, mask = np.arange(7) < 5, np.array([True, True, True, False, True])
    local = _local(
        out=jnp.asarray(out),
        batch={"label": jnp.asarray(label)},
        mask=jnp.asarray(mask),
        mu=0.7,
        examples_of=lambda field: jnp.asarray({"label": own}[field]),
        present=jnp.asarray(present),
    )
    prior = (np.bincount(own[present], minlength=3) + 1) / (present.sum() + 3)
    loss = lambda logits: np.log(np.exp(logits).sum(1)) - logits[np.arange(5), label]
    wanted = (loss(out + 0.7 * np.log(prior)) - loss(out))[mask].mean()
    np.testing.assert_allclose(terms.logit_adjustment().penalty(local), wanted, rtol=1e-10)


FAULTY, NOTHING = faulty(), Channel()
# A quadratic problem for each client: examples x, targets y, a model linear in its parameters.
DATA = {
    "x": _draw(3, NUM_CLIENTS * NUM_EXAMPLES, WIDTH),
    "label": _draw(4, NUM_CLIENTS * NUM_EXAMPLES),
}
LINEAR = tasks.Task(
    init=lambda key: {"w": jnp.zeros([WIDTH])},
    outputs=lambda params, batch: ((batch["x"] @ params["w"])[:, None], ()),
    loss=lambda out, batch: (out[:, 0] - batch["label"]) ** 2 / 2,
    metrics=lambda out, batch: {},
)


def _turned():
    """A rule that multiplies the mean update by a matrix, as one by curvature does."""

    def apply(received, state, params):
        even = received.took_part / jnp.maximum(jnp.sum(received.took_part), 1)
        return {"w": MATRIX @ (even @ received.delta["w"])}, state, {}

    return aggregate.Aggregator(lambda params: (), apply)


MATRIX = _draw(7, WIDTH, WIDTH)
RULES = aggregate.AGGREGATORS | {"turned": _turned}


@functools.cache
def _parts(term, aggregator="mean", optimizer="sgd", cohort=NUM_CLIENTS, steps=60, channel=NOTHING):
    return Parts(
        task=LINEAR,
        local=client_lib.first_order(LINEAR.loss, LINEAR.augment, batch_size=0, steps=steps, term=term),
        term=term,
        sketcher=None,
        aggregator=RULES[aggregator](),
        server=server.make(optimizer, 0.9),
        num_clients=NUM_CLIENTS,
        cohort=cohort,
        channel=channel,
    )


@pytest.mark.parametrize("name", ["moon", "scaffold"])
def test_the_first_state_can_be_donated(name):
    """MOON's store is the model itself: one buffer, it would be given twice."""
    state = parts_lib.init(_parts(terms.TERMS[name]()), {"w": jnp.zeros(3, jnp.float32)})
    given = jax.jit(lambda state: state, donate_argnums=0)(state)
    np.testing.assert_array_equal(given.params["w"], 0)


@functools.cache
def _round(parts):
    return jax.jit(functools.partial(rounds.whole_round, parts))


def _run(parts, number, mu=0.0, lr=0.2, server_lr=1.0, counts=(NUM_EXAMPLES,) * NUM_CLIENTS, wrong=None):
    """(the rates, the states before each round and after the last); `wrong` are the rates of faults."""
    array = jnp.asarray
    hyper = Hyper(array(lr), array(0.0), array(mu))
    rates = Rates(hyper, array(1.0), array(server_lr), ChannelRates(faults=wrong))
    owned = jnp.arange(NUM_CLIENTS * NUM_EXAMPLES).reshape(NUM_CLIENTS, NUM_EXAMPLES)
    clients = Client(owned, jnp.asarray(counts))
    data = jax.tree.map(jnp.asarray, DATA)
    states = [parts_lib.init(parts, LINEAR.init(None))]
    for _ in range(number):
        states.append(_round(parts)(states[-1], rates, data, clients, jax.random.key(0))[0])
    return rates, states


def _states(*args, **options):
    return _run(*args, **options)[1]


OPTIMUM = np.linalg.lstsq(DATA["x"], DATA["label"], rcond=None)[0]


def test_dyn_reaches_the_pooled_optimum_where_averaging_does_not(x64):
    term = terms.dyn()
    final = _states(_parts(term), 200, mu=0.5)[-1]
    plain = _states(_parts(terms.none()), 200)[-1]
    error = lambda state: np.linalg.norm(state.params["w"] - OPTIMUM)
    assert error(plain) > 1e-2, "averaging is as good: the clients do not differ"
    assert error(final) < 1e-5
    # At the fixed point what every client keeps is its gradient, and they cancel.
    x, y = (DATA[name].reshape(NUM_CLIENTS, NUM_EXAMPLES, -1) for name in ("x", "label"))
    gradients = np.stack([a.T @ (a @ OPTIMUM[:, None] - b) / NUM_EXAMPLES for a, b in zip(x, y, strict=True)])[..., 0]
    np.testing.assert_allclose(final.store["w"], gradients, atol=1e-4)
    np.testing.assert_allclose(final.shared["w"], 0, atol=1e-5)


@pytest.mark.parametrize(
    "trouble",
    [
        "none",
        "turned",
        pytest.param("absent", marks=pytest.mark.slow),
        "nan",
        pytest.param("flip", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["mifa", "varp"])
def test_a_store_of_updates_by_hand(x64, name, trouble):
    """Also under a rule that multiplies the mean: what the term adds to the updates is multiplied as they are."""
    injected, server_lr, matrix = trouble in FAULTS, 0.7, MATRIX if trouble == "turned" else np.eye(WIDTH)
    rule = "turned" if trouble == "turned" else "mean"
    parts = _parts(terms.TERMS[name](), rule, cohort=2, steps=3, channel=FAULTY if injected else NOTHING)
    counts = [NUM_EXAMPLES, NUM_EXAMPLES, 0 if trouble == "absent" else NUM_EXAMPLES, NUM_EXAMPLES]
    wrong = FaultRates(*(jnp.asarray(0.4 * (kind == trouble)) for kind in FaultRates._fields)) if injected else None
    rates, states = _run(parts, 8, server_lr=server_lr, counts=counts, wrong=wrong)
    latest = {}
    for k, (state, after) in enumerate(itertools.pairwise(states)):
        ids = np.asarray(rounds.draw(parts, jnp.int32(k), rates, jax.random.key(0))[0]).tolist()
        rows = lambda state: np.asarray(state.store["update"]["w"] if name == "mifa" else state.store["w"])
        own = {m: rows(after)[m] for m in ids if np.any(rows(after)[m] != rows(state)[m])}
        if not own:
            assert trouble not in ("none", "turned")
            chex.assert_trees_all_equal(after.params, state.params)  # nobody took part: the round is skipped
            continue
        over_all = lambda: sum(latest.values()) / NUM_CLIENTS
        if name == "varp":
            wanted = over_all() + np.mean([own[m] - latest.get(m, 0) for m in own], axis=0)
        latest |= own
        if name == "mifa":
            wanted = np.mean(list(latest.values()), axis=0)
        step = (after.params["w"] - state.params["w"]) / server_lr
        np.testing.assert_allclose(step, matrix @ wanted, rtol=1e-9, atol=1e-12)
    # What is remembered is what was sent: FedAvg on the same clients takes the same first step.
    plain = parts._replace(term=terms.none(), local=_parts(terms.none(), steps=3).local)
    first = _states(plain, 1, server_lr=server_lr, counts=counts, wrong=wrong)[-1]
    np.testing.assert_allclose(states[1].params["w"], first.params["w"], rtol=1e-12)


def test_what_is_kept_of_an_update_does_not_hang_on_the_training_loss(x64):
    parts = _parts(terms.varp(), cohort=3, steps=3)
    rates, (state,) = _run(parts, 0)
    state = state._replace(store=jax.tree.map(lambda rows: rows[:3], state.store))
    delta, took_part = {"w": jnp.ones([3, WIDTH])}, jnp.array([True, True, False])
    results = LocalResult(delta, state.store, jnp.array([jnp.nan, 1.0, 1.0]), None, None)
    received = Received(took_part, jnp.ones(3), delta)
    store, stores = remember(parts, state, rates, results, received)
    np.testing.assert_array_equal(store["w"][:, 0], [1, 1, 0])
    np.testing.assert_allclose(stores.shared["w"], 2 / NUM_CLIENTS)
    np.testing.assert_array_equal(stores.cohort["w"], 1)


@pytest.mark.parametrize("name", [pytest.param("mifa", marks=pytest.mark.slow), "varp"])
def test_a_store_of_updates_makes_up_for_absent_clients(x64, name):
    everyone = _states(_parts(terms.none(), steps=5), 400)[-1].params["w"]
    with_store = _states(_parts(terms.TERMS[name](), cohort=2, steps=5), 400, server_lr=0.3)
    plain = _states(_parts(terms.none(), cohort=2, steps=5), 400, server_lr=0.3)
    error = lambda states: max(np.linalg.norm(state.params["w"] - everyone) for state in states[-20:])
    assert error(with_store) < 1e-6 < 1e-2 < error(plain)
    all_of_them = _states(_parts(terms.TERMS[name](), steps=5), 400)[-1].params["w"]
    np.testing.assert_allclose(all_of_them, everyone, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("cohort", [NUM_CLIENTS, 2])
@pytest.mark.parametrize("name", ["scaffold", "dyn", "mifa", "varp"])
def test_shared_is_the_mean_of_all_stores(x64, name, cohort):
    states = _states(_parts(terms.TERMS[name](), cohort=cohort), 5, mu=0.5)
    for state in states:
        chex.assert_trees_all_close(state.shared, jax.tree.map(lambda x: x.mean(0), state.store), atol=1e-12)
    chex.assert_trees_all_equal(states[0].store, optax.tree.zeros_like(states[0].store))
    assert optax.tree.norm(states[-1].store) > 0


def test_scaffold_reaches_the_pooled_optimum(x64):
    final = _states(_parts(terms.scaffold(), steps=10), 300)[-1]
    np.testing.assert_allclose(final.params["w"], OPTIMUM, atol=1e-5)


def test_fedexp_by_hand(x64):
    deltas = {"a": jnp.asarray(_draw(0, 3, 4)), "b": jnp.asarray(_draw(1, 3, 2))}
    step = jax.tree.map(lambda d: d.mean(0), deltas)
    rule = server.fedexp()
    negative = optax.tree.scale(-1, step)
    update = lambda deltas, present: rule.update(negative, rule.init(step), step, deltas=deltas, present=present)[0]
    found = update(deltas, jnp.ones(3, bool))
    square = lambda tree: sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(tree))
    wanted = max(1, square(deltas) / 3 / (2 * (square(step) + 1e-3)))
    chex.assert_trees_all_close(found, optax.tree.scale(wanted, negative), rtol=1e-12)
    same = jax.tree.map(lambda s: jnp.stack([s] * 3), step)
    chex.assert_trees_all_equal(update(same, jnp.ones(3, bool)), negative)
    for value in (7.0, np.nan):  # of a client that takes no part, finite or not
        more = jax.tree.map(lambda d, value=value: jnp.concatenate([d, jnp.full_like(d[:1], value)]), deltas)
        chex.assert_trees_all_close(update(more, jnp.array([True, True, True, False])), found, rtol=1e-12)


def test_acg_is_a_lookahead_with_momentum(x64):
    """The published form: clients start from theta + lam m, m <- lam m + mean delta, theta <- theta + m."""
    rule, lam = server.make("acg", 0.8), 0.8
    theta, m = np.zeros(3), np.zeros(3)
    held = {"w": jnp.zeros(3)}
    state = rule.init(held)
    for k in range(5):
        delta = _draw(k, 3)
        m = lam * m + delta
        theta = theta + m
        update, state = rule.update({"w": jnp.asarray(-delta)}, state, held)
        held = jax.tree.map(lambda h, u: h - u, held, update)
        np.testing.assert_allclose(held["w"], theta + lam * m, rtol=1e-12)


@pytest.mark.parametrize("kind", server.SECOND_MOMENTS)
def test_adaptive_servers_are_those_of_algorithm_2(x64, kind):
    """Line by line, on updates whose sizes differ by orders of magnitude, so that Yogi's sign takes both values."""
    beta_1, beta_2, tau, size = 0.8, 0.99, 1e-3, 5
    rule, m, v, signs = server.make(kind, beta_1), np.zeros(size), np.full(size, tau**2), set()
    state = rule.init({"w": jnp.zeros(size)})
    for k in range(10):
        delta = _draw(k, size) * 10.0 ** (-(k % 4))
        m = beta_1 * m + (1 - beta_1) * delta
        signs |= set(np.sign(v - delta**2))
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - beta_2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta_2 * v + (1 - beta_2) * delta**2
        found, state = rule.update({"w": jnp.asarray(delta)}, state)
        np.testing.assert_allclose(found["w"], m / (np.sqrt(v) + tau), rtol=1e-12)
    assert signs == {-1, 1}


@pytest.mark.parametrize("kind", server.SECOND_MOMENTS)
def test_adaptive_servers_in_half_precision_are_those_in_full(kind):
    """The squares of small updates would underflow."""
    rule, steps = server.make(kind, 0.9), [1e-4 * _draw(k, 3) for k in range(10)]

    def last(dtype):
        state = rule.init({"w": jnp.zeros(3, dtype)})
        for step in steps:
            found, state = rule.update({"w": jnp.asarray(step, dtype)}, state)
        return found["w"].astype(float)

    np.testing.assert_allclose(last("float16"), last("float32"), rtol=1e-2)


@pytest.mark.parametrize("optimizer", sorted(server.OPTIMIZERS))
def test_every_server_optimiser_learns(x64, optimizer):
    lr = {"adagrad": 0.3, "adam": 0.1, "yogi": 0.1, "momentum": 0.2, "acg": 0.2}.get(optimizer, 1.0)
    states = _states(_parts(terms.none(), optimizer=optimizer, steps=5), 40, server_lr=lr)
    loss = lambda state: np.mean((DATA["x"] @ np.asarray(state.params["w"]) - DATA["label"]) ** 2)
    best = np.mean((DATA["x"] @ OPTIMUM - DATA["label"]) ** 2)
    assert loss(states[-1]) - best < 0.2 * (loss(states[0]) - best)


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_an_average_of_models_changes_no_step(x64, decay):
    """It is the weighted mean of all models, the last one included, as NumPy has it; the momentum goes on inside."""
    plain = server.make("momentum", 0.9)
    rule, models, theta = server.averaged(plain, decay), [], {"w": jnp.asarray(_draw(1, 3))}
    state, inner = rule.init(theta), plain.init(theta)
    for k in range(4):
        models.append(theta["w"])
        weights = decay ** np.arange(k, -1, -1.0)
        mean = np.average(np.stack(models), axis=0, weights=weights)
        np.testing.assert_allclose(server.average_of(state, theta)["w"], mean, rtol=1e-12)
        gradient = {"w": jnp.asarray(_draw(2 + k, 3))}
        update, state = rule.update(gradient, state, theta, deltas=None, present=None)
        wanted, inner = plain.update(gradient, inner)
        np.testing.assert_array_equal(update["w"], wanted["w"])
        theta = {"w": theta["w"] - 0.1 * update["w"]}
    assert server.average_of(inner, theta) is theta


def test_late_models_of_half_precision_count_as_much():
    rule, theta = server.averaged(server.make("sgd", 0.0), 1.0), {"w": jnp.zeros(1, jnp.bfloat16)}
    models = jnp.arange(600, dtype=jnp.bfloat16)

    def update(state, model):
        return rule.update({"w": jnp.zeros(1, jnp.bfloat16)}, state, {"w": model[None]})[1], None

    state, _ = jax.lax.scan(update, rule.init(theta), models)
    np.testing.assert_allclose(state.mean["w"][0], np.mean(np.asarray(models, float)), rtol=1e-4)


def test_a_wrong_server_optimiser_names_the_field():
    with pytest.raises(
        ValueError, match=r"config\.server\.optimizer: unknown 'adma'; known: acg, adagrad, adam, .*yogi"
    ):
        server.make("adma", 0.9)
