"""What the documentation shows runs as it stands, and what it names exists: fields, methods, files, functions."""

import ast
import importlib
import re
import sys
import types
from pathlib import Path

import jax
import pytest

from fipa_jax import aggregate, tasks
from fipa_jax import config as config_lib
from fipa_jax.client import terms
from fipa_jax.config import methods
from fipa_jax.models import networks
from fipa_jax.run import experiment, phase_parts
from fipa_jax.tasks import pde

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md")) if "_build" not in str(path)
}
README = (ROOT / "README.md").read_text()
# A block with the comment `% fragment` above it does not stand alone. Notebooks and recipes have tests of their own.
SNIPPETS = [
    pytest.param(code, id=f"{page}-{number}")
    for page, text in PAGES.items()
    if not page.startswith(("notebooks/", "recipes/"))
    for number, (fragment, code) in enumerate(
        re.findall(r"^(% fragment\n)?```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    )
    if not fragment and code not in README  # which has its own test
]
TABLES = {
    "logistic": tasks.TASKS,
    "ridge": terms.TERMS,
    "my_median": aggregate.AGGREGATORS,
    "sign": phase_parts.LOCAL_SOLVERS,
    "heat": pde.EQUATIONS,
}


@pytest.fixture
def extensions():
    """The modules of docs/_ext that need no Sphinx."""
    sys.path.insert(0, str(DOCS / "_ext"))
    yield importlib.import_module("written_at_build"), importlib.import_module("plain_docstrings")
    sys.path.remove(str(DOCS / "_ext"))


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code, tmp_path, monkeypatch):
    """Each alone, as a module of its own; the tables that it adds to are restored."""
    monkeypatch.chdir(tmp_path)
    for name, table in (TABLES | {"wide": networks.MODELS}).items():
        monkeypatch.setitem(table, name, None)
        monkeypatch.delitem(table, name)
    module = types.ModuleType("docs_snippet")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "a snippet of docs", "exec"), module.__dict__)
    if hasattr(module, "mean_loss"):
        of_zero = (module.clients["y"] ** 2).mean() / 2  # the loss of a model that always says 0
        assert module.mean_loss < 0.1 * of_zero
    if hasattr(module, "get_config"):
        config = module.get_config()
        with jax.enable_x64(config.precision == "float64"):
            experiment.build(config)  # which goes through a round by shapes alone


def test_there_is_a_snippet_for_everything_that_can_be_swapped():
    shown = "".join(PAGES.values())
    for name in ('TASKS["', 'EQUATIONS["', 'TERMS["', 'AGGREGATORS["', 'MODELS["'):
        assert name in shown


def exists(group, path):
    for name in path.split("."):
        if not hasattr(group, "keys") or name not in group:
            return False
        group = group[name]
    return True


@pytest.mark.parametrize("page", PAGES)
def test_fields_named_exist(page):
    """As `config.a.b`, or in backticks from the groups of a phase on, or of an aggregator."""
    config = config_lib.default()
    named = set(re.findall(r"(?:--)?\bconfig\.([a-z_.]+[a-z_])", PAGES[page])) - {"py", "json", "md", "prepare_process"}
    assert not [field for field in named if not exists(config, field)]
    groups = "|".join(key for key, value in config.fipa.items() if hasattr(value, "keys"))
    short = set(re.findall(rf"`((?:{groups}|past|limits)\.[a-z_.]+)(?:=[^`]*)?`", PAGES[page]))
    places = config.fipa, config.fipa.aggregator
    assert not [field for field in short if not any(exists(place, field) for place in places)]


def compared(text):
    """The methods in all `--config.compare=(...)` of a page, with the variables of the shell filled in."""
    for shown in re.finditer(r"--config\.compare=\((.*?)\)\"", text, re.DOTALL):
        before = text[: shown.start()]
        variables = dict(re.findall(r"^([A-Z]+)=([^\s\"]+)", before, re.MULTILINE))  # the last of a name counts
        words = re.sub(r"\$([A-Z]+)", lambda name, known=variables: known[name[1]], shown[1])
        yield from re.findall(r"'([^']+)'", words)


def test_compared_methods_shown_are_valid():
    shown = [spec for text in PAGES.values() for spec in compared(text)]
    assert len(shown) > 30
    for spec in shown:
        methods.method(config_lib.default(), spec)


def test_all_methods_are_explained():
    table = PAGES["guides/experiments.md"]
    assert not [name for name in methods.METHODS if f"`{name}`" not in table]


@pytest.mark.parametrize("page", PAGES)
def test_files_named_exist(page):
    pattern = r"(?<![\w/.])(?:configs|scripts|fipa_jax|tests|\.ci)/[\w/.-]*\w"
    for path in re.findall(pattern, PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text, folder = PAGES[page], (DOCS / page).parent
    linked = re.findall(r"\{doc\}`(?:[^`<]*<)?([^`<>]+)>?`", text)
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        linked += [line for line in block.split("\n") if line and not line.startswith(":")]
    for name in linked:
        target = DOCS / name[1:] if name.startswith("/") else folder / name
        assert any(target.with_name(target.name + end).exists() for end in (".md", ".ipynb", ".rst")), name
    for name in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (folder / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_functions_named_exist(page):
    for name in re.findall(r"\{py:\w+\}`(?:~)?([\w.]+)`", PAGES[page]):
        module, _, rest = name.rpartition(".")
        try:
            assert hasattr(importlib.import_module(module), rest), name
        except ModuleNotFoundError:
            importlib.import_module(name)


def test_the_config_page_has_every_field_and_its_default(extensions):
    page = extensions[0].filled(PAGES["reference/config.md"])
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", page, re.MULTILINE)
    config = config_lib.default().to_dict()
    config.pop("warmup")  # the fields of the FIPA phase

    def leaves(group):
        for key, value in group.items():
            yield from leaves(value) if isinstance(value, dict) else [(key, value)]

    shown = [(name.rpartition(".")[2], value) for name, value in rows]
    wanted = dict.fromkeys(leaves(config))
    assert sorted(name for name, _ in shown) == sorted(name for name, _ in leaves(config))
    given = {name: [repr(value) for key, value in wanted if key == name] for name, _ in wanted}
    plain = [(name, value) for name, value in shown if value not in ("rounds", "name")]  # which differ by phase
    assert not [(name, value) for name, value in plain if repr(ast.literal_eval(value)) not in given[name]]


def test_every_place_is_filled_in(extensions):
    for text in PAGES.values():
        assert "{{" not in extensions[0].filled(text)


def test_the_command_line_page_has_every_option(extensions):
    page = extensions[0].filled(PAGES["reference/command_line.md"])
    source = (ROOT / "scripts/train.py").read_text()
    for name in re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source):
        assert f"| `--{name}` |" in page
    assert "| `--last` | `1` |" in page


def test_the_server_keeps_as_many_numbers_as_the_page_on_memory_says():
    """By shapes alone."""
    size, rank, cohorts, clients = 30, 4, 3, 7
    params = {"w": jax.ShapeDtypeStruct([size], "float32")}

    def kept(**options):
        state = jax.eval_shape(aggregate.fipa(**options).init, params)
        return sum(leaf.size for leaf in jax.tree.leaves(state.solver))

    past = {kind: aggregate.PastRounds(kind, rank, 0.9, cohorts, clients) for kind in ("prior", "targets", "latest")}
    assert kept(past=past["prior"]) == rank * (size + 1) + 1
    assert kept(past=past["targets"]) == cohorts * (rank * (size + 1) + size + 1)
    assert kept(past=past["latest"]) == clients * (rank * (size + 1) + 2 * size + 2)
    assert kept(trust=True, relative=False) == size + 6


def test_every_part_of_the_package_has_its_page():
    for package in sorted((ROOT / "fipa_jax").glob("*/__init__.py")):
        name = package.parent.name
        page = PAGES[f"reference/api/{name}.md"]
        assert f".. automodule:: fipa_jax.{name}\n" in page
        if "__all__" in package.read_text():
            continue
        for module in package.parent.glob("[a-z]*.py"):
            assert f".. automodule:: fipa_jax.{name}.{module.stem}\n" in page, module


def test_docstrings_become_restructured_text(extensions):
    lines = [
        "The step |s| of `fipa`s:",
        "",
        "    step = H^+ z  [P]",
        "",
        "Args:",
        "  a, b_: see `c`.",
        "",
        "Example:",
        "  f(x)",
    ]
    text = "\n".join(extensions[1].converted(lines))
    assert r"The step \|s\| of ``fipa``\ s:" in text
    assert ".. code-block:: text\n\n   step = H^+ z  [P]" in text
    assert "Args:\n  a, b\\_: see ``c``." in text
    assert ".. code-block:: python\n   :force:\n\n   f(x)" in text
