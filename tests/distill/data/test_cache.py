"""What is kept is used again while it is whole, and made again when it is not."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from piflow_edge.distill.data.array_cache import load_or_build
from piflow_edge.errors import DataError
from piflow_edge.system import cache_folder as places
from piflow_edge.system.cache_folder import cache_folder
from piflow_edge.system.files import sha256

ARRAY = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)


class CachedSet:
    def __init__(self, array, known):
        self.array, self.names = array, known["names"]

    def fingerprint(self):
        return sha256(self.array.tobytes() + "".join(self.names).encode())


@pytest.fixture
def place(tmp_path):
    return tmp_path / "sets" / "key"


def keep(place, builds, fail=None):
    def build(writer):
        builds.append(place)
        writer.append(ARRAY[:1])
        if fail:
            raise fail
        writer.append(ARRAY[1:])
        return {"names": ["a", "b"]}

    return load_or_build(place, "the set", build, CachedSet)


def files(place):
    return sorted(file.name for file in place.parent.iterdir())


def test_it_is_made_once(place):
    builds = []
    for _ in range(3):
        kept = keep(place, builds)
        np.testing.assert_array_equal(kept.array, ARRAY)
        assert isinstance(kept.array, np.memmap) and kept.names == ["a", "b"]
    assert len(builds) == 1
    assert files(place) == ["key.json", "key.lock", "key.npy"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def alter(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("key.npy", cut),
        ("key.npy", alter),
        ("key.npy", Path.unlink),
        ("key.npy", lambda file: file.write_bytes(b"")),
        ("key.npy", lambda file: np.save(file, np.zeros((2, 2)))),
        ("key.json", cut),
        ("key.json", lambda file: file.write_text("[]")),
        ("key.json", lambda file: file.write_text('{"known": {}}')),
        ("key.json", lambda file: file.write_text(file.read_text().replace('"b"', '"c"'))),
    ],
)
def test_what_was_damaged_is_made_again_and_said(place, caplog, name, damage):
    builds = []
    keep(place, builds)
    damage(place.parent / name)
    kept = keep(place, builds)
    np.testing.assert_array_equal(kept.array, ARRAY)
    assert kept.names == ["a", "b"] and len(builds) == 2
    assert "the set in the cache" in caplog.text and "damaged and made again" in caplog.text
    caplog.clear()
    keep(place, builds)
    assert len(builds) == 2 and not caplog.text


@pytest.mark.parametrize("fail", [KeyboardInterrupt(), DataError("no good"), OSError(errno.ENOSPC, "full")])
def test_what_was_cut_short_is_not_kept(place, caplog, fail):
    with pytest.raises((KeyboardInterrupt, DataError)):
        keep(place, [], fail)
    assert files(place) == ["key.lock"]
    np.testing.assert_array_equal(keep(place, []).array, ARRAY)
    assert not caplog.text


def test_what_a_killed_builder_left_is_removed(place):
    place.parent.mkdir()
    (place.parent / ".key.npy.0123abcd").write_bytes(b"half")
    (place.parent / ".other.npy.0123abcd").write_bytes(b"half")  # somebody else's, who may still be at it
    keep(place, [])
    assert files(place) == [".other.npy.0123abcd", "key.json", "key.lock", "key.npy"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.sets: .*PIFLOW_EDGE_CACHE"):
        keep(tmp_path / "file" / "sets" / "key", [])


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from piflow_edge.distill.data.array_cache import load_or_build
from piflow_edge.system.files import sha256

place, log = Path(sys.argv[1]), Path(sys.argv[2])

class Kept:
    def __init__(self, array, known):
        self.array = array
    def fingerprint(self):
        return sha256(self.array.tobytes())

def build(writer):
    with log.open("a") as file:
        file.write("built\\n")
    for i in range(10):
        writer.append(np.full((1, 1000), i))
        time.sleep(0.05)
    return {}

array = load_or_build(place, "the set", build, Kept).array
assert array.shape == (10, 1000) and (array == np.arange(10)[:, None]).all()
"""


def test_of_several_processes_one_builds_and_the_others_wait(place, tmp_path):
    command = [sys.executable, "-c", BUILDER, str(place), str(tmp_path / "log")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0 and not stderr
    assert (tmp_path / "log").read_text().count("built") == 1


def test_items_that_grow_are_rewritten_in_place(place):
    def build(writer):
        for item in ARRAY:
            writer.append(item[None, :1])
        writer.rewrite(lambda item: item.repeat(3, axis=1))
        writer.append(np.full((1, 3, 3), 99, np.uint8))
        return {"names": []}

    found = load_or_build(place, "the set", build, CachedSet).array
    np.testing.assert_array_equal(found[:4], ARRAY[:, :1].repeat(3, axis=1))
    assert found.shape == (5, 3, 3) and (found[4] == 99).all()


def test_the_folder_is_the_platforms_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PIFLOW_EDGE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PIFLOW_EDGE_CACHE")
    monkeypatch.setenv("HOME", "/home/of")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for platform, expected in {
        "linux": "/home/of/.cache/piflow-edge",
        "darwin": "/home/of/Library/Caches/piflow-edge",
        "win32": "/home/of/AppData/Local/piflow-edge",
    }.items():
        monkeypatch.setattr(places.sys, "platform", platform)
        assert cache_folder().as_posix() == expected
    monkeypatch.setattr(places.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder().as_posix() == "/elsewhere/piflow-edge"
