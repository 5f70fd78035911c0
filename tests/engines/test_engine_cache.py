"""Engines on disk: found under all they depend on, whole or not at all, also with several processes at once."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from piflow_edge.engines import Graph
from piflow_edge.engines.building import engine_cache
from piflow_edge.engines.building.engine_cache import EngineKey, get_or_build, miss, newest
from piflow_edge.errors import EngineError

GRAPH = Graph(b"model")
KEY = EngineKey("tensorrt", GRAPH.sha256, "fp16", "1:1:8", "10.3.0", "12.6", "Orin", "8.7", "workspace=all")

PLACE = {name: getattr(KEY, name) for name in ("backend", "tensorrt", "cuda", "gpu", "compute_capability")}

pytest.importorskip("filelock")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFLOW_EDGE_CACHE", str(tmp_path))
    return tmp_path / "engines"


def fill(key=KEY, data=b"engine"):
    return get_or_build(key, lambda: (data, {"seconds": 1.0}))


def never():
    raise AssertionError("it was built again")


def test_an_engine_is_built_once():
    entry, built = fill()
    assert built and entry.read() == b"engine" and entry.built == {"seconds": 1.0}
    entry, built = get_or_build(KEY, never)
    assert not built and entry.read() == b"engine" and entry.built == {"seconds": 1.0}
    assert get_or_build(KEY, lambda: (b"anew", {}), rebuild=True)[0].read() == b"anew"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineKey)])
def test_every_part_of_the_key_counts_and_a_miss_names_it(name, folder):
    fill()
    other = dataclasses.replace(KEY, **{name: "another"})
    if name != "backend":
        shown = GRAPH.sha256[:12] if name == "onnx" else getattr(KEY, name)
        assert miss(other) == (
            f"the nearest engine in {folder} has another {name.replace('_', ' ')} 'another', there {shown!r}"
        )
    assert get_or_build(other, lambda: (b"other", {}))[1]
    assert get_or_build(KEY, never)[0].read() == b"engine"


def test_a_miss_compares_with_the_nearest(folder):
    assert miss(KEY) == f"no tensorrt engine is in {folder}"
    fill(dataclasses.replace(KEY, tensorrt="10.0.1", cuda="12.4", gpu="RTX"))
    fill(dataclasses.replace(KEY, cuda="12.2", profile="1:1:1"))
    assert "another profile '1:1:8', there '1:1:1'; another cuda '12.6', there '12.2'" in miss(KEY)


def test_the_last_built_of_those_that_run_here_is_found():
    assert newest(GRAPH, PLACE) is None
    fill()
    wide = dataclasses.replace(KEY, profile="1:4:16")
    fill(wide, b"wide")
    entry, data = newest(GRAPH, PLACE)
    assert entry.key == wide and data == b"wide"
    assert newest(GRAPH, PLACE | {"cuda": "13.0"}) is None and newest(Graph(b"other"), PLACE) is None


@pytest.mark.parametrize("where", [0, 40, -3], ids=["first line", "key", "engine"])
def test_an_altered_engine_is_built_again_and_never_used(where, caplog):
    path = fill()[0].path
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    assert newest(GRAPH, PLACE) is None
    entry, built = fill(data=b"anew")
    assert built and entry.read() == b"anew"
    assert "built again" in caplog.text


def test_a_cut_or_a_longer_file_is_built_again():
    path = fill()[0].path
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"x", b"", whole[:20]):
        path.write_bytes(data)
        assert fill()[1]
    assert path.read_bytes().startswith(whole[:20])


def test_an_engine_that_cannot_be_opened_is_built_again(caplog):
    fill()
    _, built = get_or_build(KEY, lambda: (b"anew", {}), usable=lambda data: data == b"anew")
    assert built and "cannot be opened here" in caplog.text
    assert not get_or_build(KEY, never, usable=lambda data: data == b"anew")[1]


def test_a_failed_build_leaves_nothing(folder):
    def fail():
        raise EngineError("no memory")

    with pytest.raises(EngineError, match="no memory"):
        get_or_build(KEY, fail)
    assert not list(folder.glob("*.engine")) and not list(folder.glob(".*.engine*"))
    assert fill()[1]


def test_weights_beside_a_graph_count_in_its_hash():
    one, two = Graph(b"model", {"w": b"1"}), Graph(b"model", {"w": b"2"})
    assert len({g.sha256 for g in (GRAPH, one, two, Graph(b"model", {"v": b"1"}))}) == 4
    assert one.sha256 == Graph(b"model", {"w": b"1"}).sha256


# --- several processes

SCRIPT = """
import sys, time
from pathlib import Path
from piflow_edge.engines.building import engine_cache
from piflow_edge.engines.building.engine_cache import EngineKey, get_or_build

key, told = EngineKey(*{key!r}), Path({told!r})


def build():
    with told.open("a") as file:
        file.write("built\\n")
    {work}
    return b"x" * 1_000_000, {{}}


entry, built = get_or_build(key, build)
assert len(entry.read()) == 1_000_000
"""


def process(tmp_path, work):
    told = tmp_path / "told"
    code = SCRIPT.format(key=dataclasses.astuple(KEY), told=str(told), work=work)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True), told


def test_processes_that_want_the_same_engine_wait_and_one_builds_it(tmp_path):
    started = [process(tmp_path, "time.sleep(0.5)") for _ in range(3)]
    for running, _ in started:
        _, words = running.communicate(timeout=120)
        assert running.returncode == 0, words
    assert started[0][1].read_text() == "built\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moment", ["build", "write"])
def test_a_builder_that_is_killed_leaves_the_lock_open_and_no_half_engine(tmp_path, folder, moment):
    # While it builds; or while the file is written, which stops for good before it is synced.
    work = "time.sleep(600)" if moment == "build" else "import os; os.fsync = lambda file: time.sleep(600)"
    running, told = process(tmp_path, work)
    while not told.exists() or (moment == "write" and not list(folder.glob(".*"))):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not list(folder.glob("*.engine")) and newest(GRAPH, PLACE) is None
    entry, built = fill(data=b"whole")
    assert built and entry.read() == b"whole"
    assert not [path for path in folder.glob(".*") if path.suffix != ".lock"]


def test_without_filelock_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(ImportError, match="pip install filelock"):
        fill()
    assert engine_cache.entries() == []
