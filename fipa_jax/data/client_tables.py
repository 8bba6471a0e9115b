"""How are data with clients of their own prepared: hospitals, patients, speakers? From their archives to an .npz.

The file is one that the task `own_data` reads, see `own_arrays`, or of texts the task `text`. An archive's files are
compared with their digests and read where they lie. A new set is an entry of `SOURCES`.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fipa_jax import installed
from fipa_jax.data import loading, sources
from fipa_jax.files import local, replacing
from fipa_jax.lookup import lookup


class TableSource(NamedTuple):
    """A set of tables, or of texts, as it is published."""

    url: str  # of the archive, or of the one file
    files: dict[str, str]  # {name of a file in it: SHA-256}
    read: Callable[[dict[str, str]], dict[str, np.ndarray]]  # {name: text} -> the arrays of the .npz


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> Path:
    """Prepares a set once, from an archive that is downloaded, or from the archive or its files in a folder.

    Args:
      name: a key of `SOURCES`.
      data_dir: where the .npz goes, and the archive into `downloads` in it; "" is where image sets go.
      manual_dir: the folder with the archive or its files, if it is not to be downloaded.

    Returns:
      The path of the .npz; one that was there before is left as it is.

    Raises:
      FileNotFoundError: something is not in `manual_dir`.
      ImportError: a package that preparing needs is not installed.
      OSError: there is no network or no room.
      ValueError: the name is not known, or a file is not the official one.
    """
    source, root = lookup(SOURCES, name, "the data set to prepare"), loading.root(data_dir)
    path = root / f"{name}.npz"
    if path.exists():
        return path
    folder = local(manual_dir, "--manual_dir") if manual_dir else root / "downloads" / name
    archive = folder / source.url.rpartition("/")[2]
    if not manual_dir and not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(archive) as temporary:
            sources.download(source.url, temporary, archive.name)
    texts = {file: _text(source, file, folder, archive) for file in source.files}
    arrays = source.read(texts)
    root.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return path


def _text(source: TableSource, file: str, folder: Path, archive: Path) -> str:
    """What a file holds, from the folder or from the archive in it, once it is checked."""
    if (folder / file).is_file():
        where, content = folder / file, (folder / file).read_bytes()
    elif archive.is_file():
        where = archive
        try:
            with zipfile.ZipFile(archive) as opened:
                (member,) = [name for name in opened.namelist() if name.rpartition("/")[2] == file]
                content = opened.read(member)
        except (*sources.DAMAGE, ValueError, KeyError) as error:
            raise ValueError(f"{archive} is damaged, or lacks {file}; delete it and fetch {source.url}") from error
    else:
        lacking = f"{file} is not" if file == archive.name else f"neither {archive.name} nor {file} is"
        raise FileNotFoundError(f"{lacking} in {folder}; the data set needs {', '.join(source.files)}, of {source.url}")
    if (got := hashlib.sha256(content).hexdigest()) != source.files[file]:
        raise ValueError(
            f"{file} in {where} is not the official file: needed SHA-256 {source.files[file]}, got {got} from its "
            f"{len(content)} bytes; fetch {source.url}"
        )
    return content.decode()


HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


def _heart_disease(texts: dict[str, str]) -> dict[str, np.ndarray]:
    """740 patients of four hospitals, 13 inputs, sick or not, with the preprocessing and the split of FLamby.

    FLamby (du Terrail et al. 2022), Fed-Heart-Disease: the three columns that most hospitals have not filled are left
    out, then the patients that lack one; two columns of categories become one for each category but the first. Of each
    hospital 66 % train, drawn by scikit-learn, with equal shares of the sick but in Switzerland.
    """
    installed.check("datasets", "preparing heart_disease", "sklearn")
    from sklearn.model_selection import train_test_split

    parts: dict[str, list] = {name: [] for name in ("x", "y", "client", "x_test", "y_test", "client_test")}
    for hospital in HOSPITALS:
        table = np.genfromtxt(io.StringIO(texts[f"processed.{hospital}.data"]), delimiter=",", missing_values="?")
        table = table[~np.isnan(table[:, [*range(10), 13]]).any(axis=1)]
        plain, chest_pain, at_rest = table[:, [0, 1, 3, 4, 5, 7, 8, 9]], table[:, [2]], table[:, [6]]
        x = np.concatenate([plain, chest_pain == np.array([[2, 3, 4]]), at_rest == np.array([[1, 2]])], axis=1)
        sick = np.where(table[:, 13] > 0, "sick", "healthy")
        alike = None if hospital == "switzerland" else sick
        drawn = train_test_split(np.arange(len(x)), train_size=0.66, random_state=43, stratify=alike)
        for end, rows in zip(("", "_test"), map(np.sort, drawn), strict=True):
            for name, values in {"x": x[rows], "y": sick[rows], "client": np.full(len(rows), hospital)}.items():
                parts[name + end].append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _parkinsons(texts: dict[str, str]) -> dict[str, np.ndarray]:
    """5,875 recordings of 42 patients: 19 inputs, the motor and the total score; every fifth of a patient is a test."""
    table = np.loadtxt(io.StringIO(texts["parkinsons_updrs.data"]), delimiter=",", skiprows=1)
    patient = table[:, 0].astype(np.int64)
    is_test = np.zeros(len(table), bool)
    for one in np.unique(patient):
        is_test[np.flatnonzero(patient == one)[4::5]] = True
    columns = {"x": np.delete(table, (0, 4, 5), axis=1), "y": table[:, 4:6], "client": patient - 1}
    parts = {"": ~is_test, "_test": is_test}
    return {f"{name}{end}": values[rows] for end, rows in parts.items() for name, values in columns.items()}


def _shakespeare(texts: dict[str, str]) -> dict[str, np.ndarray]:
    """The words of 299 speakers, each one's speeches one after another in the order of the file.

    A speech is a block between empty lines that begins with a line `NAME:` and goes on. The other 125 blocks are left
    out; 9 speakers have no words in the file but such a line.
    """
    words: dict[str, list[str]] = {}
    for block in texts["input.txt"].split("\n\n"):
        name, colon, speech = block.strip("\n").partition(":\n")
        if colon and "\n" not in name:
            words.setdefault(name, []).append(speech)
    spoken = {name: "\n".join(speeches) + "\n" for name, speeches in words.items()}
    return {
        "text": np.frombuffer("".join(spoken.values()).encode("utf-32-le"), np.uint32),
        "length": np.array([len(text) for text in spoken.values()]),
        "client": np.array([*spoken]),
    }


# The tables from UCI, CC BY 4.0: DOI 10.24432/C52P4X (Janosi et al. 1988) and 10.24432/C5ZS3N (Tsanas and Little 2009).
SOURCES = {
    "heart_disease": TableSource(
        "https://archive.ics.uci.edu/static/public/45/heart+disease.zip",
        {
            "processed.cleveland.data": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
            "processed.hungarian.data": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
            "processed.switzerland.data": "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
            "processed.va.data": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
        },
        _heart_disease,
    ),
    "parkinsons": TableSource(
        "https://archive.ics.uci.edu/static/public/189/parkinsons+telemonitoring.zip",
        {"parkinsons_updrs.data": "f2c7d5025dec4e92e7feae367a5f7ccf58789a10ac6b54bdf15976c599f9dd39"},
        _parkinsons,
    ),
    "shakespeare": TableSource(  # in the public domain; the choice of Karpathy (2015), a tenth of all that he wrote
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
        _shakespeare,
    ),
}
