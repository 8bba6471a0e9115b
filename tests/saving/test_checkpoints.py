"""Checkpoints come back as they were written, or are named and passed over; models are one portable file."""

import errno
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import files as files_lib
from fipa_jax import trees
from fipa_jax.saving import checkpoints as checkpoint
from fipa_jax.saving.checkpoints import Checkpoints
from fipa_jax.saving.model_files import export, load

TREE = {
    "params": {"Dense_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.full(3, -0.0)}},
    "server": {"count": np.int32(7), "half": np.ones(4, jnp.bfloat16), "mask": np.array([True, False])},
    "store": {"ids": np.zeros(0, np.int64), "rows": np.zeros((0, 2, 3), np.float32)},
}


def moved(by):
    """The tree with other parameters."""
    params = {"Dense_0": {name: leaf + by for name, leaf in TREE["params"]["Dense_0"].items()}}
    return TREE | {"params": params}


@pytest.fixture
def three(tmp_path):
    """A folder with the steps 1, 2, 3."""
    kept = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        kept.save(step, moved(step), {"rows": 10 * step})
    kept.close()
    return tmp_path / "checkpoints"


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def files(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def assert_is(saved, step):
    assert saved.step == step and saved.note["rows"] == 10 * step
    wanted = trees.paths(moved(step))
    assert saved.leaves.keys() == wanted.keys()
    for path, leaf in wanted.items():
        found = saved.leaves[path]
        assert found.dtype == leaf.dtype and found.shape == leaf.shape
        assert found.tobytes() == np.asarray(leaf).tobytes(), path


def test_the_last_step_comes_back_bit_for_bit(three):
    assert_is(checkpoint.recover(three), 3)
    assert_is(checkpoint.read(three / "1"), 1)


def test_no_step_goes_before_the_next_is_sealed(tmp_path, monkeypatch):
    """Also where only one is kept, and of one that loses its name."""
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, moved(1), {"rows": 10}, ["best"])
    kept.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sums_of", lambda folder: 1 / 0)
        kept.save(2, moved(2), {"rows": 20}, ["best"])
        with pytest.raises(OSError, match="checkpoint 2 could not be written"):
            kept.close()
    assert_is(checkpoint.recover(tmp_path), 1)
    assert steps(tmp_path) == [1]


def test_the_last_few_steps_stay_and_those_that_have_a_name(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step, names in ((1, ["start", "best"]), (2, ["best"]), (3, []), (5, []), (8, [])):
        kept.save(step, TREE, {}, names)
    kept.close()
    assert steps(tmp_path) == [1, 2, 5, 8]
    again = Checkpoints(tmp_path, keep=2)
    assert {name: step for name, (step, _) in again.named().items()} == {"start": 1, "best": 2}
    again.save(9, TREE, {}, ["best"])
    again.close()
    assert steps(tmp_path) == [1, 8, 9]


def test_every_flipped_bit_is_found_and_the_step_before_is_used(three, tmp_path, caplog):
    """In every file of the step, its own checksums included."""
    draw = np.random.default_rng(0)
    whole = tmp_path / "whole"
    three.rename(whole)
    names = [path.relative_to(whole / "3") for path in files(whole / "3") if path.stat().st_size]
    assert len(names) > 5
    for name in names:
        shutil.rmtree(three, ignore_errors=True)
        shutil.copytree(whole, three)
        content = bytearray((three / "3" / name).read_bytes())
        content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        (three / "3" / name).write_bytes(content)
        caplog.clear()
        assert_is(checkpoint.recover(three), 2)
        assert str(three / "3") in caplog.text and "damaged" in caplog.text
        assert steps(three) == [1, 2]
    assert len(list((tmp_path / "broken").iterdir())) == len(names), "what was broken is kept"


@pytest.mark.parametrize("damage", ["truncated", "missing", "surplus", "unreadable"])
def test_other_damage_is_found(three, damage, monkeypatch):
    file = three / "3" / "_CHECKPOINT_METADATA"
    if damage == "unreadable":
        digest = files_lib.digest_of_file

        def failing(path):
            if path.is_relative_to(three / "3"):
                raise OSError(errno.EIO, "Input/output error")
            return digest(path)

        monkeypatch.setattr(files_lib, "digest_of_file", failing)
        assert_is(checkpoint.recover(three), 2)
        return
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "missing":
        file.unlink()
    else:
        (three / "3" / "d").write_text("from elsewhere")
    with pytest.raises(ValueError, match=r"checkpoints/3 is damaged: \S+ is not as it was written"):
        checkpoint.read(three / "3")
    assert_is(checkpoint.recover(three), 2)


def test_what_was_being_written_is_no_step(three):
    (three / "4").mkdir()
    (three / "5.orbax-checkpoint-tmp").mkdir()
    assert_is(checkpoint.recover(three), 3)
    kept = Checkpoints(three, keep=3)
    kept.save(4, moved(4), {"rows": 40})
    kept.close()
    assert_is(checkpoint.recover(three), 4)
    assert not list(three.glob("*tmp*"))
    assert [path.name for path in (three.parent / "broken").iterdir()] == ["4"], "nothing is deleted"


def test_steps_without_seals_are_damaged_but_for_the_last(three):
    """Only that one can have been under way when the process ended."""
    for step in (2, 3):
        (three / str(step) / checkpoint.SEAL).unlink()
    assert_is(checkpoint.recover(three), 1)
    (three / "1" / checkpoint.SEAL).rename(three / "lost")
    shutil.copytree(three / "1", three / "2")
    with pytest.raises(
        ValueError, match=r"no checkpoint can be used; of the last one, .*1 is no checkpoint: it has no SHA256SUMS"
    ):
        checkpoint.recover(three)


def test_all_damaged_is_an_error_each_time_and_nothing_is_moved(three):
    for step in (1, 2, 3):
        os.truncate(next(path for path in files(three / str(step)) if path.stat().st_size > 100), 7)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of the last one, .*3 is damaged.* \(nor can the 2 before it\)"):
            checkpoint.recover(three)
    assert steps(three) == [1, 2, 3]
    assert checkpoint.recover(three / "none") is None


def test_a_step_of_no_use_is_passed_over(three):
    def check(note):
        if note["rows"] > 15:
            raise ValueError("too many rows")

    assert_is(checkpoint.recover(three, check), 1)
    assert steps(three) == [1]


def test_a_full_disk_is_said_before_anything_is_written(three, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = Checkpoints(three, keep=3)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 1\.0 MiB in .*checkpoints: No space left") as raised:
        kept.save(4, TREE, {})
    assert raised.value.errno == errno.ENOSPC
    kept.close()
    assert_is(checkpoint.recover(three), 3)
    assert not list(three.glob("*.partial"))


def test_a_write_that_fails_later_is_said_at_the_next_step_and_the_one_before_it_stays(three, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = Checkpoints(three, keep=3)
    monkeypatch.setattr(checkpoint, "write", full)
    kept.save(4, TREE, {})
    for attempt in (lambda: kept.save(5, TREE, {}), kept.close):
        with pytest.raises(OSError, match=r"checkpoint 4 could not be written to .*No space left"):
            attempt()
    assert_is(checkpoint.recover(three), 3)


def test_a_step_is_not_written_twice(three):
    kept = Checkpoints(three, keep=3)
    with pytest.raises(OSError, match="checkpoint 3 could not be written"):
        kept.save(3, TREE, {})
    kept.close()


def test_a_model_is_read_from_a_file_or_from_a_step(three, tmp_path):
    export(tmp_path / "model.msgpack", moved(3)["params"])
    for path in (tmp_path / "model.msgpack", three / "3"):
        for found in (load(path), load(path, moved(3)["params"])):
            for name, leaf in moved(3)["params"]["Dense_0"].items():
                np.testing.assert_array_equal(found["Dense_0"][name], leaf)
    other = {"Dense_0": {"kernel": np.zeros((2, 3), np.float32)}}
    with pytest.raises(ValueError, match=r"does not fit .*Dense_0/bias"):
        load(three / "3", other)


def test_the_digest_is_of_paths_types_shapes_and_contents():
    one = {"a": np.arange(6.0), "b": np.zeros(0)}
    same = dict(reversed(list({name: leaf.copy() for name, leaf in one.items()}.items())))
    assert checkpoint.digest(one) == checkpoint.digest(same)
    others = [
        {"a": np.arange(6.0), "c": np.zeros(0)},
        {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(0)},
        {"a": np.arange(6.0).view(np.int64), "b": np.zeros(0)},
        {"a": np.arange(6.0)[::-1], "b": np.zeros(0)},
        {"a": np.arange(6.0), "b": np.zeros(0, np.float32)},
    ]
    assert len({checkpoint.digest(tree) for tree in [one, *others]}) == 6


def test_a_flipped_bit_in_a_model_is_found(tmp_path):
    path, draw = tmp_path / "model.msgpack", np.random.default_rng(0)
    export(path, TREE["params"])
    whole = path.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.msgpack"):
            load(path)


def test_checksums_are_those_of_the_command(three):
    """`sha256sum -c SHA256SUMS` reads them."""
    lines = (three / "3" / checkpoint.SEAL).read_text().splitlines()
    assert all(len(line.split("  ")[0]) == 64 and (three / "3" / line.split("  ")[1]).is_file() for line in lines)
    assert json.loads((three / "3" / "_CHECKPOINT_METADATA").read_text())
