"""What a type checker sees of the installed package: literals for names, and the same names as the tables have."""

import json
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from fipa_jax.aggregate import (
    aggregator,
    fisher_informed,
    merged_curvature,
    past_rounds,
    rules,
    server_optimizers,
    solvers,
)
from fipa_jax.client import first_order, layer_steps, second_order
from fipa_jax.curvature import products, sketch, solver_choice

LITERALS = {
    "form": (solvers.Form, fisher_informed.FORMS),
    "kind of past": (past_rounds.PastKind, ["none", "prior", "targets", "latest", "curvature"]),
    "weighting": (aggregator.Weighting, aggregator.WEIGHTINGS),
    "place": (aggregator.Place, rules.PLACES),
    "merge": (merged_curvature.Merge, {"auto", *merged_curvature.METHODS}),
    "server's optimiser": (server_optimizers.ServerOptimizer, server_optimizers.OPTIMIZERS),
    "adaptive server": (server_optimizers.AdaptiveKind, server_optimizers.SECOND_MOMENTS),
    "client's optimiser": (first_order.Optimizer, first_order.OPTIMIZERS),
    "client's preconditioner": (layer_steps.Preconditioner, layer_steps.PRECONDITIONS),
    "system": (second_order.System, second_order.SYSTEMS),
    "solver": (solver_choice.SolverName, solver_choice.SOLVERS),
    "jacobian": (products.JacobianName, products.JACOBIANS),
    "store": (sketch.StoreName, sketch.STORES),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literals_are_the_names_in_the_tables(name):
    literal, table = LITERALS[name]
    assert set(typing.get_args(literal)) == set(table)


SCRIPT = """import jax.numpy as jnp
from fipa_jax import aggregate, curvature
import fipa_jax

sketch = curvature.Sketch(jnp.ones([2, 1]), jnp.ones([2, 3, 1]))
step, info = aggregate.fipa_step({"w": jnp.ones([2, 3])}, sketch, jnp.ones(2), form="damped", damping=1e-3)
rule: fipa_jax.aggregate.Aggregator = fipa_jax.aggregate.fipa("pinv", past=aggregate.PastRounds("prior"))
"""
WRONG = {
    "form": 'aggregate.fipa("dampd")',
    "kind of past": 'aggregate.PastRounds(kind="recent")',
    "weighting": 'aggregate.mean("evenly")',
    "argument": "aggregate.fipa_step({}, sketch, jnp.ones(2), dampin=1.0)",
    "solver": 'curvature.make_sketch(lambda p, b: b, lambda o, b: o, rank=2, solver="lanzcos")',
    "lacking report": "sketch.report.trace",
}


def checked(folder, text):
    """The errors that the checker finds in a user's script, as lines (from 1) with the message."""
    (folder / "script.py").write_text(text)
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "basic", "include": ["script.py"]}))
    program = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which("basedpyright")
    if program is None:
        pytest.skip("needs basedpyright, of the extra fipa_jax[checks]")
    command = [program, "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=240).stdout)
    return {each["range"]["start"]["line"] + 1: each["message"] for each in found["generalDiagnostics"]}


@pytest.mark.slow
def test_a_users_checker_follows_the_installed_package_and_finds_wrong_names(tmp_path):
    """The package as this interpreter has it installed, by the path of an editable install or from a wheel."""
    right = len(SCRIPT.splitlines())
    errors = checked(tmp_path, SCRIPT + "\n".join(WRONG.values()) + "\n")
    assert set(errors) == {right + 1 + number for number in range(len(WRONG))}, errors
