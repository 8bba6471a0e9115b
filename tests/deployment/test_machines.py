"""A real federation on this machine: a SuperLink, two nodes with their workers, and what their deaths cost."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.deployed import gap

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
pytest.importorskip("flwr", reason="Flower is not installed: pip install -e '.[flower]'")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower"
RUN = runpy.run_path(str(EXAMPLE / "run.py"), run_name="run")


@pytest.fixture
def options(tmp_path):
    return RUN["arguments"](["--workdir", str(tmp_path / "run"), "--timeout", "120"])


def rows(options):
    file = options.workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


def simulated(rounds):
    """The model after so many rounds of the same problem in this process's own kind, by a simulation."""
    code = (
        "from fipa_jax import config as c; c.prepare_process()\n"
        "import runpy, numpy as np, jax; from fipa_jax import installed, trees\n"
        "from fipa_jax.run import experiment as e, loop; from fipa_jax.saving.journal import Rows\n"
        "from fipa_jax.config.methods import method\n"
        "config = runpy.run_path(str(installed.folder('configs') / 'sine.py'))['get_config']()\n"
        f"config.fipa.rounds, config.rounds_per_call, config.compare = {rounds}, 1, ('fipa',)\n"
        "with jax.enable_x64(True):\n"
        "    x = e.build(config); p = loop.run_phase(x, method(config, 'fipa'), 'fipa', x.params, 0, Rows())\n"
        "import json; print(json.dumps({k: np.asarray(v).tolist() for k, v in trees.paths(p).items()}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    leaves = json.loads(done.stdout.splitlines()[-1])
    return {path: np.array(leaf) for path, leaf in leaves.items()}


def model(options):
    from fipa_jax import trees
    from fipa_jax.saving.model_files import load

    with pytest.importorskip("jax").enable_x64(True):
        leaves = trees.paths(load(options.workdir / "fipa.msgpack"))
        return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def test_a_federation_on_this_machine_is_a_simulation(options):
    options.rounds = 3
    with RUN["Machines"](options) as machines:
        assert machines.wait(machines.submit()) == "finished:completed"
    assert not RUN["descendants"](os.getpid())  # nothing is left behind
    assert [row["round"] for row in rows(options)] == [0, 1, 2]
    got, want = model(options), simulated(3)
    assert gap(dict(sorted(got.items())), dict(sorted(want.items()))) <= 1e-12


def test_with_keys_and_certificates(options):
    options.rounds, options.authenticate = 2, True
    with RUN["Machines"](options) as machines:
        assert machines.wait(machines.submit()) == "finished:completed"
    assert len(rows(options)) == 2


def test_a_killed_node_costs_one_round_and_a_killed_server_none(options):
    options.rounds = 16
    with RUN["Machines"](options) as machines:
        run = machines.submit()
        until(lambda: len(rows(options)) >= 2)
        machines.stop("node-1", signal.SIGKILL)
        machines.stop("worker-1", signal.SIGKILL)
        killed = len(rows(options))
        until(lambda: len(rows(options)) >= killed + 3)
        waited = [row["seconds_answers"] for row in rows(options)[killed:]]
        assert sum(seconds > 20 for seconds in waited) <= 1 and max(waited) < 75
        assert rows(options)[-1]["clients_absent"] == 1 and not rows(options)[-1]["skipped"]

        machines.start_client(1)
        until(lambda: rows(options)[-1]["clients_absent"] == 0)

        started = RUN["descendants"](machines.processes["link"].pid)
        for pid in [pid for pid, words in started.items() if "flwr-serverapp" in words]:
            os.kill(pid, signal.SIGKILL)
        until(lambda: machines.wait(run).startswith("finished"))
        before = rows(options)
        assert machines.wait(machines.submit()) == "finished:completed"
    after = rows(options)
    assert [row["round"] for row in after] == [*range(16)]
    kept = len(before) - 1  # at most the last row had no checkpoint yet
    assert after[:kept] == before[:kept]
