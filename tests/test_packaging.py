"""What is built and installed: the wheel's and the archive's contents, the commands, and what a bare install can do."""

import os
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from fipa_jax import installed

ROOT = Path(__file__).resolve().parents[1]
SHIPPED_SCRIPTS = {f"scripts/{name}.py" for name in ("train", "summarise", "prepare_data")}
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "fipa_jax").rglob("*.py")}
CONFIGS = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.py")}


def wanted_in_wheel():
    """All that a wheel holds beside its own description."""
    return MODULES | {"fipa_jax/py.typed"} | {f"fipa_jax/{path}" for path in CONFIGS | SHIPPED_SCRIPTS}


def copied(folder):
    """A copy of the checkout's files, without what git ignores, to build from."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


def test_what_a_wheel_is_packed_from_is_the_package_its_configs_and_its_commands(tmp_path):
    pytest.importorskip("setuptools")
    source, built = copied(tmp_path / "source"), tmp_path / "built"
    command = [sys.executable, "setup.py", "-q", "build", "-b", str(built)]
    subprocess.run(command, cwd=source, capture_output=True, check=True, timeout=120)
    files = {str(path.relative_to(built / "lib")) for path in built.rglob("*") if path.is_file()}
    assert files == wanted_in_wheel()


def test_the_folders_of_configs_and_scripts_are_found_beside_the_package_and_inside_of_it(tmp_path, monkeypatch):
    assert installed.folder("configs") == ROOT / "configs"
    for place in (tmp_path / "fipa_jax" / "configs", tmp_path / "configs"):
        place.mkdir(parents=True)
    monkeypatch.setattr(installed, "PACKAGE", tmp_path / "fipa_jax")
    assert installed.folder("configs") == tmp_path / "fipa_jax" / "configs"
    with pytest.raises(FileNotFoundError, match="without its folder scripts"):
        installed.folder("scripts")


def test_a_missing_package_of_an_extra_is_named_in_one_line_with_a_command_that_is_true(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ModuleNotFoundError) as error:
        installed.check("experiments", "fipa_jax.models", "numpy", "flax")
    assert "flax" in str(error.value) and "fipa_jax[experiments]" in str(error.value)
    assert str(error.value).endswith(f"pip install -e '{ROOT}[experiments]'") and "\n" not in str(error.value)
    monkeypatch.setattr(installed, "PACKAGE", tmp_path)  # as in a wheel: no setup.py beside it
    needs = ["jax>=0.10", "flax>=0.12; extra == 'experiments'", "pytest>=8; extra == 'test'"]
    monkeypatch.setattr(installed.metadata, "requires", lambda name: needs)
    assert installed.missing("experiments", "it", "flax").endswith("pip install 'flax>=0.12'")


def test_the_commands_run_the_scripts_of_their_names(monkeypatch):
    commands = runpy.run_path(str(ROOT / "fipa_jax" / "__main__.py"))
    assert {f"scripts/{file}" for file in commands["COMMANDS"].values()} == SHIPPED_SCRIPTS
    result = subprocess.run(
        [sys.executable, "-m", "fipa_jax", "summarise", "nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1 and result.stderr.startswith("error: no run in nowhere")
    result = subprocess.run([sys.executable, "-m", "fipa_jax", "fly"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "train, summarise, prepare-data" in result.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(the wheel, the source archive), built as for a release."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    source = copied(folder / "source")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    subprocess.run(command, capture_output=True, check=True, timeout=600)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


@pytest.mark.slow
def test_a_wheel_and_a_source_archive_hold_what_they_should_and_nothing_else(distributions):
    wheel, archive = distributions
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        described = {name.partition(".dist-info/")[2] for name in file.namelist()} - {""}
    assert names == wanted_in_wheel()
    assert described == {"licenses/LICENSE", "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"}
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    written = {"setup.cfg", "PKG-INFO"}  # by setuptools
    ours = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "MANIFEST.in", "pyproject.toml"}
    tools = {"setup.py", "requirements.txt"}
    assert names == MODULES | {"fipa_jax/py.typed"} | CONFIGS | SHIPPED_SCRIPTS | ours | tools | written


BARE = """
import importlib.util, sys, warnings
warnings.simplefilter("error")
import fipa_jax.aggregate, fipa_jax.curvature, fipa_jax.client.first_order, fipa_jax.client.second_order
import fipa_jax.federation.round, fipa_jax.tasks, fipa_jax.data.partition
assert "site-packages" in fipa_jax.__file__, fipa_jax.__file__
assert importlib.util.find_spec("flax") is None and importlib.util.find_spec("chex") is None
import jax.numpy as jnp
sketch = fipa_jax.curvature.Sketch(jnp.ones([2, 1]), jnp.ones([2, 1, 1]))
step, info = fipa_jax.aggregate.fipa_step({"w": jnp.ones([2, 1])}, sketch, jnp.ones(2))
assert jnp.allclose(step["w"], 1)
for name in ("config", "models", "reporting", "saving", "run"):
    try:
        getattr(fipa_jax, name)
    except ModuleNotFoundError as error:
        assert "fipa_jax[experiments]" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(name)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_bare_install_of_the_wheel_has_the_mathematics_and_with_the_extra_the_commands(distributions, tmp_path):
    """In an environment of its own, from the package index that pip is set to."""
    wheel, _ = distributions
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    pip, python = [str(folder / "bin/pip"), "install", "-q", "--disable-pip-version-check"], str(folder / "bin/python")
    run(*pip, str(wheel))
    run(python, "-c", BARE)
    run(*pip, f"{wheel}[experiments]")
    small = ("--config.fipa.rounds=2", "--config.rounds_per_call=1", "--config.compare=('fipa',)")
    run(str(folder / "bin/fipa-train"), "--config=sine", "--workdir=out", *small)
    assert "test_mse" in run(str(folder / "bin/fipa-summarise"), "out")
    run(python, "-m", "fipa_jax", "train", "--config=configs/sine.py:sgd", "--workdir=again", *small)
    assert "cifar10" in run(str(folder / "bin/fipa-prepare-data"), "--help")
