"""The command line as a user meets it: exit codes, stdout and stderr; a few commands run as processes of their own."""

import json
import signal
import subprocess
import sys
import time

import pytest

from piflow_edge.bundle.precisions import PRECISIONS
from tests.bundle.test_bundle import edit
from tests.commands.command_line import run, run_process

COMMANDS = [
    "demo", "train-teacher", "distill", "train-features", "evaluate", "export", "build", "sample", "inspect", "verify",
    "sign", "pack", "unpack", "triton", "bench", "doctor",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    out = run(command, "--help").stdout
    assert "Example:" in out
    assert "piflow-edge" in out


def test_the_help_of_export_names_every_precision():
    words = " ".join(
        run("export", "--help").stdout.split()
    )  # written out: to look them up would bring in NumPy
    assert f"Of the graphs: {', '.join(PRECISIONS)};" in words


def loaded_by(code, *, after):
    """The modules that a fresh interpreter loads for `code`, after it has run `after`."""
    # In this one another test may have loaded any.
    told = f"import sys\n{after}\nbefore = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_command_line_loads_nothing_heavy():
    loaded = loaded_by("import piflow_edge.cli", after="import click")
    assert "piflow_edge.commands.images" in loaded
    assert not loaded & {"torch", "onnx", "onnxruntime", "numpy", "PIL", "rich", "sklearn"}
    # Not so heavy, but a tenth of the time that --help takes.
    assert not loaded & {"subprocess", "shutil", "platform", "json"}


def test_importing_the_package_loads_what_its_names_need_and_no_more():
    bare = {name for name in loaded_by("import piflow_edge", after="pass") if name.startswith("piflow_edge")}
    assert bare == {"piflow_edge"}
    loaded = loaded_by("import piflow_edge as pf; pf.GMPolicy, pf.rollout, pf.load", after="import numpy")
    assert "piflow_edge.integrator" in loaded
    assert not loaded & {"torch", "onnx", "onnxruntime", "tensorrt", "PIL", "subprocess", "shutil"}
    # What opening a bundle takes comes with opening one, and what a GPU takes with an array there.
    late = ("bundle", "generator", "signature", "sampling", "kernels.cuda", "kernels.nvidia")
    assert not loaded & {f"piflow_edge.{name}" for name in late}


def test_usage_errors_exit_with_2():
    assert "No such option" in run_process("sample", "x", "--wings", code=2).stderr
    assert "Missing option" in run("sample", "x", code=2).stderr


@pytest.mark.torch
class TestOnABundle:
    def test_verify(self, shared_bundle):
        answer = json.loads(run_process("verify", shared_bundle, "--json").stdout)
        assert answer["passed"] and len(answer["layers"]) == 6
        assert "latents" in run("verify", shared_bundle).stdout

    def test_inspect(self, shared_bundle):
        answer = json.loads(run("inspect", shared_bundle, "--json").stdout)
        assert answer["schedule"]["nfe"] == 2
        assert {row["answer"] for row in answer["compatibility"]} <= {"yes", "no", "unverified"}
        assert answer["signature"] is None
        assert 0 < answer["recorded_image_bytes"]["pinned"] < answer["recorded_image_bytes"]["device"]
        text = run("inspect", shared_bundle).stdout
        assert "network calls per image" in text and "TensorRT 8.6" in text and "nobody" in text
        assert json.loads(run("inspect", "--schema").stdout)["additionalProperties"] is False

    def test_inspect_shows_brackets_as_they_are(self, bundle):
        errors = {"int8": {"student": {"[/b]x[red]": 0.5}}}
        edit(bundle, lambda body: body["provenance"].update(layer_errors=errors, versions={"[/i]": "1"}))
        text = run("inspect", bundle).stdout
        assert "[/b]x[red]" in text and "[/i] 1" in text

    def test_signed_packed_sent_and_used(self, bundle, tmp_path):
        from tests.bundle.test_signature import write_keys

        (private, public), (_, other) = write_keys(tmp_path, "ours"), write_keys(tmp_path, "theirs")
        fingerprint = run("sign", bundle, "--key", private).stdout.strip()
        run("pack", bundle, "--out", tmp_path / "sent.zip")
        arrived = tmp_path / "arrived"
        words = run("unpack", tmp_path / "sent.zip", "--out", arrived, "--trusted-key", other, code=2).stderr
        assert f"signed by {fingerprint}, which is not trusted" in words and not arrived.exists()
        run(
            "unpack", tmp_path / "sent.zip", "--out", arrived, "--trusted-key", other, "--trusted-key", public
        )
        answer = json.loads(run("verify", arrived, "--trusted-key", public, "--json").stdout)
        assert answer["signature"] == {"fingerprint": fingerprint, "verified": True, "trusted": True}
        assert fingerprint in run("inspect", arrived).stdout
        picture = ["--labels", 1, "--out", tmp_path / "x.png", "--trusted-key"]
        assert "which is not trusted" in run("sample", arrived, *picture, other, code=2).stderr
        assert not (tmp_path / "x.png").exists()
        run("sample", arrived, *picture, public)

    def test_sample_to_one_file(self, shared_bundle, tmp_path):
        from PIL import Image

        out = tmp_path / "new" / "digits.png"
        done = run_process("sample", shared_bundle, "--labels", "3, 7", "--seed", 5, "--out", out)
        assert done.stdout.strip() == str(out)
        with Image.open(out) as image:
            assert image.width == 2 * image.height - 2  # two squares and three gaps of 2

    def test_sample_to_a_folder(self, shared_bundle, tmp_path):
        answer = json.loads(
            run("sample", shared_bundle, "--labels", "1,2", "--out", tmp_path, "--json").stdout
        )
        assert sorted(f.name for f in tmp_path.iterdir()) == ["0-0.png", "0-1.png"]
        assert answer["engine"] == "ort-cpu" and answer["seeds"] == [[0, 0], [0, 1]]

    def test_a_picture_made_again_from_what_it_says(self, shared_bundle, tmp_path):
        first, again = tmp_path / "first.png", tmp_path / "again.png"
        run(
            "sample",
            shared_bundle,
            "--labels",
            "3,7",
            "--count",
            2,
            "--seed",
            5,
            "--h",
            "inf",
            "--out",
            first,
        )
        run("sample", shared_bundle, "--like", first, "--out", again)
        assert again.read_bytes() == first.read_bytes()
        done = run("sample", shared_bundle, "--like", first, "--nfe", 1, "--out", tmp_path / "x.png", code=2)
        assert "--like says what --nfe is" in done.stderr

    def test_like_takes_engine_and_device_and_says_how_to_choose_others(
        self, shared_bundle, tmp_path, caplog
    ):
        from dataclasses import replace

        from PIL import Image

        from piflow_edge import read_recipe
        from piflow_edge.runtime.pictures import png_bytes

        first, elsewhere, out = (tmp_path / name for name in ("first.png", "elsewhere.png", "out.png"))
        run("sample", shared_bundle, "--labels", 3, "--out", first)
        picture, recipe = Image.open(first), read_recipe(first)

        def like(code=0, *given, **changes):
            elsewhere.write_bytes(png_bytes(picture, replace(recipe, **changes)))
            caplog.clear()
            done = run("sample", shared_bundle, "--like", elsewhere, "--out", out, *given, code=code)
            return done.stderr + caplog.text

        told = like(2, device="tpu")
        assert "engine 'ort-cpu' runs on cpu; got device 'tpu'" in told
        assert "--engine chooses another, such as auto" in told
        assert "engine is one of" in like(2, engine="warp-drive")
        assert "--engine chooses" not in like(2, "--engine", "ort-cpu", "--device", "tpu")
        assert like(0, "--device", "cpu", device="tpu").count("rounding may differ") == 1
        assert like(0, "--engine", "auto", engine="warp-drive").count("rounding may differ") == 1
        assert "of piflow-edge 0.0.1, this is" in like(0, release="0.0.1")
        assert out.read_bytes() == first.read_bytes()

    def test_sample_from_an_image_to_arrays(self, shared_bundle, tmp_path):
        import numpy as np
        from PIL import Image

        picture, mask, out = tmp_path / "start.png", tmp_path / "mask.png", tmp_path / "out.npy"
        pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
        Image.fromarray(pixels).save(picture)
        Image.fromarray(np.tri(8, dtype=np.uint8) * 255).save(mask)
        given = ["--labels", 1, "--image", picture, "--mask", mask, "--out", out, "--output"]
        answer = json.loads(run("sample", shared_bundle, *given, "uint8", "--json").stdout)
        assert answer["files"] == [str(out)] and answer["recipe"]["settings"]["resamples"] == 4
        kept = np.tri(8) == 0
        np.testing.assert_array_equal(np.load(out)[0, ..., 0][kept], pixels[kept])
        words = run("sample", shared_bundle, *given[:4], "--out", tmp_path / "x.png", code=2).stderr
        assert "give the strength" in words and not (tmp_path / "x.png").exists()

    def test_an_unusable_bundle_exits_with_2_and_one_line(self, bundle, tmp_path):
        (bundle / "LICENSE").unlink()
        for command in (["verify"], ["inspect"], ["sample", "--labels", "1", "--out", tmp_path / "x.png"]):
            done = run(command[0], bundle, *command[1:], code=2)
            assert done.stderr.startswith("piflow-edge: ") and "LICENSE is missing" in done.stderr
            assert done.stdout == "" and "Traceback" not in done.stderr
        assert not (tmp_path / "x.png").exists()

    @pytest.mark.parametrize(
        ("out", "words"),
        [("/proc/x/y.png", "/proc/x"), ("plain/x.png", "plain"), ("dir.png", "dir.png"), ("plain", "plain")],
    )
    def test_a_place_that_cannot_be_written_exits_with_2(self, shared_bundle, tmp_path, out, words):
        (tmp_path / "plain").write_text("a file")
        (tmp_path / "dir.png").mkdir()
        done = run("sample", shared_bundle, "--labels", 1, "--out", tmp_path / out, code=2)
        assert words in done.stderr and "Traceback" not in done.stderr
        assert not list((tmp_path / "dir.png").iterdir()) and (tmp_path / "plain").read_text() == "a file"

    @pytest.mark.parametrize(
        "arguments",
        [["--labels", "²"], ["--labels", ""], ["--labels", "1", "--out", "x.gif"], ["--engine", "gpu"]],
    )
    def test_arguments_that_make_no_sense_exit_with_2(self, shared_bundle, tmp_path, arguments):
        done = run("sample", shared_bundle, "--labels", 1, "--out", tmp_path / "x.png", *arguments, code=2)
        assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []

    def test_a_label_that_does_not_exist_exits_with_2(self, shared_bundle, tmp_path):
        done = run("sample", shared_bundle, "--labels", "11", "--out", tmp_path / "x.png", code=2)
        assert "got label 11" in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_bundle_that_computes_something_else_exits_with_1(self, bundle, tmp_path):
        import io

        import numpy as np

        from tests.bundle.test_bundle import edit

        with np.load(bundle / "golden.npz") as archive:
            golden = dict(archive)
        golden["latents"] = golden["latents"] + 0.1
        file = io.BytesIO()
        np.savez_compressed(file, **golden)
        from piflow_edge.system.files import sha256

        data = file.getvalue()
        (bundle / "golden.npz").write_bytes(data)
        spec = {"sha256": sha256(data), "size": len(data)}
        edit(bundle, lambda body: body["files"].update({"golden.npz": spec}))
        done = run("verify", bundle, code=1)
        assert "FAILED" in done.stdout and "trajectories differ by" in done.stderr

    def test_export_and_what_it_refuses(self, tmp_path):
        from piflow_edge.distill.loop.checkpoint import save_checkpoint
        from tests.conftest import make_student

        save_checkpoint(tmp_path / "student", make_student(nfe=1))
        answer = json.loads(run("export", tmp_path / "student", "--out", tmp_path / "b", "--json").stdout)
        assert answer["passed"]
        graphs = ["export", tmp_path / "student", "--out", tmp_path / "g", "--sampler-graph"]
        assert "sampler images" in run(*graphs, "1,3").stdout
        shown = run("inspect", tmp_path / "g").stdout
        assert "sampler.nfe1" in shown and "sampler.nfe3" in shown
        for calls in ("0", "1,two"):
            assert "such as 1,2,4" in run(*graphs, calls, "--overwrite", code=2).stderr
        assert "exists" in run("export", tmp_path / "student", "--out", tmp_path / "b", code=2).stderr
        assert "there is none" in run("export", tmp_path, "--out", tmp_path / "c", code=2).stderr
        assert (
            "a teacher"
            in run("distill", "--teacher", tmp_path / "student", "--out", tmp_path / "d", code=2).stderr
        )
        assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


@pytest.mark.torch
def test_a_teacher_and_a_student_from_the_command_line(tmp_path):
    size = ["--iterations", 3, "--batch-size", 4]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shape = ["--hidden-size", 16, "--depth", 1, "--num-heads", 2]
    assert run("train-teacher", "--out", teacher, *size, *shape).stdout.strip() == str(teacher)
    assert "--resume" in run("train-teacher", "--out", teacher, *size, *shape, code=2).stderr
    run("distill", "--teacher", teacher, "--out", student, *size, "--nfe", 4)
    run("distill", "--teacher", teacher, "--out", student, *size, "--nfe", 4, "--resume")
    done = run("distill", "--teacher", teacher, "--out", student, *size, "--nfe", 2, "--resume", code=2)
    assert "other settings" in done.stderr


@pytest.mark.torch
def test_a_folder_of_pictures_and_an_autoencoder_from_the_command_line(tmp_path, caplog):
    pytest.importorskip("diffusers", reason="autoencoders need the 'diffusers' extra")
    from PIL import Image

    from piflow_edge.distill.loop.checkpoint import save_checkpoint
    from tests.conftest import make_autoencoder, make_student

    for i, name in enumerate(("cats", "dogs")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for j in range(3):
            Image.new("RGB", (20, 25), (100 * i, 50 * j, 99)).save(tmp_path / "set" / name / f"{j}.png")
    (tmp_path / "set" / "cats" / "broken.png").write_bytes(b"?")
    make_autoencoder("AutoencoderKL", tmp_path / "vae")
    data = ["--data", tmp_path / "set", "--size", "16", "--autoencoder", tmp_path / "vae"]
    short = ["--iterations", 2, "--batch-size", 4, "--out"]
    shape = ["--hidden-size", 16, "--depth", 1, "--num-heads", 2]
    done = run("train-teacher", *data, *shape, *short, tmp_path / "teacher")
    assert "skipped 1 of 7 images" in caplog.text and "cats/broken.png: not an image" in caplog.text
    assert "encoding set" in done.stderr
    settings = json.loads((tmp_path / "teacher" / "checkpoint.json").read_text())["settings"]
    save_checkpoint(tmp_path / "student", make_student(latent=settings["latent"], in_channels=4))
    run("export", tmp_path / "student", "--autoencoder", tmp_path / "vae", "--out", tmp_path / "bundle")
    with Image.open(tmp_path / "bundle" / "preview.png") as image:
        assert image.width > image.height > 16


@pytest.mark.torch
@pytest.mark.parametrize("size", ["0", "8x"])
def test_a_size_that_makes_no_sense_exits_with_2(tmp_path, size):
    done = run("train-teacher", "--size", size, "--out", tmp_path / "out", code=2)
    assert "such as 48x64" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.torch
def test_ctrl_c_keeps_what_was_trained_and_resume_goes_on(tmp_path):
    command = ["distill", "--out", tmp_path, "--batch-size", 2, "--log-every", 1, "--iterations"]
    process = subprocess.Popen(
        [sys.executable, "-m", "piflow_edge.cli", *map(str, command), "1000"],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr and "Traceback" not in stderr
    stopped = json.loads((tmp_path / "checkpoint.json").read_text())["iteration"]
    assert 1 <= stopped < 1000
    run(*command, stopped + 2, "--resume")
    assert json.loads((tmp_path / "checkpoint.json").read_text())["iteration"] == stopped + 2


def test_an_unreadable_image_folder_exits_with_2(tmp_path):
    pytest.importorskip("torch", reason="training needs the 'train' extra")
    (tmp_path / "data" / "cats").mkdir(parents=True)
    (tmp_path / "data" / "cats" / "0.png").write_bytes(b"not an image")
    done = run("train-teacher", "--data", tmp_path / "data", "--out", tmp_path / "out", code=2)
    assert "more than half" in done.stderr and "cats/0.png: not an image" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named_with_the_command_that_gets_it(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['piflow-edge', 'distill', '--out', sys.argv[1]];"
        "from piflow_edge.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'piflow-edge[train]'" in done.stderr
