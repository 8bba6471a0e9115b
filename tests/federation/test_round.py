"""Whole rounds: exact facts against centralised solves, and that neither chunks, devices nor a resume change a run."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

from fipa_jax import aggregate, tasks, trees
from fipa_jax.aggregate import row_blocks
from fipa_jax.aggregate.limits import Limits
from fipa_jax.client import first_order as client_lib
from fipa_jax.client import second_order, terms
from fipa_jax.client.examples import Client, subsample
from fipa_jax.client.local_solver import Hyper
from fipa_jax.curvature import products as curvature
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import plain, with_rank_by_gradient
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation import state as state_lib
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Resident
from fipa_jax.run.programs import jitted

CLIENTS, NUM_EXAMPLES, WIDTH, HIDDEN, NUM_OUTPUTS = 5, 6, 3, 4, 2
COUNTS = np.array([6, 2, 5, 1, 4])
ROOT = 7  # seed of the root key


def _linear(params, batch):
    return batch["x"] @ params["head"]["w"] + params["head"]["b"][None], ()


def _network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"]["w"] + params["body"]["b"][None])
    return hidden @ params["head"]["w"] + params["head"]["b"][None], (hidden,)


def _layer(key, width, outputs):
    weight, bias = jax.random.split(key)
    return {"w": jax.random.normal(weight, [width, outputs]), "b": jax.random.normal(bias, [outputs])}


def _init_network(key):
    body, head = jax.random.split(key)
    return {"body": _layer(body, WIDTH, HIDDEN), "head": _layer(head, HIDDEN, NUM_OUTPUTS)}


_half_squared = lambda out, batch: jnp.sum((out - batch["y"]) ** 2, axis=1) / 2
_metrics = lambda out, batch: {"mse": jnp.mean((out - batch["y"]) ** 2, axis=1)}
NETWORK = tasks.Task(_init_network, _network, _half_squared, _metrics)
LINEAR = tasks.Task(lambda key: {"head": _layer(key, WIDTH, NUM_OUTPUTS)}, _linear, _half_squared, _metrics)


def _problem(num_examples=NUM_EXAMPLES, counts=COUNTS):
    """(data, clients): every client has a block of the examples, padded by examples of the block."""
    draw = np.random.default_rng(0)
    total = CLIENTS * num_examples
    data = {"x": draw.normal(size=(total, WIDTH)), "y": draw.normal(size=(total, NUM_OUTPUTS))}
    indices = np.arange(total).reshape(CLIENTS, num_examples)
    return {name: jnp.asarray(field) for name, field in data.items()}, Client(jnp.asarray(indices), jnp.asarray(counts))


def _rates(lr=0.1, damping=0.0, mu=1.0, lr_decay=1.0, server_lr=1.0):
    array = lambda value: jnp.asarray(value, jnp.result_type(float))
    return Rates(Hyper(array(lr), array(damping), array(mu)), array(lr_decay), array(server_lr))


def _sketcher(task, curvature, rank=3, solver="rows"):
    """What the rule wants to know of the curvature; None if nothing."""
    makers = {
        "sketch": lambda outputs, features: sketch.make_sketch(
            outputs, task.loss, rank=rank, features=features, solver=solver
        ),
        "diagonal": lambda outputs, features: sketch.make_diagonal(outputs, task.loss),
    }
    return None if curvature == "none" else plain(makers[curvature])


def _parts(task=NETWORK, *, rank=3, rule=None, term=None, local=None, cohort=CLIENTS, solver="rows", **fields):
    term = term or terms.none()
    rule = rule or (aggregate.fipa() if rank else aggregate.mean())
    first_order = client_lib.first_order(task.loss, task.augment, batch_size=2, epochs=2, term=term)
    return Parts(
        task=task,
        local=local or first_order,
        term=term,
        sketcher=_sketcher(task, rule.needs.curvature, rank, solver),
        aggregator=rule,
        num_clients=CLIENTS,
        cohort=cohort,
        **{"server": optax.identity()} | fields,
    )


def _first(parts, round=0, seed=0):
    """The state before a round."""
    return parts_lib.init(parts, parts.task.init(jax.random.key(seed)), round)


@functools.cache
def _round(parts):
    return jax.jit(functools.partial(rounds.whole_round, parts))


def _run(parts, num_rounds, rates=None, problem=None, state=None, step=None):
    """(state, [info of each round])."""
    data, clients = problem or _problem()
    step, state, infos = step or _round(parts), state or _first(parts), []
    for _ in range(num_rounds):
        state, info = step(state, rates or _rates(), data, clients, jax.random.key(ROOT))
        infos.append(jax.device_get(info))
    return state, infos


# Momentum on the server, controls of the clients, half of them a round: everything that a state can hold.
FULL = _parts(term=terms.scaffold(), cohort=3, server=optax.trace(0.9))


def _mesh(devices):
    return jax.make_mesh((devices,), ("clients",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@functools.cache
def _two_rounds(chunk, devices):
    """The parameters; the state's places must be a fixed point of the round, or it would compile more than once."""
    parts = _parts(chunk=chunk, mesh=_mesh(devices) if devices else None)
    first = _first(parts)
    state, _ = _run(parts, 2, state=first)
    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
    return jax.device_get(state.params)


@pytest.mark.slow
def test_stores_on_the_host_do_not_change_a_run(x64):
    """Stage by stage as a run does it: of all clients' controls the device sees those of the cohort alone."""
    wanted, _ = _run(FULL, 3)
    stages, rates = jitted(FULL), _rates()
    people, root = Resident(*_problem()), jax.random.key(ROOT)
    state, drawn = parts_lib.init(FULL, NETWORK.init(jax.random.key(0)), on_host=True), set()
    for _ in range(3):
        ids, orders = stages.draw(state.round, rates, root)
        cohort = people.cohort(ids)._replace(orders=orders)
        seen = state_lib.fetch(state, ids)
        assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(seen.store))
        results = stages.train(seen, rates, cohort, root)
        sketches = stages.sketch(seen, rates, cohort, results, root)
        seen, _ = stages.serve(seen, rates, cohort, results, sketches)
        state = state_lib.keep(state, seen, ids)
        drawn |= set(ids.tolist())
        assert len(state.store) == len(drawn)
    state = state._replace(store=state.store.rows(np.arange(CLIENTS)))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state.store))
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("chunk", "devices"), [(2, 0), pytest.param(0, 2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_chunks_do_not_change_a_run(x64, chunk, devices):
    # vmap changes the order of sums: the same to rounding, which a float64 merge does not amplify much.
    chex.assert_trees_all_close(_two_rounds(chunk, devices), _two_rounds(1, 0), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_devices_do_not_change_a_bit_of_a_run(x64, devices):
    chex.assert_trees_all_equal(_two_rounds(1, devices), _two_rounds(1, 0))


@pytest.mark.slow
def test_what_past_rounds_have_left_lies_on_the_devices_by_rows(x64, monkeypatch):
    """Each holds its part of the rows between rounds and after a resume; steps and past have the same bits."""
    monkeypatch.setattr(row_blocks, "SPREAD_FROM", 16)
    states = []
    for devices in (1, 2, 4):
        mesh = _mesh(devices)
        past = {"relative": False, "past": aggregate.PastRounds("prior", rank=5)}
        parts = _parts(rule=aggregate.fipa(damping=0.1, spread=row_blocks.Spread(mesh), **past), mesh=mesh)
        first = _first(parts)
        state, _ = _run(parts, 2, state=first)
        again = state_lib.restored(first, trees.paths(state_lib.snapshot(state)), mesh)
        for before, after, back in zip(*map(jax.tree.leaves, (first, state, again)), strict=True):
            assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
            assert back.sharding.is_equivalent_to(before.sharding, back.ndim)
            np.testing.assert_array_equal(jax.device_get(after), jax.device_get(back))
        (basis,) = (leaf for leaf in jax.tree.leaves(state.aggregator) if leaf.ndim == 3)
        assert basis.shape == (1, 64, 5) and basis.addressable_data(0).shape == (1, 64 // devices, 5)
        states.append(jax.device_get(state))
    for other in states[1:]:
        chex.assert_trees_all_equal(states[0], other)


def test_a_round_compiles_once_and_a_resume_is_exact(x64):
    """Momentum on the server, controls of the clients, half of them a round: everything that a state can hold."""
    chex.clear_trace_counter()

    def once(*args):
        return rounds.whole_round(FULL, *args)

    run = functools.partial(_run, FULL, step=jax.jit(chex.assert_max_traces(once, 1)))
    straight, infos = run(4)
    stopped, _ = run(2)
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), stopped)
    resumed, resumed_infos = run(2, state=restored)
    chex.assert_trees_all_equal(resumed, straight)
    chex.assert_trees_all_equal(resumed_infos, infos[2:])
    assert int(straight.round) == 4
    # Rates are traced: another choice of them does not compile anew, and it counts.
    slower, _ = run(4, rates=_rates(lr=0.05, lr_decay=0.9, server_lr=0.5))
    assert not np.allclose(ravel_pytree(slower.params)[0], ravel_pytree(straight.params)[0])

    # The cohort follows from the root key and the round number, and from nothing else in the state.
    ids = [tuple(info["ids"]) for info in infos]
    assert all(len(set(cohort)) == 3 and set(cohort) <= set(range(CLIENTS)) for cohort in ids)
    assert len(set(ids)) > 1, "all rounds have the same cohort"
    assert [tuple(info["ids"]) for info in run(2, state=_first(FULL, 2, seed=9))[1]] == ids[2:]

    # SCAFFOLD: the server's control stays the mean of all clients' own, and those that were never drawn hold zero.
    chex.assert_trees_all_close(
        straight.shared, jax.tree.map(lambda m: m.mean(axis=0), straight.store), rtol=1e-10, atol=1e-13
    )
    norms = np.linalg.norm(jax.vmap(lambda m: ravel_pytree(m)[0])(straight.store), axis=1)
    np.testing.assert_array_equal(norms > 0, np.isin(np.arange(CLIENTS), np.concatenate(ids)))


def test_controls_of_clients_without_work_or_sense_are_kept(x64):
    """An empty client takes no step, so that its control says nothing new; a client of NaN is set aside whole."""
    counts = np.array([6, 0, 5, 1, 4])
    data, clients = _problem(counts=counts)
    broken = data | {"x": data["x"].at[clients.indices[3, 0]].set(jnp.nan)}
    parts = _parts(term=terms.scaffold())
    state, infos = _run(parts, 2, problem=(broken, clients))
    chex.assert_tree_all_finite(state)
    np.testing.assert_array_equal(infos[-1]["rejected"], np.arange(CLIENTS) == 3)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda m: m[jnp.array([1, 3])] != 0, state.store),
        jax.tree.map(lambda m: jnp.zeros([2, *m.shape[1:]], bool), state.store),
    )
    chex.assert_trees_all_close(
        state.shared, jax.tree.map(lambda m: m.mean(axis=0), state.store), rtol=1e-10, atol=1e-13
    )
    without, _ = _run(parts, 2, problem=(data, clients._replace(num_examples=clients.num_examples.at[3].set(0))))
    chex.assert_trees_all_close(state, without, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 3], ids=["mean", "fipa"])
def test_only_trainable_leaves_move(x64, rank):
    parts = _parts(rank=rank, trainable="^head/")
    start = NETWORK.init(jax.random.key(0))
    state, _ = _run(parts, 2)
    chex.assert_trees_all_equal(state.params["body"], start["body"])
    for name, leaf in state.params["head"].items():
        assert np.all(leaf != start["head"][name]), name


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"trainable: no parameter path matches 'haed'.*body/b.*head/w"):
        _first(_parts(trainable="haed"))


def test_rates_scale_what_they_name(x64):
    """One local step on all examples, FedAvg: the round is linear in both learning rates."""
    local = client_lib.first_order(NETWORK.loss, NETWORK.augment, batch_size=0, epochs=1)
    parts = _parts(rank=0, local=local)
    start = NETWORK.init(jax.random.key(0))

    def moved(round, **rates):
        state, _ = _run(parts, 1, rates=_rates(**rates), state=_first(parts, round))
        return jax.tree.map(lambda a, b: a - b, state.params, start)

    data, clients = _problem()
    own = np.asarray(clients.indices)[np.arange(NUM_EXAMPLES)[None] < COUNTS[:, None]]
    pooled = {name: field[own] for name, field in data.items()}
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(_half_squared(_network(p, pooled)[0], pooled))))(start)
    for round, decay, server in ((0, 0.5, 1.0), (3, 0.5, 1.0), (0, 1.0, 0.3)):
        wanted = jax.tree.map(lambda g: -0.1 * decay**round * server * g, gradient)
        chex.assert_trees_all_close(moved(round, lr_decay=decay, server_lr=server), wanted, rtol=1e-9, atol=1e-14)


FIPA = _parts()
STAGES = functools.cache(jitted)


def _first_sketches(parts, problem):
    """(state, cohort, results, sketches) of the first round; the sketches with a clients axis."""
    root, rates, stages = jax.random.key(ROOT), _rates(), STAGES(parts)
    state = _first(parts)
    cohort = Resident(*problem).cohort(stages.draw(state.round, rates, root)[0])
    results = STAGES(FIPA).train(state, rates, cohort, root)  # the same for all of these parts
    return state, cohort, results, stages.sketch(state, rates, cohort, results, root)


@pytest.mark.parametrize(("at", "chunk"), [("broadcast", 1), ("local", 0)])
def test_curvature_is_seen_where_the_rule_wants_it(x64, at, chunk):
    """At the broadcast parameters, or at each client's own after its training; in any chunks."""
    data, clients = problem = _problem()
    state, _, results, found = _first_sketches(_parts(rule=aggregate.diagonal(at=at), chunk=chunk), problem)
    moved = trees.replace(state.params, results.delta)
    own = jax.tree.map(lambda leaf, delta: leaf[None] + delta * (at == "local"), state.params, moved)
    diagonal = curvature.make_ggn_diagonal(lambda params, batch: _network(params, batch)[0], _half_squared)
    batch = jax.tree.map(lambda field: field[clients.indices], data)
    wanted = jax.jit(jax.vmap(diagonal))(own, batch, jnp.arange(NUM_EXAMPLES)[None] < clients.num_examples[:, None])
    np.testing.assert_allclose(found.values, wanted, rtol=1e-10, atol=1e-14)
    assert np.max(np.abs(found.values)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_rank_adapts_to_the_gradients(x64, broken):
    """By the rule's own words; a client of NaN undoes nobody else's sketch."""
    data, clients = _problem()
    if broken:
        data = data | {"y": data["y"].at[clients.indices[2, 0]].set(jnp.nan)}
    scale, problem = 0.2, (data, clients)
    state, cohort, results, whole = _first_sketches(FIPA, problem)
    by_gradient = with_rank_by_gradient(FIPA.sketcher, NETWORK.loss, scale)
    *_, cut = _first_sketches(FIPA._replace(sketcher=by_gradient), problem)
    start = jax.tree.map(jnp.copy, state)  # `serve` takes its place
    _, info = STAGES(FIPA).serve(start, _rates(), cohort, results, cut)
    there = np.arange(CLIENTS) != 2 if broken else np.full(CLIENTS, True)
    np.testing.assert_array_equal(info["rejected"], ~there)
    gradient = curvature.make_gradient(lambda params, batch: _network(params, batch)[0], _half_squared)
    batch = jax.tree.map(lambda field: field[clients.indices], data)
    masks = jnp.arange(NUM_EXAMPLES)[None] < clients.num_examples[:, None]
    gradients = np.asarray(jax.jit(jax.vmap(gradient, (None, 0, 0)))(state.params, batch, masks))[there]
    length, total = np.linalg.norm(gradients, axis=1), np.linalg.norm(gradients.sum(axis=0))
    values = np.asarray(whole.eigenvalues)[there]
    keep = values >= values[:, :1] * np.minimum(0.99, scale / (length + total))[:, None]
    assert 0 < keep.mean() < 1, "a test of nothing"
    np.testing.assert_allclose(cut.eigenvalues[there], values * keep, rtol=1e-12)
    np.testing.assert_array_equal(np.any(np.asarray(cut.basis)[there] != 0, axis=1), keep)


@pytest.mark.slow
def test_auto_takes_any_task(x64):
    """The last layer by its closed form, and by another way a network without features."""
    parts = _parts(solver="auto", rank=8, trainable="^head/")
    state, (info,) = _run(parts, 1)
    by_rows, _ = _run(parts._replace(sketcher=_parts(rank=8).sketcher), 1)
    chex.assert_trees_all_close(state.params, by_rows.params, rtol=1e-2, atol=1e-3)
    assert 0.99 < info["captured"] <= 1 + 1e-12 and info["sketches_unconverged"] == 0
    parts = _parts(LINEAR, solver="auto")
    jax.eval_shape(
        functools.partial(rounds.whole_round, parts), _first(parts), _rates(), *_problem(), jax.random.key(ROOT)
    )


def _exact(task, rank):
    """FIPA's pinv with exact local Gauss-Newton solves and full-rank sketches."""
    rule = aggregate.fipa("pinv", rcond=1e-10, limits=Limits(max_step=1e9))
    return _parts(task, rank=rank, rule=rule, local=second_order.gauss_newton(task.loss, task.augment, steps=1))


def test_exact_local_gauss_newton_gives_the_centralised_step(x64):
    """Two examples and two outputs a client: D = 20 < P = 26, hence the least-norm step of the pooled problem."""
    num_examples = 2
    parts = _exact(NETWORK, rank=num_examples * NUM_OUTPUTS)
    data, _ = problem = _problem(num_examples, np.full(CLIENTS, num_examples))
    start = NETWORK.init(jax.random.key(0))
    state, infos = _run(parts, 1, rates=_rates(lr=1.0, damping=0.0), problem=problem)
    flat, unravel = ravel_pytree(start)
    residual = jax.jit(lambda theta: (_network(unravel(theta), data)[0] - data["y"]).reshape(-1))
    jacobian, error = np.asarray(jax.jit(jax.jacobian(residual))(flat)), np.asarray(residual(flat))
    condition = np.linalg.cond(jacobian)
    wanted = -np.linalg.pinv(jacobian) @ error
    found = ravel_pytree(state.params)[0] - flat
    np.testing.assert_allclose(infos[0]["effective_rank"], error.size, rtol=1e-9)
    # Sketches hold H_m, whose condition is the square of the Jacobian's.
    assert np.linalg.norm(found - wanted) < np.finfo(float).eps * 10 * condition**2 * np.linalg.norm(wanted)
    assert condition < 1e4, "too ill conditioned for this test to say anything"


def test_least_squares_is_solved_in_one_round(x64):
    """Ragged clients, each with more examples than parameters; damping only so that its own system is regular."""
    problem = data, clients = _problem(12, np.array([12, 6, 9, 7, 10]))
    parts, damping = _exact(LINEAR, rank=(WIDTH + 1) * NUM_OUTPUTS), 1e-9
    state, infos = _run(parts, 1, rates=_rates(lr=1.0, damping=damping), problem=problem)
    own = np.asarray(clients.indices)[np.arange(12)[None] < np.asarray(clients.num_examples)[:, None]]
    x, y = np.asarray(data["x"])[own], np.asarray(data["y"])[own]
    solution = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
    found = np.r_[state.params["head"]["w"], state.params["head"]["b"][None]]
    np.testing.assert_allclose(found, solution, atol=1e-6)  # damping over the clients' smallest eigenvalues, about 1e-2
    assert infos[0]["fedavg_cosine"] < 0.999, "FedAvg solves it too: a test of nothing"


def test_a_sketch_of_some_examples_is_of_its_own_examples():
    client = Client(jnp.arange(10, 18), jnp.array(5))
    draws = [subsample(jax.random.key(seed), client, 3) for seed in range(8)]
    for drawn in draws:
        assert drawn.indices.shape == (3,) and int(drawn.num_examples) == 3
        assert len(set(np.asarray(drawn.indices).tolist())) == 3 and np.all(drawn.indices < 15)
    assert len({tuple(np.asarray(drawn.indices)) for drawn in draws}) > 1
    small = subsample(jax.random.key(0), client._replace(num_examples=jnp.array(2)), 3)
    assert int(small.num_examples) == 2 and set(np.asarray(small.indices[:2]).tolist()) == {10, 11}
    for examples in (0, 8, 9):
        chex.assert_trees_all_equal(subsample(jax.random.key(0), client, examples), client)


def test_what_is_trained_besides_is_thrown_away(x64):
    """Clients' updates of the head are those of training all; the body that they trained along does not move."""
    data, clients = _problem()
    whole, head = (
        _parts(rule=aggregate.mean(), **fields) for fields in ({}, {"trainable": "^head/", "also_trained": ".*"})
    )
    cohort, first = Resident(data, clients).cohort(jnp.arange(CLIENTS)), _first(whole)
    deltas = {}
    for name, parts in {"whole": whole, "head": head, "alone": head._replace(also_trained="")}.items():
        state = state_lib.fetch(_first(parts), cohort.ids)
        deltas[name] = jax.jit(functools.partial(rounds.train, parts))(
            state, _rates(), cohort, jax.random.key(ROOT)
        ).delta
    assert set(deltas["head"]) == {"head/w", "head/b"}
    chex.assert_trees_all_equal(deltas["head"], {path: deltas["whole"][path] for path in deltas["head"]})
    assert not np.allclose(deltas["head"]["head/w"], deltas["alone"]["head/w"])
    state, _ = _run(head, 1)
    chex.assert_trees_all_equal(state.params["body"], first.params["body"])
    assert not np.allclose(state.params["head"]["w"], first.params["head"]["w"])
