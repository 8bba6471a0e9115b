"""What does the command line ask for? Flags become a checked config, or one line that says what to change."""

import os
import re
import traceback
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict

from fipa_jax import installed
from fipa_jax.config import defaults, fields
from fipa_jax.config.checks import validate


def parse(argv: list[str], config: flags.FlagHolder, default: Path, values: flags.FlagValues = flags.FLAGS) -> list:
    """Parses the flags, reads the config file, and checks the config.

    Args:
      argv: the program and its arguments.
      config: the flag `--config` of ml_collections.
      default: the config file, where no other is named.
      values: all flags.

    Returns:
      argv without the flags.

    Raises:
      ValueError: a mistake on the command line or in the config file, in one line.
    """
    argv, file = _with_config_file(argv, default)
    _check_fields(argv)
    argv = _last_of_tuples(argv)
    try:
        rest = _read(argv, config, values)
    except Exception as error:  # the config file is code, and may raise anything
        raise ValueError(_say(error, file)) from error
    if len(rest) > 1:
        raise ValueError(f"unknown arguments {rest[1:]}; a field is set by --config.field=value")
    return rest


def set_fields(argv: list[str]) -> list[str]:
    """Paths of the phases' fields that flags set: `--config.fipa.sketch.rank=5` gives `fipa.sketch.rank`."""
    found = [re.match(r"--?(?:no)?config\.((?:fipa|warmup)\.[\w.]+)", arg) for arg in argv]
    return [match[1] for match in found if match]


def check_workdir(path: Path) -> None:
    """Checks, without writing, that there can be a folder of results at this path.

    Raises:
      ValueError: there is something else, or no right to write.
    """
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written to" if nearest.is_dir() else "is no folder"
        raise ValueError(f"--workdir: {str(path)!r} is for the results, but {nearest} {what}; name another folder")


def config_file(name: str) -> Path:
    """The config file of a path, or of a shipped config's name: `sine` and `configs/sine.py` are known everywhere.

    Raises:
      ValueError: there is no such file, and no such name.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(installed.folder("configs").glob("*.py"))}
    short = re.sub(r"^configs/|\.py$", "", name)
    if short not in shipped:
        raise ValueError(f"--config: no file {name!r}; needs the path of one, or a name in {', '.join(shipped)}")
    return shipped[short]


def _with_config_file(argv, default):
    """(argv with the flag --config=FILE:VARIANT, the file)."""
    given = [place for place, arg in enumerate(argv) if re.match(r"--?config(=|$)", arg)]
    if not given:
        # As the flag's own default, it would be read before parsing.
        return [argv[0], f"--config={default}", *argv[1:]], str(default)
    place = given[-1]
    _, equals, value = argv[place].partition("=")
    if not equals and place + 1 == len(argv):
        raise ValueError("--config: needs the path of a config file, or its name, such as sine")
    value, rest = (value, argv[place + 1 :]) if equals else (argv[place + 1], argv[place + 2 :])
    name, colon, variant = value.partition(":")
    file = str(config_file(name))
    return [*argv[:place], f"--config={file}{colon}{variant}", *rest], file


def _check_fields(argv):
    """Refuses flags of fields that do not exist, before the config file is read."""
    for arg in argv:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            try:
                fields.find(defaults.default(), match[1])
            except KeyError as error:
                raise ValueError(_one_line(f"config.{match[1]}: {error.args[0]}")) from None


def _last_of_tuples(argv):
    """Without flags of tuples that a later one sets again: together they would be one long tuple."""
    places = {}  # field -> where its flags are, each with its value
    for place, arg in enumerate(argv):
        match = re.match(r"--?config\.([^=]*)(=?)", arg)
        if match and isinstance(fields.value(defaults.default(), match[1]), tuple):
            places.setdefault(match[1], []).append(range(place, place + (1 if match[2] else 2)))
    earlier = {place for flags_of in places.values() for words in flags_of[:-1] for place in words}
    return [arg for place, arg in enumerate(argv) if place not in earlier]


def _read(argv, config, values):
    """Parses the flags and checks the config that they give; returns what is no flag."""
    logger = logging.get_absl_logger()
    try:
        logger.disabled = True  # it would say beforehand what the error says
        rest = values(argv)
        if not isinstance(config.value, ConfigDict | dict | None):  # a file that cannot be read shows itself only here
            _ = config.value.seed
        validate(config.value)
    finally:
        logger.disabled = False
    return rest


def _say(error, file):
    """What an error says, in one line, with its place where it comes out of the config file."""
    if isinstance(error, flags.Error) and (match := re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.S)):
        needed = fields.needed(fields.value(defaults.default(), match[1]))
        return f"config.{match[1]}: needs {needed}, got {match[2]!r}"
    if isinstance(error, AttributeError) and str(error).endswith("has no attribute 'get_config'"):
        return f"--config: {file} needs a function get_config() that returns the config"
    cause = error
    while cause is not None:
        if lines := _lines_in(file, cause):
            return f"{file}, line {lines[-1]}: {type(cause).__name__}: {_one_line(_text(cause))}"
        cause = cause.__context__
    return _one_line(_text(error))


def _lines_in(file, error):
    """The numbers of a file's lines through which an error has come."""
    return [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]


def _text(error):
    """An error's text without the list of all fields, with which ml_collections fills screens."""
    while error.args and isinstance(error.args[0], Exception):  # one error in the other's place
        (error,) = error.args
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = re.sub(r"Other fields present:.*?(?=Did you mean|$)", "", text, flags=re.S)
    name = re.match(r"(?:Key )?[\"'](\w+)[\"']", text)  # that a config file has set, or read
    words = fields.renamed_by_name(name[1]) if name and isinstance(error, KeyError) else ""
    return f"{text}; {words}" if words else text


def _one_line(text):
    """At most a screen."""
    line = " ".join(text.split())
    return line if len(line) <= 1000 else f"{line[:400]} ... {line[-400:]}"
