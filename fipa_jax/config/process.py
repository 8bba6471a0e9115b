"""What must stand in the environment before jax starts, and the folder of what can be made anew."""

import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path


def prepare_process(devices: int = 1) -> None:
    """Sets what must stand in the environment before jax starts; call it first in a script.

    Batched LAPACK calls can deadlock XLA's CPU thread pool on machines with few cores unless its concurrent scheduler
    is off, and OpenBLAS's own threads slow small factorisations up to a hundred times. Compiled programs are kept in
    the user's cache, also those that took no time to compile: a run has dozens of them. Values the user has set win.

    Where jax is imported already, which has read its settings by then, it says so in a RuntimeWarning.
    """
    # A program compiled for one kind of CPU may not run on another that shares the home folder.
    programs = user_cache() / f"programs-{platform.machine()}-{hashlib.sha256(_cpu_features()).hexdigest()[:8]}"
    defaults = {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if "jax" in sys.modules and not defaults.keys() <= os.environ.keys():
        warnings.warn("prepare_process: jax is imported already, call it before; it changes nothing now", stacklevel=2)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
    if devices > 1:
        wanted.append(f"--xla_force_host_platform_device_count={devices}")
    missing = [flag for flag in wanted if flag.split("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def user_cache() -> Path:
    """The folder in which what can be made anew is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fipa_jax"


def _cpu_features() -> bytes:
    """What tells kinds of CPU apart: Linux lists a processor's abilities; elsewhere its name must do."""
    try:
        found = Path("/proc/cpuinfo").read_bytes()
    except OSError:
        return platform.processor().encode()
    lines = [line for line in found.splitlines() if line.lower().startswith((b"flags", b"features"))]
    return lines[0] if lines else b""
