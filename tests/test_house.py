"""Who imports whom: the arrows of the layout, walked by `ast`, and what an import pulls in and sets."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fipa_jax"

# module -> the modules of the package that it may import: curvature -> eigen -> sketch -> merge -> forms -> past, and
# uploads, -> aggregate, beside trees; simulate -> client, and with curvature -> second_order; these meet in rounds;
# partition, data, models -> tasks; all sides meet in experiment alone, but for what a person sees of them, in report.
ARROWS = {
    "__init__": set(),
    "trees": set(),
    "curvature": set(),
    "eigen": {"curvature"},
    "sketch": {"curvature", "eigen"},
    "merge": {"sketch"},
    "trust": set(),
    "uploads": {"trees", "sketch"},
    "forms": {"merge", "sketch", "trees"},
    "past": {"forms", "sketch", "trees", "uploads"},
    "aggregate": {"trees", "sketch", "forms", "past", "trust", "uploads"},
    "faults": {"sketch"},
    "late": set(),
    "simulate": set(),
    "memory": set(),
    "population": {"simulate"},
    "terms": {"simulate", "trees"},
    "client": {"simulate", "sketch", "terms", "trees"},
    "second_order": {"client", "curvature", "simulate", "terms", "trees"},
    "server": {"trees"},
    "rounds": {
        "trees", "curvature", "sketch", "aggregate", "client", "faults", "late", "memory", "simulate", "terms",
        "uploads",
    },
    "partition": set(),
    "sums": set(),
    "data": {"config", "sums"},
    "datasets": {"data"},
    "models": set(),
    "tasks": set(),
    "tasks.regression": {"tasks", "models"},
    "tasks.own_data": {"tasks", "tasks.regression", "models", "partition"},
    "tasks.pde": {"tasks", "models"},
    "tasks.images": {"tasks", "models", "data", "partition"},
    "fields": set(),
    "compared": {"fields"},
    "config": {"compared", "fields"},
    "command_line": {"config", "fields"},
    "recipes": {"config"},
    "checkpoint": {"sums", "trees"},
    "stopping": set(),
    "origin": {"__init__", "partition", "trees"},
    "journal": {"checkpoint", "metrics", "rounds", "stopping", "trees"},
    "resume": {"checkpoint", "journal", "origin", "stopping"},
    "plots": set(),
    "metrics": set(),
    "report": {"forms", "partition", "plots", "sketch", "stopping", "tasks", "trees", "uploads"},
    "phase": {
        "aggregate", "client", "compared", "faults", "past", "rounds", "second_order", "server", "sketch", "tasks",
        "terms", "trees",
    },
    "cache": {"metrics", "tasks", "trees"},
    "tune": {"rounds"},
    "loop": {
        "config", "faults", "journal", "tune", "metrics", "phase", "population", "simulate", "report", "rounds",
        "sketch", "trees",
    },
    "experiment": {
        "cache", "checkpoint", "compared", "config", "journal", "loop", "metrics", "origin", "partition", "phase",
        "plots", "population", "report", "resume", "rounds", "simulate", "tasks",
    },
}  # fmt: skip
LIGHT = {"jax", "optax", "numpy", "chex"}  # what the modules for other people's loops may need
FOR_IMPORTERS = (
    "trees", "curvature", "eigen", "sketch", "merge", "trust", "uploads", "aggregate", "simulate", "client",
    "second_order", "faults", "memory", "population", "rounds",
)  # fmt: skip


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path):
    """(modules of the package, top-level names of other packages) imported anywhere in a file, functions included."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name.removeprefix("fipa_jax.") in MODULES else node.module for name in whole]
        else:
            continue
        for name in found:
            if name.split(".")[0] == "fipa_jax":
                ours.add(name.removeprefix("fipa_jax.") if name != "fipa_jax" else "__init__")
            else:
                others.add(name.split(".")[0])
    return ours, others


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_layout_allows(module):
    assert module in ARROWS, f"{module} is new: give it its arrows here"
    ours, _ = imports(MODULES[module])
    assert ours <= ARROWS[module], f"{module} must not import {sorted(ours - ARROWS[module])}"


@pytest.mark.parametrize("module", FOR_IMPORTERS)
def test_the_mathematics_needs_jax_optax_and_numpy_alone(module):
    _, others = imports(MODULES[module])
    assert others <= LIGHT | set(sys.stdlib_module_names)


def test_numpy_is_enough_for_the_splits():
    assert imports(MODULES["partition"])[1] <= {"numpy"} | set(sys.stdlib_module_names)


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


def test_aggregate_pulls_in_nothing_heavy():
    heavy = {"flax", "tensorflow_datasets", "tensorflow", "matplotlib", "ml_collections", "tqdm", "absl.app", "PIL"}
    loaded = set(python("import sys, fipa_jax.aggregate; print(*sys.modules)"))
    assert not loaded & heavy
    assert "jax" in loaded


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


def test_what_is_built_holds_all_modules_and_says_that_it_is_typed(tmp_path):
    """What a wheel is packed from: all that setup.py puts into it."""
    pytest.importorskip("setuptools")
    source, built = tmp_path / "source", tmp_path / "built"
    shutil.copytree(PACKAGE, source / "fipa_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "build", "-b", str(built)]
    subprocess.run(command, cwd=source, capture_output=True, check=True, timeout=120)
    files = {path.relative_to(built / "lib") for path in built.rglob("*") if path.is_file()}
    wanted = {path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")} | {Path("fipa_jax/py.typed")}
    assert files == wanted


def test_importing_a_module_leaves_jax_as_it_was():
    """No environment variable, no precision, no backend: that is the caller's."""
    python(
        "import os; before = dict(os.environ)\n"
        "import jax; settings = dict(jax.config.values)\n"
        "import fipa_jax.aggregate, fipa_jax.rounds, fipa_jax.config\n"
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
