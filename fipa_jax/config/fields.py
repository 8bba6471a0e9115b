"""What is a field of a config, and which values can it take? Paths to fields, and the kinds of their values."""

import difflib
import re

from ml_collections import ConfigDict

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}

# Fields of before -> what they are called now, those of a phase without `fipa.` or `warmup.`; "" where none took over.
RENAMED = {
    "client_memory": "client_store",
    "local.step_scale": "local.adaptive.scale",
    "local.max_steps": "local.adaptive.max_steps",
    "local.tries": "local.gauss_newton.tries",
    "local.system": "local.gauss_newton.system",
    "local.cg_steps": "local.gauss_newton.cg_steps",
    "sketch.memory": "",
    "aggregator.memory": "aggregator.past.kind",
    "aggregator.memory_decay": "aggregator.past.decay",
    "aggregator.memory_rank": "aggregator.past.rank",
    "aggregator.memory_length": "aggregator.past.length",
    "aggregator.max_step": "aggregator.limits.max_step",
    "aggregator.max_divergence": "aggregator.limits.max_divergence",
    "aggregator.explosion": "aggregator.limits.explosion",
    "aggregator.trace_cap": "aggregator.limits.trace_cap",
    "aggregator.staleness": "aggregator.late.staleness",
    "aggregator.transport": "aggregator.late.transport",
    "aggregator.max_drift": "aggregator.late.max_drift",
    "aggregator.mix": "aggregator.late.mix",
}


def find(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """The group that a path such as `fipa.sketch.rank` leads to, and the name of the field in it.

    Raises:
      KeyError: there is no such field, or it is a group of fields; says which is the nearest, or its name of now.
    """
    *parents, last = path.split(".")
    group = config
    for name in parents:
        _check_known(group, name, path)
        if not isinstance(group[name], ConfigDict):
            raise KeyError(f"{name!r} is a value, not a group of fields")
        group = group[name]
    _check_known(group, last, path)
    if isinstance(group[last], ConfigDict):
        raise KeyError(f"{last!r} is a group of fields: {', '.join(group[last])}")
    return group, last


def value(config: ConfigDict, path: str):
    """What the field at a path such as `fipa.sketch.rank` holds."""
    group, name = find(config, path)
    return group[name]


def renamed(path: str) -> str:
    """What a field of before is called now, in words; "" where there never was one at this path."""
    phase, field = re.fullmatch(r"((?:fipa\.|warmup\.)?)(.*)", path, re.S).groups()
    if field not in RENAMED or (phase and "." not in field):
        return ""
    return f"this field is now {phase + RENAMED[field]!r}" if RENAMED[field] else "this field is gone, leave it out"


def renamed_by_name(name: str) -> str:
    """The same where only a field's own name is known, not its group."""
    pairs = [(old, new) for old, new in RENAMED.items() if old.rpartition(".")[2] == name]
    return ", ".join(f"{old} is now {new}" if new else f"{old} is gone" for old, new in pairs)


def parse(text: str, like):
    """The value of the kind of `like` that a text stands for.

    Raises:
      ValueError: it stands for none; says what is needed.
    """
    kind = type(like)
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"needs {needed(like)}, got {text!r}") from None


def needed(like) -> str:
    """In words, which values a field takes whose default is `like`."""
    return f"a tuple such as {like or ('a', 'b')}" if isinstance(like, tuple) else KINDS[type(like)]


def check(config, like: ConfigDict, group: str = "config") -> None:
    """Checks that all fields of `like` are there and hold values of their kind, finite and of 32 bits.

    A config file can leave what the command line cannot: None, True for 1, a text in a tuple, a group without fields.

    Raises:
      ValueError: names the field, what was needed and what arrived.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{group}: needs all fields of fipa_jax.config.default(), got {type(config).__name__}")
    _check_renamed(config, group)
    for name, default in like.items():
        field = f"{group}.{name}"
        if name not in config:
            raise ValueError(f"{field}: is missing; start from fipa_jax.config.default()")
        if isinstance(default, ConfigDict):
            check(config[name], default, field)
        else:
            _check_value(field, config[name], default)


def _check_renamed(config, group):
    """Refuses fields of before, which only an unlocked config can hold."""
    for name in config:
        if words := renamed(f"{group}.{name}".removeprefix("config.")):
            raise ValueError(f"{group}.{name}: {words}")


def _check_value(field, value, like):
    kind = type(like)
    if not _is_of_kind(value, like):
        raise ValueError(f"{field}: needs {needed(like)}, got {value!r}")
    if kind is int and not -(2**31) <= value < 2**31:
        raise ValueError(f"{field}: needs a whole number between -2^31 and 2^31, got {value}")
    if kind is float and not abs(value) < 2.0**127:  # NaN is not
        raise ValueError(f"{field}: needs a finite number, got {value}")


def _is_of_kind(value, like):
    """Whether a value is of its default's type, where True is no number, and a tuple's parts are of one type.

    Those of a tuple that is empty by default are texts.
    """
    if isinstance(like, tuple):
        return isinstance(value, tuple) and all(type(part) is type(like[0] if like else "") for part in value)
    return isinstance(value, type(like)) and isinstance(value, bool) == isinstance(like, bool)


def _check_known(group, name, path):
    """Refuses a name that the group has not; `path` is the whole one."""
    if name in group:
        return
    if words := renamed(path):
        raise KeyError(words)
    near = difflib.get_close_matches(name, list(group), 1) or _below(group, name)[:3]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(group)}"
    raise KeyError(f"there is no field {name!r}; {hint}")


def _below(config, name):
    """Paths of the fields of this name in the groups below."""
    groups = [(key, group) for key, group in config.items() if isinstance(group, ConfigDict)]
    nearest = [f"{key}.{name}" for key, group in groups if name in group]
    return nearest + [f"{key}.{path}" for key, group in groups for path in _below(group, name)]
