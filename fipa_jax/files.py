"""Files that are on the disk whole or not at all, their SHA-256 sums, and whether there is room for more.

Everything that must survive a crash is written by `write` or `replacing`. The sums of a folder's files stand in a file
beside them, in the format of the command `sha256sum`, so that `sha256sum -c SHA256SUMS` checks them without this code.
"""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

SUMS = "SHA256SUMS"  # the file with the sums of all others in its folder
PARTIAL = ".partial"  # how the names of temporary files end
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, or quota, says
TEMPORARY = rf".*\.[0-9a-f]{{8}}{re.escape(PARTIAL)}"  # the names that `replacing` gives
MARKS = {  # byte-order mark: how the text behind it is coded; the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
PROBE = 2**26  # bytes; file systems that cannot reserve them write them


def local(path: str | Path, field: str) -> Path:
    """The path on this machine that a user has written, with `~` for a home folder.

    Args:
      field: that holds the path, for the error.

    Raises:
      ValueError: it is the address of an object store, or of a home that there is not.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise ValueError(f"{field}: {str(path)!r} is an address; needs a path on this machine, such as a mounted one")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{field}: {str(path)!r} begins with the home of nobody who is known here") from None


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8 or as its byte-order mark says (some editors write one), without the mark.

    Raises:
      UnicodeDecodeError: it is no such text.
    """
    content = path.read_bytes()
    return content.decode(next((coding for mark, coding in MARKS.items() if content.startswith(mark)), "utf-8"))


def read_json(path: Path):
    """What a JSON file holds.

    Raises:
      ValueError: it is no JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path) -> bytes:
    """The content of the file `SUMS` for a folder: a line for every other file in it, and below."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return "".join(f"{digest_of_file(folder / name)}  {name}\n" for name in names if name != SUMS).encode()


def write(path: Path, content: bytes) -> None:
    """Writes a file that is on the disk whole or not at all, and replaces one that was there; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a temporary file, which takes the place of `path` when the block ends.

    A reader finds the old file or the new one, never a part of it, and after a crash of the machine too: the file is on
    the disk before it is renamed. Each writer has a temporary file of its own, so that the last one wins. Where the
    block fails, its temporary file is removed; a process that is killed leaves it for `remove_partial`.

    Example:
      with replacing(folder / "image.npy") as temporary, temporary.open("wb") as file:
        np.save(file, image)

    Args:
      path: of the file; its folder is there.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_partial(folder: Path) -> None:
    """Removes the temporary files that killed processes have left in a folder which nobody else writes to now."""
    for path in folder.glob(f"*{PARTIAL}"):
        if re.fullmatch(TEMPORARY, path.name):  # another program's download may be called so, too
            path.unlink()


def check_room(folder: Path, size: int) -> None:
    """Looks whether there is room for so many bytes; by taking up to `PROBE` of them, as quotas show only then.

    Raises:
      OSError: there is not.
    """
    probe = _temporary(folder / "room")
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


def _temporary(path: Path) -> Path:
    """A name beside a file's that no other writer has; not longer than file systems allow, whatever the file's."""
    beginning = path.name.encode()[:64].decode(errors="ignore")  # limits count bytes
    return path.with_name(f"{beginning}.{secrets.token_hex(4)}{PARTIAL}")


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, on systems that can: the files themselves are there by now."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
