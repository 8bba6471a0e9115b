"""Trains a global model by the phases of a config and compares aggregation rules.

python scripts/train.py
python scripts/train.py --config=configs/cifar10.py --config.data.dir=DIR --workdir=runs/cifar10
"""

import sys
from pathlib import Path

from fipa_jax import config as config_lib

config_lib.prepare_process()  # before jax starts

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "sine.py"
CONFIG = config_flags.DEFINE_config_file("config", str(DEFAULT), "What to run; any field: --config.a.b=value.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where the results go; by default runs/NAME-OF-THE-CONFIG.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; a field is set by --config.field=value")
    from fipa_jax import experiment

    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]).stem
    try:
        experiment.main(CONFIG.value, Path(WORKDIR.value or f"runs/{name}"))
    except (ValueError, FileNotFoundError, ImportError) as error:
        logging.debug("traceback", exc_info=True)  # shown by --verbosity=1
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
