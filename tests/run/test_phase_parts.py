"""What does not fit together in a phase is one line that names the field; what is accepted takes a finite step."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import tiny

from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.config import command_line, fields
from fipa_jax.config.methods import method
from fipa_jax.federation import parts as parts_lib
from fipa_jax.models import networks
from fipa_jax.run import experiment, phase_parts
from fipa_jax.tasks import images, task
from fipa_jax.tasks.task import Problem, Task, head_only

draw = np.random.default_rng(0)


def fields_of(**fields):
    """The tiny config with fields set by their paths."""
    config = tiny()
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in fields.items()})
    return config


def own_data(folder):
    np.savez(folder / "mine.npz", x=draw.normal(size=(12, 2)), y=draw.normal(size=(12, 1)))
    return task.build(fields_of(task__name="own_data", task__file=str(folder / "mine.npz")))


def equation(folder):
    return task.build(fields_of(task__name="pde", task__boundary_points=2, task__test_points=4))


def pictures(folder):
    train = {"image": draw.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8), "label": np.arange(8, dtype=np.int32) % 3}
    learned = images.classifier(networks.MLP((3,), 3), (4, 4, 3), np.full(3, 0.5), np.full(3, 0.2), augmented=True)
    return Problem(learned, train, train, None, [np.arange(4), np.arange(4, 8)])


def head_of(problem):
    """The pictures as a phase sees them whose features are cached."""
    body = {"body": draw.normal(size=(8, 3)).astype(np.float32), "label": problem.train["label"]}
    return problem._replace(task=head_only(problem.task), train=body)


# name -> (what makes the problem, what the phase trains)
TASKS = {
    "sine": (lambda folder: task.build(tiny()), ".*"),
    "own data": (own_data, ".*"),
    "equation": (equation, ".*"),
    "images": (pictures, ".*"),
    "images, their head": (pictures, "^Dense_1/"),
    "images, their head on features": (lambda folder: head_of(pictures(folder)), "^Dense_1/"),
}
NEEDS = {"logit_adjustment": "label", "rcl": "label levels trainable", "moon": "last trainable"}


@functools.cache
def problem_of(name, folder):
    return TASKS[name][0](folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def tried(term, name, folder):
    """(problem, config, parts, params, what the check says)."""
    problem = problem_of(name, folder)
    config = fields_of(fipa__term__name=term, fipa__trainable=TASKS[name][1], fipa__aggregator__name="mean")
    config.fipa.local.update({"batch_size": 3, "steps": 2})
    config.fipa.local.compress.name = "top_k" if term == "feedback" else "none"
    parts = phase_parts.make_parts(config, config.fipa, problem.task, 2)
    params, error = problem.task.init(jax.random.key(0)), ""
    try:
        experiment.check_needs(config.fipa, parts, params, problem.train, "fipa")
    except ValueError as caught:
        error = str(caught)
    return problem, config, parts, params, error


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("term", terms.TERMS)
def test_a_term_is_refused_in_one_line_where_it_finds_nothing(term, name, folder):
    *_, error = tried(term, name, folder)
    on_head, classes = "head" in name, "images" in name
    wanted = {"logit_adjustment": not classes, "rcl": not classes or on_head, "moon": name == "equation" or on_head}
    assert bool(error) == wanted.get(term, False)
    if error:
        assert re.match(rf"config\.fipa\.term\.name: '{term}' ", error) and "\n" not in error
        assert any(need in error for need in NEEDS[term].split())


# In the fast suite those that look into the model.
STEPS = [
    pytest.param(term, name, marks=() if term == "rcl" and name == "images" else pytest.mark.slow)
    for term in terms.TERMS
    for name in TASKS
]


@pytest.mark.parametrize(("term", "name"), STEPS)
def test_a_term_that_is_accepted_takes_a_finite_step(term, name, folder):
    problem, config, parts, params, error = tried(term, name, folder)
    if error:
        return
    chosen, outputs = parts_lib.model_of(parts, params)
    store = jax.tree.map(lambda leaf: leaf + 0.1, parts.term.init(chosen))
    client = Client(jnp.asarray(problem.clients[0][:4]), jnp.asarray(4))
    data = jax.tree.map(jnp.asarray, problem.train)
    hyper = phase_parts.make_rates(config.fipa, "float32").local._replace(mu=jnp.asarray(1.0))
    shared, local = parts.term.init(chosen), jax.jit(functools.partial(parts.local, outputs))
    result = local(chosen, data, client, jax.random.key(0), hyper, store, shared)
    chex.assert_tree_all_finite(result)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(result.delta)) > 0


REFUSED = {
    "a class where there is none": ({"fipa__term__name": "rcl"}, "config.fipa.term.name 'rcl' 'label'"),
    "in a warm-up": (
        {"warmup__rounds": 1, "warmup__term__name": "logit_adjustment"},
        "config.warmup.term.name 'logit_adjustment' 'label'",
    ),
    "features of an equation": (
        {"task__name": "pde", "fipa__term__name": "moon"},
        "config.fipa.term.name 'moon' features.last",
    ),
    "features of no layer": (
        {"model__widths": (), "fipa__term__name": "moon"},
        "config.fipa.term.name 'moon' config.fipa.trainable",
    ),
    "features that stay": (
        {"fipa__term__name": "moon", "fipa__trainable": "Dense_1", "fipa__cache_body": True},
        "config.fipa.term.name 'moon' config.fipa.trainable",
    ),
    "a pull without a way": (
        {"fipa__term__name": "prox", "fipa__local__steps": 1},
        "config.fipa.term.name 'prox' step",
    ),
    "a pull without a way, by epochs": (
        {"fipa__term__name": "prox", "fipa__local__epochs": 1, "fipa__local__batch_size": 0},
        "config.fipa.term.name 'prox' step",
    ),
    "a pull on a natural gradient": (
        {"fipa__term__name": "prox", "fipa__local__optimizer": "natural_gradient"},
        "config.fipa.term.name 'prox' local.optimizer 'natural_gradient'",
    ),
    "a batch of one": (
        {"fipa__term__name": "rcl", "fipa__local__batch_size": 1},
        "config.fipa.local.batch_size 'rcl' 2 1",
    ),
    "the last layer of an equation": (
        {"task__name": "pde", "fipa__sketch__solver": "head"},
        "config.fipa.sketch.solver 'head' features.last 'auto'",
    ),
    "stragglers of one step": (
        {"fipa__faults__straggle": 0.5, "fipa__local__epochs": 1, "fipa__local__batch_size": 0},
        "config.fipa.faults.straggle several",
    ),
    "views of what has none": (
        {"fipa__cache_body": True, "fipa__cache_views": 2, "fipa__trainable": "Dense_1"},
        "config.fipa.cache_views views 0",
    ),
    "a holdout of no images": ({"data__holdout": 0.1}, "config.data.holdout task.name 'sine' 0.1"),
    "a side of no images": ({"data__side": 8}, "config.data.side task.name 'sine' 8"),
    "a turn of no images": ({"data__rotation": 10.0}, "config.data.rotation task.name 'sine' 10.0"),
    "a head of no ResNet": ({"model__head_width": 8}, "config.model.head_width model.name 'mlp' 8"),
    "a dtype of no ResNet": (
        {"model__compute_dtype": "bfloat16"},
        "config.model.compute_dtype model.name 'mlp' 'bfloat16'",
    ),
    "a step by the head's curvature for all": (
        {"fipa__also_trained": ".*", "fipa__trainable": "Dense_1", "fipa__local__optimizer": "gauss_newton"},
        "config.fipa.also_trained first-order 'gauss_newton'",
    ),
    "controls of the head for all": (
        {"fipa__also_trained": ".*", "fipa__trainable": "Dense_1", "fipa__term__name": "scaffold"},
        "config.fipa.also_trained 'scaffold'",
    ),
    "a body that is not there": (
        {"fipa__also_trained": ".*", "fipa__trainable": "Dense_1", "fipa__cache_body": True},
        "config.fipa.also_trained cache_body False",
    ),
    "layers that are not there": (
        {"fipa__also_trained": "^Dens_0/"},
        "config.fipa.also_trained '^Dens_0/' Dense_0/kernel",
    ),
    "Adam's own damping": (
        {"fipa__local__optimizer": "adam", "fipa__aggregator__own_damping": True, "fipa__aggregator__relative": False},
        "config.fipa.aggregator.own_damping local.optimizer 'adam'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_do_nothing_is_refused_before_the_first_round(case):
    fields, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        experiment.build(fields_of(compare=("fipa",), **fields))
    said = str(caught.value)
    assert "\n" not in said and not [word for word in words.split() if word not in said], said


def test_labels_that_are_no_classes_are_refused(folder):
    """A single output, and labels of fractions."""
    problem, config = problem_of("images", folder), fields_of(fipa__term__name="logit_adjustment")
    one = problem.task._replace(outputs=lambda params, batch: (problem.task.outputs(params, batch)[0][:, :1], ()))
    fractions = problem.train | {"label": problem.train["label"].astype(np.float32)}
    for learned, data in ((one, problem.train), (problem.task, fractions)):
        parts = phase_parts.make_parts(config, config.fipa, learned, 2)
        with pytest.raises(ValueError, match=r"config\.fipa\.term\.name: 'logit_adjustment' needs .* classes"):
            experiment.check_needs(config.fipa, parts, learned.init(jax.random.key(0)), data, "fipa")


def test_an_own_term_that_nothing_moves_is_refused(folder, monkeypatch):
    """Whatever it says of its needs."""
    monkeypatch.setitem(terms.TERMS, "idle", lambda: terms.Term(penalty=lambda local: local.mu * jnp.sum(local.mask)))
    problem, config = problem_of("sine", folder), fields_of(fipa__term__name="idle")
    parts = phase_parts.make_parts(config, config.fipa, problem.task, 2)
    with pytest.raises(ValueError, match=r"config\.fipa\.term\.name: 'idle' does not change with .*trainable"):
        experiment.check_needs(config.fipa, parts, problem.task.init(jax.random.key(0)), problem.train, "fipa")


PRIOR = "aggregator.past.kind=prior:aggregator.past.adaptive=True"
TRUSTED = "fipa:aggregator.trust=True:aggregator.relative=False:aggregator.limits.max_step=0"
USELESS = {
    "fipa_few_bytes:term.name=dyn": r"term\.name: 'dyn' corrects the server's step .* send gradients, which are",
    "fipa:term.name=varp:aggregator.past.kind=latest": r"term\.name: with 'varp' .* 'latest' they take part already",
    "fipa_memory:term.name=mifa:aggregator.past.kind=targets": r"term\.name: with 'mifa' .* 'targets' they take part",
    "fipa_auto:term.name=varp": r"past\.adaptive: goes by the gradients of the cohort, to which 'varp' adds",
    "fipa_sums:term.name=mifa": r"term\.name: 'mifa' keeps what each client sends, and the rule 'sums'",
    "fipa_sums_of_gradients:term.name=varp": r"term\.name: 'varp' keeps what each client sends",
    "fedavg:local.optimizer=gradient:local.clip_norm=0.01": r"local\.optimizer = 'gradient' takes no local\.clip_norm",
    "fedivon:local.weight_decay=0.1": r"local\.optimizer = 'ivon' takes no local\.weight_decay",
    "fipa:aggregator.past.adaptive=True": r"past\.adaptive: .*'prior', got 'none'",
    f"fipa_sums:{PRIOR}": r"past\.adaptive: .*'sums'.*set it to False",
    f"fedpm:{PRIOR}": r"past\.adaptive: .*'kronecker'.*set it to False",
    "fisher_diagonal:aggregator.form=pinv": r"aggregator\.form: the rule 'diagonal' .* set it to 'damped'",
    "fisher_diagonal:aggregator.trust=True": r"aggregator\.trust: the rule 'diagonal' has no use",
    "fedfisher_kfac:aggregator.trust=True": r"aggregator\.trust: the rule 'kronecker' has no use",
    "fedivon:aggregator.trust=True": r"aggregator\.trust: the rule 'posterior' has no use",
    "fipa_span:aggregator.trust=True": r"aggregator\.trust: the rule 'span' has no use",
    "fedpm:aggregator.own_damping=True": r"aggregator\.own_damping: the rule 'kronecker' has no use",
    "fipa_span:aggregator.own_damping=True": r"aggregator\.own_damping: the rule 'span' has no use",
    "fisher_diagonal:aggregator.past.kind=latest": r"past\.kind: the rule 'diagonal' .* set it to 'none'",
    "fedivon:aggregator.past.kind=prior": r"past\.kind: the rule 'posterior' has no use",
    "fisher_diagonal:aggregator.late.max_drift=0.1": r"late\.max_drift: the rule 'diagonal' .* set it to 0\.0",
    "fedpm:aggregator.late.max_drift=0.1": r"late\.max_drift: the rule 'kronecker' has no use",
    "fipa_sums:sketch.bits=4": r"sketch\.bits: is of eigenpairs, and under the rule 'sums' .* set it to 0",
    "fisher_diagonal:sketch.bits=4": r"sketch\.bits: .* under the rule 'diagonal'",
    "fedfisher_kfac:sketch.energy=0.9": r"sketch\.energy: .* under the rule 'kronecker'",
    f"{TRUSTED}:term.name=moon": r"aggregator\.trust: with the term 'moon' clients have another objective",
    f"{TRUSTED}:term.name=rcl": r"aggregator\.trust: with the term 'rcl' clients have another objective",
}


@pytest.mark.parametrize("spec", USELESS)
def test_an_option_that_would_do_nothing_is_refused(spec):
    with pytest.raises(ValueError, match=USELESS[spec]):
        phase_parts.check(tiny(compare=(spec,)))


WHATEVER = {"local__clip_norm": 1.0, "aggregator__past__adaptive": True, "sketch__bits": 4}
OF_FIPA = WHATEVER | {
    "local__weight_decay": 0.1,
    "aggregator__trust": True,
    "aggregator__own_damping": True,
    "aggregator__late__max_drift": 0.1,
    "sketch__store": "bfloat16",
    "sketch__energy": 0.9,
    "sketch__gradient_scale": 1.0,
    "sketch__budget": 5000.0,
}
INHERITED = {"fipa_few_bytes": WHATEVER, "fipa_pinv": {"aggregator__past__adaptive": True}}
INHERITED |= dict.fromkeys(("fipa_sums", "fipa_sums_of_gradients"), OF_FIPA | {"aggregator__trust": False})
INHERITED |= dict.fromkeys(("fedpm", "fedfisher_kfac", "regmean"), OF_FIPA)
INHERITED |= dict.fromkeys(
    ("fipa_span", "fisher_diagonal", "fedivon", "ivon_admm"),
    OF_FIPA | {"aggregator__past__kind": "prior", "aggregator__form": "pinv"},
)


@pytest.mark.parametrize("name", INHERITED)
def test_a_compared_method_leaves_aside_what_only_others_use(name):
    phase_parts.check(fields_of(compare=(name,), **{f"fipa__{path}": value for path, value in INHERITED[name].items()}))


def test_what_has_no_damping_is_compared_with_a_phase_that_follows_it():
    config = fields_of(fipa__aggregator__trust=True, fipa__aggregator__relative=False, fipa__local__matched=True)
    config.fipa.local.optimizer, config.compare = "gauss_newton", ("fipa", "fipa_pinv")
    phase_parts.check(config)


def test_trust_takes_a_term_whose_objective_stays_the_same():
    phase_parts.check(tiny(compare=(f"{TRUSTED}:term.name=logit_adjustment", f"{TRUSTED}:term.name=prox")))


ALL, WARM = "in all methods of config.compare", "in the warm-up"


@pytest.mark.parametrize(
    ("compare", "flag", "words", "where"),
    [
        (("fipa", "fedavg"), "fipa.local.momentum=0.5", "nothing reads it with local.optimizer = 'sgd'", ALL),
        (("fedavg",), "fipa.sketch.rank=2", "no part of this method reads it", ALL),
        (("fipa_span",), "fipa.local.lr=0.3", "nothing reads it with local.optimizer = 'gradient'", ALL),
        (("fipa_span", "fedavg"), "fipa.local.lr=0.3", "", ALL),
        (("fipa", "fedavg"), "fipa.sketch.rank=2", "", ALL),
        (("fedavg",), "fipa.sketch.rank=20", "", ALL),  # as it is by default
        (("fipa", "fedavg:local.optimizer=momentum"), "fipa.local.momentum=0.5", "", ALL),
        (("fipa",), "warmup.local.momentum=0.5", "nothing reads it with local.optimizer = 'sgd'", WARM),
        (("fipa",), "warmup.sketch.rank=2", "no part of this method reads it", WARM),
        (("fipa",), "warmup.local.lr=0.3", "", WARM),
    ],
)
def test_a_flag_that_no_method_reads_is_named(compare, flag, words, where):
    path, _, value = flag.partition("=")
    config = fields_of(**{path.replace(".", "__"): int(value) if "rank" in path else float(value)}, warmup__rounds=1)
    config.compare = compare
    paths = command_line.set_fields(["train.py", "--config=sine", f"--config.{flag}", "--config.seed=1"])
    assert paths == [path]
    lines = phase_parts.without_effect(config, paths)
    assert len(lines) == bool(words)
    assert all(re.match(rf"config\.{path}: {words}.* \({where}\)$", line) for line in lines)


@pytest.mark.parametrize(
    ("compare", "flag", "own"),
    [
        (("fipa_memory",), "fipa.local.lr=0.3", "1.0"),
        (("fipa_span", "fipa_few_bytes"), "fipa.sketch.bits=4", "8"),
        (("fipa_memory", "fipa_span"), "fipa.local.lr=0.3", "1.0"),  # which the second does not read
        (("fedavg:local.lr=0.1",), "fipa.local.lr=0.3", "0.1"),
        (("fipa_memory",), "fipa.local.views=True", "False"),  # as it is by default
        (("fipa_memory", "fedavg"), "fipa.local.lr=0.3", ""),
        (("fipa_memory",), "fipa.server.lr=1.0", ""),  # what the method says too
    ],
)
def test_a_flag_that_every_method_overwrites_is_named(compare, flag, own):
    config, (path, _, value) = fields_of(), flag.partition("=")
    group, field = fields.find(config, path)
    group[field] = fields.parse(value, group[field])
    config.compare = compare
    lines = phase_parts.without_effect(config, [path])
    assert len(lines) == bool(own)
    field = path.removeprefix("fipa.")
    for line in lines:
        where = f"write NAME:{field}={value} in config.compare"
        assert line == f"config.{path}: each method that reads it sets it itself, to {own}; {where}"


def test_a_step_that_is_judged_by_losses_is_not_of_random_views():
    """Of tasks that have them."""
    augmented = Task(init=None, outputs=None, loss=None, metrics=None, augment=lambda key, batch: batch)
    config = fields_of(compare=(f"{TRUSTED}:local.optimizer=sgd",))
    for views in (True, False):
        settings = method(config, f"{config.compare[0]}:local.views={views}")
        with contextlib.nullcontext() if not views else pytest.raises(ValueError, match=r"trust: with local\.views"):
            phase_parts.make_parts(config, settings, augmented, num_clients=2)
