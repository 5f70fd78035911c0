"""Whole images by the JavaScript package in Node.js, beside Python's."""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge.system.files import sha256
from tests.helpers.protobuf import message, node, outside
from tests.web.conftest import as_floats

DIGITS = str(pf.demo_bundle())


@pytest.fixture(scope="module")
def digits():
    with pf.load("digits", precision="fp32") as generator:
        yield generator


def check_images(found: dict, result: pf.Result) -> None:
    """Images within one level, and latents within rounding of the engines."""
    for i, (pixels, latents) in enumerate(zip(found["images"], found["latents"], strict=True)):
        expected = result.images[i]
        assert np.abs(np.reshape(pixels, expected.shape) - expected.astype(int)).max() <= 1
        scale = np.abs(result.latents[i]).max()
        np.testing.assert_allclose(as_floats(latents), result.latents[i].ravel(), rtol=0, atol=1e-4 * scale)


def test_pictures_are_those_of_python(ask, digits):
    cases = [
        ({"seed": 5}, list(range(10))),
        ({"seed": 1, "nfe": 3, "temperature": 0.4, "substeps": 50}, [3, "7"]),
        ({"seed": 2, "nfe": 4, "h": "inf", "temperature": "auto"}, [1, 2]),
        ({"seed": 2**53 - 1, "nfe": 2, "h": 0.7}, [0]),
        ({"seed": [[9, 4], [3, 0]]}, [6, 6]),
        ({"seed": 3, "solver": "multistep"}, [5, 8]),
        ({"seed": 3, "solver": "multistep", "nfe": 3, "substeps": 10}, [5]),
        ({"seed": 3, "solver": "multistep", "nfe": 2, "substeps": 3, "h": 0.5}, [4]),
        ({"seed": 0}, [i % 10 for i in range(18)]),  # more than one batch
    ]
    answers = ask(
        *(
            {"command": "draw", "bundle": DIGITS, "subject": labels, "options": options}
            for options, labels in cases
        )
    )
    for (options, labels), found in zip(cases, answers, strict=True):
        seed = options["seed"]
        given = {**options, "seed": [tuple(pair) for pair in seed] if isinstance(seed, list) else seed}
        check_images(found["answer"], digits(labels, output="numpy", **given))


def test_previews_are_those_of_python(ask, digits):
    seen = []
    digits([3, 8], seed=4, nfe=3, callback=lambda progress: seen.append((progress.sigma_t, progress.x_0)))
    (found,) = ask(
        {
            "command": "draw",
            "bundle": DIGITS,
            "subject": {"labels": [3, 8]},
            "options": {"seed": 4, "nfe": 3},
            "previews": True,
        }
    )
    assert [progress["call"] for progress in found["answer"]["seen"]] == [1, 2, 3]
    for (sigma_t, x_0), progress in zip(seen, found["answer"]["seen"], strict=True):
        assert progress["sigmaT"] == pytest.approx(sigma_t, abs=1e-12)
        expected = digits.decode(x_0).astype(int)
        assert np.abs(np.reshape(progress["images"], expected.shape) - expected).max() <= 1


def test_the_png_holds_the_recipe_by_which_python_makes_it_again(ask, digits, tmp_path):
    from PIL import Image

    (found,) = ask(
        {"command": "draw", "bundle": DIGITS, "subject": [3, 7], "options": {"seed": 2**40, "nfe": 2}}
    )
    for i, png in enumerate(found["answer"]["pngs"]):
        content = base64.b64decode(png)
        (file := tmp_path / f"{i}.png").write_bytes(content)
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        np.testing.assert_array_equal(pixels.ravel(), found["answer"]["images"][i])
        again = digits.make_again(pf.read_recipe(file), output="numpy").images[0, ..., 0]
        assert np.abs(again.astype(int) - pixels).max() <= 1


def test_a_call_stops_where_its_signal_is_aborted(ask):
    (found,) = ask(
        {"command": "draw", "bundle": DIGITS, "subject": [3], "options": {"nfe": 4}, "abortAfter": 2}
    )
    assert found["error"] == "Cancelled" and [progress["call"] for progress in found["seen"]] == [1, 2]


def test_what_makes_no_sense_is_refused(ask):
    cases = [
        ([10], {}, "there are 10 classes"), (["eleven"], {}, "eleven"), ([], {}, "one label or more"),
        ({"prompts": "3"}, {}, "prompts have no meaning"), ({}, {}, "give labels"), ([1], {"nfe": 0}, "nfe"),
        ([1], {"seed": -1}, "seed"), ([1], {"seed": [[1, 2], [3, 4]]}, "1 images, 2 pairs"), ([1], {"h": -1}, "h is"),
        ([1], {"temperature": "hot"}, "temperature"), ([1], {"solver": "heun"}, "solver is one of euler, multistep"),
    ]  # fmt: skip
    answers = ask(
        *(
            {"command": "draw", "bundle": DIGITS, "subject": labels, "options": options}
            for labels, options, _ in cases
        )
    )
    for (_, _, reason), found in zip(cases, answers, strict=True):
        assert found["error"] == "RequestError" and reason in found["message"]


def flip_a_bit(folder: Path) -> None:
    file = folder / "student.fp32.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_the_manifest(folder: Path) -> None:
    file = folder / "bundle.json"
    file.write_text(file.read_text().replace('"eps": 0.0001', '"eps": 0.0002'))


def put_graph(*fields: tuple):
    """Puts another graph in, with all checksums right, as an attacker would."""
    from piflow_edge.bundle.typed_json import write_json

    def change(folder: Path) -> None:
        model = message(*fields)
        (folder / "student.fp32.onnx").write_bytes(model)
        body = json.loads((folder / "bundle.json").read_bytes())
        del body["sha256"]
        body["files"]["student.fp32.onnx"] = {"sha256": sha256(model), "size": len(model)}
        (folder / "bundle.json").write_bytes(write_json({**body, "sha256": sha256(write_json(body))}))

    return change


# What is done to a bundle, and what its refusal says.
CHANGES = {
    "a bit": (flip_a_bit, "student.fp32.onnx does not match its checksum"),
    "the manifest": (change_the_manifest, "its own checksum"),
    "no manifest": (lambda folder: (folder / "bundle.json").unlink(), "bundle.json cannot be read"),
    "weights outside": (put_graph((7, message((5, outside("secret.bin"))))), "keeps weights in secret.bin"),
    "weights of a constant": (
        put_graph((7, message((1, node("Constant", [], ["y"], message((5, outside("/etc/x")))))))),
        "/etc/x",
    ),
    "weights in a subgraph": (
        put_graph((7, message((1, node("If", [], ["y"], message((6, message((5, outside("../x")))))))))),
        "../x",
    ),
    "a domain": (
        put_graph((25, message((7, node("Evil", [], ["y"], domain="ai.evil"))))), "the domain ai.evil"
    ),
    "half a graph": (put_graph((7, b"\xff" * 50)), "not a whole ONNX model"),
}  # fmt: skip


def test_altered_bundles_and_graphs_that_reach_beyond_them_are_refused(ask, tmp_path):
    for name, (change, _) in CHANGES.items():
        change(Path(shutil.copytree(DIGITS, tmp_path / name)))
    answers = ask(
        *({"command": "draw", "bundle": str(tmp_path / name), "subject": [3]} for name in CHANGES),
    )
    for (name, (_, reason)), found in zip(CHANGES.items(), answers, strict=True):
        assert found["error"] in ("BundleError", "EngineError") and reason in found["message"], name


def test_only_the_manifest_that_was_asked_for_is_taken(ask):
    digests = [sha256(Path(DIGITS, "bundle.json").read_bytes()), "0" * 64]
    right, wrong = ask(
        *(
            {"command": "draw", "bundle": DIGITS, "open": {"sha256": digest}, "subject": [3]}
            for digest in digests
        )
    )
    assert "answer" in right and "not the 0000" in wrong["message"]


@pytest.mark.torch
def test_a_prompt_gives_the_picture_that_python_gives(ask, text_folder):
    prompts = ["a red apple", "eine Katze, die lacht 🐈", ""]
    (found,) = ask(
        {"command": "draw", "bundle": str(text_folder), "subject": prompts, "options": {"seed": 3}}
    )
    with pf.load(text_folder, precision="fp32") as generator:
        check_images(found["answer"], generator(prompts, seed=3, output="numpy"))
