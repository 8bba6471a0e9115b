"""What the README shows runs as it stands, and what it names exists."""

import re
import sys
import types
from pathlib import Path

import pytest

from fipa_jax import aggregate, tasks
from fipa_jax import config as config_lib
from fipa_jax.client import terms
from fipa_jax.config import methods as compared
from fipa_jax.run import whole_run
from fipa_jax.tasks import pde

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, tmp_path, monkeypatch):
    """Each snippet alone, as a module of its own; the tables that it adds to are restored."""
    monkeypatch.chdir(tmp_path)
    for table in (tasks.TASKS, terms.TERMS, aggregate.AGGREGATORS, pde.EQUATIONS):
        for name in ("logistic", "ridge", "median", "heat"):
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)
    module = types.ModuleType(f"readme_snippet_{number}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), module.__dict__)
    if number == 0:
        of_zero = (module.clients["y"] ** 2).mean() / 2  # the loss of a model that always says 0
        assert module.mean_loss < 0.1 * of_zero
    if hasattr(module, "get_config"):
        config = module.get_config()
        config.fipa.rounds, config.compare = 1, ("fipa",)
        whole_run.run(config, tmp_path / "run")


def test_there_is_a_snippet_for_the_loop_and_for_every_swappable_type():
    assert len(SNIPPETS) == 5
    assert [name in README for name in ('TASKS["', 'EQUATIONS["', 'TERMS["', 'AGGREGATORS["')] == [True] * 4
    assert README.index("```python") < README.index("## Set-up")


def test_fields_named_in_the_readme_exist():
    defaults = config_lib.default()
    fields = set(re.findall(r"(?:--)?\bconfig\.([a-z_.]+[a-z_])", README)) - {"py", "json", "prepare_process"}
    for field in fields:
        inner = defaults
        for name in field.split("."):
            assert name in inner, f"README names config.{field}, which is no field"
            inner = inner[name]


def test_compared_methods_shown_in_the_readme_are_valid():
    config = config_lib.default()
    specs = re.search(r"--config\.compare=\((.*?)\)", README).group(1).replace("'", "").split(",")
    assert len(specs) > 2
    for spec in specs:
        compared.method(config, spec)
    named = re.findall(r"`(fedavg|fedbuff|fedasync|centralised|fisher_\w+|fipa\w*)`", README)
    assert set(named) - {"fipa_jax"} == set(compared.METHODS)


def test_no_place_is_left_to_fill_in():
    assert not re.search(r"[A-Z]+(_[A-Z]+)+_HERE|TODO|TBD", README)


def test_both_commands_set_everything_up():
    """One line each, from nothing: .ci/run follows the second."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -e . && "
    assert commands == [install + ".venv/bin/python scripts/train.py", install + ".venv/bin/python -m pytest"]
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"(?:configs|scripts|fipa_jax|tests)/[\w/]+\.py", README):
        assert (ROOT / path).is_file(), path
