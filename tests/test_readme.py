"""What the README shows runs as it stands, and what it names exists; it stays short."""

import re
import sys
import types
from pathlib import Path

from fipa_jax import config as config_lib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LONGEST = 10_000  # bytes; whatever else there is to say is in docs/


def test_it_is_short():
    assert len(README.encode()) <= LONGEST


def test_the_loop_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    module = types.ModuleType("readme_snippet")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "README.md", "exec"), module.__dict__)
    of_zero = (module.clients["y"] ** 2).mean() / 2  # the loss of a model that always says 0
    assert module.mean_loss < 0.1 * of_zero


def test_fields_named_in_the_readme_exist():
    defaults = config_lib.default()
    fields = set(re.findall(r"(?:--)?\bconfig\.([a-z_.]+[a-z_])", README)) - {"py", "json", "prepare_process"}
    for field in fields:
        inner = defaults
        for name in field.split("."):
            assert name in inner, f"README names config.{field}, which is no field"
            inner = inner[name]


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


def test_links_lead_to_files():
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(linked) > 10
    assert not [path for path in linked if not (ROOT / path).exists()]
