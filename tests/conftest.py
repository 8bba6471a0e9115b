"""What every test runs under; the environment is set before jax starts."""

import atexit
import contextlib
import ctypes
import importlib.metadata
import os
import shutil
import tempfile

from fipa_jax import config

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # shared with the processes that tests start, and gone with them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Compilation is most of the suite's time: a quarter of it without LLVM's optimisation and XLA's fusion emitters.
# `.ci/slow` runs all with both. XLA ends a process at a flag that it does not know: the second is for versions that do.
FAST = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST.append("--xla_cpu_use_fusion_emitters=false")
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(flag for flag in FAST if flag.partition("=")[0] not in given)]).strip()
config.prepare_process(devices=4)

import gc  # noqa: E402
import hashlib  # noqa: E402
import math  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from helpers import archives  # noqa: E402

from fipa_jax.data import sources as datasets  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


ENOUGH = 1.2 * 2**30  # bytes of a process; what is compiled after that is compiled anew


def resident():
    """The bytes of this process, where Linux tells; else as if there were too many."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return math.inf


@pytest.fixture(autouse=True, scope="module")
def caches():
    """Lets go of compiled programs between modules: those of hundreds of tests would fill gigabytes."""
    yield
    if resident() < ENOUGH:
        return
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # where the C library is another
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture
def x64():
    """float64, for comparisons with dense oracles."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Makes archives of a data set in `tmp_path / archives`, and theirs the official checksums."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("tensorflow_datasets", "array_record", "PIL.Image"):
            pytest.importorskip(package)

    def make(name, **changes):
        folder = tmp_path / "archives"
        folder.mkdir(exist_ok=True)
        arrays = archives.MAKERS[name](folder)
        admit(name, folder, **changes)
        return folder, arrays

    def admit(name, folder, **changes):
        source = datasets.SOURCES[name]
        sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in source.archives}
        monkeypatch.setitem(datasets.SOURCES, name, source._replace(archives=sums, **changes))

    make.admit = admit
    return make
