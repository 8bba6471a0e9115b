"""Which methods share compiled programs? Those that differ in traced numbers alone, by what the pieces say."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import tiny
from ml_collections import ConfigDict

from fipa_jax import tasks
from fipa_jax.config import checks, fields
from fipa_jax.config.methods import method
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation.channel import FAULTS
from fipa_jax.federation.round import whole_round
from fipa_jax.run import experiment
from fipa_jax.run.phase_parts import TRACED, check, make_parts, make_rates
from fipa_jax.run.programs import STEERING, key_of

# Methods whose rules hold numbers of every kind; with late clients and faults, whose rates are then traced.
CHANNEL = ":late.share=0.5:late.most=2:faults.nan=0.1:faults.scale=0.1"
METHODS = [
    f"{name}{CHANNEL}"
    for name in (
        "fipa",
        "fipa_pinv",
        "fipa_tikhonov",
        "fedavg",
        "fisher_diagonal",
        "fipa:aggregator.past.kind=prior",
        "fipa:aggregator.past.kind=targets:aggregator.past.length=2",
        "fipa:aggregator.past.kind=latest",
    )
] + ["fipa:aggregator.trust=true:aggregator.relative=false"]


def leaves(settings, path=""):
    """{path: value} of all fields of a phase."""
    fields = {}
    for name, value in settings.items():
        own = f"{path}.{name}".strip(".")
        fields |= leaves(value, own) if isinstance(value, ConfigDict) else {own: value}
    return fields


def changed(settings, path):
    """The settings with another value of the same type in one field; rates that are above 0 stay so."""
    other = settings.copy_and_resolve_references()
    *parents, name = path.split(".")
    group = other
    for parent in parents:
        group = group[parent]
    value = group[name]
    if isinstance(value, bool):
        group[name] = not value
    elif isinstance(value, str):
        group[name] = f"{value}?"
    elif isinstance(value, int):
        group[name] = value + 1
    else:
        group[name] = value / 2 if value else 0.25
    return other


@pytest.fixture(scope="module")
def problem():
    return tasks.build(tiny())


@pytest.fixture(scope="module")
def arguments(problem):
    """Of a whole round: (parameters, examples, clients)."""
    built = experiment.build(tiny(compare=("fedavg",)), problem)
    return built.params, *built.population


def _phase(config, settings, problem):
    return make_parts(config, settings, problem.task, len(problem.clients)), make_rates(settings, config.precision)


@pytest.mark.parametrize("spec", METHODS)
def test_methods_share_a_key_where_traced_numbers_alone_differ(spec, problem):
    config = tiny()
    settings = method(config, spec)
    parts, _ = _phase(config, settings, problem)
    key, fields = key_of(settings, parts), leaves(settings)
    traced = {*TRACED, *(f"aggregator.{name}" for name in parts.aggregator.hyper)}
    assert traced | set(STEERING) <= set(fields), "what is traced goes by the path of its field"
    apart = {path for path in fields if key_of(changed(settings, path), parts) != key}
    shared = set(fields) - apart
    if spec.endswith(CHANNEL):
        assert shared == traced | set(STEERING)
    else:  # whether there is a channel at all is not traced
        begins = {"late.share", *(f"faults.{kind}" for kind in FAULTS)}
        assert shared == (traced | set(STEERING)) - begins
    assert key_of(settings, parts._replace(chunk=7)) != key
    assert key_of(settings, parts._replace(cohort=7)) != key


@pytest.mark.parametrize("spec", METHODS)
def test_numbers_that_share_a_key_are_in_the_rates_or_the_rules_state(spec, problem, arguments):
    config = tiny()
    settings = method(config, spec)
    wanted = _traced(config, settings, problem, arguments[0])
    for path in _traced_paths(settings, problem):
        other = _traced(config, changed(settings, path), problem, arguments[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(other, wanted)
        differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), other, wanted)
        assert any(jax.tree.leaves(differ)), f"{path} gets lost"


@pytest.mark.parametrize("spec", [METHODS[0], METHODS[1], METHODS[3], METHODS[4], METHODS[6], METHODS[-1]])
def test_numbers_that_share_a_key_leave_the_program_as_it_is(spec, problem, arguments):
    """To the letter, all of them changed at once; a number of another kind does not."""
    config = tiny()
    settings = all_changed = method(config, spec)
    for path in _traced_paths(settings, problem):
        all_changed = changed(all_changed, path)
    program = _program(config, settings, problem, arguments)
    assert _program(config, all_changed, problem, arguments) == program
    if spec.startswith("fedavg"):
        other = changed(settings, "aggregator.late.staleness")
        assert _program(config, other, problem, arguments) != program


def _traced_paths(settings, problem):
    parts, _ = _phase(tiny(), settings, problem)
    paths = [f"aggregator.{name}" for name in parts.aggregator.hyper] + list(TRACED)
    if not settings.privacy.epsilon:
        paths = [path for path in paths if not path.startswith("privacy.")]
    if not settings.late.share:  # whether there is a channel at all is not traced
        paths = [path for path in paths if path.split(".")[0] not in ("late", "faults")]
    return [path for path in paths if not (settings.aggregator.trust and path == "server.lr")]  # which trust needs as 1


def _traced(config, settings, problem, params):
    """(the rates, the rule's first state)."""
    parts, rates = _phase(config, settings, problem)
    return jax.tree.map(jnp.asarray, (rates, parts_lib.init(parts, params).aggregator))


def _program(config, settings, problem, arguments):
    """The text of a whole round's program."""
    parts, rates = _phase(config, settings, problem)
    params, *people = arguments
    state = parts_lib.init(parts, params)
    return str(jax.make_jaxpr(functools.partial(whole_round, parts))(state, rates, *people, jax.random.key(0)))


def test_a_phase_without_faults_or_delays_shares_nothing_with_one_that_has_them(problem):
    config = tiny()
    keys = set()
    for spec in ("fedavg", "fedavg:faults.nan=0.1", "fedavg:late.share=0.1", "fedavg:faults.nan=0.1:late.share=0.1"):
        settings = method(config, spec)
        keys.add(key_of(settings, _phase(config, settings, problem)[0]))
    assert len(keys) == 4


# Of a run's loop, of the data, of a deployment's late clients, or above what tiny clients have: they change no program.
ELSEWHERE = re.compile(
    r"rounds|least_clients|most_bytes_up|max_skips|cache_.*|trainable|also_trained|pooled|privacy\..*|local\.batch_size|"
    r"local\.views|local\.gauss_newton\.cg_steps|sketch\.(oversample|power_steps)|aggregator\.past\.rank|"
    r"aggregator\.(span|sums)\.(columns|fresh)|aggregator\.late\..*"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        "fedavg",
        "fedavg:local.optimizer=momentum:term.name=prox:server.optimizer=adam",
        "fedavg:local.optimizer=gauss_newton",
        "fipa:late.share=0.5:faults.nan=0.1",
        "fipa:sketch.solver=rows",
        "fipa:aggregator.past.kind=latest",
        "fipa_memory",
        "fipa_few_bytes:sketch.share=0.5",
        "fipa_span",
        "fipa_sums",
        "fedpm",
        "fedfisher_kfac",
        "regmean",
        "fedivon",
        "ivon_admm",
        "fisher_diagonal",
    ],
)
def test_fields_are_refused_where_they_change_nothing_and_only_there(spec, problem, arguments):
    """By the program's own text, and the numbers that it is given."""
    config = tiny(compare=(spec,))
    settings = method(config, spec)

    def of(phase):
        return _program(config, phase, problem, arguments), jax.tree.map(
            np.asarray, jax.tree.leaves(_traced(config, phase, problem, arguments[0]))
        )

    plain, wrong = of(settings), {}
    for path in leaves(settings):
        other = changed(settings, path)
        value = fields.value(other, path)
        if ELSEWHERE.fullmatch(path) or isinstance(value, str):
            continue
        said = ""
        try:
            run = tiny(compare=(f"{spec}:{path}={value}",))
            checks.validate(run)
            check(run)
        except ValueError as error:
            said = str(error)
        try:
            found = of(other)
        except ValueError:  # not only before the first round
            continue
        if "reads it" in said:  # a traced number may be there, and go nowhere
            wrong |= {path: said} if found[0] != plain[0] else {}
        elif not said and found[0] == plain[0] and all(map(np.array_equal, found[1], plain[1])):
            wrong[path] = "taken in silence"
    assert not wrong
