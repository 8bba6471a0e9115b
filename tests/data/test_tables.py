"""A table of numbers and words becomes the arrays that it says, or is told what to change."""

import builtins
from pathlib import Path

import numpy as np
import pytest

from fipa_jax.data import own_arrays
from fipa_jax.data.tables import READERS, Columns

arrow = pytest.importorskip("pyarrow", reason="pyarrow reads tables")

ROWS = {
    "age": [63, 41, 57, 70],
    "smokes": [True, False, False, True],
    "chest": ["none", "typical", "none", "other"],
    "client": ["Basel", "Ulm", "Basel", "Ulm"],
    "y": [1.5, 2.5, 0.5, 3.0],
    "z": [1, 2, 3, 4],
}


def _write(folder, ending, rows):
    from pyarrow import csv, parquet

    path, table = folder / f"mine{ending}", arrow.table(rows)
    {".csv": csv.write_csv, ".parquet": parquet.write_table}[ending](table, path)
    return str(path)


@pytest.mark.parametrize("ending", READERS)
def test_columns_become_inputs_targets_and_owners(tmp_path, ending):
    found = own_arrays.read(_write(tmp_path, ending, ROWS))
    words = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]])  # none, other, typical
    np.testing.assert_array_equal(found["x"], np.c_[ROWS["age"], ROWS["smokes"], words, ROWS["z"]])
    np.testing.assert_array_equal(found["y"], np.array(ROWS["y"])[:, None])
    assert found["client"].tolist() == ROWS["client"]


def test_named_columns_are_taken_and_the_owner_never_as_an_input(tmp_path):
    file = _write(tmp_path, ".csv", ROWS)
    found = own_arrays.read(file, Columns(targets=("y", "z"), inputs=("age",), client="chest"))
    np.testing.assert_array_equal(found["x"], np.array(ROWS["age"])[:, None])
    np.testing.assert_array_equal(found["y"], np.stack([ROWS["y"], ROWS["z"]], 1))
    assert found["client"].tolist() == ROWS["chest"]
    assert own_arrays.read(file, Columns(client="chest"))["x"].shape[1] == len(["age", "smokes", "Basel", "Ulm", "z"])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (Columns(inputs=("age", "y")), "inputs: names 'y', which is a target"),
        (Columns(targets=("z",), inputs=("z",)), "inputs: names 'z', which is a target"),
        (Columns(inputs=("age", "client")), r"inputs: names 'client', which is the owner, config\.task\.client"),
        (Columns(targets=("chest",), client="chest"), "targets: names 'chest', which is the owner"),
        (Columns(targets=("y", "y")), r"targets: names 'y', which is config\.task\.targets already"),
        (Columns(inputs=("age", "z", "age")), r"inputs: names 'age', which is config\.task\.inputs already"),
    ],
)
def test_a_column_is_one_thing_alone(tmp_path, columns, said):
    file = _write(tmp_path, ".csv", ROWS)
    with pytest.raises(ValueError, match=rf"^config\.task\.{said}.*; name a column once"):
        own_arrays.read(file, columns)


def test_words_may_be_targets(tmp_path):
    found = own_arrays.read(_write(tmp_path, ".parquet", ROWS), Columns(targets=("chest",)))
    assert found["y"].tolist() == ROWS["chest"]


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (ROWS, Columns(targets=("yy",)), "no column 'yy'; it has age, smokes, .*config.task.targets"),
        (ROWS, Columns(inputs=("agee",)), "no column 'agee'"),
        (ROWS | {"age": [63, None, 57, None]}, Columns(), "nothing in 2 rows of column 'age', first in row 1"),
        (ROWS | {"age": [63.0, float("nan"), 57, 1]}, Columns(), "NaN or infinity in 1 rows of x, first in row 1"),
        (ROWS, Columns(targets=("chest", "y")), "words in one of the targets chest, y"),
        ({"y": [1, 2]}, Columns(), "no column besides its targets"),
        (ROWS, Columns(client="hospitl"), r"no column 'hospitl'; it has age, smokes, .*config\.task\.client"),
        (ROWS | {"": [0, 1, 2, 3]}, Columns(), "a column '', a table's row numbers; leave it out"),
        (ROWS | {"__index_level_0__": [0, 1, 2, 3]}, Columns(), "column '__index_level_0__', a table's row numbers"),
        ({"x": [[1], [2]], "y": [1, 2]}, Columns(), "column 'x' of type list"),
        (
            {"x": [f"w{i}" for i in range(60)], "y": [1] * 60},
            Columns(),
            "60 different words in column 'x', more than 50",
        ),
        ({"x": [1.0], "y": [1.0], "client": [0.5]}, Columns(), None),
    ],
)
def test_a_table_that_does_not_fit_is_told_what_to_change(tmp_path, rows, columns, said):
    file = _write(tmp_path, ".parquet", rows)
    if said is None:
        assert own_arrays.read(file, columns)["client"].tolist() == ["0.5"]
        return
    with pytest.raises(ValueError, match=rf"config\.task\.file: .*mine\.parquet' .*{said}"):
        own_arrays.read(file, columns)


@pytest.mark.parametrize(("ending", "content"), [(".csv", b""), (".csv", b"a,b\n1,2,3\n"), (".parquet", b"PAR1 no")])
def test_what_is_no_table_is_named(tmp_path, ending, content):
    (tmp_path / f"mine{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.task\.file: .* cannot be read as a \{ending} table"):
        own_arrays.read(str(tmp_path / f"mine{ending}"))


@pytest.mark.parametrize(
    ("gap", "refused"), [("", True), ("NA", True), ('""', True), ('"NA"', True), ("nothing", False)]
)
@pytest.mark.parametrize("column", ["age", "chest", "y", "client"])
def test_a_gap_among_words_is_no_word(tmp_path, gap, refused, column):
    """Neither an input, nor a class, nor an owner, in quotes or not."""
    rows = {
        "age": ["63", "41", "57"],
        "chest": ["none", "other", "none"],
        "client": ["a", "b", "a"],
        "y": ["n", "y", "n"],
    }
    rows[column][1] = gap
    lines = [",".join(rows), *(",".join(line) for line in zip(*rows.values(), strict=True))]
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
    if not refused:
        found = own_arrays.read(str(tmp_path / "mine.csv"))
        assert len(found["x"]) == 3 and (column in ("age", "chest") or gap in found[column])
        return
    with pytest.raises(ValueError, match=rf"nothing in 1 rows of column '{column}', first in row 1; fill or drop them"):
        own_arrays.read(str(tmp_path / "mine.csv"))


def test_a_column_that_is_not_asked_for_may_be_anything(tmp_path):
    dates = arrow.array([0, 1, None, 3], arrow.date32())
    file = _write(tmp_path, ".parquet", ROWS | {"when": dates, "note": [None, "", "x", None]})
    assert own_arrays.read(file, Columns(inputs=("age", "z")))["x"].shape == (4, 2)
    with pytest.raises(ValueError, match=r"'when', first in row 2; .* or name in config\.task\.inputs those of age, "):
        own_arrays.read(file)
    with pytest.raises(ValueError, match=r"rows of column 'when', first in row 2; fill or drop them$"):
        own_arrays.read(file, Columns(inputs=("age", "z"), client="when"))


@pytest.mark.parametrize("text", ["a,gr\xf6\xdfe,y\n1,2,3\n4,5,6\n", "a,b,y\n\xfcber,2,3\nunter,5,6\n"])
def test_words_that_are_not_utf_8_are_named(tmp_path, text):
    (tmp_path / "mine.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.task\.file: .*mine\.csv' .*; save (it|the file) as UTF-8"):
        own_arrays.read(str(tmp_path / "mine.csv"))


@pytest.mark.parametrize("ending", READERS)
def test_an_ending_may_be_in_capitals(tmp_path, ending):
    file = Path(_write(tmp_path, ending, ROWS)).rename(tmp_path / f"MINE{ending.upper()}")
    assert own_arrays.read(str(file))["client"].tolist() == ROWS["client"]


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    file, real = _write(tmp_path, ".csv", ROWS), builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError("no module", name="pyarrow")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs pyarrow, which the extra fipa_jax\[tables\] brings: pip install"):
        own_arrays.read(file)
