"""Are the runs of two checkouts the same to the bit? Small runs of many configs, compared figure by figure.

A record holds every row of metrics.jsonl but for seconds and bytes, digests of the models, and of the arrays of the
last checkpoint that have more than one entry. Runs on images need a folder with CIFAR-10 as TFDS prepares it; without
one they are left out. Fields that a checkout knows by an older name are given to it by that name.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fipa_jax.config.fields import RENAMED

RENAMED_FIGURES = {"memory_share": "past_share"}  # of a row
DIGESTS = """
import hashlib, pathlib, sys
import numpy as np
try:
    from fipa_jax.saving.checkpoints import read
except ImportError:
    from fipa_jax.checkpoint import read
steps = [path for path in pathlib.Path(sys.argv[1]).iterdir() if path.name.isdigit()]
leaves = read(max(steps, key=lambda path: int(path.name))).leaves.values()
leaves = [leaf for leaf in leaves if leaf.size > 1]
described = [np.ascontiguousarray(leaf).tobytes() + str((leaf.dtype, leaf.shape)).encode() for leaf in leaves]
print("\\n".join(sorted(hashlib.sha256(content).hexdigest()[:16] for content in described)))
"""


class Case(NamedTuple):
    """A small run."""

    config: str
    fields: tuple[str, ...]  # FIELD=value
    devices: int = 1


LATE = ("fipa.late.share=0.5", "fipa.late.most=2")
FAULTS = tuple(f"fipa.faults.{kind}=0.3" for kind in ("drop", "nan", "flip", "scale", "straggle"))
TERMS = ("scaffold", "dyn", "mifa", "varp", "prox", "moon", "rcl", "logit_adjustment")
HEAD = "trainable=^Dense_1/:cache_body=true:local.micro_batch=0"


def sine(variant: str = "", *fields: str, devices: int = 1) -> Case:
    """Six rounds of a variant of configs/sine.py."""
    return Case(f"configs/sine.py{variant}", ("fipa.rounds=6", "rounds_per_call=1", *fields), devices)


def cifar(*methods: str, fields: tuple = (), devices: int = 1) -> Case:
    """Four rounds on 240 images, three of six clients a round."""
    small = (
        f"compare={methods!r}",
        "partition.num_clients=6",
        "cohort=3",
        "data.train_split=train[:240]",
        "warmup.rounds=1",
        "fipa.rounds=3",
        "eval.clients_every=0",
        "fipa.sketch.examples=20",
    )
    return Case("configs/cifar10.py:debug", (*small, *fields), devices)


SGD = ("warmup.rounds=2", "fipa.local.steps=20")
ABSOLUTE = ("fipa.aggregator.relative=False", "fipa.aggregator.damping=0.01")
PAST = "fipa:aggregator.past.kind={}:aggregator.past.rank=30"
CASES = {
    "sine": sine(),
    "sine_float32": sine("", "precision=float32"),
    "sine_blocks": sine("", "rounds_per_call=4"),
    "sine_gauss_newton": sine(":gauss_newton", "warmup.rounds=3"),
    "sine_forms": sine(
        ":sgd",
        *SGD,
        "compare=('fipa_pinv', 'fipa_tikhonov', 'fipa_damped', 'fisher_diagonal', 'fedavg')",
    ),
    "sine_gradient_rank": sine(
        ":sgd",
        *SGD,
        "fipa.sketch.gradient_scale=1.0",
        "fipa.local.adaptive.scale=0.01",
        "compare=('fipa', 'fipa:term.name=scaffold')",
    ),
    "sine_own_damping": sine(
        ":sgd",
        *SGD,
        *LATE,
        *ABSOLUTE,
        "fipa.aggregator.own_damping=True",
        f"compare={('fipa', PAST.format('prior'), 'fipa:aggregator.late.max_drift=0.01')}",
    ),
    "sine_past": sine(
        ":sgd",
        *SGD,
        *LATE,
        *ABSOLUTE,
        "task.num_clients=6",
        "cohort=2",
        f"compare={tuple(PAST.format(kind) for kind in ('latest', 'targets', 'prior'))}",
    ),
    "sine_devices4": sine("", "devices=4", "task.num_clients=4", "compare=('fipa', 'fedavg')", devices=4),
    "gaussians": Case(
        "configs/gaussians_2d.py",
        ("fipa.rounds=3", "warmup.rounds=2", "rounds_per_call=1", "task.examples_per_client=60", "eval.every=3"),
    ),
    "poisson_1d": Case("configs/poisson_1d.py", ("fipa.rounds=5", "task.examples_per_client=60", "rounds_per_call=1")),
    "burgers_published": Case(
        "configs/burgers.py:published",
        ("fipa.rounds=3", "task.examples_per_client=60", "fipa.local.steps=20", "rounds_per_call=1"),
    ),
    "cifar_past": cifar(
        "fipa_memory", "fipa", "fipa:aggregator.past.kind=targets:aggregator.past.rank=12:aggregator.past.length=2"
    ),
    "cifar_late": cifar("fipa_memory", "fedbuff", "fedasync", "fipa", fields=LATE),
    "cifar_faults": cifar("fedavg", "fipa", fields=FAULTS),
    "cifar_faults_late": cifar("fipa", "fedavg", fields=FAULTS + LATE),
    "cifar_terms": cifar(*(f"fedavg:term.name={term}" for term in TERMS)),
    "cifar_server": cifar(
        *(f"fedavg:server.optimizer={name}" for name in ("exp", "adam", "acg")),
        "fedavg:term.name=mifa:server.optimizer=exp",
        "fisher_diagonal",
    ),
    "cifar_head": cifar(f"fipa:{HEAD}", f"fedavg:{HEAD}"),
    "cifar_chunk2": cifar("fipa_memory", "fedavg:term.name=scaffold", fields=("chunk=2",)),
    "cifar_devices4": cifar("fipa_memory", "fedavg:term.name=scaffold", fields=("devices=4", "cohort=4"), devices=4),
    "cifar_host": cifar("fipa_memory", "fedavg:term.name=scaffold", fields=("examples_on=host", "client_store=host")),
    "cifar_bfloat16": cifar("fipa:sketch.store=bfloat16:sketch.energy=0.9", "fipa_memory:sketch.solver=subspace"),
}


def record(checkout: Path, data_dir: str, names: list[str], jobs: int) -> dict:
    """{case: what its run leaves} of the cases named, or all, by the code of a checkout."""
    names = [name for name in names or CASES if data_dir or not name.startswith("cifar")]
    with ThreadPoolExecutor(jobs) as pool:
        return dict(
            zip(names, pool.map(lambda name: run(checkout.resolve(), data_dir, CASES[name]), names), strict=True)
        )


def run(checkout: Path, data_dir: str, case: Case) -> dict:
    """What a case's run leaves: {rows, models, state}, or {error}."""
    text = "".join(path.read_text() for path in sorted((checkout / "fipa_jax").rglob("*.py")))
    old = {} if "past.kind" in text else RENAMED
    flags = [f"--config.{by_old_names(field, old)}" for field in case.fields]
    flags += [f"--config.data.dir={Path(data_dir).resolve()}"] if "cifar" in case.config else []
    several = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={case.devices}"} if case.devices > 1 else {}
    environment = os.environ | {"PYTHONPATH": str(checkout), "TQDM_DISABLE": "1"} | several
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "scripts/train.py", f"--config={case.config}", f"--workdir={workdir}", *flags]
        ended = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if ended.returncode:
            return {"error": ended.stderr[-3000:]}
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        models = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(workdir.glob("*.msgpack"))]
        digests = [sys.executable, "-c", DIGESTS, str(workdir / "checkpoints")]
        state = subprocess.run(digests, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return {"rows": [figures(row) for row in rows], "models": sorted(models), "state": state}


def by_old_names(field: str, old: dict[str, str]) -> str:
    """FIELD=value with the names of before, {old name: new name}."""
    for before, now in sorted(old.items(), key=lambda names: -len(names[1])):
        field = field.replace(now, before) if now else field
    return field


def figures(row: dict) -> dict:
    """A row without what the machine decides, and without the method's name, which holds names of fields."""
    kept = {name: value for name, value in row.items() if not name.startswith(("seconds", "bytes")) and name != "run"}
    return {RENAMED_FIGURES.get(name, name): value for name, value in kept.items()}


def compare(first: dict, second: dict) -> int:
    """Prints case by case whether two records are the same; returns the number that are not."""
    different = 0
    for name in [name for name in first if name in second]:
        errors = [record[name]["error"] for record in (first, second) if "error" in record[name]]
        words = f"FAILED: {errors[0][-400:]}" if errors else difference(first[name], second[name])
        different += bool(words)
        size = "" if errors else f"{len(second[name]['rows']):3} rows, {len(second[name]['models'])} models"
        print(f"{name:20} {size}, {words or 'identical'}")
    missing = sorted(first.keys() ^ second.keys())
    for name in missing:
        print(f"{name:20} is in one of the records alone")
    different += len(missing)
    print(f"{different} of {len(first)} differ" if different else f"all {len(first)} identical")
    return different


def difference(first: dict, second: dict) -> str:
    """What differs between two records of a case, in words; "" if nothing does."""
    if len(first["rows"]) != len(second["rows"]):
        return f"{len(first['rows'])} rows and {len(second['rows'])}"
    for a, b in zip(first["rows"], second["rows"], strict=True):
        names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        if names:
            return f"round {b['round']}: {', '.join(names[:5])}"
    if first["models"] != second["models"]:
        return "models"
    return "" if first["state"] == second["state"] else "the last state"
