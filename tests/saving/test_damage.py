"""Prepared data that are missing, truncated or altered are named before a run starts, and run no code of theirs."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from helpers import toy

from fipa_jax.data import loading as data
from fipa_jax.data import sources as datasets
from fipa_jax.files import SUMS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A prepared data set with its digests."""
    root = toy.prepare(tmp_path_factory.mktemp("tfds"))
    data.write_sums(root / "toy" / "1.0.0")
    return root


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to be damaged, as others prepare it: without digests."""
    shutil.copytree(whole, tmp_path / "data")
    folder = tmp_path / "data" / "toy" / "1.0.0"
    (folder / SUMS).unlink()
    return folder


def load(folder):
    return data.load("toy", "train", str(folder.parent.parent), str(folder.parent.parent.parent / "cache"))


def records(folder, split="train"):
    return folder / f"toy-{split}.array_record-00000-of-00001"


def refused(folder):
    with pytest.raises(ValueError, match=r"config\.data\.dir: .*prepare it anew: .*tfds build toy") as caught:
        load(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not list(folder.parents[2].glob("cache/*")), "what is damaged is not cached"
    return str(caught.value)


def cut(file, length):
    return lambda folder: os.truncate(folder / file, length)


def edit(file, old, new):
    return lambda folder: (folder / file).write_text(re.sub(old, new, (folder / file).read_text(), count=1))


RECORDS = records(data.Path()).name


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: records(folder).unlink(),
        cut(RECORDS, 0),
        cut(RECORDS, 5000),
        cut(RECORDS, 65536),
        cut(RECORDS, 131071),
        lambda folder: records(folder).write_bytes(b"garbled" * 20000),
        cut("dataset_info.json", 0),
        cut("dataset_info.json", 100),
        edit("dataset_info.json", '"24"', '"25"'),
        edit("dataset_info.json", '"version".*', '"version": ""'),
        lambda folder: (folder / "features.json").unlink(),
        cut("features.json", 100),
        edit("features.json", "dimensions", "dimensionz"),
        lambda folder: (folder / "features.json").write_text("{}"),
        lambda folder: (folder / "features.json").write_bytes(b"\xff\xfe"),
    ],
)
def test_damaged_files_are_named_with_the_way_out(folder, damage):
    damage(folder)
    refused(folder)


def test_a_flipped_bit_in_a_record_is_found(folder):
    """By array_record's own hashes; the gaps between its blocks hold nothing."""
    path, before = records(folder), load(folder)
    shutil.rmtree(folder.parents[2] / "cache")
    content, draw = path.read_bytes(), np.random.default_rng(0)
    held = np.flatnonzero(np.frombuffer(content, np.uint8))
    for position in draw.choice(held[held >= 64], 40, replace=False):  # after the signature
        altered = bytearray(content)
        altered[position] ^= 1 << draw.integers(8)
        path.write_bytes(altered)
        refused(folder)
    path.write_bytes(content)
    assert np.array_equal(load(folder)["image"], before["image"])


@pytest.mark.parametrize("file", [RECORDS, "dataset_info.json", "features.json"])
def test_digests_find_what_is_another_whole_file(whole, tmp_path, file):
    shutil.copytree(whole, tmp_path / "data")
    folder = tmp_path / "data" / "toy" / "1.0.0"
    load(folder)
    shutil.rmtree(tmp_path / "cache")
    if file == RECORDS:  # a whole file of records, but of other ones
        records(folder).write_bytes(records(folder, "test").read_bytes())
    else:
        (folder / file).write_text(f"{(folder / file).read_text()} ")
    assert f"{file} is not as it was prepared" in refused(folder)


def test_what_is_prepared_here_has_digests(official, tmp_path):
    folder, _ = official("mnist")
    prepared = datasets.prepare("mnist", str(tmp_path / "data"), str(folder))
    listed = [line.split("  ")[1] for line in (prepared / SUMS).read_text().splitlines()]
    assert sorted([*listed, SUMS]) == sorted(path.name for path in prepared.iterdir())
    data.verify(prepared)


FEATURE = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"


@pytest.mark.parametrize("form", ["camel case", "snake case", "legacy", "nested text", "info"])
def test_a_prepared_folder_imports_no_code_but_that_of_tfds(folder, form, monkeypatch, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "features.json"
    if form == "info":
        edit("dataset_info.json", "{", '{"features": {"pythonClassName": "evil.Label"},')(folder)
    elif form == "legacy":
        path.write_text(json.dumps({"type": "evil.Label", "content": {}}))
    elif form == "nested text":
        inner = json.dumps({"label": {"type": "evil.Label", "content": {}}})
        name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        path.write_text(json.dumps({"pythonClassName": name, "jsonFeature": {"json": inner}}))
    else:
        text = path.read_text().replace(FEATURE, "evil.Label")
        path.write_text(text.replace("pythonClassName", "python_class_name") if form == "snake case" else text)
    assert "names code that is not TFDS's, evil.Label" in refused(folder)
    assert not (tmp_path / "made").exists() and "evil" not in sys.modules


def test_the_module_that_a_description_names_is_not_imported(folder, monkeypatch, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    edit("dataset_info.json", '"moduleName".*', '"moduleName": "evil",')(folder)
    assert '"evil"' in (folder / "dataset_info.json").read_text()
    assert len(load(folder)["label"]) == toy.SPLITS["train"]
    assert not (tmp_path / "made").exists() and "evil" not in sys.modules


def test_an_empty_slice_is_an_error(whole, tmp_path):
    with pytest.raises(ValueError, match=r"config\.data: 'train\[5:3\]' of toy holds no examples"):
        data.load("toy", "train[5:3]", str(whole), str(tmp_path))
