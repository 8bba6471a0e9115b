"""Fields by their paths: those of before are named anew, and every number has its range."""

import pytest
from ml_collections import ConfigDict

from fipa_jax.config import checks, fields
from fipa_jax.config.defaults import default
from fipa_jax.config.methods import method

# Numbers without a range of their own -> who checks them.
CHECKED_BELOW = {
    "partition.alpha": "data.partition.check, by the split that reads it",
    "partition.shards_per_client": "data.partition.check, by the split that reads it",
    "fipa.local.epochs": "checks, where no steps are given",
}
OF_A_PHASE = [path for path in fields.RENAMED if "." in path]


def paths(config, prefix=""):
    """{path: value} of all fields of a config without its warm-up."""
    found = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        found |= paths(value, f"{path}.") if isinstance(value, ConfigDict) else {path: value}
    return {path: value for path, value in found.items() if not path.startswith("warmup.")}


FIELDS = paths(default())


@pytest.mark.parametrize("old", fields.RENAMED)
def test_a_field_of_before_is_gone_and_its_successor_is_there(old):
    prefix, new = "fipa." if old in OF_A_PHASE else "", fields.RENAMED[old]
    assert f"{prefix}{old}" not in FIELDS
    assert not new or f"{prefix}{new}" in FIELDS


@pytest.mark.parametrize("phase", ["fipa.", "warmup."])
@pytest.mark.parametrize("old", OF_A_PHASE)
def test_a_path_of_before_names_the_one_of_now(phase, old):
    new = fields.RENAMED[old]
    with pytest.raises(KeyError) as caught:
        fields.find(default(), f"{phase}{old}")
    assert caught.value.args[0] == (f"this field is now {phase + new!r}" if new else "this field is gone, leave it out")


@pytest.mark.parametrize("old", OF_A_PHASE)
def test_a_method_with_a_field_of_before_names_the_one_of_now(old):
    with pytest.raises(ValueError, match=r"config\.compare: 'fipa:.*: this field is") as caught:
        method(default(), f"fipa:{old}=1")
    assert repr(fields.RENAMED[old]) in str(caught.value) or not fields.RENAMED[old]


@pytest.mark.parametrize("old", fields.RENAMED)
def test_a_config_that_holds_a_field_of_before_is_refused(old):
    config, path = default().unlock(), f"fipa.{old}" if old in OF_A_PHASE else old
    config.update_from_flattened_dict({path: 1})
    with pytest.raises(ValueError, match=rf"^config\.{path}: this field is (now|gone)"):
        checks.validate(config)


@pytest.mark.parametrize(
    "path", ["fipa.client_memory", "warmup.client_memory", "task.memory", "memory", "fipa.tries.x"]
)
def test_a_field_that_never_was_has_no_successor(path):
    with pytest.raises(KeyError, match="there is no field"):
        fields.find(default(), path)


def test_a_name_without_its_group_names_all_that_it_was():
    assert fields.renamed_by_name("memory") == "sketch.memory is gone, aggregator.memory is now aggregator.past.kind"
    assert not fields.renamed_by_name("rank")


def test_every_number_has_a_range():
    ranges = set(checks.RUN) | {f"fipa.{path}" for path in checks.PHASE}
    first = {path: value[0] if isinstance(value, tuple) and value else value for path, value in FIELDS.items()}
    is_number = {path: isinstance(x, (int, float)) and not isinstance(x, bool) for path, x in first.items()}
    assert {path for path, true in is_number.items() if true} == ranges | set(CHECKED_BELOW)


@pytest.mark.parametrize(
    ("numbers", "inside", "outside"),
    [
        (checks.Range(1), (1, 10**9), (0, 0.999, float("nan"))),
        (checks.Range(0, 1), (0, 0.5, 1), (-1e-9, 1.001, float("nan"))),
        (checks.Range(0, 1, brackets="()"), (1e-9, 0.999), (0, 1, float("nan"))),
        (checks.Range(0, 1, brackets="[)"), (0, 0.999), (-1e-9, 1)),
    ],
    ids=["least", "closed", "open", "half open"],
)
def test_a_range_holds_the_numbers_that_it_says(numbers, inside, outside):
    assert all(checks.holds(numbers, number) for number in inside)
    assert not any(checks.holds(numbers, number) for number in outside)


def test_a_tuple_that_is_empty_by_default_takes_texts():
    config = default()
    config.task.targets = ("price", "size")
    fields.check(config, default())
    config.task.targets = (1,)
    with pytest.raises(ValueError, match=r"config.task.targets: needs a tuple such as \('a', 'b'\), got \(1,\)"):
        fields.check(config, default())
