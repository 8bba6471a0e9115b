"""The recipes of the documentation: each page holds one program, which runs as it stands and learns something."""

import ast
import re
import sys
import types
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[1] / "docs" / "recipes"
NAMES = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index")
NEEDS = {"equinox": "equinox", "haiku": "haiku"}  # page -> a package that the core does not bring
LEARNED = 0.1  # of the first mean loss, that may be left


def program(name):
    """The one program on a page."""
    programs = re.findall(r"^```python\n(.*?)^```", (PAGES / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(programs) == 1, f"{name}.md: a page has one program"
    return programs[0]


def run(name, monkeypatch):
    """The names that a page's program leaves."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: pip install 'fipa_jax[recipes]'")
    module = types.ModuleType(f"recipe_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(program(name), f"{name}.md", "exec"), module.__dict__)
    assert not module.info["rejected"].any(), "a client was left out"
    assert not module.info["flags"]["examples_mixed"].any()
    assert module.losses[-1] < LEARNED * module.losses[0]
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_loop_of_ones_own(name):
    """By its text alone: it needs nothing of ours but curvature and aggregation, and looks at its first batch."""
    tree = ast.parse(program(name))
    ours = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "fipa_jax"
        for alias in node.names
    }
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert ours == {"aggregate", "curvature"}
    assert {"curvature.make_sketch", "curvature.check", "aggregate.fipa_step"} <= called


def test_the_index_shows_every_recipe():
    index = (PAGES / "index.md").read_text()
    listed = re.search(r"```{toctree}\n.*?\n\n(.*?)```", index, re.DOTALL).group(1).split()
    assert sorted(listed) == NAMES
    assert all(f"({name}.md)" in index for name in NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, monkeypatch):
    module = run(name, monkeypatch)
    if name == "batch_norm":
        assert "change with the other examples" in module.refusal
