"""Several processes, as on several hosts: two with two devices each find to the bit the model that one device finds."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fipa_jax.reporting import metrics
from fipa_jax.run import whole_run

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "task.num_clients": 3,  # four devices: one of them works for nobody
    "task.examples_per_client": 8,
    "model.widths": (3,),
    "fipa.sketch.rank": 3,
    "fipa.rounds": 60,
    "rounds_per_call": 1,
    "compare": ("fipa",),
    "devices": 0,
}


def start(*flags, workdir, devices):
    """Starts the script with so many devices of its own, and a user's cache of its own."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment["XDG_CACHE_HOME"] = f"{workdir}-cache"
    small = [f"--config.{field}={value}" for field, value in SMALL.items()]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), f"--workdir={workdir}", *small, *flags],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_pair(folder, *flags):
    """Starts two processes with two devices each, that belong together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # With one client a device there is but one chunk to choose, and each process finds it for itself.
    together = ("--processes=2", f"--coordinator=localhost:{port}", "--config.chunk=-1", *flags)
    return [start(*together, f"--process={p}", workdir=folder / f"of{p}", devices=2) for p in (0, 1)]


def wait(process, status=0):
    said = process.communicate(timeout=240)[0]
    assert process.returncode == status, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fipa", "fipa:aggregator.trust=False:aggregator.past.kind=prior"])
def test_rounds_of_a_large_model_have_the_same_bits_wherever_its_rows_lie(method, tmp_path):
    """66,561 parameters: bases are spread by rows, on 1, 2, 4 devices, 2 processes with two each, 4 with one."""
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "scaling", "--model=sine", "--methods", method]
    command += ["--clients=4", "--examples=8", "--rounds=3", "--set", "model.widths=(256,256)", "fipa.sketch.rank=3"]
    done = subprocess.run([*command, f"--out={tmp_path / 'found.json'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "found.json").read_text())["rounds"]
    places = [(row["processes"], row["devices"]) for row in rows]
    assert places == [(1, 1), (1, 2), (1, 4), (2, 4), (4, 4)]
    assert len({row["hash"] for row in rows}) == 1, rows


@pytest.mark.slow
def test_two_processes_with_two_devices_are_one_device(tmp_path):
    """Though they were stopped on the way, by a signal to one of them, and have gone on."""
    pair, rows = start_pair(tmp_path), tmp_path / "of0" / "metrics.jsonl"
    while pair[1].poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > 10):
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        assert "stopped by SIGTERM after round" in wait(process, 128 + signal.SIGTERM)
    assert 10 < len(metrics.read(rows)) < 60
    for process in start_pair(tmp_path, "--config.seed=1"):  # an error in the first ends both
        assert "unfinished run of another origin" in wait(process, 1)
    said = [wait(process) for process in start_pair(tmp_path)]
    assert "going on after round" in said[0]
    config = runpy.run_path(str(ROOT / "configs/sine.py"))["get_config"]()
    config.update_from_flattened_dict(SMALL | {"devices": 1})
    whole_run.run(config, tmp_path / "alone")
    assert (tmp_path / "of0" / "fipa.msgpack").read_bytes() == (tmp_path / "alone" / "fipa.msgpack").read_bytes()
    rows = [metrics.read(tmp_path / run / "metrics.jsonl") for run in ("of0", "alone")]
    assert [row["test_mse"] for row in rows[0]] == [row["test_mse"] for row in rows[1]]
    assert (tmp_path / "of1-cache" / "fipa_jax" / "chunks.json").exists()
    assert not (tmp_path / "of1").exists() and "test_mse" in said[0] and "test_mse" not in said[1]
