"""Every measurement that takes seconds when it is tiny runs, and leaves its figures in a file; no figure is judged."""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fipa_jax.models import networks as models

ROOT = Path(__file__).resolve().parents[1]
SINE = str(ROOT / "configs" / "sine.py")
COMMANDS = {
    "products": "products --model=cnn_6k --examples=4 --widths 2 --micro-batches 2 --repeats=1",
    "eigenpairs": "eigenpairs --keys=1 --ranks 4 --cases symmetric_network",
    "sequence": "sequence --symbols=3 --window=4 --examples=4 --width=4 --layers=1 --rank=2 --repeats=1",
    "head": "head --features=4 --classes=3 --examples=6 --pixels=16 --channels 2 2 --ranks 2 --epochs=1 --repeats=1",
    "merge": "merge --parts=size --size=300 --clients=2 --rank=2 --size-methods=gram --stores=float32 --repeats=1",
    "gauss_newton": "gauss_newton --ranks 2 --rounds 2 4 --substeps=2 --plot=gap.png",
    "step": "step --model=cnn_6k --side=32 --classes=10 --batch=4 --repeats=1",
    "convolution": "convolution --batch=2 --layers=1 --repeats=1",
    "startup": "startup --models sine --methods fedavg",
    "population": "population --populations 20 --cohort=2 --pool=50 --model=cnn_6k --terms scaffold --rounds=2",
    "scaling": "scaling --model=sine --methods fedavg --clients=2 --examples=8 --rounds=2 --places 1x2",
    "sums": "sums --parts=runs,bits,server --columns=3 --rounds 1 2 --size=300 --rank=3 --clients 2 4 --repeats=1",
    "scaling_merge": (
        "scaling --parts=merge,paper --size=70000 --run-size=70000 --merge-clients=2 --rank=2 --devices 1 2"
    ),
    "profile": "profile --config=FILE --set task.examples_per_client=8 fipa.sketch.rank=3 --rounds=1",
    "checkpoint": "checkpoint --config=FILE --set task.examples_per_client=8 fipa.sketch.rank=3 --rounds=2 --repeats=1",
    "ragged": "ragged --model=cnn_6k --examples=16 --clients=2 --rank=2 --solver=rows --epochs=1 --chunk=2 --repeats=1",
    "deployment": "deployment --config=FILE --set task.examples_per_client=8 --rounds=2 --megabytes=1",
    "messages": "messages --models cnn_6k --examples=4 --ranks 2 --samples=1 --micro-batch=2 --repeats=1",
    "private": (
        "private --config=FILE:private --epsilons 8 --rounds 1 --clips 1 --rates 0.1 --server-rates 1 --adam-rates 0.1 "
        "--dampings 0.1 --keys 1 --further-keys 1 --batch 1"
    ),
    "robust": "robust --size=20 --rank=4",
    "round": f"round --model=cnn_6k --examples=8 --clients=2 --batch=4 --repeats=1 --torch-python={sys.executable}",
    "lowering": "lowering --configs=sine",
    "device": "device --tiny --parts=numerics",
    "rules": "round --rules --model=cnn_6k --examples=8 --clients=2 --sketches=head --epochs=1 --repeats=1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_measurement_runs(name, tmp_path):
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        ROOT / "scripts" / "benchmark.py",
        *COMMANDS[name].replace("FILE", SINE).split(),
        f"--out={out}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["machine"]["versions"]["jax"]
    assert name == "device" or result["setting"], "what was measured is written down"


NETWORKS = {"cnn": models.CNN((3, 4), 10, hidden=5), "resnet": models.ResNet((4, 8), 1, 10)}


def test_every_way_to_convolve_gives_the_same(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    draw, parts = np.random.default_rng(0), importlib.import_module("benchmarks.convolution").PARTS
    images, cotangent = draw.normal(size=(2, 3, 6, 6, 4)).astype(np.float32)
    kernel = draw.normal(size=(3, 3, 4, 4)).astype(np.float32)
    for ways in parts.values():
        ours, *others = (np.asarray(way(images, kernel, cotangent)) for way in ways.values())
        for other in others:
            np.testing.assert_allclose(other, ours, rtol=1e-4, atol=1e-4)


@pytest.fixture
def one_client(monkeypatch):
    """The round benchmark, found as the scripts find it, and its options for one client of six images."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("benchmarks.round"), argparse.Namespace(examples=6, clients=1, batch=3)


@pytest.mark.slow
def test_one_client_of_a_resnet_is_timed(one_client):
    benchmark, args = one_client
    variants, flops = benchmark.ours(args, *benchmark.problem(args, NETWORKS["resnet"]))
    assert flops > 0
    assert list(variants) == ["ours, client by client"], "stacking one client is no other variant"
    assert next(iter(variants.values()))() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_a_peer_gets_our_weights(name, one_client, tmp_path):
    benchmark, args = one_client
    task, params, train = benchmark.problem(args, NETWORKS[name])
    spec = benchmark.describe(args, NETWORKS[name], params, tmp_path / "weights.npz")
    with np.load(spec["weights"]) as saved:
        assert sum(leaf.size for leaf in saved.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: its network cannot be compared with ours")
    worker, hello = benchmark.start("torch", sys.executable, spec)
    worker.communicate("")
    assert benchmark.difference(task, params, train, np.array(hello["logits"])) < benchmark.TOLERANCE


def test_a_peer_with_another_network_ends_the_measurement(one_client):
    benchmark, _ = one_client
    benchmark.check({"torch": 1e-6})
    for value in (0.1, float("nan")):
        with pytest.raises(SystemExit, match="not ours"):
            benchmark.check({"torch": 1e-6, "pfl": value})


def test_the_clock_of_a_family_counts_a_childs_child(one_client):
    serve = importlib.import_module("benchmarks.round_workers.serve")
    work = "import time\nwhile time.process_time() < 0.3: sum(range(10**5))\nprint(flush=True)\ninput()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    own, family = serve.user_seconds(), serve.family_seconds()
    child = subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    running = serve.family_seconds() - family
    child.communicate("\n")
    ended = serve.family_seconds() - family
    assert serve.user_seconds() - own < 0.15 < running <= ended
