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

    Once jax is imported its settings have been read, and once it has started its flags too.

    Args:
      devices: as how many XLA shows the CPU, for tests of several.

    Raises:
      RuntimeError: jax has started, without the flags of XLA that should be set.

    Warns:
      RuntimeWarning: jax is imported but has not started: XLA's flags are set in time, the other settings are not.
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
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
    if devices > 1:
        wanted.append(f"--xla_force_host_platform_device_count={devices}")
    missing = [flag for flag in wanted if flag.split("=")[0] not in flags]
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    _check_in_time(missing, list(unset))
    os.environ.update(unset)
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def _check_in_time(flags: list[str], names: list[str]) -> None:
    """Refuses to set flags of XLA once jax has started; warns of variables that are set once jax is imported."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    if flags and bridge is not None and bridge.backends_are_initialized():
        raise RuntimeError(
            f"prepare_process: jax has started, and XLA reads its flags no more, but needs {' '.join(flags)}. Call it "
            "before `import jax` and whatever imports it, in a notebook after restarting the kernel"
        )
    if names and "jax" in sys.modules:
        words = f"prepare_process: jax is imported and has read its settings: {', '.join(names)} come too late"
        warnings.warn(f"{words}. Call it before `import jax` and whatever imports it", RuntimeWarning, stacklevel=3)


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
