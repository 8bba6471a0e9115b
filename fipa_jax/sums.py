"""Are files as they were written? Their SHA-256 stand beside them, in the format of the command `sha256sum`."""

import hashlib
from pathlib import Path

NAME = "SHA256SUMS"  # of the file in their folder


def digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of(folder: Path) -> bytes:
    """What the file `NAME` says of all the others in the folder and below."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return "".join(f"{digest(folder / name)}  {name}\n" for name in names if name != NAME).encode()
