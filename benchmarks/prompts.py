"""What does a prompt cost, and what do networks that take turns save? One JSON line answers.

A student that reads prompts by a real text encoder is exported with it and a decoder: three networks of unlike size, of
which the encoder alone was ever trained. `overhead`: the networks' bare calls on inputs that lie ready, and the
generator, prompt in and pixels out, take turns; with a new prompt each time, encoder included, and with the same one,
which is not encoded again. The median of the rounds' ratios, and its 95 % interval, is to be at most 1.03 where the
networks take 20 ms or more. `peak_mb`: a fresh process opens
the bundle, all networks or one in turn, and makes an image; its peak of memory above what its imports take is to be at
most the largest file, what that network takes to run, and 500 MB.

Run: python -m benchmarks.prompts --text-encoder minilm
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

import piflow_edge as pf
from benchmarks.timing import answer, parser, rounds_of
from piflow_edge.distill.data.autoencoder import load_autoencoder
from piflow_edge.distill.networks.flow_network import attach_policy_head
from piflow_edge.distill.networks.text_dit import TextDiTConfig, TextDiTNetwork
from piflow_edge.distill.networks.text_encoders import load_text_encoder, open_prompts
from piflow_edge.distill.sources import StudentModel
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import GMPolicySpec

# What a child does: the peak of its memory in MB, before anything is opened and after an image.
_CHILD = """
import json, sys
import piflow_edge as pf
from piflow_edge.runtime.generator import Generator
from piflow_edge.system.hardware import memory
with pf.load("digits", "ort-cpu") as small:
    small("3")
before = memory().peak
with pf.load(sys.argv[1], "ort-cpu", options=pf.EngineOptions(keep=sys.argv[2])) as generator:
    generator("a red apple", seed=0, output="numpy")
print(json.dumps(memory().peak - before))
"""


def write_bundle(encoder_source: str, folder: Path, small: bool) -> Path:
    """The student with its text encoder and a decoder that doubles the side, in float32."""
    import diffusers

    torch.manual_seed(0)
    widths = (32, 64) if small else (256, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**blocks, block_out_channels=widths, latent_channels=4).save_pretrained(
        folder / "ae"
    )
    autoencoder = load_autoencoder(folder / "ae")
    encoder = load_text_encoder(encoder_source, max_tokens=32)
    widths_of_text = {spec.name: spec.shape[-1] for spec in encoder.inputs()}
    sizes = {"text_size": widths_of_text["encoder_hidden_states"],
             "pooled_size": widths_of_text["pooled_projections"]}  # fmt: skip
    config = (
        TextDiTConfig(4, 32, 2, 24, 1, 2, **sizes) if small else TextDiTConfig(4, 32, 2, 512, 8, 8, **sizes)
    )
    teacher = TextDiTNetwork(config)
    torch.nn.init.normal_(teacher.module.head.out.weight, std=config.hidden_size**-0.5)
    model = StudentModel(
        attach_policy_head(teacher, GMPolicySpec(8)), nfe=2, conditioner=open_prompts([encoder]).spec,
        latent=vars(autoencoder.latent),
    )  # fmt: skip
    export_bundle(model, folder / "bundle", encoders=[encoder], autoencoder=autoencoder)
    return folder / "bundle"


def measure_overhead(generator: pf.Generator, options) -> dict:
    """Medians and ratios of the bare calls and the generator, with new prompts and with one that came before."""
    text, manifest = generator.conditioner, generator.bundle.manifest
    (spec,) = text.encoders
    noise = pf.philox_normal(0, [0], manifest.latent.shape)
    steered = text.example(1)
    levels = manifest.schedule.schedule().sigmas[:-1].tolist()
    inputs = [generator.student.inputs(noise, sigma_t, steered) for sigma_t in levels]
    ids = spec.encoder_inputs(text.tokenize("a red apple number 1")[spec.name])
    latents = generator("a red apple", seed=0, output="latent").latents
    decoded = generator.decoding.inputs(latents)
    numbers = itertools.count()

    def run_bare(*, encode: bool) -> None:
        if encode:
            generator.engines[spec.network].run(ids)
        for given in inputs:
            generator.engine.run(given)
        generator.decoder.run(decoded)

    def draw(prompt: str) -> None:
        generator(prompt, seed=0, output="numpy")

    calls = {
        "bare_new": lambda: run_bare(encode=True),
        "generator_new": lambda: draw(f"a red apple number {next(numbers)}"),
        "bare_again": lambda: run_bare(encode=False),
        "generator_again": lambda: draw("a red apple"),
    }
    times = rounds_of(calls, options.rounds, options.seconds, warmup=2)
    ms = {name: round(median(times[name]), 3) for name in calls}
    found = {"ms": ms, "rounds": len(times["bare_new"])}
    for kind in ("new", "again"):
        ratios = np.array(times[f"generator_{kind}"]) / np.array(times[f"bare_{kind}"])
        found[f"ratio_{kind}"], found[f"interval_{kind}"] = median_with_interval(ratios)
    return found


def median_with_interval(values: np.ndarray) -> tuple[float, list[float]]:
    """The median, and where 95 of 100 medians of values drawn anew from these lie."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return round(float(np.median(values)), 4), [round(float(low), 4), round(float(high), 4)]


def measure_peak(bundle: Path, keep: str) -> float:
    """MB at the peak of a fresh process above what its imports take."""
    command = [sys.executable, "-c", _CHILD, str(bundle), keep]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--text-encoder", required=True, help="folder of transformers, with pooled vectors")
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--seconds", type=float, default=120, help="most for the timed rounds")
    options.add_argument("--small", action="store_true", help="tiny student and decoder, to try the script")
    options = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(options.text_encoder, Path(folder), options.small)
        with pf.load(bundle, "ort-cpu") as generator:
            overhead = measure_overhead(generator, options)
        peaks = {keep: round(measure_peak(bundle, keep), 1) for keep in ("all", "one")}
        files = {file.name: round(file.stat().st_size / 1e6, 1) for file in sorted(bundle.glob("*.onnx"))}
    answer(options, {"files_mb": files, "overhead": overhead, "peak_mb": peaks})


if __name__ == "__main__":
    main()
