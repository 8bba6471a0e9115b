"""Each mistake of scripts/harness/mistakes.py is told in one line; nothing that a user's file holds is unpickled."""

import importlib
import pickle
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from fipa_jax.config import command_line
from fipa_jax.data import loading as data
from fipa_jax.data import own_arrays, partition
from fipa_jax.files import digest_of_file
from fipa_jax.run import experiment
from fipa_jax.run import phase_parts as phase
from fipa_jax.saving.model_files import load

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
mistakes = importlib.import_module("harness.mistakes")
sys.path.remove(str(ROOT / "scripts"))
# Those for which the script itself is started: of each kind one.
STARTED = (
    "misspelt flag", "misspelt field", "text for a number", "variant", "no config file", "config file: field",
    "work directory is a file", "work directory in a file", "config file: no return", "data folder", "rank",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by ml_collections


def parse(argv):
    """The config that the script's flags give."""
    values = flags.FlagValues()
    sys.modules.pop("config_config", None)  # what the last file has defined
    argv = ["train.py", *argv]
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    command_line.parse(argv, config, ROOT / "configs" / "sine.py", values)
    return config.value


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    mistakes.write_files(folder)
    return folder


@pytest.mark.parametrize("mistake", [name for name in mistakes.MISTAKES if "work directory" not in name])
def test_a_mistake_is_one_line(mistake, files, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises((ValueError, OSError)) as caught:
        config = parse(mistakes.flags(mistake, files))
        with jax.enable_x64(config.precision == "float64"):
            experiment.build(config)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000
    if mistake not in ("misspelt flag", "resume"):  # other flags are there
        assert not mistakes.unsaid(mistake, str(caught.value)), caught.value


@pytest.mark.parametrize("mistake", ["local optimiser", "server optimiser", "solver", "form", "devices"])
def test_names_are_looked_up_before_data_are_loaded(mistake):
    config = parse(mistakes.flags(mistake, Path()))
    with pytest.raises(ValueError) as caught:
        phase.check(config)
    assert not mistakes.unsaid(mistake, str(caught.value)) and "(in the method 'fipa')" in str(caught.value)


@pytest.mark.parametrize("mistake", STARTED)
def test_a_mistake_in_the_script_is_one_line_and_nothing_is_written(mistake, tmp_path):
    row = mistakes.start(mistake, tmp_path)
    assert not row.wrong, row


@pytest.mark.parametrize("words", [["--config.model.widths=(8,)"], ["--config.model.widths", "(8, 2)"]])
def test_the_last_of_two_flags_counts_for_tuples_too(words):
    config = parse([*words, "--config.seed=1", "--config.model.widths=(4,)", "--config.seed=2"])
    assert config.model.widths == (4,) and config.seed == 2
    assert parse(["--config.model.widths=(4,)", *words]).model.widths[0] == 8


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line.os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=f"--workdir: .* but {tmp_path} cannot be written to"):
        command_line.check_workdir(tmp_path / "new" / "run")
    (tmp_path / "there").mkdir()
    command_line.check_workdir(tmp_path / "there" / "run")
    assert not list((tmp_path / "there").iterdir())


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def npz(path, **arrays):
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array, allow_pickle=True)


@pytest.fixture
def bomb(tmp_path):
    """An object array, and the file that is there once it is unpickled."""
    made = tmp_path / "made"
    return np.array([Bomb(made)], object), made


@pytest.mark.parametrize("kind", ["npz", "npy", "pickle"])
@pytest.mark.parametrize(
    ("read", "said"),
    [
        (own_arrays.read, r"config\.task\.file: .*evil"),
        (lambda file: partition.partition("file", np.arange(3), 1, 0, file=file), r"config\.partition\.file: .*evil"),
        (lambda file: load(file, {"w": np.zeros(3)}), "evil.* is not a model file"),
    ],
    ids=["own arrays", "split", "model"],
)
def test_nothing_is_unpickled(read, said, kind, bomb, tmp_path):
    array, made = bomb
    for suffix in (".npz", ".npy", ".json", ".msgpack"):  # whatever its name says
        path = tmp_path / f"evil{suffix}"
        if kind == "npz":
            npz(path, x=array, y=array, **{"0": array})
        elif kind == "npy":
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(array[0]))
        with pytest.raises(ValueError, match=said) as caught:
            read(str(path))
        assert "allow_pickle" not in str(caught.value), "that is no advice to give"
    assert not made.exists()
    pickle.loads(pickle.dumps(array[0])).close()
    assert made.exists(), "the bomb is one"


def test_a_cached_array_is_not_unpickled(bomb, tmp_path):
    """Not even where its digest is right."""
    array, made = bomb
    paths = {field: tmp_path / f"{field}.npy" for field in ("image", "label")}
    data._write_cache(paths, {"image": np.zeros([1, 2, 2, 3], np.uint8), "label": np.zeros([1], np.int32)})
    assert data._read_cache(paths, 1) is not None
    np.save(paths["image"], array, allow_pickle=True)
    data._sum(paths["image"]).write_text(digest_of_file(paths["image"]))
    assert data._read_cache(paths, 1) is None
    assert not made.exists()


@pytest.mark.parametrize("archive", ["own arrays", "split"])
def test_an_altered_archive_is_read_as_it_was_or_refused(archive, tmp_path):
    """Every bit of the part that is not covered by a checksum, the names and lengths, and of some that is."""
    path, arrays = tmp_path / "mine.npz", {"x": np.ones((5, 1)), "y": np.ones(5), "client": np.arange(5)}
    if archive == "split":
        arrays = {"0": np.arange(3), "1": np.arange(3, 5)}
    np.savez(path, **arrays)
    read = lambda: own_arrays.read(str(path)) if archive == "own arrays" else dict(enumerate(split(path)))
    split = lambda file: partition.from_file(None, np.arange(5), 2, str(file))
    whole, before, refused = path.read_bytes(), read(), 0
    draw = np.random.default_rng(0)
    directory = whole.index(b"PK\x01\x02")
    positions = [*range(directory, len(whole)), *draw.integers(0, directory, 100)]
    for position in positions:
        altered = bytearray(whole)
        altered[position] ^= 1 << draw.integers(8)
        path.write_bytes(altered)
        try:
            after = read()
        except ValueError as error:
            assert "mine.npz" in str(error)
            refused += 1
        else:
            assert after.keys() == before.keys()
            assert all(np.array_equal(after[name], before[name]) for name in before), position
    assert refused > len(positions) / 4
    for length in draw.integers(0, len(whole), 20):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"mine\.npz"):
            read()


def test_an_array_of_a_size_that_does_not_exist_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**14, 1)})
    with pytest.raises(ValueError, match=r"config\.task\.file: .* 'x' that cannot be read"):
        own_arrays.read(str(tmp_path / "mine.npz"))


def test_a_misspelt_array_is_not_left_aside(tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.ones((5, 1)), y=np.ones(5), cliend=np.arange(5), weather=np.ones(2))
    with pytest.raises(ValueError, match="has an array 'cliend'; did you mean 'client'"):
        own_arrays.read(str(tmp_path / "mine.npz"))
