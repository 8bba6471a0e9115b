"""Trains a global model by the phases of a config and compares methods.

python scripts/train.py
python scripts/train.py --config=configs/cifar10.py --config.data.dir=DIR --workdir=runs/cifar10

A shipped config goes by its name too, --config=cifar10; of a wheel this script is the command fipa-train.
"""

import os
import sys
import traceback
from pathlib import Path


def say(kind, error, where):
    """Writes what ends the program: one line for Ctrl-C, at whatever moment it comes."""
    if issubclass(kind, KeyboardInterrupt):
        but = " without --resume=no" if "--resume=no" in sys.argv else ""
        print(
            f"stopped by Ctrl-C; the same command{but} goes on from the last checkpoint, if there is one",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, where)


sys.excepthook = say

from fipa_jax import config as config_lib  # noqa: E402

config_lib.prepare_process()  # before jax starts

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from fipa_jax import files  # noqa: E402
from fipa_jax.config import command_line  # noqa: E402

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "sine.py"
CONFIG = config_flags.DEFINE_config_file("config", None, "What to run, by default sine; --config.a.b=value.")
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "Of several processes that share the clients: HOST:PORT of the first one, or auto under Slurm or on TPUs.",
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many there are, where the coordinator is HOST:PORT.")
PROCESS = flags.DEFINE_integer("process", None, "Which one of them this is, from 0.")
RESUME = flags.DEFINE_enum(
    "resume",
    "yes",
    ["yes", "no", "anyway"],
    "Whether a run that was stopped in the work directory goes on: yes, where config, data and code are the same; "
    "anyway; or no, which moves it aside.",
)
WORKDIR = flags.DEFINE_string("workdir", "", "Where the results go; by default runs/NAME-OF-THE-CONFIG.")


def parse(argv):
    """Parses the flags; a mistake in them, or in the config, ends in one line."""
    try:
        rest = command_line.parse(argv, CONFIG, DEFAULT)
        if not PROCESS.value and COORDINATOR.value != "auto":  # only the first process writes
            command_line.check_workdir(files.local(WORKDIR.value or "runs", "--workdir"))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # not the libraries' reports on what they are doing
    return rest


def join():
    """Joins the processes that share the clients, if the flags name any."""
    import jax

    address = "" if COORDINATOR.value == "auto" else COORDINATOR.value
    if len({not address, PROCESSES.value is None, PROCESS.value is None}) > 1:
        sys.exit("error: --coordinator=HOST:PORT, --processes and --process come together, or --coordinator=auto alone")
    if COORDINATOR.value:
        jax.distributed.initialize(address or None, PROCESSES.value, PROCESS.value)


def main(_):
    from fipa_jax.run import phase_parts, whole_run
    from fipa_jax.run.loop import Stalled
    from fipa_jax.saving.signals import Stopped

    join()
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]).stem
    try:
        for line in phase_parts.without_effect(CONFIG.value, command_line.set_fields(sys.argv)):
            logging.warning(line)
        whole_run.main(CONFIG.value, files.local(WORKDIR.value or f"runs/{name}", "--workdir"), RESUME.value)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
    except (ValueError, OSError, ImportError, Stalled) as error:
        logging.debug("traceback", exc_info=True)  # shown by --verbosity=1
        leave(f"error: {error}")
    except Exception:
        if not COORDINATOR.value:
            raise
        leave(traceback.format_exc())


def leave(words):
    """Ends this process; one of several at once, as the others would wait for it, and it for them."""
    if not COORDINATOR.value:
        sys.exit(words)
    print(words, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
