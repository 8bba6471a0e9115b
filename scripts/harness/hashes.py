"""Is the final model the same, whatever must not change it? Its SHA-256 after several runs: `faults.py hashes`."""

import hashlib
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

from fipa_jax.saving.model_files import load
from harness.victim import Victim

ROUNDS = 10
SAME = {
    "once": (),
    "again": (),
    "2 devices": ("--config.devices=2",),
    "4 devices": ("--config.devices=4",),
    "examples on the host": ("--config.examples_on=host",),
    "the client store on the host": ("--config.client_store=host",),
    "the host running ahead": ("--config.stage_seconds=False", "--config.eval.every=5"),
}
NEAR = {"chunks of 2": ("--config.chunk=2",), "5 rounds a call": ("--config.rounds_per_call=5",)}

PROMISED = {"runs in SAME whose models differ": 0, "farthest in NEAR": lambda found, value: value < 1e-9}


def add_options(parser) -> None:
    parser.add_argument("--only", nargs="*", default=[*SAME, *NEAR], choices=[*SAME, *NEAR])


def run(args) -> dict:
    """{run: the beginning of its hash, and how far its methods' models are from those of the first run}."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    hashes, vectors = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            victim = Victim(Path(folder) / name, ROUNDS, *(SAME | NEAR)[name])
            victim.finish()
            models = victim.models()
            hashes[name] = hashlib.sha256(b"".join(models[file] for file in sorted(models))).hexdigest()[:16]
            trees = [load(victim.workdir / file) for file in sorted(models)]
            vectors[name] = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(trees)])
    first = vectors[args.only[0]]
    distances = {name: float(np.max(np.abs(vector - first))) for name, vector in vectors.items()}
    found = {name: f"{hashes[name]}  at most {distances[name]:.1e} from the first" for name in args.only}
    same = {hashes[name] for name in args.only if name in SAME}
    near = [distances[name] for name in args.only if name in NEAR]
    return found | {"runs in SAME whose models differ": len(same) - 1, "farthest in NEAR": max(near, default=0.0)}
