"""Whatever stands on the command line or in a compared method: a config with values of the right kinds, or one line."""

import os
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from fipa_jax import config as config_lib
from fipa_jax.config import command_line
from fipa_jax.config import methods as compared

ROOT = Path(__file__).resolve().parents[2]
CASES = int(os.environ.get("FUZZ_CASES", "150"))  # of each property
PROFILE = settings(max_examples=CASES, derandomize=True, deadline=None, database=None)
DEFAULT = config_lib.default()
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by ml_collections


def leaves(config, prefix=""):
    """{path: value} of all fields."""
    found = {}
    for name, value in config.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return found


FIELDS = leaves(DEFAULT)
GROUPS = sorted({path.rpartition(".")[0] for path in FIELDS} - {""})
NAMES = sorted({*compared.METHODS} | {value for value in FIELDS.values() if isinstance(value, str) and value})

texts = st.text(max_size=8)
numbers = st.one_of(st.integers(), st.integers(-2, 3), st.floats(), st.sampled_from([2**31, 10**400, 1e39, 1e-400]))
plain = st.one_of(numbers, st.booleans(), st.none(), texts, st.sampled_from(NAMES))
values = st.one_of(
    plain.map(str),
    st.lists(plain, max_size=3).map(tuple).map(str),
    st.lists(plain, max_size=3).map(str),
    st.dictionaries(texts, plain, max_size=2).map(str),
    st.lists(st.sampled_from(["fipa", "fedavg", "fipa:server.lr=0.1", "fipa:pooled=1"]), max_size=3)
    .map(tuple)
    .map(str),
    st.sampled_from(["(" * 300, "(1,", "[[1]]", "'", '"', "1e3", "1_000", "0x1", "\x00", "1\n2", "True", "\u0661"]),
)
paths = st.one_of(
    st.sampled_from(sorted(FIELDS)),
    st.sampled_from(sorted(FIELDS)),
    st.sampled_from(GROUPS),
    st.builds(lambda path, cut: path[:cut] + path[cut + 1 :], st.sampled_from(sorted(FIELDS)), st.integers(0, 20)),
    st.builds(lambda path, end: f"{path}.{end}", st.sampled_from(sorted(FIELDS)), texts),
    texts,
)
method_paths = st.one_of(st.sampled_from(sorted(leaves(DEFAULT.fipa))), paths)
specs = st.one_of(
    st.builds(
        lambda name, changes: ":".join([name, *(f"{path}={value}" for path, value in changes)]),
        st.one_of(st.sampled_from(sorted(compared.METHODS)), texts),
        st.lists(st.tuples(method_paths, values), max_size=3),
    ),
    st.text(),
)
arguments = st.one_of(
    st.builds(lambda dash, path, value: f"{dash}config.{path}={value}", st.sampled_from(["--", "-"]), paths, values),
    st.builds(lambda start, path: f"{start}{path}", st.sampled_from(["--config.", "--noconfig."]), paths),
    specs.map(lambda spec: f"--config.compare={(spec,)}"),
    texts,
    texts.map(lambda text: f"--{text}"),
)


def check_kinds(config, like):
    found = leaves(config)
    for path, value in leaves(like).items():
        assert type(found[path]) is type(value), path
        if isinstance(value, tuple):
            assert all(type(part) is type(value[0]) for part in found[path]), path


def check_line(error):
    assert len(str(error).splitlines()) == 1, error
    assert len(str(error)) < 2000, error


@PROFILE
@given(st.lists(arguments, min_size=1, max_size=3))
def test_a_command_line_gives_a_config_or_one_line(given_arguments):
    argv, found = ["train.py", *given_arguments], flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=found, sys_argv=argv)
    try:
        command_line.parse(argv, config, ROOT / "configs" / "sine.py", found)
    except ValueError as error:
        check_line(error)
        assert "config" in str(error) or "flag" in str(error), error
    else:
        check_kinds(config.value, DEFAULT)


@PROFILE
@given(specs)
def test_a_method_gives_a_phase_or_one_line(spec):
    try:
        phase = compared.method(DEFAULT, spec)
    except ValueError as error:
        check_line(error)
        assert "config.compare" in str(error)
    else:
        check_kinds(phase, DEFAULT.fipa)


raw = st.one_of(plain, st.lists(plain, max_size=2), st.lists(plain, max_size=2).map(tuple), st.binary(max_size=3))


@PROFILE
@given(st.lists(st.tuples(st.sampled_from(sorted(FIELDS)), raw), min_size=1, max_size=3))
def test_values_that_a_config_file_sets_are_checked(changes):
    config = config_lib.default()
    for path, value in changes:
        try:
            config.update_from_flattened_dict({path: value})
        except (TypeError, ValueError, OverflowError):
            return  # by ml_collections, which names the field
    try:
        config_lib.validate(config)
    except ValueError as error:
        check_line(error)
        assert "config." in str(error)
    else:
        check_kinds(config, DEFAULT)
