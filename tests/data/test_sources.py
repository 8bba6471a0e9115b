"""Archives in the official layouts become what `data.load` reads, in their order; of others one hears what is wrong."""

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import archives

from fipa_jax.data import loading as data
from fipa_jax.data import sources as datasets

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(datasets.SOURCES)


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to download fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", refuse)


def leftovers(root):
    return [path for path in Path(root).rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_prepared_archives_load_as_they_are_and_in_their_order(name, official, tmp_path, offline):
    folder, arrays = official(name)
    prepared = datasets.prepare(name, tmp_path / "data", folder)
    assert prepared == tmp_path / "data" / name / datasets.SOURCES[name].version
    assert arrays.keys() == {"train", data.test_split(name)}
    for split, (shown, labels) in arrays.items():
        loaded = data.load(name, split, str(tmp_path / "data"), str(tmp_path / "cache"))
        np.testing.assert_array_equal(loaded["image"], shown)
        np.testing.assert_array_equal(loaded["label"], labels)
    assert data.in_original_order(name, str(tmp_path / "data"))
    wanted = 3 if name == "tiny_imagenet" else 100 if name == "cifar100" else 10
    assert len(data.class_names(name, str(tmp_path / "data"))) == wanted
    mean, std = data.standardise(name, loaded["image"])
    assert mean.shape == std.shape == (datasets.SOURCES[name].shape[-1],)
    assert "tensorflow" not in sys.modules


def test_the_order_holds_over_several_record_files(official, tmp_path, monkeypatch):
    folder, arrays = official("mnist")
    from tensorflow_datasets.core.utils import shard_utils

    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *args, **kwargs: 3)
    prepared = datasets.prepare("mnist", tmp_path / "data", folder)
    assert len(list(prepared.glob("mnist-train.array_record-*"))) == 3
    loaded = data.load("mnist", "train", str(tmp_path / "data"), str(tmp_path / "cache"))
    np.testing.assert_array_equal(loaded["image"], arrays["train"][0])


def test_class_names_and_versions_are_those_of_tfds(official, tmp_path):
    for name, (first, last) in {"cifar10": ("name0", "name9"), "tiny_imagenet": ("n01", "n03")}.items():
        folder, _ = official(name)
        prepared = datasets.prepare(name, tmp_path / "data", folder)
        names = (prepared / "label.labels.txt").read_text().split()
        assert (names[0], names[-1]) == (first, last)
        theirs = ROOT / "../shared/data" / name / datasets.SOURCES[name].version / "features.json"
        if theirs.is_file():
            fields = [
                json.loads(p.read_text())["featuresDict"]["features"] for p in (theirs, prepared / "features.json")
            ]
            assert fields[0].keys() == fields[1].keys()
            assert fields[0]["image"]["image"]["shape"] == fields[1]["image"]["image"]["shape"]


def test_prepared_data_are_left_as_they_are(official, tmp_path):
    folder, _ = official("mnist")
    prepared = datasets.prepare("mnist", tmp_path / "data", folder)
    before = {path: path.stat().st_mtime_ns for path in leftovers(prepared)}
    assert datasets.prepare("mnist", tmp_path / "data", "nowhere") == prepared
    assert before == {path: path.stat().st_mtime_ns for path in leftovers(prepared)}
    (prepared / "dataset_info.json").unlink()
    with pytest.raises(FileExistsError, match="holds no prepared data set; remove it"):
        datasets.prepare("mnist", tmp_path / "data", folder)


def test_every_source_has_its_statistics_and_known_checksums():
    assert set(datasets.SOURCES) == set(data.CHANNEL_STATS)
    for name, source in datasets.SOURCES.items():
        assert all(len(checksum) == 64 for checksum in source.archives.values())
        assert all(len(numbers) == source.shape[-1] for numbers in data.CHANNEL_STATS[name])
    from tensorflow_datasets.core.download import checksums

    theirs = checksums.get_all_url_infos()
    for name in set(datasets.SOURCES) - {"tiny_imagenet"}:
        for file, checksum in datasets.SOURCES[name].archives.items():
            assert theirs[f"{datasets.SOURCES[name].url}/{file}"].checksum == checksum


@pytest.fixture
def served(tmp_path):
    """A web server of the folder `archives`; its address and the paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "archives")

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_archives_are_downloaded_once_and_checked(official, served, tmp_path):
    url, asked = served
    _, arrays = official("mnist", url=url)
    datasets.prepare("mnist", tmp_path / "data")
    loaded = data.load("mnist", "test", str(tmp_path / "data"), str(tmp_path / "cache"))
    np.testing.assert_array_equal(loaded["label"], arrays["test"][1])
    assert sorted(asked) == sorted(f"/{file}" for file in datasets.SOURCES["mnist"].archives)
    kept = tmp_path / "data" / "downloads" / "mnist"
    assert {path.name for path in kept.iterdir()} == set(datasets.SOURCES["mnist"].archives)
    for path in leftovers(tmp_path / "data" / "mnist"):
        path.unlink()
    (tmp_path / "data" / "mnist" / "3.0.1").rmdir()
    asked.clear()
    datasets.prepare("mnist", tmp_path / "data")
    assert not asked


def test_a_wrong_or_truncated_download_is_not_kept(official, served, tmp_path):
    url, _ = served
    folder, _ = official("cifar10", url=url)
    archive = folder / "cifar-10-binary.tar.gz"
    needed = datasets.SOURCES["cifar10"].archives[archive.name]
    archive.write_bytes(archive.read_bytes()[:-100])
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{archive.name} is not the official file.*{needed}, got {got}.*fetch {url}"):
        datasets.prepare("cifar10", tmp_path / "data")
    assert not leftovers(tmp_path / "data")


def test_without_network_the_error_says_what_to_fetch(official, tmp_path):
    official("mnist", url="http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"cannot be downloaded.*train-images.*, t10k-labels.*--manual-dir"):
        datasets.prepare("mnist", tmp_path / "data")
    assert not leftovers(tmp_path / "data")


def test_a_missing_page_is_an_error(official, served, tmp_path):
    url, _ = served
    official("mnist", url=url + "/nowhere")
    with pytest.raises(OSError, match=r"cannot be downloaded .*404"):
        datasets.prepare("mnist", tmp_path / "data")


@pytest.mark.parametrize("name", NAMES)
def test_the_manual_folder_must_hold_the_official_files(name, official, tmp_path, offline):
    (tmp_path / "empty").mkdir()
    source = datasets.SOURCES[name]
    with pytest.raises(FileNotFoundError, match="is not there; the data set needs") as error:
        datasets.prepare(name, tmp_path / "data", tmp_path / "empty")
    assert all(file in str(error.value) for file in source.archives) and source.url in str(error.value)
    folder = tmp_path / "archives"
    folder.mkdir()
    archives.MAKERS[name](folder)  # in the right layout, but not the official ones
    file, checksum = next(iter(source.archives.items()))
    with pytest.raises(ValueError, match=f"{file} is not the official file.*needed SHA-256 {checksum}, got "):
        datasets.prepare(name, tmp_path / "data", folder)
    assert not leftovers(tmp_path / "data")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_bytes(b"garbled" * 100)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut, garble, empty])
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "tiny_imagenet"])
def test_an_unreadable_archive_is_named_and_leaves_nothing(name, spoil, official, tmp_path):
    """Should its checksum be right all the same."""
    folder, _ = official(name)
    file = list(datasets.SOURCES[name].archives)[-1]
    spoil(folder / file)
    official.admit(name, folder)
    with pytest.raises(ValueError, match=f"{file} is damaged or laid out in another way"):
        datasets.prepare(name, tmp_path / "data", folder)
    assert not leftovers(tmp_path / "data")


def without_member(folder):
    archives.tar(folder / "cifar-10-binary.tar.gz", {"cifar-10-batches-py/data_batch_1": b"pickled"})


def cut_record(folder):
    files = {f"cifar-10-batches-bin/{file}": bytes(3073) for file in [*datasets.CIFAR10_TRAIN[:4], "test_batch.bin"]}
    names = {"cifar-10-batches-bin/batches.meta.txt": b"a\nb\n"}
    archives.tar(
        folder / "cifar-10-binary.tar.gz", {**files, **names, "cifar-10-batches-bin/data_batch_5.bin": bytes(3072)}
    )


@pytest.mark.parametrize("spoil", [without_member, cut_record])
def test_a_wrong_layout_of_cifar(spoil, official, tmp_path):
    folder, _ = official("cifar10")
    spoil(folder)
    official.admit("cifar10", folder)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is damaged or laid out in another way"):
        datasets.prepare("cifar10", tmp_path / "data", folder)
    assert not leftovers(tmp_path / "data")


def test_links_and_paths_in_an_archive_lead_nowhere(official, tmp_path):
    """A link as a member is no file; a path out of the archive's folder is never asked for, for nothing is unpacked."""
    folder, _ = official("cifar10")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-bin/batches.meta.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        out = tarfile.TarInfo("../../written")
        archive.addfile(out, io.BytesIO())
    official.admit("cifar10", folder)
    with pytest.raises(ValueError, match="damaged or laid out in another way"):
        datasets.prepare("cifar10", tmp_path / "data", folder)
    assert not list(tmp_path.rglob("written"))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (struct.pack(">4I", 2049, 2, 28, 28) + bytes(2 * 784), struct.pack(">2I", 2049, 2) + bytes(2)),  # magic number
        (struct.pack(">4I", 2051, 2, 28, 28) + bytes(784), struct.pack(">2I", 2049, 2) + bytes(2)),  # one image less
        (
            struct.pack(">4I", 2051, 2, 28, 28) + bytes(2 * 784),
            struct.pack(">2I", 2049, 3) + bytes(3),
        ),  # one label more
    ],
)
def test_a_wrong_layout_of_mnist(images, labels, official, tmp_path):
    folder, _ = official("mnist")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    official.admit("mnist", folder)
    with pytest.raises(ValueError, match=r"train-.*-ubyte.gz is damaged or laid out in another way"):
        datasets.prepare("mnist", tmp_path / "data", folder)
    assert not leftovers(tmp_path / "data")


@pytest.mark.parametrize("missing", ["wnids.txt", "n02_boxes.txt", "n02_11.JPEG", "val_annotations.txt", "val_4.JPEG"])
def test_a_wrong_layout_of_tiny_imagenet(missing, official, tmp_path):
    folder, _ = official("tiny_imagenet")
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if not name.endswith(missing)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    official.admit("tiny_imagenet", folder)
    with pytest.raises(ValueError, match=f"tiny-imagenet-200.zip is damaged or laid out in another way.*{missing}"):
        datasets.prepare("tiny_imagenet", tmp_path / "data", folder)
    assert not leftovers(tmp_path / "data")


def test_a_full_disk_leaves_nothing_half_prepared(official, tmp_path, monkeypatch):
    folder, _ = official("cifar10")
    from array_record.python import array_record_module

    class Full(array_record_module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device")  # so it fails on a file system that is full

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(OSError, match=r"cifar10/3.0.2 cannot be written, and nothing is left of it.*No space left"):
            datasets.prepare("cifar10", tmp_path / "data", folder)
    assert not leftovers(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="is not prepared"):
        data.load("cifar10", "train", str(tmp_path / "data"))
    datasets.prepare("cifar10", tmp_path / "data", folder)


def test_a_full_disk_stops_a_download(official, served, tmp_path, monkeypatch):
    official("cifar10", url=served[0])

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"cannot be downloaded.*No space left on device.*disk"):
        datasets.prepare("cifar10", tmp_path / "data")
    assert not leftovers(tmp_path / "data")


def test_what_a_killed_preparation_left_is_not_loaded(official, tmp_path):
    folder, _ = official("mnist")
    prepared = datasets.prepare("mnist", tmp_path / "data", folder)
    prepared.rename(prepared.parent / "incomplete.ABC123_3.0.1")  # TFDS's name for it
    with pytest.raises(FileNotFoundError, match="is not prepared"):
        data.load("mnist", "train", str(tmp_path / "data"))


def test_an_unknown_data_set_lists_the_known():
    with pytest.raises(ValueError, match="data set to prepare: unknown 'cifar1'; known: cifar10, cifar100, fashion"):
        datasets.prepare("cifar1")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "PIL"])
def test_missing_packages_are_named_before_anything_is_downloaded(official, tmp_path, monkeypatch, offline, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"preparing mnist needs {package}, which .*fipa_jax.tfds.*: pip install"):
        datasets.prepare("mnist", tmp_path)


def run(*args):
    command = [sys.executable, "scripts/prepare_data.py", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_the_command_ends_in_one_line_of_error(tmp_path):
    result = run("mnist", f"--data-dir={tmp_path / 'data'}", f"--manual-dir={tmp_path}")
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "train-images-idx3-ubyte.gz" in line
    result = run("cifar1")
    assert result.returncode == 2 and "invalid choice: 'cifar1'" in result.stderr
