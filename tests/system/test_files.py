"""Files that are whole or absent, and what is said when they cannot be written."""

import errno
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from piflow_edge.system.files import check_place, check_room, new_folder, write_atomic

LONGEST = "é" * 125 + ".json"  # 255 bytes


def test_a_name_as_long_as_names_may_be(tmp_path):
    write_atomic(tmp_path / LONGEST, b"data")
    assert (tmp_path / LONGEST).read_bytes() == b"data" and len(os.listdir(tmp_path)) == 1
    with new_folder(tmp_path / LONGEST[:-5]) as folder:
        write_atomic(folder / "inside", b"")
    assert (tmp_path / LONGEST[:-5] / "inside").is_file()


def test_a_full_disk_says_what_did_not_fit(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space .*, 2\.5 MB to write, [\d.]+ MB free: '.*weights'"):
        write_atomic(tmp_path / "weights", bytes(2_500_000))
    assert not os.listdir(tmp_path)


def test_another_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/file'$"):
        write_atomic(tmp_path / "nowhere" / "file", b"")


def test_room_for_two_is_known_before_the_first_is_written(tmp_path):
    check_room(tmp_path, 1000, "a checkpoint")
    with pytest.raises(OSError, match=r"a checkpoint takes 1000000000000 MB, .* two; \d+ MB are free: '.*'"):
        check_room(tmp_path, 10**18, "a checkpoint")


def test_figures_of_a_full_disk_are_never_zero(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=123_456))
    with pytest.raises(OSError, match=r"a checkpoint takes 0\.09 MB, .* two; 0\.12 MB are free"):
        check_room(tmp_path, 90_000, "a checkpoint")


def test_a_full_disk_inside_a_folder_names_the_file_where_it_was_to_be(tmp_path):
    def fill(told, name=None):
        with new_folder(tmp_path / "bundle", size=3_500_000) as folder:
            raise OSError(errno.ENOSPC, told, name and str(folder / name))

    with pytest.raises(OSError, match=r"space, 1 MB to write, 1 MB free: '.*/bundle/one'$"):
        fill("space, 1 MB to write, 1 MB free", "one")
    with pytest.raises(OSError, match=r"space, 3\.5 MB to write, [\d.e+]+ MB free: '.*/bundle'$"):
        fill("space")  # as a write raises it
    assert not os.listdir(tmp_path)


def test_a_place_where_nothing_can_be_made_is_known_before(tmp_path):
    check_place(tmp_path / "new" / "file")
    assert os.listdir(tmp_path) == ["new"] and not os.listdir(tmp_path / "new")
    (tmp_path / "file").write_bytes(b"")
    check_place(tmp_path / "file")  # to be replaced
    with pytest.raises(NotADirectoryError, match=r"file/inside'$"):
        check_place(tmp_path / "file" / "inside")
    with pytest.raises(OSError, match=r"File name too long: '.*aé'$"):
        check_place(tmp_path / ("a" * 254 + "é"))


REPLACES = """
import sys
from pathlib import Path
from piflow_edge.system.files import new_folder, write_atomic

print("ready", flush=True)
for i in range(10**9):
    with new_folder(Path(sys.argv[1])) as folder:
        for name in ("manifest", "graph", "weights"):
            write_atomic(folder / name, b"%d " % i * 50_000)
"""


def test_whatever_is_killed_while_a_folder_is_replaced_leaves_a_whole_one(tmp_path):
    place, waits = tmp_path / "bundle", random.Random(0)
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", REPLACES, str(place)], stdout=subprocess.PIPE) as child:
            assert child.stdout.readline()
            while not place.exists():
                time.sleep(0.01)
            time.sleep(waits.uniform(0, 0.1))
            child.kill()
        # Between its two renames the old folder stands under a name of its own: nothing is lost then either.
        (found,) = [place] if place.exists() else tmp_path.glob(".bundle.*.old")
        contents = {file.read_bytes() for file in found.iterdir()}
        assert len(list(found.iterdir())) == 3 and len(contents) == 1
        assert len(set(contents.pop().split())) == 1
