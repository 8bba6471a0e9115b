"""Every config builds; a mistake in one is found before anything is computed, and its message says where."""

import importlib.util
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fipa_jax import config as config_lib
from fipa_jax import tasks
from fipa_jax.aggregate import layerwise, posteriors, rules, server_optimizers
from fipa_jax.aggregate.fisher_informed import FORMS
from fipa_jax.aggregate.past_rounds import PastKind
from fipa_jax.client import compression, second_order, terms
from fipa_jax.config import checks, fields
from fipa_jax.config import methods as compared
from fipa_jax.curvature.solver_choice import SOLVERS
from fipa_jax.data import partition
from fipa_jax.models.networks import MODELS
from fipa_jax.run import experiment, phase_parts
from fipa_jax.tasks.task import TASKS

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def tiny(**changes):
    """The sine task, with few examples and parameters; `a__b=value` sets config.a.b."""
    config = config_lib.default()
    config.task.examples_per_client = 6
    config.model.widths = (3,)
    config.fipa.sketch.rank = 2
    config.fipa.rounds = 1
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return config


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid_in_every_variant(path):
    """Its methods fit together too; the error of an unknown variant names all that there are."""
    module = load(path)
    assert f"--config=configs/{path.name}" in module.__doc__ or path.stem == "sine"
    with pytest.raises(ValueError, match=r"--config: unknown 'none such'; known: \w") as unknown:
        module.get_config("none such")
    variants = str(unknown.value).partition("known: ")[2].split(", ")
    assert set(re.findall(rf"{path.stem}\.py:(\w+)|`:(\w+)`", module.__doc__)) <= {
        found for name in variants for found in ((name, ""), ("", name))
    }
    for variant in ("", *variants):
        config = module.get_config(variant)
        config.init_from = "a_body.msgpack" if config.init_paths else ""  # which these variants leave to the user
        config_lib.validate(config)
        phase_parts.check(config)
        assert config.is_locked
        assert config.task.name in tasks.TASKS


@pytest.mark.parametrize(
    ("name", "variant"), [("cifar10", "debug"), pytest.param("tiny_imagenet", "cpu", marks=pytest.mark.slow)]
)
def test_an_image_config_goes_through_a_round_of_every_method(name, variant, tmp_path):
    """By shapes alone, on the real data."""
    if not (SHARED / name).exists():
        pytest.skip(f"no {name} under {SHARED}")
    config = load(ROOT / "configs" / f"{name}.py").get_config(variant)
    config.data.train_split, config.data.test_split, config.data.holdout = "train[:200]", "train[200:220]", 0.0
    config.partition.num_clients = 10
    config.data.dir, config.data.cache_dir = str(SHARED), str(tmp_path)
    assert len(experiment.build(config).compiled) > 1


def test_a_misspelt_field_names_the_nearest():
    config = config_lib.default()
    with pytest.raises(AttributeError, match="rank"):
        config.fipa.sketch.rnak = 3
    with pytest.raises(AttributeError, match="damping"):
        _ = config.fipa.aggregator.dampin


def test_a_value_of_another_type_is_refused():
    with pytest.raises(TypeError):
        config_lib.default().fipa.rounds = "many"


def test_a_method_changes_the_fipa_phase_alone():
    config = config_lib.default()
    before = config.to_json()
    method = compared.method(config, "fedavg:server.lr=0.3:local.epochs=2:aggregator.relative=false:trainable=Dense_1/")
    assert method.aggregator.name == "mean"
    assert (method.server.lr, method.local.epochs, method.aggregator.relative) == (0.3, 2, False)
    assert method.trainable == "Dense_1/"
    assert config.to_json() == before
    assert compared.method(config, "fipa").to_json() == config.fipa.to_json()


@pytest.mark.parametrize("name", compared.METHODS)
def test_every_method_applies_to_the_defaults(name):
    assert compared.method(config_lib.default(), name).rounds == config_lib.default().fipa.rounds


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fedavgg", "unknown 'fedavgg'; known: centralised, fedasync, fedavg, fedbuff, "),
        ("fipa:server.lr", "needs NAME:field=value"),
        ("fipa:server.lrr=1", "no field 'lrr'.*did you mean 'lr'"),
        ("fipa:serverr.lr=1", "no field 'serverr'.*did you mean 'server'"),
        ("fipa:xyz=1", "no field .xyz.*; known: .*rounds, "),
        ("fipa:server=1", "'server' is a group of fields"),
        ("fipa:server.lr.x=1", "'lr' is a value"),
        ("fipa:local.epochs=1.5", "'local.epochs': needs a whole number, got '1.5'"),
        ("fipa:server.lr=fast", "'server.lr': needs a number, got 'fast'"),
        ("fipa:aggregator.relative=maybe", "'aggregator.relative': needs True or False, got 'maybe'"),
    ],
)
def test_a_mistake_in_a_compared_method(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        compared.method(config_lib.default(), spec)
    assert "config.compare" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("precision", "float16"),
        ("cohort", -1),
        ("chunk", -2),
        ("devices", -1),
        ("first_round", -1),
        ("compare", ()),
        ("compare", ("fipa", "fipa")),
        ("task.num_clients", 0),
        ("task.examples_per_client", 0),
        ("task.test_fraction", 0.0),
        ("task.test_fraction", 1.0),
        ("task.column", -1),
        ("data.holdout", 1.0),
        ("data.rotation", -1.0),
        ("data.rotation", 181.0),
        ("eval.every", 0),
        ("eval.batch_size", 0),
        ("warmup.rounds", -1),
        ("warmup.local.epochs", 0),
        ("fipa.local.lr", -0.1),
        ("fipa.local.batch_size", -1),
        ("fipa.local.gauss_newton.tries", -1),
        ("fipa.local.gauss_newton.cg_steps", 0),
        ("fipa.sketch.rank", 0),
        ("fipa.sketch.power_steps", -1),
        ("fipa.sketch.oversample", -1),
        ("fipa.sketch.tolerance", -0.1),
        ("fipa.sketch.loss_rank", -1),
        ("fipa.sketch.probes", -1),
        ("fipa.sketch.energy", 1.5),
        ("fipa.sketch.energy", -0.1),
        ("fipa.sketch.gradient_scale", -1.0),
        ("fipa.sketch.gradient_scale", float("nan")),
        ("fipa.sketch.examples", -1),
        ("fipa.aggregator.damping", -1.0),
        ("fipa.aggregator.limits.max_step", -1.0),
        ("fipa.aggregator.limits.trace_cap", -1.0),
        ("fipa.aggregator.past.decay", 1.1),
        ("fipa.aggregator.past.rank", 0),
        ("fipa.aggregator.past.length", 0),
        ("fipa.aggregator.limits.max_divergence", -1.0),
        ("fipa.aggregator.late.max_drift", -1.0),
        ("fipa.aggregator.late.staleness", -1.0),
        ("fipa.late.share", 1.5),
        ("fipa.late.most", 0),
        ("fipa.least_clients", -1),
        ("fipa.faults.flip", 1.1),
        ("fipa.server.lr", -1.0),
        ("fipa.trainable", "("),
        ("fipa.rounds", 0),
    ],
)
def test_a_mistake_names_its_field(field, value):
    with pytest.raises(ValueError, match=re.escape(f"config.{field}")):
        experiment.build(tiny(**{field.replace(".", "__"): value}))


def test_a_mistake_in_a_compared_method_names_field_and_method():
    with pytest.raises(ValueError, match=r"config\.fipa\.local\.lr.*'fipa:local.lr=-1'"):
        experiment.build(tiny(compare=("fedavg", "fipa:local.lr=-1")))


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("task.name", "images, own_data"),
        ("model.name", "cnn_23k"),
        ("model.activation", "tanh"),
        ("fipa.local.optimizer", "gauss_newton, gradient, ivon, kronecker, lbfgs"),
        ("fipa.term.name", "prox"),
        ("fipa.aggregator.name", "mean"),
        ("fipa.aggregator.form", "damped, pinv, tikhonov"),
        ("fipa.aggregator.weighting", "examples, uniform"),
        ("fipa.aggregator.merge", "auto, gram, qr, tsqr"),
        ("fipa.aggregator.past.kind", "none, prior, targets"),
        ("fipa.sketch.solver", "auto, head, lanczos, rows, subspace"),
        ("fipa.sketch.jacobian", "head, matrix_free, rows"),
        ("fipa.sketch.store", "bfloat16"),
        ("fipa.server.optimizer", "adam"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(field, known):
    """Found while building, before the first round of any phase."""
    with pytest.raises(ValueError, match=f"unknown.*'nonesuch'; known: .*{known}") as caught:
        experiment.build(tiny(**{field.replace(".", "__"): "nonesuch"}))
    assert field.removeprefix("fipa.") in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("partition.num_clients", 7, "task.name = 'sine' does not read it; leave it at 100, got 7"),
        ("data.holdout", 0.1, "task.name = 'sine' does not read it; leave it at 0.0, got 0.1"),
        ("data.flip", False, "task.name = 'sine' does not read it; leave it at True"),
        ("task.holdout", 0.3, "task.name = 'sine' does not read it"),
        ("task.window", 5, "task.name = 'sine' does not read it"),
        ("task.equation", "burgers", "task.name = 'sine' does not read it"),
        ("model.layers", 3, "model.name = 'mlp' does not read it"),
        ("model.head_width", 3, "model.name = 'mlp' does not read it"),
        ("init_paths", "^Dense", "of config.init_from, which is not set"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(field, value, words):
    config = tiny()
    group, name = fields.find(config, field)
    group[name] = value
    with pytest.raises(ValueError, match=rf"^config\.{field}: {re.escape(words)}"):
        checks.validate(config)


def test_the_number_of_clients_of_the_gaussians_is_not_chosen():
    config = tiny()
    config.task.name, config.task.num_clients = "gaussians_2d", 12
    with pytest.raises(ValueError, match=r"config\.task\.num_clients: task\.name = 'gaussians_2d' does not read it"):
        experiment.build(config)


def test_fields_are_read_by_the_tasks_and_models_that_there_are():
    assert set(checks.TASKS) == set(TASKS) and set(checks.MODELS) == set(MODELS)
    read = [path for paths in (*checks.READ_BY_TASKS.values(), *checks.READ_BY_MODELS.values()) for path in paths]
    assert len(set(read)) == len(read) and all(fields.value(config_lib.default(), path) is not None for path in read)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fedavg:local.momentum=0.5", "local.momentum: nothing reads it with local.optimizer = 'sgd'"),
        ("fedavg:server.momentum=0.5", "server.momentum: nothing reads it with server.optimizer = 'sgd'"),
        ("fedavg:term.mu=1", "term.mu: nothing reads it with term.name = 'none'"),
        ("fedavg:late.most=3", "late.most: nothing reads it with late.share = 0.0"),
        ("fedavg:sketch.rank=5", "sketch.rank: no part of this method reads it"),
        ("fedavg:local.gauss_newton.tries=3", "local.gauss_newton.tries: no part of this method reads it"),
        ("fedavg:local.adaptive.scale=0.1", "local.adaptive.scale: no part of this method reads it"),
        ("fedavg:aggregator.past.kind=prior", "aggregator.past.kind: no part of this method reads it"),
        ("fedavg:local.epochs=3:local.steps=20", "local.epochs: nothing reads it with local.steps = 20"),
        ("fedavg:aggregator.late.max_drift=0.5", "aggregator.late.max_drift: nothing reads it with aggregator.name"),
        (
            "fipa_sums:aggregator.late.transport=False",
            "aggregator.late.transport: nothing reads it with aggregator.name",
        ),
        (
            "fipa:sketch.solver=rows:sketch.jacobian=rows",
            "sketch.jacobian: nothing reads it with sketch.solver = 'rows'",
        ),
        ("fipa:aggregator.past.rank=3", "aggregator.past.rank: nothing reads it with aggregator.past.kind = 'none'"),
        ("fipa:aggregator.rcond=0.1", "aggregator.rcond: nothing reads it with aggregator.form = 'damped'"),
        ("fipa:aggregator.late.mix=True", "aggregator.late.mix: nothing reads it with aggregator.name = 'fipa'"),
        ("fipa:sketch.loss_rank=1", "sketch.loss_rank: is of explicit rows, not of 'matrix_free'"),
        ("fipa_span:local.lr=0.3", "local.lr: nothing reads it with local.optimizer = 'gradient'"),
        ("fipa_span:sketch.loss_rank=1", "sketch.loss_rank: is of explicit rows, not of 'matrix_free'"),
        ("fipa_memory:local.damping=0.3", "local.damping: no part of this method reads it"),
    ],
)
def test_a_field_that_a_method_sets_and_nothing_reads_is_refused(spec, words):
    with pytest.raises(ValueError, match=rf"^config\.fipa\.{re.escape(words)}.*in the method {re.escape(repr(spec))}"):
        experiment.build(tiny(compare=("fipa", spec)))


@pytest.mark.parametrize(
    "spec",
    [
        "fedavg:local.momentum=0.9:server.lr=0.5",  # as it is by default
        "fedavg:local.optimizer=momentum:local.momentum=0.5:server.optimizer=adam:server.momentum=0.5",
        "fedavg:term.name=prox:term.mu=1:late.share=0.5:late.most=3:aggregator.late.staleness=1",
        "fipa:local.optimizer=natural_gradient:local.damping=0.3:sketch.solver=rows:sketch.loss_rank=1",
        "fipa:aggregator.past.kind=latest:aggregator.past.rank=3:aggregator.late.transport=False",
        "fedbuff:aggregator.late.staleness=1",  # of a deployment, whose clients are late by themselves
    ],
)
def test_a_field_that_another_choice_of_the_method_reads_is_taken(spec):
    checks.validate(config := tiny(compare=(spec,)))
    phase_parts.check(config)


def test_a_way_to_own_models_reads_the_sketch_of_any_method():
    config = tiny(compare=("fedavg:sketch.rank=2",))
    config.personal.compare = ("curvature",)
    phase_parts.check(config)


def test_choices_that_leave_fields_unread_are_those_that_there_are():
    """What is missing in the table would be taken in silence; what is there and no more is never met."""
    known = {
        "local.optimizer": {*phase_parts.LOCAL_SOLVERS},
        "local.compress.name": {*get_args(get_type_hints(compression.Compression)["name"])},
        "term.name": {*terms.TERMS, "duals"},
        "server.optimizer": {*server_optimizers.OPTIMIZERS},
        "aggregator.name": {*rules.AGGREGATORS},
        "aggregator.form": {*FORMS},
        "aggregator.past.kind": {*get_args(PastKind)},
        "aggregator.layers.kind": {*layerwise.KINDS},
        "aggregator.posterior.form": {*posteriors.FORMS},
        "local.gauss_newton.system": {*get_args(second_order.System)},
        "sketch.solver": {*SOLVERS},
    }
    assert {*checks.OTHER_RULES} | {"fipa"} == known["aggregator.name"]
    config = tiny().fipa
    for path, where in checks.UNREAD_WHERE:
        fields.value(config, path)  # which refuses what is no field
        for choice, names in where.items():
            if isinstance(names, checks.Range):
                assert not checks.holds(names, 0)
                continue
            assert all(type(name) is type(fields.value(config, choice)) or name in (0, 1) for name in names)
            assert not isinstance(names[0], str) or set(names) < known[choice], choice


def test_a_place_that_is_not_known_is_named():
    """Of a method whose rule takes the field."""
    with pytest.raises(ValueError, match=r"aggregator\.at: unknown 'home'; known: broadcast, local"):
        experiment.build(tiny(compare=("fisher_diagonal:aggregator.at=home",)))


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"config\.partition\.name: unknown 'nonesuch'; known: dirichlet, "):
        partition.partition("nonesuch", [0, 1], 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 3}, r"config\.cohort: 3 is above the number of clients, 2"),
        ({"devices": 64}, r"config\.devices: 64 asked for"),
        ({"fipa__sketch__rank": 1000}, "sketch.rank: 1000 is above the number of trainable parameters"),
        ({"fipa__sketch__solver": "head"}, "head needs trainable parameters that are the last layer's"),
        ({"fipa__sketch__energy": 0.9, "fipa__sketch__probes": 0}, "sketch.energy: needs the trace"),
        ({"fipa__trainable": "Conv"}, "trainable: no parameter path matches 'Conv'; the paths are: Dense_0/bias"),
        ({"fipa__local__optimizer": "gauss_newton", "fipa__term__name": "prox"}, "gauss_newton.*takes no term"),
        (
            {"fipa__local__optimizer": "gauss_newton", "fipa__local__gauss_newton__system": "x"},
            r"local\.gauss_newton\.system: unknown 'x'; known",
        ),
        ({"fipa__local__optimizer": "lbfgs", "fipa__local__clip_norm": 1.0}, "lbfgs.*takes no local.clip_norm"),
        ({"compare": ("fedavg:local.optimizer=natural_gradient",)}, "natural_gradient.*steps by the client's sketch"),
        (
            {"compare": ("fipa:local.optimizer=natural_gradient:local.damping=0",)},
            r"local\.damping: 'natural_gradient'",
        ),
        ({"compare": ("fipa_memory:aggregator.trust=True",)}, r"aggregator\.trust: needs all clients in every round"),
        (
            {"compare": ("fipa:aggregator.relative=False:aggregator.past.kind=prior:aggregator.past.adaptive=True",)},
            r"aggregator\.past\.adaptive: needs updates that the rule undoes",
        ),
        ({"compare": ("fipa:aggregator.own_damping=True",)}, r"aggregator\.own_damping: needs form = 'damped', rel"),
        (
            {"compare": ("fipa:local.optimizer=adam:aggregator.own_damping=True:aggregator.relative=False",)},
            r"own_damping: needs local\.optimizer = 'sgd'.*got 'adam'",
        ),
        ({"init_from": "nonesuch.msgpack"}, r"config\.init_from: no model file at nonesuch\.msgpack"),
    ],
)
def test_what_does_not_fit_the_problem_is_found_before_the_first_round(changes, message):
    """In a later phase too: the warm-up is not run first."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        experiment.build(tiny(warmup__rounds=1, **changes))
