"""Is the final model the same, whatever must not change it? Its SHA-256 after several runs: `faults.py hashes`."""

import hashlib
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

from fipa_jax import checkpoint
from harness.victim import Victim

ROUNDS = 10
SAME = {
    "once": (),
    "again": (),
    "2 devices": ("--config.devices=2",),
    "4 devices": ("--config.devices=4",),
    "examples on the host": ("--config.examples_on=host",),
    "clients' memories on the host": ("--config.client_memory=host",),
    "the host running ahead": ("--config.stage_seconds=False", "--config.eval.every=5"),
}
NEAR = {"chunks of 2": ("--config.chunk=2",), "5 rounds a call": ("--config.rounds_per_call=5",)}


def add_options(parser) -> None:
    parser.add_argument("--only", nargs="*", default=[*SAME, *NEAR], choices=[*SAME, *NEAR])


def run(args) -> dict:
    """{run: the beginning of its hash, and how far its rules' models are from those of the first run}."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    found, first = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            victim = Victim(Path(folder) / name, ROUNDS, *(SAME | NEAR)[name])
            victim.finish()
            models = victim.models()
            content = hashlib.sha256(b"".join(models[file] for file in sorted(models))).hexdigest()
            trees = [checkpoint.load(victim.workdir / file) for file in sorted(models)]
            vector = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(trees)])
            first = vector if first is None else first
            found[name] = f"{content[:16]}  at most {np.max(np.abs(vector - first)):.1e} from the first"
    return found
