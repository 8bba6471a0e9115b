"""The house, walked by `ast`: who imports whom, what an import pulls in and sets, how long and branched things are."""

import ast
import graphlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fipa_jax import aggregate

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fipa_jax"

# From the ground up: a module imports from the floors below its own, and on its own from its own package alone.
FLOORS = (
    {"trees", "lookup", "files", "derivatives", "installed", "backend"},
    {"curvature", "config", "models"},
    {"aggregate", "client", "data"},
    {"federation", "tasks"},
    {"privacy"},
    {"reporting"},
    {"saving"},
    {"run"},
    {"deployment"},
    {"__main__"},
)
LIGHT = {"jax", "optax", "numpy"}  # what the packages for other people's loops may need
FOR_IMPORTERS = ("backend", "trees", "lookup", "files", "derivatives", "curvature", "aggregate", "client", "federation")
HEAVY = {
    "flax",
    "tensorflow_datasets",
    "tensorflow",
    "matplotlib",
    "ml_collections",
    "tqdm",
    "absl.app",
    "orbax",
    "PIL",
}


def name_of(path):
    """The dotted name of a module, `fipa_jax` for the package's own `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IN_PACKAGES = {name: path for name, path in MODULES.items() if name != "fipa_jax"}


def imports(path):
    """(modules of the package, top-level names of other packages) imported anywhere in a file, functions included."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        else:
            continue
        for name in names:
            (ours if name.split(".")[0] == "fipa_jax" else others).add(name)
    return ours, {name.split(".")[0] for name in others}


def part_of(module):
    """The package, or the single module, in which a module of `fipa_jax` lies."""
    return module.split(".")[1]


def floor_of(part):
    return next((number for number, floor in enumerate(FLOORS) if part in floor), None)


def test_every_part_of_the_package_has_its_floor():
    parts = sorted({part_of(module) for module in IN_PACKAGES})
    assert parts == sorted(part for floor in FLOORS for part in floor)


@pytest.mark.parametrize("module", IN_PACKAGES)
def test_a_module_imports_from_the_floors_below_and_from_its_own_package(module):
    ours, _ = imports(IN_PACKAGES[module])
    own = part_of(module)
    for name in ours - {"fipa_jax"}:  # the version
        other = part_of(name)
        assert other == own or floor_of(other) < floor_of(own), f"{module} must not import {name}"


@pytest.mark.parametrize("module", IN_PACKAGES)
def test_inside_the_package_concrete_modules_are_imported(module):
    """An `__init__` is for those outside: through one inside, each of its modules would depend on all of them."""
    ours, _ = imports(IN_PACKAGES[module])
    through = [name for name in ours - {"fipa_jax"} if MODULES[name].name == "__init__.py"]
    assert not through, f"{module} imports the package {through}, not a module of it"


def test_no_imports_go_in_a_circle():
    arrows = {module: imports(path)[0] for module, path in MODULES.items() if path.name != "__init__.py"}
    graphlib.TopologicalSorter(arrows).prepare()


@pytest.mark.parametrize("module", [module for module in IN_PACKAGES if part_of(module) in FOR_IMPORTERS])
def test_the_mathematics_needs_jax_optax_and_numpy_alone(module):
    _, others = imports(MODULES[module])
    assert others <= LIGHT | set(sys.stdlib_module_names)


def test_numpy_is_enough_for_the_splits():
    assert imports(MODULES["fipa_jax.data.partition"])[1] <= {"numpy"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [module for module in IN_PACKAGES if part_of(module) == "config"])
def test_the_config_needs_no_jax(module):
    """So that `prepare_process` can set what jax reads as it starts."""
    ours, others = imports(MODULES[module])
    assert "jax" not in others and {part_of(name) for name in ours} <= {"config", "lookup", "files", "installed"}


def test_scripts_and_configs_import_the_package_only():
    """`python scripts/train.py` has only scripts/ on its path."""
    for path in [*(ROOT / "configs").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        _, others = imports(path)
        assert not others & {"configs", "scripts", "tests"}, path


def python(code):
    """Runs code in a fresh process; returns what it prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_loads_and_sets_nothing():
    code = "import os, sys; before = dict(os.environ); import fipa_jax; assert before == dict(os.environ);"
    assert not set(python(code + "print(*sys.modules)")) & {"jax", "numpy", "optax", "ml_collections"}


def test_parts_of_the_package_come_when_they_are_asked_for():
    """After `import fipa_jax` alone; a name that is none of them is an error as of any module."""
    parts = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"trees"}
    listed = set(python("import fipa_jax; print(*dir(fipa_jax))"))
    assert listed == parts | {"__version__"}
    heavy = {"flax", "ml_collections", "tqdm", "orbax", "matplotlib"}
    assert not set(python("import sys, fipa_jax; fipa_jax.aggregate.fipa; print(*sys.modules)")) & heavy
    python(
        "import fipa_jax\n"
        "for name in dir(fipa_jax): getattr(fipa_jax, name)\n"
        "assert not hasattr(fipa_jax, 'nonesuch')\n"
        "from fipa_jax import files, tasks\n"
    )


def test_importing_modules_pulls_in_nothing_heavy_and_leaves_jax_as_it_was():
    """No environment variable, no precision, no backend: that is the caller's. Those for other people's loops first."""
    loops = [module for module in MODULES if part_of(module + ".") in FOR_IMPORTERS]
    assert {"fipa_jax.aggregate", "fipa_jax.curvature", "fipa_jax.federation.round"} <= set(loops)
    python(
        "import importlib, os, sys; before = dict(os.environ)\n"
        "import jax; settings = dict(jax.config.values)\n"
        f"for module in {loops}: importlib.import_module(module)\n"
        f"assert not set(sys.modules) & {HEAVY}, set(sys.modules) & {HEAVY}\n"
        f"for module in {list(MODULES)}: importlib.import_module(module)\n"
        "assert before == dict(os.environ) and settings == dict(jax.config.values)\n"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()\n"
    )


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name)
    code = "from fipa_jax import config; config.prepare_process(); import jax; jax.jit(lambda x: x + 1)(2);"
    (folder,) = python(f"{code} print(jax.config.jax_compilation_cache_dir)")
    assert Path(folder).parent == tmp_path / "fipa_jax" and list(Path(folder).iterdir())


def test_preparing_the_process_keeps_what_the_user_has_set():
    code = (
        "import os; os.environ.update(XLA_FLAGS='--xla_cpu_enable_concurrency_optimized_scheduler=true', "
        "OMP_NUM_THREADS='3')\n"
        "from fipa_jax import config; config.prepare_process(devices=2); config.prepare_process(devices=2)\n"
        "print(os.environ['XLA_FLAGS'], os.environ['OMP_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS'])"
    )
    kept = ["--xla_cpu_enable_concurrency_optimized_scheduler=true", "--xla_force_host_platform_device_count=2"]
    assert python(code) == [*kept, "3", "1"]


# The shape of the code, by its syntax trees: what keeps it readable is measured, not hoped for.
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION, LONGEST_FILE, MOST_PARAMETERS, MOST_OF_A_FACADE = 60, 400, 8, 12
LAMBDAS = 12  # in 1000 lines
MOST_MODULES = 120
FLAX = ("conv",)  # its parameters are those that flax gives a convolution


SHAPE = runpy.run_path(str(ROOT / "scripts" / "shape.py"))
FUNCTIONS = list(SHAPE["functions"](PACKAGE))


def test_functions_are_short():
    lines = {where: SHAPE["code_lines"](node) for where, node in FUNCTIONS}
    assert not {where: number for where, number in lines.items() if number > LONGEST_FUNCTION}


def test_functions_take_few_parameters():
    """At most eight; a public factory at most twelve, all beyond two by keyword alone."""
    many = []
    for where, node in FUNCTIONS:
        plain, keyword = len(node.args.posonlyargs + node.args.args), len(node.args.kwonlyargs)
        public = not node.name.startswith("_") and plain <= 2 and plain + keyword <= MOST_OF_A_FACADE
        if plain + keyword > MOST_PARAMETERS and not public and node.name not in FLAX:
            many.append(f"{where}: {plain} by place, {keyword} by keyword")
    assert not many


def test_functions_branch_little():
    """95 of 100 have at most four branches, and none more than ten."""
    counts = {where: SHAPE["branches"](node) for where, node in FUNCTIONS}
    assert sorted(counts.values())[int(0.95 * len(counts))] <= 4
    assert not {where: count for where, count in counts.items() if count > 10}


def test_lambdas_are_few():
    assert SHAPE["lambdas"](PACKAGE) <= LAMBDAS


def test_files_are_short_and_not_too_many():
    long = {str(file): lines for file in FILES if (lines := len(file.read_text().splitlines())) > LONGEST_FILE}
    assert not long
    defining = [file for file in FILES if file.name != "__init__.py"]
    assert len(defining) <= MOST_MODULES


def test_every_public_thing_has_a_docstring():
    bare = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        bare += [f"{file.name} {n.name}" for n in public if not ast.get_docstring(n)]
        bare += [] if ast.get_docstring(tree) else [file.name]
    assert not bare


def test_no_aggregate_module_hides_a_function():
    """A module of a public function's name would be what `fipa_jax.aggregate.NAME` finds."""
    modules = {file.stem for file in (PACKAGE / "aggregate").glob("*.py")}
    assert not modules & set(aggregate.__all__)
