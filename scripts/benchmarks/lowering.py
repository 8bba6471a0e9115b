"""Does every stage of a round lower for a GPU and a TPU, on a machine that has neither? And what is in it that slows?

For each phase, stage and kind of device: how many float64 values the program holds, which a float32 run should not, and
its calls out of the program: decompositions are such calls on a GPU, a call back to Python would be one too.
"""

import argparse
import re
import runpy
from collections import Counter
from pathlib import Path

import jax
import jax.export
import numpy as np

from benchmarks.device import random_problem
from fipa_jax import backend
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation.round import by_clients
from fipa_jax.federation.state import fetch
from fipa_jax.run import experiment, programs, whole_run
from fipa_jax.run.phase_parts import make_rates

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEVICES = {"gpu": "cuda", "tpu": "tpu"}  # the backend's name -> the platform's, of jax.export
FILLING = ("Sharding", "annotate_device_placement")  # calls that are none


def run(options: list[str]) -> dict:
    """Lowers the stages of the configs asked for; prints and returns a row for each."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py lowering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default=",".join(PROBLEMS))
    args = parser.parse_args(options)
    print(f"{'config':15}{'phase':16}{'stage':8}{'device':8}{'float64':>8}  calls")
    rows = [row for name in args.configs.split(",") for row in rows_of(name)]
    return {"setting": vars(args), "rows": rows}


def rows_of(name: str) -> list[dict]:
    """{config, phase, stage, device, float64, calls} of every stage of a config, at a small size."""
    config, rows = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](), []
    problem = PROBLEMS[name](config)
    with jax.enable_x64(config.precision == "float64"):
        made = experiment.build(config, problem)
        for phase, as_run in whole_run.configs_of(config).items():
            warmup = phase == whole_run.WARMUP
            settings = as_run.warmup if warmup else as_run.fipa
            view = whole_run.view_of(made, settings, made.params, {}, warmup)
            for device in DEVICES:
                for stage, text in lowered(view, settings, made.params, device).items():
                    row = {"config": name, "phase": phase, "stage": stage, "device": device, **contents(text)}
                    print(
                        f"{name:15}{phase[:15]:16}{stage:8}{device:8}{row['float64']:8}  {row['calls'] or ''}",
                        flush=True,
                    )
                    rows.append(row)
    return rows


def lowered(view, settings, params, device: str) -> dict[str, str]:
    """{stage: its program's text} of a phase, traced and lowered for a kind of device.

    Args:
      view: the experiment, as the phase sees it.
      settings: the phase's fields.
      params: the whole model's.
    """
    parts = experiment.parts_of(view, settings)
    rates, stages, texts = make_rates(settings, view.config.precision), programs.jitted(parts), {}
    state = fetch(parts_lib.init(parts, params, on_host=True), np.arange(parts.cohort))

    def stage(name):
        def of_shapes(*args):
            export = jax.export.export(getattr(stages, name), platforms=[DEVICES[device]])
            texts[name] = export(*jax.tree.map(_shape_of, args)).mlir_module()
            return getattr(stages, name).eval_shape(*args)

        return of_shapes

    with backend.traced_for(device):
        _, orders = stage("draw")(state.round, rates, view.root)
        cohort = view.population.shapes(parts.cohort)._replace(orders=orders)
        results, sketches = by_clients(parts, stage("train"), stage("sketch"))(state, rates, cohort, view.root)
        stage("serve")(state, rates, cohort, results, sketches)
    return texts


def contents(text: str) -> dict:
    """{"float64": how many values of a program are, "calls": {what it calls: how often}}."""
    calls = Counter(re.findall(r"custom_call @([\w.]+)", text))
    for name in FILLING:
        calls.pop(name, None)
    return {"float64": len(re.findall(r"^\s*%.*\bf64\b.*$", text, re.MULTILINE)), "calls": dict(calls)}


def _shape_of(leaf):
    return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.numpy.result_type(leaf))


def _sine(config):
    return None


def _cifar10(config):
    config.model.name, config.partition.num_clients, config.cohort = "cnn_6k", 4, 2
    config.warmup.rounds = 1
    config.compare = ("fipa_memory", "fipa", "fedavg", "fedavg:server.optimizer=adam", "fedavg:term.name=scaffold")
    config.fipa.sketch.rank, config.fipa.aggregator.past.rank = 5, 10
    return random_problem(config, (16, 16, 3), 10, 20)


def _tiny_imagenet(config):
    config.partition.num_clients, config.cohort = 4, 2
    config.warmup.rounds, config.compare = 1, config.compare[:2]
    return random_problem(config, (16, 16, 3), 20, 20)


PROBLEMS = {"sine": _sine, "cifar10": _cifar10, "tiny_imagenet": _tiny_imagenet}  # config -> its problem, or None
