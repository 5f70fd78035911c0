"""`generate`: the same files whoever makes them, in how many parts and after whatever was killed."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import piflow_edge as pf
from piflow_edge.errors import DataError
from piflow_edge.runtime.bulk.bulk_job import read_job
from piflow_edge.runtime.bulk.bulk_work import make_shard
from piflow_edge.runtime.bulk.ray_workers import ShardWorker
from piflow_edge.runtime.recipe import parse_recipe
from tests.commands.command_line import run
from tests.commands.test_docs import FENCE, ROOT, calls

ASKED = ("digits", "--labels", "7,0-2", "--count", "30", "--seed", "5", "--shard-size", "25")


def generate(out, *more, asked=ASKED, code=0):
    done = run("generate", *asked, "--out", out, "--json", *more, code=code)
    return json.loads(done.stdout) if code == 0 else done.stderr


def read_files(folder):
    """Name -> bytes of all files but the hidden ones."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def read_entries(folder):
    """All files in all shards, in order, by name; a name that comes twice fails."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for entry in archive:
                assert entry.name not in found
                found[entry.name] = archive.extractfile(entry).read()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder that one worker makes without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    answer = generate(folder)
    assert answer["shards"] == {"made": 5, "in_all": 5} and answer["images"] == 120 and answer["complete"]
    return folder


def test_image_i_is_number_i_of_the_seed(whole):
    entries = read_entries(whole)
    with pf.load("digits") as generator:
        result = generator(labels="7,0-2", count=30, seed=5, output="numpy")
    for i, expected in enumerate(result.images):
        picture = np.asarray(Image.open(io.BytesIO(entries[f"{i:012}.png"])))
        np.testing.assert_array_equal(picture, expected[..., 0])
        assert parse_recipe(entries[f"{i:012}.json"].decode()) == result.recipe.of(i)
        assert entries[f"{i:012}.txt"].decode() == str([7, 0, 1, 2][i // 30])
    assert len(entries) == 3 * 120


def test_a_picture_of_a_shard_can_be_made_again(whole, tmp_path):
    (tmp_path / "one.png").write_bytes(read_entries(whole)["000000000077.png"])
    with pf.load("digits") as generator:
        again = generator.make_again(pf.read_recipe(tmp_path / "one.png"))
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(Image.open(tmp_path / "one.png")))


def test_parts_make_the_same_files_as_one_worker(whole, tmp_path):
    first = generate(tmp_path / "images", "--part", "1/2")
    assert first["shards"]["made"] == 2 and not first["complete"]
    second = generate(tmp_path / "images", "--part", "0/2")
    assert second["shards"]["made"] == 3 and second["complete"]
    assert read_files(tmp_path / "images") == read_files(whole)


def test_a_worker_of_a_cluster_makes_the_same_shards(whole, tmp_path):
    folder = tmp_path / "images"
    generate(folder, "--part", "0/5")
    worker = ShardWorker(str(folder), "digits", {})
    for shard in (3, 1, 2, 4, 1):  # one is handed out twice, as after a death
        worker({"shard": shard})
    assert read_files(folder) == read_files(whole)


def test_nothing_is_lost_or_twice_after_a_kill(tmp_path):
    asked = ("digits", "--labels", "all", "--count", "150", "--shard-size", "20")
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "piflow_edge.cli", "generate", *asked, "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # In the middle of a shard: some are there, and the next one has a hidden file.
    deadline = time.monotonic() + 60
    while not (list(killed.glob("*.tar")) and list(killed.glob(".*.tar.*"))):
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in killed.glob("*.tar")}
    assert 0 < len(there) < 75 and list(killed.glob(".*.tar.*"))
    answer = generate(killed, asked=asked)
    assert answer["shards"] == {"made": 75 - len(there), "in_all": 75} and answer["complete"]
    assert {path: path.stat().st_mtime_ns for path in there} == there
    generate(undisturbed, asked=asked)
    assert sorted(path.name for path in killed.iterdir()) == sorted(
        path.name for path in undisturbed.iterdir()
    )
    assert read_files(killed) == read_files(undisturbed)
    assert len(read_entries(killed)) == 3 * 1500


def test_a_full_disk_says_how_much_a_shard_takes(whole, tmp_path, monkeypatch):
    def fill(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def needed(folder):
        with pytest.raises(
            OSError, match=r"No space left on device, .* to write, .* free: .*000001.tar'"
        ) as it:
            make_shard(generator, job, folder, 1)
        return float(re.search(r", ([\d.e+]+) MB to write", str(it.value))[1])

    job, taken = read_job(whole), (whole / "000001.tar").stat().st_size / 1e6
    shutil.copy(whole / "000000.tar", tmp_path)
    with pf.load("digits") as generator:
        monkeypatch.setattr(os, "fsync", fill)
        assert needed(tmp_path) == pytest.approx(taken, rel=0.1)
        (tmp_path / "000000.tar").unlink()
        assert taken < needed(tmp_path) < 3 * taken


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--seed", "6"], "seed is 5 there and 6 here"),
        (["--nfe", "2"], "nfe is 1 there and 2 here"),
        (["--labels", "7"], "subjects is"),
        (["--engine", "reference"], "there is no|engine is 'ort-cpu' there and 'reference' here"),
    ],
)
def test_a_folder_of_other_images_is_not_touched(whole, changes, words):
    before = read_files(whole)
    output = generate(whole, *changes, code=2)
    assert any(word in output for word in words.split("|")), output
    assert read_files(whole) == before


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("digits",), "give labels or prompts"),
        (("digits", "--labels", "12"), "got label 12"),
        (("digits", "--labels", "1", "--temperature", "-1"), "temperature"),
        (("digits", "--labels", "1", "--part", "2/2"), "the last is 1"),
        (("digits", "--labels", "1", "--ray", "auto"), "give --engine a name"),
    ],
)
def test_what_cannot_be_made_leaves_no_folder(asked, words, tmp_path):
    assert words in generate(tmp_path / "out", asked=asked, code=2)
    assert not (tmp_path / "out").exists()


def test_the_commands_of_its_page_run(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="evaluate reads real images with the 'train' extra")
    monkeypatch.chdir(tmp_path)
    blocks = FENCE.findall((ROOT / "docs" / "bulk.md").read_text(encoding="utf-8"))
    commands = calls("".join(f"```sh\n{body}```\n" for language, body in blocks if language == "sh"))
    here = [words for words in commands if "--ray" not in words]
    for words in here:
        run(*words)
    assert [words[0] for words in here] == ["generate", "generate", "generate", "evaluate"]
    assert read_files(tmp_path / "shared") == read_files(tmp_path / "images")


def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    assert "holds other files" in generate(tmp_path, code=2)
    assert read_files(tmp_path) == {"letter.txt": b"dear"}


def test_a_job_that_was_altered_is_refused(whole, tmp_path):
    body = json.loads((whole / "job.json").read_text())
    for change in ({"version": 2}, {"bulk": {"count": 0}}, {"colour": "red"}):
        (tmp_path / "job.json").write_text(json.dumps(body | change))
        with pytest.raises(DataError, match="is no job"):
            read_job(Path(tmp_path))


def test_evaluate_scores_a_folder_as_the_bundle_that_made_it(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("torch", reason="real images are read by the 'train' extra")
    generate(tmp_path / "images", asked=("digits", "--labels", "all", "--count", "20"))
    shipped = Path(pf.__file__).parent / "assets" / "digits"
    asked = ["evaluate", shipped, tmp_path / "images", "--no-teacher", "--json"]
    done = run(*asked, "--images", 200)
    drawn, found = json.loads(done.stdout)["scores"]
    assert found["name"] == "images" and found["network_calls"] == 1 and found["ms_per_image"] is None
    # Other noise, the same student: what a score of 200 images varies by (15 to 40 here), and far from 200 of one step.
    assert abs(found["fid"] - drawn["fid"]) < 25
    assert set(found["class_diversity"]) == set("0123456789")
    too_many = run(*asked, "--images", 210, code=2)
    assert "holds 20 images of '0', and 21 are compared" in too_many.stderr
