"""FIPA as solver and wrappers: what its facade composes, what it says beside its step, and what may be swept."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import (
    CLIENTS,
    LIKE,
    RULES,
    SIZE,
    Dense,
    apply,
    apply_rule,
    as_vector,
    assert_close,
    clients_of,
    each_fipa,
    each_form,
    each_rank,
    shapes_of,
    uploads_of,
    with_hyper,
)

from fipa_jax import aggregate
from fipa_jax import config as config_lib
from fipa_jax.aggregate import (
    INFO,
    LateUpdates,
    Limits,
    PastRounds,
    adaptive,
    capped,
    limited,
    remembering,
    trust_region,
)
from fipa_jax.aggregate.solvers import damped, pinv, tikhonov
from fipa_jax.curvature.sketch import FLAGS, Report

DECAY = {"decay": 0.8}
ABSOLUTE = {"damping": 0.3, "relative": False}
BOUNDS = {"max_step": 2.0, "max_divergence": 0.05}


@each_rank
@each_fipa
def test_info_equals_its_dense_values(x64, name, rank):
    clients = clients_of(rank)
    dense, (step, info) = Dense(*clients), apply_rule(name, uploads_of(*clients))
    spectrum = np.linalg.eigvalsh(dense.total)[::-1][: min(CLIENTS * rank, SIZE)]
    padded = np.pad(spectrum, [0, CLIENTS * rank - len(spectrum)])  # where D > P, the merged factor has a null space
    np.testing.assert_allclose(info["spectrum"], padded, rtol=1e-10, atol=1e-28)
    assert info["merged_pairs"] == CLIENTS * rank
    absolute = {"tikhonov_absolute": 0.3, "damped_absolute": 0.3}.get(name)
    beta = absolute or {"tikhonov": 1e-2, "damped": 1e-2}.get(name, 0) * spectrum[0]
    np.testing.assert_allclose(info["effective_rank"], np.sum(spectrum / (spectrum + beta)), rtol=1e-10)
    np.testing.assert_allclose(info["condition"], (spectrum[0] + beta) / (spectrum[-1] + beta), rtol=1e-9)
    length, average = np.linalg.norm(step), np.linalg.norm(dense.mean)
    np.testing.assert_allclose(info["fedavg_cosine"], step @ dense.mean / (length * average), rtol=1e-10)
    np.testing.assert_allclose(info["fedavg_norm_ratio"], length / average, rtol=1e-10)
    np.testing.assert_allclose(info["step_ratio"], length / np.linalg.norm(dense.deltas, axis=1).max(), rtol=1e-10)


def _report(captured):
    """A report for each client, the second sketch not finite and the last not converged."""
    eigenvalues = clients_of(2)[2]
    flags = {name: jnp.zeros(CLIENTS, bool) for name in FLAGS} | {"not_finite": jnp.array([False, True, False, False])}
    return Report(
        residuals=jnp.asarray(np.arange(CLIENTS * 2).reshape(CLIENTS, 2) / 100),
        products=jnp.array([10, 20, 30, 40]),
        converged=jnp.array([True, False, True, False]),
        trace=jnp.asarray(eigenvalues.sum(axis=1) / captured),
        trace_error=jnp.zeros(CLIENTS),
        flags=flags,
    )


@each_form
def test_a_sketch_that_its_client_flags_as_not_finite_is_set_aside(x64, form):
    """And the others' reports become info."""
    captured = np.array([0.5, 0.9, 0.3, 0.6])
    deltas, counts, eigenvalues, basis = clients_of(2)
    step, info = apply_rule(form, uploads_of(deltas, counts, eigenvalues, basis, _report(captured)))
    without = Dense(deltas, counts * [1, 0, 1, 1], eigenvalues, basis)
    assert_close(step, RULES[form][1](without))
    np.testing.assert_array_equal(info["rejected"], np.arange(CLIENTS) == 1)
    np.testing.assert_allclose(info["captured"], without.weights @ captured[[0, 2, 3]], rtol=1e-12)
    np.testing.assert_allclose(info["sketch_residual"], 0.07, rtol=1e-12)
    assert info["sketch_products"] == 100 and info["sketches_unconverged"] == 1
    assert set(info["flags"]) == set(FLAGS) and info["flags"]["not_finite"].tolist() == [False, True, False, False]
    assert info["merged_pairs"] == 6
    bare = apply_rule(form, uploads_of(deltas, counts, eigenvalues, basis))[1]
    assert set(info) - set(bare) == {
        "captured", "sketch_residual", "sketch_products", "sketches_unconverged", "flags",
    }  # fmt: skip


@each_form
def test_hyper_parameters_are_traced(x64, form):
    """A sweep compiles once, and a vmap over the state is the same sweep."""
    uploads, params = uploads_of(*clients_of(2)), jax.tree.map(jnp.asarray, LIKE)
    rule, own = aggregate.fipa(form), "rcond" if form == "pinv" else "damping"
    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(lambda *args: apply(rule, *args)[0], 1))
    states = [with_hyper(rule.init(params), **{own: value}) for value in (1e-3, 1e-1, 0.3)]
    steps = [compiled(uploads, state, params) for state in states]
    dense = Dense(*clients_of(2))
    beta = 0.3 * dense.largest
    wanted = {
        "pinv": dense.pinv(0.3) @ dense.pull,
        "tikhonov": dense.solve(beta)(dense.pull),
        "damped": dense.solve(beta)(dense.pull + beta * dense.mean),
    }
    assert_close(as_vector(steps[2]), wanted[form])
    assert np.linalg.norm(as_vector(steps[0]) - as_vector(steps[2])) > 1e-3, "the hyper-parameter does nothing"
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    swept = jax.jit(jax.vmap(lambda *args: apply(rule, *args)[0], in_axes=(None, 0, None)))
    chex.assert_trees_all_close(
        swept(uploads, stacked, params),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps),
        rtol=1e-9,
        atol=1e-12,
    )


# Each changes what the rule of the next test proposes, or whom it hears.
CHANGES = {
    "damping": 3.0,
    "limits.max_step": 0.01,
    "limits.max_divergence": 1e-6,
    "limits.explosion": 1e-9,
    "past.decay": 0.1,
    "late.max_drift": 1e-9,
}


def test_every_number_in_the_state_does_something_without_compiling_anew(x64):
    params, uploads = jax.tree.map(jnp.asarray, LIKE), _late(uploads_of(*clients_of(2)))
    rule = aggregate.fipa(**ABSOLUTE, past=PastRounds("prior", rank=5))
    assert set(rule.hyper) == set(CHANGES)
    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(lambda *args: apply(rule, *args), 1))
    _, state, _ = compiled(uploads, rule.init(params), params)
    plain, *_ = compiled(uploads, state, params)
    for name, value in CHANGES.items():
        other, *_ = compiled(uploads, with_hyper(state, **{name: value}), params)
        assert np.linalg.norm(as_vector(other) - as_vector(plain)) > 1e-3 * np.linalg.norm(as_vector(plain)), name


def _late(uploads):
    moved = jax.tree.map(lambda leaf: jnp.ones_like(leaf).at[0].set(0), uploads.delta)
    return uploads._replace(age=jnp.arange(CLIENTS, dtype=jnp.int32), moved=moved)


@functools.cache
def _uniform(form):
    """(options, the rule, the same compiled)."""
    options = {"damping": 0.2, "rcond": 1e-3, "limits": Limits(max_step=2.0), "weighting": "uniform"}
    rule = aggregate.fipa(form, **options)
    return options, rule, jax.jit(functools.partial(apply, rule))


@each_form
def test_uniform_weights_do_not_look_at_the_number_of_examples(x64, form):
    # Where subspaces meet: apart from each other, pinv has no use for w_m.
    deltas, _, eigenvalues, basis = clients_of(SIZE)
    many, one = (uploads_of(deltas, np.array(counts), eigenvalues, basis) for counts in ([5, 0, 3, 70], [1, 0, 1, 1]))
    (options, rule, compiled), params = _uniform(form), jax.tree.map(jnp.asarray, LIKE)
    uniform = as_vector(compiled(many, rule.init(params), params)[0])
    own = {"rcond": options["rcond"]} if form == "pinv" else {"damping": options["damping"]}
    assert_close(uniform, apply_rule(form, one, **own)[0], 1e-12)
    assert np.linalg.norm(uniform - apply_rule(form, many, **own)[0]) > 0.01 * np.linalg.norm(uniform)


@each_form
def test_fipa_step_equals_the_aggregator(x64, form):
    uploads, (options, rule, compiled) = uploads_of(*clients_of(SIZE)), _uniform(form)

    def call(uploads, damping):  # traced, as in a caller's own sweep
        changed = {name: value for name, value in options.items() if name != "weighting"} | {"damping": damping}
        equal = [1] * len(uploads.num_examples)  # as uniform weights
        return aggregate.fipa_step(uploads.delta, uploads.sketch, equal, form=form, **changed)

    step, info = jax.jit(call)(uploads, options["damping"])
    params = jax.tree.map(jnp.asarray, LIKE)
    wanted, _, wanted_info = compiled(uploads, rule.init(params), params)
    chex.assert_trees_all_close((step, info), (wanted, wanted_info), rtol=1e-12)
    chex.assert_trees_all_equal_shapes_and_dtypes(step, params)


# name: (what the facade is asked for, the same by hand).
COMPOSED = {
    "damped": (
        lambda: aggregate.fipa("damped", damping=0.01, limits=Limits(trace_cap=3.0, **BOUNDS)),
        lambda: capped(limited(damped(0.01), **BOUNDS), trace_cap=3.0),
    ),
    "pinv": (
        lambda: aggregate.fipa("pinv", rcond=1e-3, limits=Limits(explosion=7.0)),
        lambda: capped(limited(pinv(1e-3, explosion=7.0))),
    ),
    "tikhonov": (
        lambda: aggregate.fipa("tikhonov", **ABSOLUTE, merge="qr"),
        lambda: capped(limited(tikhonov(**ABSOLUTE, merge="qr"))),
    ),
    "own_damping": (
        lambda: aggregate.fipa(**ABSOLUTE, own_damping=True),
        lambda: capped(limited(damped(**ABSOLUTE, own_damping=True))),
    ),
    "trust": (
        lambda: aggregate.fipa(**ABSOLUTE, trust=True, limits=Limits(max_step=0.0)),
        lambda: capped(trust_region(limited(damped(**ABSOLUTE), max_step=0.0))),
    ),
    "prior": (
        lambda: aggregate.fipa(**ABSOLUTE, past=PastRounds("prior", 5, **DECAY)),
        lambda: capped(remembering(limited(damped(**ABSOLUTE)), aggregate.prior(5), **DECAY)),
    ),
    "adaptive": (
        lambda: aggregate.fipa(**ABSOLUTE, past=PastRounds("prior", 5, **DECAY, adaptive=True)),
        lambda: capped(adaptive(remembering(limited(damped(**ABSOLUTE)), aggregate.prior(5), **DECAY))),
    ),
    "targets": (
        lambda: aggregate.fipa(past=PastRounds("targets", 5, length=2, **DECAY)),
        lambda: capped(remembering(limited(damped()), aggregate.targets(damped(relative=False), 5, 2), **DECAY)),
    ),
    "latest": (
        lambda: aggregate.fipa("tikhonov", past=PastRounds("latest", 2, num_clients=6, **DECAY)),
        lambda: capped(remembering(limited(tikhonov()), aggregate.latest(2, 6), **DECAY)),
    ),
}


def _sent(rule, seed):
    """What clients send to a rule: all that it needs, from updates that are not all small."""
    uploads = uploads_of(*clients_of(2, seed))
    needs = {"loss": rule.needs.loss, "damping": rule.needs.damping}
    numbers = {name: jnp.array([3.0, 1.0, 2.0, 4.0]) - seed for name, needed in needs.items() if needed}
    return uploads._replace(**numbers, ids=jnp.array([5, 0, 2, 3]) if rule.needs.ids else None)


@pytest.mark.parametrize("name", COMPOSED)
def test_the_facade_only_composes(x64, name):
    """Bit for bit: the same program from the same state."""
    facade, solver = (make() for make in COMPOSED[name])
    by_hand, params = aggregate.from_solver(solver), jax.tree.map(jnp.asarray, LIKE)
    assert facade.needs == by_hand.needs and facade.hyper == by_hand.hyper
    states, programs = [], []
    for rule in (facade, by_hand):
        states.append(rule.init(params))
        programs.append(jax.jit(lambda *args, rule=rule: apply(rule, *args)).lower(_sent(rule, 0), states[-1], params))
    chex.assert_trees_all_equal(*states)
    assert programs[0].as_text() == programs[1].as_text()


def test_wrappers_that_differ_are_other_programs(x64):
    """Or the test above would be one of nothing."""
    params, texts = jax.tree.map(jnp.asarray, LIKE), []
    for solver in (damped(), limited(damped()), capped(damped()), tikhonov(), damped(relative=False)):
        rule = aggregate.from_solver(solver)
        lowered = jax.jit(lambda *args, rule=rule: apply(rule, *args)).lower(_sent(rule, 0), rule.init(params), params)
        texts.append(lowered.as_text())
    assert len(set(texts)) == len(texts)


def test_a_solver_without_wrappers_is_a_rule(x64):
    rule, params, clients = aggregate.from_solver(damped(0.01)), jax.tree.map(jnp.asarray, LIKE), clients_of(2)
    step, _, info = jax.jit(functools.partial(apply, rule))(uploads_of(*clients), rule.init(params), params)
    assert_close(as_vector(step), RULES["damped"][1](Dense(*clients)))
    assert set(rule.hyper) == {"damping", "limits.explosion", "late.max_drift"}
    assert not {"capped", "divergence", "past_share"} & set(info)


REFUSED = {
    "past over trust": (
        lambda: remembering(trust_region(damped()), aggregate.prior()),
        r"aggregator\.trust: needs all clients in every round, where aggregator\.past adds nothing",
    ),
    "trust over past": (
        lambda: trust_region(remembering(damped(), aggregate.prior())),
        r"aggregator\.trust: needs all clients in every round, where aggregator\.past adds nothing",
    ),
    "past over past": (
        lambda: remembering(remembering(damped(), aggregate.prior()), aggregate.prior()),
        r"aggregator\.past: .*wrap it once",
    ),
    "past over a cap": (
        lambda: remembering(capped(damped()), aggregate.prior()),
        r"aggregator\.limits\.trace_cap: must be outside",
    ),
    "a past that does not fade": (
        lambda: remembering(damped(), aggregate.prior(), decay=1.0),
        r"aggregator\.past\.decay: needs a number in \[0, 1\)",
    ),
    "a past of no rank": (lambda: aggregate.prior(0), r"aggregator\.past\.rank: needs at least 1"),
    "targets of no cohort": (
        lambda: aggregate.targets(damped(), length=0),
        r"aggregator\.past\.length: needs at least 1",
    ),
    "limits twice": (lambda: limited(limited(damped())), r"aggregator\.limits: .*wrap it once"),
    "caps twice": (lambda: capped(capped(damped())), r"aggregator\.limits\.trace_cap: .*wrap it once"),
    "trust twice": (lambda: trust_region(trust_region(damped())), r"aggregator\.trust: .*wrap it once"),
    "limits over trust": (lambda: limited(trust_region(damped())), r"aggregator\.limits: must be inside"),
    "limits over what adapts": (
        lambda: limited(aggregate.adaptive(damped(relative=False))),
        r"aggregator\.limits: must be inside of what adapts",
    ),
    "trust over what adapts": (
        lambda: trust_region(aggregate.adaptive(damped(relative=False))),
        r"aggregator\.trust: finds the damping itself",
    ),
    "a relative damping that adapts": (
        lambda: aggregate.adaptive(remembering(limited(damped(0.1)), aggregate.prior(4))),
        r"aggregator\.past\.adaptive: finds an absolute damping",
    ),
    "trust over pinv": (lambda: trust_region(limited(pinv())), r"aggregator\.trust: 'pinv' has no damping to adapt"),
    "own damping, relative": (
        lambda: damped(own_damping=True),
        r"aggregator\.own_damping: needs form = 'damped', relative = False and damping above 0",
    ),
    "own damping of zero": (
        lambda: damped(0.0, relative=False, own_damping=True),
        r"aggregator\.own_damping: needs form = 'damped', relative = False and damping above 0",
    ),
    "nobody's latest message": (lambda: aggregate.latest(3, 0), r"aggregator\.past\.kind: 'latest' needs the number"),
    "the facade: trust and past": (
        lambda: aggregate.fipa(trust=True, past=PastRounds("prior")),
        r"aggregator\.trust: needs all clients",
    ),
    "the facade: trust and pinv": (lambda: aggregate.fipa("pinv", trust=True), r"aggregator\.trust: 'pinv' has no"),
    "the facade: own damping": (lambda: aggregate.fipa(own_damping=True), r"aggregator\.own_damping: needs"),
    "the facade: own damping of pinv": (
        lambda: aggregate.fipa("pinv", own_damping=True),
        r"aggregator\.own_damping: needs form = 'damped'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused_in_words(name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("rule", "missing", "words"),
    [
        (aggregate.fipa(trust=True), "loss", r"fipa with trust needs uploads\.loss \[C\]"),
        (
            aggregate.fipa(**ABSOLUTE, own_damping=True),
            "damping",
            r"fipa with own_damping needs uploads\.damping \[C\]",
        ),
        (aggregate.fipa(past=PastRounds("latest", num_clients=6)), "ids", r"past\.kind = 'latest' needs uploads\.ids"),
    ],
)
def test_what_a_rule_needs_is_asked_for(x64, rule, missing, words):
    params = jax.tree.map(jnp.asarray, LIKE)
    assert getattr(rule.needs, missing) is True and rule.needs.curvature == "sketch"
    with pytest.raises(ValueError, match=words):
        shapes_of(rule, _sent(rule, 0)._replace(**{missing: None}), rule.init(params), params)


def _rules():
    """Of every kind, {name: rule}; by shapes alone none of them costs anything."""
    return {name: facade() for name, (facade, _) in COMPOSED.items()}


def test_info_is_what_it_says(x64):
    """What rules say beside the screening, over all compositions, has a line in `INFO`, and each line a rule."""
    params, told, screening = (
        jax.tree.map(jnp.asarray, LIKE),
        set(),
        {"rejected", "reasons", "absent", "stale", "drift"},
    )
    for rule in (*_rules().values(), aggregate.mean()):
        sent = _late(_sent(rule, 0)) if rule.needs.curvature == "sketch" else uploads_of(*clients_of(2))
        sent = sent._replace(sketch=sent.sketch._replace(report=_report(np.full(CLIENTS, 0.5))))
        _, _, info = shapes_of(rule, sent, rule.init(params), params)
        assert screening - set(info) <= {"stale", "drift"}
        told |= set(info) - screening
    assert told == set(INFO)


def test_traced_numbers_are_fields_of_the_config():
    fields, named = config_lib.default().fipa.aggregator, set()
    rules = [
        *_rules().values(),
        aggregate.diagonal(),
        aggregate.mean(),
        aggregate.fipa(late=LateUpdates(max_drift=1.0)),
    ]
    for rule in rules:
        state = rule.init(jax.tree.map(jnp.asarray, LIKE))
        numbers = getattr(state, "hyper", state) or {}
        assert set(rule.hyper) == set(numbers) and all(jnp.shape(value) == () for value in numbers.values())
        named |= set(rule.hyper)
    for path in named:
        group = fields
        for name in path.split("."):
            group = group[name]
        assert isinstance(group, float), path
    limits = {f"limits.{name}" for name in Limits._fields} - {"limits.trace_cap"}
    assert named == {"damping", "rcond", "past.decay", "late.max_drift"} | limits
