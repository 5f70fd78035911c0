"""What a bundle takes in memory is said before it is opened, and what is said holds."""

import logging
import shutil
import subprocess
import sys

import pytest

from benchmarks.memory_needs import DRAW
from piflow_edge.bundle.folder import Bundle, find_bundle
from piflow_edge.commands.description import describe_memory
from piflow_edge.doctor import examination
from piflow_edge.doctor.findings import OK, PROBLEM
from piflow_edge.engines import EngineOptions
from piflow_edge.runtime.loading import load
from piflow_edge.runtime.residence import memory_needs
from piflow_edge.runtime.residence.memory_needs import estimate_memory
from piflow_edge.system import hardware
from tests.bundle.test_bundle import edit

GIB = 1 << 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")


@pytest.fixture(scope="module")
def emoji():
    return Bundle(find_bundle("emoji"))


def pretend_free(monkeypatch, free):
    for module in (memory_needs, examination):
        monkeypatch.setattr(module, "free_memory", lambda: free)


@linux
@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_the_estimate_is_near_what_a_process_takes(name):
    needs = estimate_memory(Bundle(find_bundle(name)))
    for keep in ("all", "one"):
        done = subprocess.run([sys.executable, "-c", DRAW, name, "", keep], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 0.7 < float(done.stdout) * 1e6 / getattr(needs, keep) < 1.4


def test_networks_in_turn_take_less_and_every_bit_counts(emoji):
    needs, digits = estimate_memory(emoji), estimate_memory(Bundle(find_bundle("digits")))
    assert 80e6 < digits.one == digits.all < needs.one < needs.all
    # Of the larger network, the encoder, all weights: they are in 8 bits but for norms.
    size = emoji.manifest.files["encoder.bert.int8.onnx"].size
    assert 80e6 + 2.2 * size < needs.one < 80e6 + 3.2 * size


def test_a_bundle_of_anybody_may_say_anything_of_its_values(tmp_path):
    shutil.copytree(find_bundle("digits"), tmp_path / "digits")
    expected = estimate_memory(Bundle(tmp_path / "digits"))
    odd = ("much", [1], {}, {"nonsense": 5}, *({"student": n} for n in ("much", -5, 1 << 60, True, 0.5)))
    for said in odd:
        edit(tmp_path / "digits", lambda body, said=said: body["provenance"].update(live_bytes=said))
        assert estimate_memory(Bundle(tmp_path / "digits")) == expected
    edit(
        tmp_path / "digits", lambda body: body["provenance"].update(live_bytes={"student": GIB, "x": 1 << 40})
    )
    whole = estimate_memory(Bundle(tmp_path / "digits"))
    assert whole.is_whole and not expected.is_whole and 1.1 * GIB < whole.all < 1.3 * GIB
    assert "at least" not in describe_memory(Bundle(tmp_path / "digits"))


def test_opening_what_does_not_fit_warns_once_and_says_what_would(emoji, monkeypatch, caplog):
    needs = estimate_memory(emoji)
    assert needs.one < needs.all
    caplog.set_level(logging.WARNING)
    for free, words in [
        (needs.all, None),
        ((needs.one + needs.all) // 2, "it fits with --keep one"),
        (needs.one - 1, "0.1 GB are free here"),
    ]:
        pretend_free(monkeypatch, free)
        caplog.clear()
        load("emoji").close()
        assert len(caplog.messages) == (words is not None)
        assert words is None or (words in caplog.text and "GB are free here" in caplog.text)
    pretend_free(monkeypatch, 1)
    caplog.clear()
    load("digits", "reference").close()  # another engine has other needs
    monkeypatch.setattr(memory_needs, "nvidia_gpus", lambda: [{"name": "any"}])
    load("digits").close()  # as have GPUs, one of which may be chosen
    assert not caplog.messages
    load("digits", device="cpu").close()
    assert len(caplog.messages) == 1


def test_what_images_take_counts_too(tmp_path, monkeypatch, caplog):
    """A small bundle may make large images."""
    shutil.copytree(find_bundle("digits"), tmp_path / "digits")
    edit(tmp_path / "digits", lambda body: body["provenance"].update(live_bytes={"student": 4 * GIB}))
    pretend_free(monkeypatch, GIB)
    load(tmp_path / "digits").close()
    assert (
        "takes about 4.5 GB on a CPU, and 1.1 GB are free here" in caplog.text and "fits" not in caplog.text
    )


def test_doctor_says_it_and_does_not_try_what_does_not_fit(emoji, monkeypatch):
    needs, folder = estimate_memory(emoji), emoji.folder
    pretend_free(monkeypatch, 16 * GIB)
    found = examination.memory_finding(folder)
    assert found.status == OK and "needs about 1" in found.detail and "17.2 GB are free" in found.detail
    pretend_free(monkeypatch, needs.one)
    assert examination.memory_finding(folder).status == PROBLEM
    assert examination.memory_finding(folder).fix == f"piflow-edge sample {folder} --keep one ..."
    assert examination.memory_finding(folder, options=EngineOptions(keep="one")).status == OK
    assert examination.memory_finding(folder, "ort-cpu").status == PROBLEM
    assert examination.memory_finding(folder, "tensorrt").status == OK
    assert examination.memory_finding(folder, device="cuda").status == OK
    pretend_free(monkeypatch, 1_000_000)
    assert "close other programs" in examination.memory_finding(folder).fix
    monkeypatch.setattr(examination, "bundle_finding", lambda *_, **__: pytest.fail("it was opened"))
    assert examination.diagnose(folder)[-1].subject == "memory"
    assert examination.memory_finding(folder.parent) is None  # no bundle: the self-test says so


@linux
@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({"memory.max": str(GIB), "memory.current": str(GIB // 2)}, GIB // 2),
        ({"memory.max": "2000", "memory.current": "1500", "memory.stat": "anon 7\ninactive_file 300"}, 800),
        (
            {"a/b/memory.max": "9000", "a/b/memory.current": "0", "memory.max": "10", "memory.current": "20"},
            0,
        ),
        ({"memory/memory.limit_in_bytes": "4000", "memory/memory.usage_in_bytes": "1000"}, 3000),
        (
            {
                "memory/memory.limit_in_bytes": "4000",
                "memory/memory.usage_in_bytes": "3000",
                "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 800",
            },
            1800,
        ),
        ({"memory/memory.limit_in_bytes": str((1 << 63) - 4096), "memory/memory.usage_in_bytes": "1"}, None),
        ({"memory.max": "garbage", "memory.current": ""}, None),
        ({}, None),
    ],
)
def test_what_is_free_keeps_to_the_limit_of_a_container(monkeypatch, tmp_path, files, left):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    told, said = hardware.read_text, {"/proc/meminfo": "MemAvailable:   8388608 kB"}
    said["/proc/self/cgroup"] = "3:memory:/a/b\n1:name=systemd:/\n0::/a/b"
    monkeypatch.setattr(hardware, "read_text", lambda path: said.get(str(path)) or told(path))
    assert hardware.free_memory() == (8 * GIB if left is None else left)
