"""The parts of the JavaScript package, each held to its twin in Python."""

import json
import platform
import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import pytest

from piflow_edge import Schedule, philox_normal
from piflow_edge.bundle.sections import LatentSpec
from piflow_edge.integrator import _evaluations, integrate
from piflow_edge.kernels import cpu
from piflow_edge.policies import DXPolicySpec, GMKPolicySpec, GMPolicySpec
from piflow_edge.runtime.images import decode
from piflow_edge.schedule import segment_sigmas
from piflow_edge.version import __version__
from tests.web.conftest import WEB, as_floats


def test_the_compiled_files_are_those_of_the_sources(node, tmp_path):
    tsc = WEB / "node_modules" / "typescript" / "bin" / "tsc"
    done = subprocess.run([node, tsc, "-p", WEB, "--outDir", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    made, kept = (
        {file.relative_to(root): file.read_text() for file in root.rglob("*.*s")}
        for root in (tmp_path, WEB / "dist")
    )
    assert made == kept  # else: make web


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm packs the package")
def test_the_package_holds_code_and_types(node):
    done = subprocess.run(
        ["npm", "pack", "--dry-run", "--json", "--offline", str(WEB)], capture_output=True, text=True
    )
    (packed,) = json.loads(done.stdout)
    names = {file["path"] for file in packed["files"]}
    assert {"dist/index.js", "dist/index.d.ts", "README.md", "package.json"} <= names
    assert packed["version"] == __version__
    assert f'"{__version__}"' in (WEB / "src" / "release.ts").read_text()


def test_noise_is_that_of_python_to_the_bit(ask):
    streams = [(0, 0, 0), (5, 1, 0), (2**32 + 7, 2**33 + 1, 3), (2**64 - 1, 2**64 - 1, 2**32 - 1)]
    sizes = (1, 3, 4, 3 * 32 * 32 + 2)
    commands = [
        {"command": "noise", "seed": str(seed), "index": str(index), "draw": draw, "size": size}
        for seed, index, draw in streams
        for size in sizes
    ]
    for command, found in zip(commands, ask(*commands), strict=True):
        seed, index, size = (int(command[name]) for name in ("seed", "index", "size"))
        expected = philox_normal(seed, [index], (size,), draw=command["draw"])[0]
        np.testing.assert_array_equal(as_floats(found["answer"]).view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(("h", "rule"), [(0.0, "round"), (0.0, "ceil"), (0.5, "ceil"), ("inf", "round")])
def test_segments_are_those_of_python(ask, h, rule):
    cases = [(1, 1.0, 1.0, 128), (4, 3.2, 1.0, 128), (3, 1.5, 0.5, 10), (8, 2.0, 2.0, 3)]
    names = ("nfe", "shift", "finalStepSizeScale", "totalSubsteps")
    answers = ask(
        *(
            {
                "command": "segments",
                "h": "Infinity" if h == "inf" else h,
                "substepRule": rule,
                **dict(zip(names, case, strict=True)),
            }
            for case in cases
        )
    )
    for case, found in zip(cases, answers, strict=True):
        from piflow_edge.sampling import substep_levels

        schedule = Schedule(*case, h, rule)
        assert len(found["answer"]) == schedule.nfe
        for segment, planned in zip(schedule.segments, found["answer"], strict=True):
            np.testing.assert_allclose(planned["sigmas"], substep_levels(segment, schedule.shift), rtol=1e-12)
            assert (planned["renoise"] is not None) == segment.renoises
            if segment.renoises:
                np.testing.assert_allclose(planned["renoise"], segment.renoise_scales, rtol=1e-12)


def test_multistep_asks_the_policy_where_python_does(ask):
    cases = [
        segment_sigmas(src, dst, steps, shift)
        for src, dst in ((1.0, 0.0), (1.0, 0.5), (0.4, 0.0), (0.9, 0.3))
        for shift in (1.0, 3.2)
        for steps in (1, 2, 3, 4, 5, 10, 27, 37, 128)
    ]
    answers = ask(*({"command": "evaluations", "sigmas": sigmas.tolist()} for sigmas in cases))
    for sigmas, found in zip(cases, answers, strict=True):
        assert found["answer"] == _evaluations(sigmas)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(
    "spec",
    [GMPolicySpec(5), GMKPolicySpec(5), DXPolicySpec(4, 0.4, 2.0), DXPolicySpec(3, 0.4, 1.0, "polynomial")],
    ids=["gm", "gmk", "grid", "polynomial"],
)
def test_policies_lead_where_those_of_python_lead(ask, spec, temperature):
    random = np.random.default_rng(0)
    shape = (2, 3, 4, 2)
    x_src = random.standard_normal(shape).astype(np.float32)
    shapes = spec.output_shapes(shape[1:])
    outputs = {
        name: random.standard_normal((2, *rest)).astype(np.float32)
        for name, rest in zip(spec.outputs, shapes, strict=True)
    }
    cases = [(1.0, 0.5, 40), (0.9, 0.0, 128), (0.3, 0.0, 7), (0.02, 0.0, 33)]
    commands = [
        {
            "command": "integrate", "described": asdict(spec), "xSrc": x_src.ravel().tolist(),
            "outputs": {name: array.ravel().tolist() for name, array in outputs.items()},
            "size": {"batch": 2, "channels": 3, "pixels": 8}, "sigmaSrc": src, "temperature": temperature,
            "sigmas": np.linspace(src, dst, steps + 1).tolist(),
        }
        for src, dst, steps in cases
    ]  # fmt: skip
    in_double = {name: array.astype(np.float64) for name, array in outputs.items()}
    for (src, dst, steps), found in zip(cases, ask(*commands), strict=True):
        policy = spec.policy(in_double, x_src.astype(np.float64), src).temper(temperature)
        expected = integrate(policy, x_src.astype(np.float64), np.linspace(src, dst, steps + 1))
        # In float64, rounded to float32 once; in the compiled kernel in float32.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.reshape(found["answer"], shape), expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.skipif("baseline" not in cpu.isas() or platform.machine() not in ("x86_64", "AMD64"),
                    reason="the baseline of other processors multiplies and adds in one rounding")  # fmt: skip
@pytest.mark.parametrize(("components", "channels", "side"), [(5, 3, 5), (8, 1, 8), (4, 16, 3), (32, 4, 6)])
@pytest.mark.parametrize("moves", [False, True])
def test_the_compiled_rollout_is_pythons_to_the_bit(ask, components, channels, side, moves):
    random = np.random.default_rng(components)
    spec, shape = GMPolicySpec(components), (2, channels, side, side)
    x_src, x_start = random.standard_normal((2, *shape)).astype(np.float32)
    outputs = {
        name: random.standard_normal((2, *rest)).astype(np.float32)
        for name, rest in zip(spec.outputs, spec.output_shapes(shape[1:]), strict=True)
    }
    outputs["logstds"][:] = 0  # of which exponentials are exact
    start, sigmas = x_start if moves else x_src, np.linspace(0.5, 0, 41)
    (found,) = ask({
        "command": "integrate", "described": asdict(spec), "xSrc": x_src.ravel().tolist(),
        "start": start.ravel().tolist() if moves else None, "sigmaSrc": 0.5, "temperature": 1,
        "outputs": {name: array.ravel().tolist() for name, array in outputs.items()},
        "size": {"batch": 2, "channels": channels, "pixels": side**2}, "sigmas": sigmas.tolist(),
    })  # fmt: skip
    expected = cpu.rollout(spec.policy(outputs, x_src, 0.5), start, sigmas, isa="baseline")
    np.testing.assert_array_equal(np.float32(found["answer"]).reshape(shape), expected)


@pytest.mark.skipif(not (WEB / "kernel.sh").exists(), reason="the sources are not here")
@pytest.mark.skipif(not shutil.which("sha256sum"), reason="the script takes checksums with sha256sum")
def test_the_compiled_rollout_was_made_from_the_kernels_as_they_are():
    stated = (WEB / "src" / "policies" / "rollout_wasm.ts").read_text()
    sources = subprocess.run(
        ["sh", WEB / "kernel.sh", "--sources"], capture_output=True, text=True, check=True
    )
    assert sources.stdout.strip() in stated, "compile it again: piflow_edge/web/kernel.sh, then make web"


@pytest.mark.parametrize(
    "latent",
    [
        LatentSpec("pixels", [3, 4, 2], 1.0, 0.0),
        LatentSpec("latents", [3, 4, 2], 0.3611, 0.1159),
        LatentSpec("latents", [12, 2, 3], 1.5, 0.1, [0.1, -0.2, 0.3] * 4, [1.5, 0.5, 2.0] * 4, 2),
    ],
    ids=["plain", "scaled", "packed"],
)
def test_latents_become_the_pixels_that_python_makes(ask, latent):
    states = np.random.default_rng(1).standard_normal((2, *latent.shape)).astype(np.float32)
    (found,) = ask({"command": "pixels", "states": states.ravel().tolist(), "latent": asdict(latent)})
    restored = latent.restore(states)
    assert found["answer"]["shape"] == list(restored.shape)
    np.testing.assert_allclose(
        np.reshape(found["answer"]["data"], restored.shape), restored, rtol=0, atol=1e-6
    )
    images = np.reshape(found["answer"]["images"], (2, *restored.shape[2:], restored.shape[1]))
    assert np.abs(images - decode(states, latent).astype(int)).max() <= 1


def test_prompts_become_the_ids_that_the_tokenizers_library_makes(ask, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the real tokenizer needs the 'text' extra")
    from tests.helpers.text_encoders import nasty_prompts, trained_vocabulary

    file = tmp_path / "tokenizer.json"
    file.write_text(trained_vocabulary("wordpiece").to_str())
    real = tokenizers.Tokenizer.from_file(str(file))
    prompts, longest = nasty_prompts(600), 77
    real.enable_truncation(longest)
    (found,) = ask({"command": "tokens", "file": str(file), "prompts": prompts, "longest": longest})
    for prompt, ids in zip(prompts, found["answer"], strict=True):
        assert ids == real.encode(prompt).ids, repr(prompt)
