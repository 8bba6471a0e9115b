"""A phase in a process of its own, started by other measurements; prints what it took as one line of JSON."""

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from fipa_jax import config as config_lib
from fipa_jax.config import methods as compared

SCRIPTS = Path(__file__).resolve().parents[1]


def start(devices: int = 1, environment: dict | None = None, **spec) -> subprocess.Popen:
    """Starts the phase that the spec describes, see `problem_and_config`, on so many virtual devices."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.whole_run", json.dumps(spec | {"started": time.time()})],
        cwd=SCRIPTS,
        env=os.environ | {"XLA_FLAGS": flags, "TQDM_DISABLE": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> dict:
    """What the phase took: seconds to the first row and of each round, user CPU seconds, peak memory, hash."""
    said = process.communicate()[0]
    if process.returncode:
        raise RuntimeError("a measured run failed; its error is above")
    return json.loads(said.splitlines()[-1])


def problem_and_config(spec: dict):
    """The problem (None for the config's own) and the config of a spec.

    Its fields: `model`, `sine` or a network of `fipa_jax.models` on random images; `clients` T, `examples` of each,
    `pool` of images among which they are drawn (0 for their sum); `cohort`, `method`, `rounds`, `batch`, `epochs`; the
    fields of the config in `fields`, by their paths.
    """
    import numpy as np
    from ml_collections import ConfigDict

    from benchmarks import setting
    from fipa_jax.config import recipes
    from fipa_jax.data import loading as data
    from fipa_jax.data import partition
    from fipa_jax.models import networks as models
    from fipa_jax.tasks import Problem, images

    config = config_lib.default()
    config.task.num_clients, config.cohort = spec["clients"], spec["cohort"]
    config.fipa.rounds, config.compare = spec["rounds"], (spec["method"],)
    config.eval.every = spec["rounds"]
    config.eval.clients_every, config.eval.batch_size = 0, 50
    if spec["model"] == "sine":
        recipes.levenberg_marquardt(config)
        config.fipa.local.batch_size, config.task.examples_per_client = 0, spec["examples"]
        config.compare = (spec["method"],)
    else:
        config.model.name, config.model.head_width = spec["model"], 64 if "resnet" in spec["model"] else 0
        recipes.whole_model(config)
        local = config.fipa.local
        local.batch_size, local.micro_batch, local.epochs = spec["batch"], -1, spec["epochs"]
    config.update_from_flattened_dict(spec.get("fields", {}))
    if spec["model"] == "sine":
        return None, config
    owned = spec["clients"] * spec["examples"]
    train = setting.random_images(spec.get("pool") or owned)
    mean, std = data.standardise("cifar10", train["image"])
    module = models.build(ConfigDict(config.model), setting.NUM_CLASSES)
    task = images.classifier(module, setting.SHAPE, mean, std, augmented=False)
    indices = np.arange(owned, dtype=np.int32) % len(train["label"])
    offsets = np.arange(0, owned + 1, spec["examples"])
    test = {name: field[:10] for name, field in train.items()}
    return Problem(task, train, test, None, partition.Ragged(indices, offsets)), config


def measure(spec: dict) -> dict:
    """Runs the phase."""
    import jax

    from fipa_jax import trees
    from fipa_jax.reporting import console as report
    from fipa_jax.run import experiment, loop
    from fipa_jax.saving.journal import Rows

    if spec.get("processes", 1) > 1:
        jax.distributed.initialize(spec["coordinator"], spec["processes"], spec["process"])
    compiled = report.Compilations()
    problem, config = problem_and_config(spec)
    times = []

    class Timed(Rows):
        def write(self, row):
            self.append(row)
            times.append(time.time())

    rows = Timed()

    with jax.enable_x64(config.precision == "float64"):
        built = experiment.build(config, problem)
        settings = compared.method(config, config.compare[0])
        params = loop.run_phase(built, settings, "run", built.params, 0, rows)
        digest = hashlib.sha256(jax.device_get(trees.ravel(params)).tobytes()).hexdigest()
    stages = [{name: value for name, value in row.items() if name.startswith("seconds_")} for row in rows]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "first": times[0] - spec["started"],
        "rounds": [sum(row.values()) for row in stages],
        "stages": stages,
        "user": usage.ru_utime,
        "peak MiB": usage.ru_maxrss / 2**10,
        "programs": str(compiled),
        "hash": digest,
    }


if __name__ == "__main__":
    config_lib.prepare_process()
    print(json.dumps(measure(json.loads(sys.argv[1]))))
