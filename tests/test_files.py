"""Files are written whole or not at all, whoever else writes them, and nothing is left of an attempt."""

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest

from fipa_jax import files
from fipa_jax.files import SUMS, check_room, remove_partial, replacing, sums_of, write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "rows.json"
    write(path, b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old" and temporary.parent == tmp_path
    assert path.read_bytes() == b"new" and names(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "stopped"])
@pytest.mark.parametrize("begun", [False, True])
def test_nothing_is_left_of_an_attempt_that_failed(tmp_path, error, begun):
    path = tmp_path / "rows.json"
    write(path, b"old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        if begun:
            temporary.write_bytes(b"ne")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == [path.name]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    write(tmp_path / "rows.json", b"new")
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder's list of names


def test_writers_do_not_disturb_one_another(tmp_path):
    """Whatever their order, the file is that of one of them."""
    path, contents = tmp_path / "chunks.json", [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and names(tmp_path) == [path.name]


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    write(tmp_path / "rows.json", b"whole")
    left = replacing(tmp_path / "rows.json")
    left.__enter__().write_bytes(b"ha")
    assert len(names(tmp_path)) == 2
    remove_partial(tmp_path)
    assert names(tmp_path) == ["rows.json"]


def test_sums_are_those_of_the_command(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_text(name)
    write(tmp_path / SUMS, sums_of(tmp_path))
    assert sums_of(tmp_path) == (tmp_path / SUMS).read_bytes(), "they do not count themselves"
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, check=True, capture_output=True)


def test_room_is_looked_for_and_given_back(tmp_path):
    check_room(tmp_path, 1000)
    with pytest.raises(OSError, match="no room for"):
        check_room(tmp_path, 2**62)
    assert not names(tmp_path)


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "http://host/x", "file:///tmp/x", "gs:/bucket"])
def test_addresses_are_no_paths(path):
    with pytest.raises(ValueError, match=r"config\.init_from: .* is an address; needs a path on this machine"):
        files.local(path, "config.init_from")


def test_a_home_is_found_and_one_of_nobody_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local("~/runs", "--workdir") == tmp_path / "runs"
    assert files.local("runs/x:1", "--workdir") == Path("runs/x:1")
    with pytest.raises(ValueError, match=r"--workdir: '~nobody-of-that-name/x' begins with the home of nobody"):
        files.local("~nobody-of-that-name/x", "--workdir")


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_is_read_with_or_without_a_byte_order_mark(tmp_path, coding):
    (tmp_path / "text").write_bytes("[1, 2]  # größer".encode(coding))
    assert files.read_text(tmp_path / "text") == "[1, 2]  # größer"


def test_another_programs_download_is_no_file_of_ours(tmp_path):
    (tmp_path / "film.partial").write_text("theirs")
    (tmp_path / f"rows.json.{'0' * 8}{files.PARTIAL}").write_text("ours")
    remove_partial(tmp_path)
    assert names(tmp_path) == ["film.partial"]


def test_a_name_of_many_bytes_can_be_replaced(tmp_path):
    path = tmp_path / ("ü" * 120)
    write(path, b"new")
    assert path.read_bytes() == b"new"
