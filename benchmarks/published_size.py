"""Can a student of a published model's size be exported and drawn here? Time, memory and sizes; weights are random.

A pipeline of FLUX.1's architecture with both of its text encoders, and an adapter as pi-Flow's authors publish them,
are written to disk, exported with weights of 4 bits and drawn from, each by the command a user would give, in a process
of its own; all is removed afterwards. It takes some 50 GB of disk, and an hour or two on two cores.

"anonymous" is memory that a process asked for. "resident" counts pages of its files too, which the system takes back
when others need room. `--limit` lets the system keep all of that below a bound (Linux with cgroup v1, as root).

Run: python -m benchmarks.published_size --limit 9 --out benchmarks/results/published_size.json
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from piflow_edge.system.hardware import machine

# Weights of a file, so that a large folder is written piece by piece.
_SHARD_BYTES = 2 << 30
_GROUP = Path("/sys/fs/cgroup/memory/piflow-edge-benchmark")
# Fields of diffusers' and transformers' configurations: of FLUX.1-dev as published, and of one that takes seconds.
FLUX = dict(
    num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
    pooled_projection_dim=768, guidance_embeds=True,
)  # fmt: skip
T5 = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64)
CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
SIZES = {
    "FLUX.1": (FLUX, T5, CLIP, [128, 256, 512, 512], 256),
    "tiny": (
        FLUX | dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=64,
                    pooled_projection_dim=32),
        T5 | dict(d_model=64, d_ff=64, num_layers=1, num_heads=1),
        CLIP | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        [8, 8, 8, 8], 4,
    ),
}  # fmt: skip
# The layers that the authors' adapters for FLUX.1 have a LoRA for, by the end of their names.
_LORA = (
    "proj_mlp",
    "proj_out",
    "net.0.proj",
    "net.2",
    "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
)
_COMPONENTS = 8
# Deviations of weights that are not those that keep a signal's size. As in a trained network, blocks add little each:
# what modulates and gates them, or ends them, is small. A token's vector is as large as what they add up to.
_SCALES = {".norm": 0.001, ".o.weight": 0.003, ".wo.weight": 0.002, "shared.weight": 1.0}
PROMPT = "a red apple on a wooden table"
# The command, and what the package logs while it runs.
_PIFLOW = """
import logging
logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
logging.getLogger("piflow_edge").setLevel(logging.INFO)
from piflow_edge.cli import main
main()
"""


def write_weights(module, folder: Path, stem: str) -> int:
    """Random weights for a module without any, as sharded safetensors in bfloat16; return how many."""
    import torch
    from safetensors.torch import save_file

    random, shards, sizes = torch.Generator().manual_seed(0), [{}], [0]
    places: dict[str, str] = {}
    weights = module.state_dict()
    shared = {name for name in weights if name.endswith("embed_tokens.weight") and "shared.weight" in weights}
    count = sum(weight.numel() for name, weight in weights.items() if name not in shared)
    total = math.ceil(2 * count / _SHARD_BYTES) + 1

    def flush() -> None:
        name = f"{stem}-{len(sizes):05d}-of-{total:05d}.safetensors"
        save_file(shards[0], folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shards[0], name))
        shards[0] = {}
        sizes.append(0)

    for name, weight in weights.items():
        if name in shared:
            continue
        if weight.ndim == 1:  # biases small, norms near one
            made = torch.randn(weight.shape, generator=random) * 0.02 + (
                "norm" in name and name.endswith("weight")
            )
        else:
            scale = next(
                (scale for part, scale in _SCALES.items() if part in name), 1 / math.sqrt(weight[0].numel())
            )
            made = torch.randn(weight.shape, generator=random) * scale
        shards[0][name] = made.to(torch.bfloat16)
        sizes[-1] += 2 * weight.numel()
        if sizes[-1] >= _SHARD_BYTES:
            flush()
    if shards[0]:
        flush()
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return count


def write_pipeline(folder: Path, size: str) -> dict[str, int]:
    """A pipeline of FLUX.1 and an adapter, in the files that real ones have; return the weights of each part."""
    import diffusers
    import torch
    import transformers

    flux, t5, clip, channels, _ = SIZES[size]
    words = _tokenizer()
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(in_channels=64, **flux)
        encoder = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **t5)
        )
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=channels, norm_num_groups=8, layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=49408, eos_token_id=102, **clip))
    counts = {}
    parts = {"transformer": (transformer, "diffusion_pytorch_model"), "text_encoder_2": (encoder, "model")}
    for name, (module, stem) in parts.items():
        place = folder / "pipeline" / name
        (module.save_config if name == "transformer" else module.config.save_pretrained)(place)
        counts[name] = write_weights(module, place, stem)
    for name, module in {"vae": vae, "text_encoder": text}.items():
        module.to(torch.bfloat16).save_pretrained(folder / "pipeline" / name)
        counts[name] = sum(parameter.numel() for parameter in module.parameters())
    for name in ("tokenizer", "tokenizer_2"):
        words.save_pretrained(folder / "pipeline" / name)
    (folder / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    counts["adapter"] = write_adapter(folder / "gmflux_k8_piid_4step", transformer, SIZES[size][4])
    return counts


def write_adapter(folder: Path, transformer, rank: int) -> int:
    """A GM adapter for FLUX.1 under the authors' names: LoRA, and output layers in the place of the base's."""
    import torch
    from safetensors.torch import save_file

    random, width, channels = torch.Generator().manual_seed(1), transformer.inner_dim, 64

    def draw(*shape: int, scale: float = 1.0):
        return (torch.randn(shape, generator=random) * scale / math.sqrt(shape[-1])).to(torch.bfloat16)

    outputs = {"means": _COMPONENTS * channels, "logweights": _COMPONENTS * 4}
    weights = {f"proj_out_{name}.weight": draw(rows, width) for name, rows in outputs.items()}
    weights |= {f"proj_out_{name}.bias": draw(rows) for name, rows in outputs.items()}
    for place, (rows, columns) in {1: (128, width), 3: (1, 128)}.items():
        weights[f"proj_out_logstds.{place}.weight"] = draw(rows, columns)
        weights[f"proj_out_logstds.{place}.bias"] = draw(rows)
    # A mixture is narrow, and nearly as wide everywhere.
    weights["proj_out_logstds.3.weight"] *= 0.1
    weights["proj_out_logstds.3.bias"] -= 2.5
    for name, weight in transformer.named_parameters():
        layer = name.removesuffix(".weight")
        if weight.ndim == 2 and "." in layer and layer.endswith(_LORA):
            weights[f"{layer}.lora_A.weight"] = draw(rank, weight.shape[1])
            weights[f"{layer}.lora_B.weight"] = draw(weight.shape[0], rank, scale=0.1)
    folder.mkdir()
    save_file(
        weights, folder / "diffusion_pytorch_model.safetensors", {"policy_config": '{"type": "GMFlow"}'}
    )
    config = {
        "_class_name": "GMFluxTransformer2DModel", "num_gaussians": _COMPONENTS, "constant_logstd": None,
        "logstd_inner_dim": 128, "gm_num_logstd_layers": 2, "logweights_channels": 4, "in_channels": channels,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return sum(weight.numel() for weight in weights.values())


def _tokenizer():
    """The tokenizer of the bundle that comes with the package, for that of FLUX.1 cannot come with it."""
    import transformers

    from piflow_edge.bundle.folder import Bundle, find_bundle

    bundle = Bundle(find_bundle("emoji"))
    (file,) = bundle.manifest.assets
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bundle.folder / file), pad_token="[PAD]", eos_token="[SEP]", model_max_length=77
    )


def run(command: list[str], limit: float | None) -> dict:
    """Run a command, and say how long it took and how much memory it had at its highest, in MB."""
    if limit is not None:
        _GROUP.mkdir(exist_ok=True)
        (_GROUP / "memory.limit_in_bytes").write_text(str(round(limit * 1e9)))

    def enter() -> None:
        if limit is not None:
            (_GROUP / "cgroup.procs").write_text(str(os.getpid()))

    began, before, anonymous, resident = time.perf_counter(), os.times(), 0.0, 0.0
    process = subprocess.Popen(command, preexec_fn=enter, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(_echo(process.stderr)))
    reader.start()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = {key: int(kib) * 1024 / 1e6 for key, kib in re.findall(r"(RssAnon|VmHWM):\s+(\d+)", status)}
        anonymous = max(anonymous, found.get("RssAnon", 0.0))
        resident = max(resident, found.get("VmHWM", 0.0))
        time.sleep(0.1)
    reader.join()
    after = os.times()
    cpu = [times.children_user + times.children_system for times in (before, after)]
    row = {
        "seconds": round(time.perf_counter() - began), "cpu_seconds": round(cpu[1] - cpu[0]),
        "anonymous_mb": round(anonymous), "resident_mb": round(resident), "limit_gb": limit,
    }  # fmt: skip
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} after {row}")
    return row | {"said": [line for line in lines if " is open, after " in line]}


def _echo(stream):
    for line in stream:
        sys.stderr.write(line)
        yield line.rstrip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="FLUX.1")
    parser.add_argument("--precision", default="int4-64", help="of the student and the text encoders")
    parser.add_argument("--pixels", default="256x256", help="size of the images")
    parser.add_argument("--limit", type=float, help="GB that the export may have")
    parser.add_argument("--folder", type=Path, help="for the files, which stay then; else a temporary one")
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        figures = measure(folder, options)
    asked = {name: getattr(options, name) for name in ("size", "precision", "pixels", "limit")}
    text = json.dumps({"machine": machine(), "asked": asked, **figures}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path, options) -> dict:
    """Write, export and draw."""
    began = time.perf_counter()
    if (folder / "counts.json").exists():
        counts = json.loads((folder / "counts.json").read_text())
    else:
        counts = write_pipeline(folder, options.size)
        (folder / "counts.json").write_text(json.dumps(counts))
    written = round(time.perf_counter() - began)
    piflow, bundle = [sys.executable, "-c", _PIFLOW], folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    exported = run(
        [*piflow, "export", "--pipeline", str(folder / "pipeline"),
         "--adapter", f"{folder}:gmflux_k8_piid_4step", "--size", options.pixels, "--precision", options.precision,
         "--network-precision", "decoder=fp16", "--network-precision", "encoder.clip=fp16", "--out", str(bundle)],
        options.limit,
    )  # fmt: skip
    files = {file.name: file.stat().st_size for file in sorted(bundle.iterdir())}
    drawn = run(
        [*piflow, "sample", str(bundle), "--prompt", PROMPT, "--keep", "one", "--out", str(folder / "image.png")],
        None,
    )  # fmt: skip
    manifest = json.loads((bundle / "bundle.json").read_text())
    errors = {
        network: sorted(found.values())
        for network, found in manifest["provenance"]["layer_errors"][options.precision].items()
    }
    return {
        "weights": counts, "write_seconds": written, "export": exported, "draw": drawn,
        "bundle_gb": round(sum(files.values()) / 1e9, 2), "files": files,
        "kept": {k: len(v) for k, v in manifest["provenance"]["kept_in_fp32"][options.precision].items() if v != "all"},
        "layer_errors": {name: {"median": e[len(e) // 2], "worst": e[-1]} for name, e in errors.items() if e},
    }  # fmt: skip


if __name__ == "__main__":
    main()
