"""Data of hospitals, patients and speakers: the official files become what others make of them, and no others do."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fipa_jax.data import client_tables, own_arrays
from fipa_jax.tasks import text

pytest.importorskip("sklearn", reason="scikit-learn draws the hospitals' split")

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def _hospital(draw, rows):
    """Rows in the layout of the official files, some of which lack a number."""
    cells = np.c_[
        draw.integers(30, 70, rows), draw.integers(0, 2, rows), draw.integers(1, 5, rows),
        draw.integers(90, 200, rows),
        draw.integers(100, 400, rows), draw.integers(0, 2, rows), draw.integers(0, 3, rows),
        draw.integers(80, 200, rows),
        draw.integers(0, 2, rows), draw.integers(0, 4, rows), np.full((rows, 3), -9), draw.integers(0, 5, rows),
    ]  # fmt: skip
    words = cells.astype(str)
    words[:, 10:13] = "?"
    words[::7, 4] = "?"
    return "\n".join(",".join(row) for row in words) + "\n"


def _patients(draw, patients, recordings):
    rows = [[p + 1, *draw.normal(size=21)] for p in range(patients) for _ in range(recordings)]
    return (
        "\n".join(["subject#," + ",".join("abcdefghijklmnopqrstu"), *(",".join(map(str, row)) for row in rows)]) + "\n"
    )


SPEECHES = "Second Lord:\nGo on.\n\nAll:\nSpeak,\nspeak.\n\nno name\n\nGhost:\n\nSecond Lord:\nYou: all\nresolved?\n"


@pytest.fixture
def texts():
    draw = np.random.default_rng(0)
    heart = {f"processed.{name}.data": _hospital(draw, 40) for name in client_tables.HOSPITALS}
    patients = {"parkinsons_updrs.data": _patients(draw, 3, 12)}
    return {"heart_disease": heart, "parkinsons": patients, "shakespeare": {"input.txt": SPEECHES}}


@pytest.fixture(params=["files", "archive"])
def official(request, texts, tmp_path, monkeypatch):
    """Small files in the true layout, as official ones, by themselves or in an archive: name -> their folder."""

    def make(name):
        source, folder = client_tables.SOURCES[name], tmp_path / name
        digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in texts[name].items()}
        monkeypatch.setitem(client_tables.SOURCES, name, source._replace(files=digests))
        folder.mkdir()
        if request.param == "archive" and source.url.endswith(".zip"):
            with zipfile.ZipFile(folder / source.url.rpartition("/")[2], "w") as archive:
                for file, text in texts[name].items():
                    archive.writestr(f"a folder/{file}", text)
        else:
            for file, text in texts[name].items():
                (folder / file).write_text(text)
        return folder

    return make


@pytest.mark.parametrize("name", ["heart_disease", "parkinsons"])
def test_what_is_prepared_is_read_as_own_data(official, name, tmp_path):
    path = client_tables.prepare(name, str(tmp_path / "data"), str(official(name)))
    arrays = own_arrays.read(str(path))
    assert set(arrays) == {"x", "y", "client", "x_test", "y_test", "client_test"}
    clients = set(client_tables.HOSPITALS) if name == "heart_disease" else {0, 1, 2}
    assert set(arrays["client"].tolist()) == set(arrays["client_test"].tolist()) == clients
    before = path.read_bytes()
    assert client_tables.prepare(name, str(tmp_path / "data"), "nowhere") == path and path.read_bytes() == before


def test_a_speakers_words_are_the_blocks_below_its_name(official, tmp_path):
    path = client_tables.prepare("shakespeare", str(tmp_path / "data"), str(official("shakespeare")))
    found = text.read(str(path), 1)
    spoken = ["".join(found.alphabet[i] for i in symbols) for symbols in found.symbols]
    words = {"Second Lord": "Go on.\nYou: all\nresolved?\n", "All": "Speak,\nspeak.\n"}
    assert dict(zip(found.names, spoken, strict=True)) == words
    assert found.alphabet == sorted(set("".join(spoken)))
    assert text.read(str(path), 20).names == ["Second Lord"]


def test_patients_with_gaps_are_left_out_and_each_fifth_recording_is_a_test(official, texts, tmp_path):
    heart = np.load(client_tables.prepare("heart_disease", str(tmp_path / "data"), str(official("heart_disease"))))
    assert len(heart["x"]) + len(heart["x_test"]) == 4 * (40 - 6)
    parkinsons = np.load(client_tables.prepare("parkinsons", str(tmp_path / "data"), str(official("parkinsons"))))
    rows = np.array([line.split(",") for line in texts["parkinsons"]["parkinsons_updrs.data"].splitlines()[1:]], float)
    test = np.concatenate([rows[12 * p : 12 * p + 12][4::5] for p in range(3)])
    np.testing.assert_array_equal(parkinsons["y_test"], test[:, 4:6])
    np.testing.assert_array_equal(parkinsons["x_test"], np.delete(test, (0, 4, 5), 1))


@pytest.mark.parametrize("name", client_tables.SOURCES)
def test_other_files_are_refused_by_name(official, texts, name, tmp_path, monkeypatch):
    folder = official(name)
    digests = dict.fromkeys(texts[name], "0" * 64)
    monkeypatch.setitem(client_tables.SOURCES, name, client_tables.SOURCES[name]._replace(files=digests))
    with pytest.raises(ValueError, match=r"is not the official file: needed SHA-256 0+, got"):
        client_tables.prepare(name, str(tmp_path / "data"), str(folder))
    assert not (tmp_path / "data" / f"{name}.npz").exists()


def test_a_folder_without_them_says_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^input\.txt is not in .*, of https://"):
        client_tables.prepare("shakespeare", str(tmp_path), str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"neither heart\+disease\.zip nor processed\.cleveland\.data is in"):
        client_tables.prepare("heart_disease", str(tmp_path), str(tmp_path))


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "heart+disease.zip").write_bytes(b"PK no")
    with pytest.raises(ValueError, match=r"damaged, or lacks processed\.cleveland\.data"):
        client_tables.prepare("heart_disease", str(tmp_path / "data"), str(tmp_path))


@pytest.mark.skipif(not (SHARED / "heart_disease").exists(), reason=f"no heart_disease under {SHARED}")
def test_the_hospitals_are_those_of_flamby(tmp_path):
    found = np.load(client_tables.prepare("heart_disease", str(tmp_path), str(SHARED / "heart_disease")))
    theirs = np.load(SHARED / "heart_disease" / "flamby_prepared.npz")
    for end, rows in (("", theirs["train"]), ("_test", ~theirs["train"])):
        np.testing.assert_array_equal(found[f"x{end}"], theirs["x"][rows])
        np.testing.assert_array_equal(found[f"y{end}"] == "sick", theirs["y"][rows] == 1)
        np.testing.assert_array_equal(found[f"client{end}"], theirs["clients"][theirs["client"][rows]])


@pytest.mark.skipif(not (SHARED / "parkinsons").exists(), reason=f"no parkinsons under {SHARED}")
def test_all_recordings_of_the_published_table_are_there(tmp_path):
    found = np.load(client_tables.prepare("parkinsons", str(tmp_path), str(SHARED / "parkinsons")))
    theirs = np.load(SHARED / "parkinsons" / "parkinsons.npz")
    rows = [
        np.concatenate([np.c_[part[f"x{end}"], part[f"y{end}"]] for end in ("", "_test")]) for part in (found, theirs)
    ]
    np.testing.assert_allclose(*(of_one[np.lexsort(of_one.T)] for of_one in rows), rtol=1e-12)
    assert len(np.unique(found["client"])) == 42


@pytest.mark.skipif(not (SHARED / "tinyshakespeare").exists(), reason="no tinyshakespeare under ../shared/data")
def test_the_speakers_of_the_whole_file_are_there(tmp_path):
    path = client_tables.prepare("shakespeare", str(tmp_path), str(SHARED / "tinyshakespeare"))
    numbers = {least: len(text.read(str(path), least).names) for least in (1, 1000, 2000, 5000, 20000)}
    assert numbers == {1: 299, 1000: 141, 2000: 99, 5000: 64, 20000: 10}
