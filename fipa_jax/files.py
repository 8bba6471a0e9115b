"""Are files as they were written? Their SHA-256 stand beside them, in the format of the command `sha256sum`."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

NAME = "SHA256SUMS"  # of the file in their folder
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, or quota, says
PROBE = 2**26  # bytes; file systems that cannot reserve them write them


def digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of(folder: Path) -> bytes:
    """What the file `NAME` says of all the others in the folder and below."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return "".join(f"{digest(folder / name)}  {name}\n" for name in names if name != NAME).encode()


def write(path: Path, content: bytes) -> None:
    """Writes a file that is either there whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_room(folder: Path, size: int) -> None:
    """Looks whether there is room for so many bytes; by taking up to `PROBE` of them, as quotas show only then.

    Raises:
      OSError: there is not.
    """
    probe = folder / "room.partial"
    try:
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with probe.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, min(size, PROBE))
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno, f"no room for {size / 2**20:.1f} MiB in {folder}: {os.strerror(error.errno)}"
        ) from None
    finally:
        probe.unlink(missing_ok=True)
