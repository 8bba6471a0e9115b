"""Every field of the config has a consumer: each group names who takes its fields, and is held to it."""

import ast
import importlib
import inspect

import pytest
from ml_collections import ConfigDict

from fipa_jax.config import defaults, fields

# Group -> who takes its fields, inside fipa_jax, as the docstrings and comments of `config.defaults` have it. A
# callable takes the fields that its parameters are named after; a module those that it reads by name.
CONSUMERS = {
    "": ("run.estimate", "run.experiment", "run.loop", "run.phase_parts", "run.whole_run"),
    "checkpoint": ("saving.resume", "saving.journal"),
    "task": ("tasks.task", "tasks.regression", "tasks.own_data", "tasks.pde", "tasks.text"),
    "data": ("tasks.images",),
    "partition": ("data.partition.partition",),
    "model": ("models.networks",),
    "personal": ("run.personal_stage", "run.personal_ways"),
    "eval": ("run.loop", "reporting.metrics.make_evaluate"),
    "fipa": ("run.experiment", "run.loop", "run.phase_parts", "run.whole_run"),
    "fipa.local": (
        "client.first_order.first_order",
        "client.second_order.gauss_newton",
        "client.second_order.lbfgs",
        "client.second_order.natural_gradient",
        "client.ivon.ivon",
        "client.first_order.gradient",
        "client.local_solver.Hyper",
    ),
    "fipa.local.compress": ("client.compression.Compression",),
    "fipa.local.adaptive": ("client.local_solver.adaptive_steps",),
    "fipa.local.gauss_newton": ("client.second_order.gauss_newton",),
    "fipa.term": ("client.local_solver.Hyper",),
    "fipa.sketch": (
        "curvature.sketch.make_sketch",
        "curvature.sketch.make_diagonal",
        "curvature.common_basis.make_image",
        "curvature.common_basis.make_core",
        "curvature.layer_factors.make_layer_factors",
    ),
    "fipa.aggregator": (
        "aggregate.rules.mean",
        "aggregate.fisher_informed.fipa",
        "aggregate.rules.diagonal",
        "aggregate.robust.krum",
        "aggregate.sum_rule.from_sums",
        "aggregate.layerwise.kronecker",
        "aggregate.posteriors.posterior",
    ),
    "fipa.aggregator.posterior": ("aggregate.posteriors.PosteriorOptions",),
    "fipa.aggregator.layers": ("aggregate.layerwise.LayerOptions",),
    "fipa.aggregator.sums": ("aggregate.sums.SumOptions",),
    "fipa.aggregator.span": ("aggregate.gradient_span.SpanOptions",),
    "fipa.aggregator.past": ("aggregate.past_rounds.PastRounds",),
    "fipa.aggregator.limits": ("aggregate.limits.Limits",),
    "fipa.aggregator.late": ("aggregate.late_updates.LateUpdates",),
    "fipa.server": ("aggregate.server_optimizers.make",),
    "fipa.late": ("federation.channel.late",),
    "fipa.faults": ("federation.channel.FaultRates",),
    "fipa.privacy": ("run.private_run",),
}
# Fields that no consumer's parameter is named after -> what becomes of them.
BY_THE_RUN = {
    "fipa.local.lr_decay": "times the learning rate, in every round: federation.parts.Rates",
    "fipa.local.views": "which examples the solver sees: run.phase_parts",
    "fipa.local.matched": "whose damping the solver takes: run.phase_parts",
    "fipa.local.adaptive.max_steps": "`most` of adaptive_steps",
    "fipa.term.name": "an entry of client.terms.TERMS",
    "fipa.sketch.gradient_scale": "`scale` of sketch.with_rank_by_gradient",
    "fipa.sketch.examples": "by the round, which draws them: federation.round",
    "fipa.sketch.views": "whether sketcher_of takes sketchers.on_views: run.phase_parts",
    "fipa.sketch.common_start": "whether sketcher_of takes sketchers.from_one_start: run.phase_parts",
    "fipa.sketch.energy": "`share` of sketch.keeping_energy",
    "fipa.sketch.bits": "of few_bits.in_few_bits",
    "fipa.sketch.share": "of sketchers.sent_seldom",
    "fipa.sketch.full": "of sketchers.sent_seldom",
    "fipa.sketch.budget": "of curvature_budget.within_budget and sketchers.above_level",
    "fipa.sketch.link": "`rate` of sketchers.within_link",
    "fipa.sketch.deadline": "`seconds` of sketchers.within_link",
    "fipa.sketch.store": "`dtype` of sketch.stored_as",
    "fipa.late.share": "by the channel's rates: federation.channel.ChannelRates",
    "fipa.aggregator.name": "an entry of aggregate.rules.AGGREGATORS",
    "fipa.server.optimizer": "`name` of server_optimizers.make",
    "fipa.server.average": "`decay` of server_optimizers.averaged",
    "fipa.server.lr": "`server_lr` of federation.parts.Rates",
}


def groups(config, path=""):
    """{path: group} of a config and of all groups in it; the warm-up, of the same fields as `fipa`, is left out."""
    inner = {f"{path}.{name}".strip("."): group for name, group in config.items() if isinstance(group, ConfigDict)}
    return {path: config} | {
        key: group for below, group in inner.items() if below != "warmup" for key, group in groups(group, below).items()
    }


GROUPS = groups(defaults.default())


def resolve(dotted):
    """The module, or what is in one, that a dotted name inside fipa_jax stands for."""
    try:
        return importlib.import_module(f"fipa_jax.{dotted}")
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(f"fipa_jax.{module}"), name)


def taken_by(dotted):
    """The names of fields that a consumer takes."""
    consumer = resolve(dotted)
    if not inspect.ismodule(consumer):
        return set(inspect.signature(consumer).parameters)
    nodes = list(ast.walk(ast.parse(inspect.getsource(consumer))))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_every_group_has_its_line():
    assert set(CONSUMERS) == set(GROUPS)


@pytest.mark.parametrize("group", CONSUMERS)
def test_every_field_of_a_group_is_taken_by_a_consumer(group):
    taken = set().union(*map(taken_by, CONSUMERS[group]))
    own = {name: f"{group}.{name}" for name, value in GROUPS[group].items() if not isinstance(value, ConfigDict)}
    assert not {path for name, path in own.items() if name not in taken} - set(BY_THE_RUN)
    assert not set(own.values()) & {path for path in BY_THE_RUN if path.rpartition(".")[2] in taken}, "taken after all"


@pytest.mark.parametrize("group", CONSUMERS)
def test_every_consumer_takes_a_field(group):
    for consumer in CONSUMERS[group]:
        assert taken_by(consumer) & set(GROUPS[group]), f"{consumer} takes nothing of {group}"


def test_fields_that_the_run_reads_are_fields():
    for path in BY_THE_RUN:
        fields.find(defaults.default(), path)


@pytest.mark.parametrize("group", CONSUMERS)
def test_the_defaults_name_the_consumers(group):
    assert not [name for name in CONSUMERS[group] if name not in inspect.getsource(defaults)]
