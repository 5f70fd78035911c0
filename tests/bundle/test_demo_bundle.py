"""The bundles that come with the package: a new user's first images, without torch and without training."""

import os
import subprocess
import sys

import pytest

import piflow_edge as pf

pytest.importorskip("onnxruntime")


def run(folder, *arguments):
    command = [sys.executable, "-m", "piflow_edge.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_it_reproduces_its_golden_samples_and_is_small():
    from piflow_edge.runtime.verification import check, verify

    generator = pf.load(pf.demo_bundle())
    check(verify(generator), "digits")
    assert generator.conditioner.names == tuple("0123456789") and generator.bundle.manifest.schedule.nfe == 1
    assert sum(file.stat().st_size for file in pf.demo_bundle().iterdir()) < 1.5e6


def test_emoji_draws_from_a_prompt_and_reproduces_its_golden_samples():
    pytest.importorskip("tokenizers")
    from piflow_edge.runtime.verification import check, verify

    with pf.load("emoji") as generator:
        check(verify(generator), "emoji")
        (heart,) = generator("blue heart", seed=0, output="numpy").images.astype(float)
        (apple,) = generator("a red apple", seed=0, output="numpy").images.astype(float)
    (red, _, blue), middle = heart[24:40, 24:40].mean((0, 1)), apple[24:40, 24:40].mean((0, 1))
    assert blue > red + 80 and middle[0] > middle[2] + 80
    folder = pf.demo_bundle().with_name("emoji")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 31e6


def test_the_command_line_calls_it_digits(tmp_path):
    from PIL import Image

    done = run(tmp_path, "sample", "digits", "--labels", "3,7", "--out", "two.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "two.png") as image:
        assert image.width > image.height


def test_a_folder_of_that_name_is_never_mistaken_for_it(tmp_path):
    (tmp_path / "digits").mkdir()
    done = run(tmp_path, "inspect", "digits")
    assert done.returncode == 2 and f".{os.sep}digits" in done.stderr.replace("/", os.sep)
    done = run(tmp_path, "inspect", "./digits")  # which holds nothing
    assert done.returncode == 2 and "bundle.json" in done.stderr


def test_it_is_not_signed_in_place(tmp_path):
    done = run(tmp_path, "sign", "digits", "--key", "key.pem")
    assert done.returncode == 2 and not (pf.demo_bundle() / "bundle.sig").exists()


def test_images_of_one_seed_get_a_file_each(tmp_path):
    from piflow_edge.runtime.pictures import png_bytes
    from piflow_edge.system.sheets import image_grid

    made = pf.load(pf.demo_bundle())([3, 7], seed=[5, 5])
    (tmp_path / "both.png").write_bytes(png_bytes(image_grid([made.images]), made.recipe))
    done = run(tmp_path, "sample", "digits", "--like", "both.png", "--out", "each")
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (tmp_path / "each").iterdir()) == ["5-0-1.png", "5-0.png"]
    assert pf.read_recipe(tmp_path / "each" / "5-0.png").conditioning == [{"label": 3}]
    assert pf.read_recipe(tmp_path / "each" / "5-0-1.png").conditioning == [{"label": 7}]


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(tmp_path):
    (tmp_path / "taken.png").mkdir()
    done = run(tmp_path, "sample", "digits", "--labels", "3", "--out", "taken.png")
    assert done.returncode == 2 and done.stderr.strip().endswith(": taken.png")
    assert [file.name for file in tmp_path.iterdir()] == ["taken.png"]


@pytest.mark.parametrize(("side", "expected"), [(64, (64, 64)), (8, (68, 68))])
def test_one_image_that_can_be_seen_is_written_as_it_is(tmp_path, side, expected):
    from PIL import Image

    from piflow_edge.runtime.pictures import save_images

    image, recipe = Image.new("L", (side, side)), pf.load(pf.demo_bundle())([3], output="latent").recipe
    (file,) = save_images(tmp_path / "a.png", [image], recipe)
    with Image.open(file) as written:
        assert written.size == expected
