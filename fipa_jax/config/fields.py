"""What is a field of a config, and which values can it take? Paths to fields, and the kinds of their values."""

import difflib

from ml_collections import ConfigDict

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}


def find(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """The group that a path such as `fipa.sketch.rank` leads to, and the name of the field in it.

    Raises:
      KeyError: there is no such field, or it is a group of fields; says which is the nearest.
    """
    *parents, last = path.split(".")
    group = config
    for name in parents:
        _known(group, name)
        if not isinstance(group[name], ConfigDict):
            raise KeyError(f"{name!r} is a value, not a group of fields")
        group = group[name]
    _known(group, last)
    if isinstance(group[last], ConfigDict):
        raise KeyError(f"{last!r} is a group of fields: {', '.join(group[last])}")
    return group, last


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
    return f"a tuple such as {like}" if isinstance(like, tuple) else KINDS[type(like)]


def check(config, like: ConfigDict, group: str = "config") -> None:
    """Checks that all fields of `like` are there and hold values of their kind, finite and of 32 bits.

    A config file can leave what the command line cannot: None, True for 1, a text in a tuple, a group without fields.

    Raises:
      ValueError: names the field, what was needed and what arrived.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{group}: needs all fields of fipa_jax.config.default(), got {type(config).__name__}")
    for name, default in like.items():
        field = f"{group}.{name}"
        if name not in config:
            raise ValueError(f"{field}: is missing; start from fipa_jax.config.default()")
        if isinstance(default, ConfigDict):
            check(config[name], default, field)
        else:
            _check_value(field, config[name], default)


def _check_value(field, value, like):
    kind = type(like)
    right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if kind is tuple and right:
        right = all(type(part) is type(like[0]) for part in value)
    if not right:
        raise ValueError(f"{field}: needs {needed(like)}, got {value!r}")
    if kind is int and not -(2**31) <= value < 2**31:
        raise ValueError(f"{field}: needs a whole number between -2^31 and 2^31, got {value}")
    if kind is float and not abs(value) < 2.0**127:  # NaN is not
        raise ValueError(f"{field}: needs a finite number, got {value}")


def _known(group, name):
    if name not in group:
        near = difflib.get_close_matches(name, list(group), 1) or _below(group, name)[:1]
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(group)}"
        raise KeyError(f"there is no field {name!r}; {hint}")


def _below(config, name):
    """Paths of the fields of this name in the groups below."""
    groups = [(key, group) for key, group in config.items() if isinstance(group, ConfigDict)]
    here = [f"{key}.{name}" for key, group in groups if name in group]
    return here + [f"{key}.{path}" for key, group in groups for path in _below(group, name)]
