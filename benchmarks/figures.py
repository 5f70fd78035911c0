"""Figures of the documentation that come from results, but for the benchmarks' own page: tables, and sentences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.tables import table
from piflow_edge.bench.tables import format_number

Results = Mapping[str, Mapping]

OURS, ONE_CALL = "ONNX Runtime", "teacher's network"
RIVALS = {
    "numpy": "NumPy", "torchscript": "TorchScript", "numpy loop": "the loop in NumPy",
    "numpy closed form": "its closed form in NumPy",
}  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """Figures within a sentence of a page. `words`: a pattern with a group for each; `figures`: of the result."""

    page: str
    result: str
    words: str
    figures: Callable[[Mapping], Sequence[str]]


def tell_evaluation(found: Results) -> str:
    scores, conditions = found["evaluate_digits"]["scores"], found["evaluate_digits"]["conditions"]
    rows = [
        (one["name"], str(one["network_calls"]), f"{one['fid']:.2f}", f"{one['fid_ratio']:.2f}",
         f"{one['diversity_ratio']:.3f}", f"{one['recall']:.3f}", f"{one['mse']:.4f}", f"{one['ms_per_image']:.2f}")
        for one in scores
    ]  # fmt: skip
    heads = [
        "network calls",
        "FID",
        "× teacher",
        "diversity × teacher",
        "recall",
        "MSE to teacher",
        "ms per image",
    ]
    told = (
        f"{conditions['images']:,} digits per row, all from the same noise and labels; teacher guided with scale "
        f"{conditions['guidance_scale']:g};\nteacher and students on ONNX Runtime "
        f"{conditions['versions']['onnxruntime']}, one image at a time, {conditions['cores']} cores of an "
        f"{conditions['cpu']}."
    )
    return f"{told}\n\n{table(['', *heads], rows)}"


def speed(found: Results) -> str:
    rows: list[tuple[str, str, str]] = []
    for name, (make, script) in SPEED.items():
        if name in found:
            first, *more = make(found[name])
            rows += [(*first, f"`python -m benchmarks.{script}`"), *((*row, "the same") for row in more)]
    return table(["what", "figure", "command"], rows)


def start(found: Mapping) -> Iterator[tuple[str, str]]:
    ms, memory = found["ms"], found["memory_mb"]
    ratio = found["import piflow_edge / import numpy"]
    yield "`import piflow_edge` with `load`, `rollout` and `GMPolicy`", f"{ratio:.2f} × `import numpy`"
    ratio = found["--help / import click"]
    yield "`piflow-edge --help`", f"{ratio:.2f} × `import click`, {ms['piflow-edge --help']:.0f} ms"
    ours, theirs = (memory[name]["resident"] for name in ("first image", "first image in PyTorch"))
    yield (
        "process start to first image",
        f"{ms['first image'] / 1000:.2f} s, {ours:.0f} MB resident; the same student in PyTorch "
        f"{ms['first image in PyTorch'] / 1000:.1f} s, {theirs:.0f} MB",
    )


def gain(found: Mapping) -> Iterator[tuple[str, str]]:
    for line in reversed(found["lines"]):  # the one the budget is of first
        rivals = [f"{gain:.0f} × against {name}" for name, gain in line["speedup"].items() if name != OURS]
        calls, samples = line["speedup / ratio of calls"], line["speedup / ratio of sample runs"]
        yield (
            f"one-call student against its guided {found['steps']}-step teacher, both on {OURS}: {line['network']} of "
            f"{line['parameters'] / 1e6:.1f} M weights, {format_number(line['ms'][ONE_CALL])} ms a call",
            f"{line['speedup'][OURS]:.0f} ×: {calls:.2f} × the ratio of calls, {samples:.2f} × that of samples run; "
            + "; ".join(rivals),
        )


def overhead(found: Mapping) -> Iterator[tuple[str, str]]:
    for line in found["lines"]:
        if line["per_call_ms"] >= 10:  # for which there is a budget
            yield (
                f"`generator(...)` over bare network calls of {line['per_call_ms']:.0f} ms: {line['student']}, calls: "
                f"{line['nfe']}",
                f"{line['ratio']:.3f} ×; {line['ratio_by_own_clock']:.4f} × by the generator's own clock",
            )


def rollouts(found: Mapping) -> Iterator[tuple[str, str]]:
    for line in found["lines"]:
        name, channels, height, width = line["size"]
        if line["substeps"] == 128 and (line["batch"], width) in ((1, 32), (1, 128), (8, 128)):
            kind = f"{'K' if line['policy'] == 'gm' else 'N'}={name}, C={channels}, {height}×{width}"
            what = f"128 substeps, {line['policy'].upper()}, {kind}, batch {line['batch']}, {found['isa']}"
            yield f"{what}; the faster of 1 and 2 threads", rollout(line["ms"])


def training(found: Mapping) -> Iterator[tuple[str, str]]:
    for line in found["lines"]:
        pace = line["images per s"]
        yield (
            f"a training step at {line['nfe']} call{'s' * (line['nfe'] > 1)}, batch {line['batch_size']}",
            f"{line['times faster']:.1f} × faster than a straightforward PyTorch loop ({pace['piflow-edge']:.0f} "
            f"images/s beside {pace['straightforward loop']:.0f})",
        )


SPEED = {
    "startup": (start, "startup --demo demo"),
    "end_to_end": (gain, "end_to_end --demo demo"),
    "overhead": (overhead, "overhead --demo demo"),
    "rollout": (rollouts, "rollout"),
    "rollout_avx512": (rollouts, "rollout"),  # of an earlier machine
    "training_step": (training, "training_step"),
}


def rollout(ms: Mapping[str, float]) -> str:
    best = {}
    for name, value in ms.items():
        kind = name.partition(",")[0]
        best[kind] = min(value, best.get(kind, value))
    ours = best.pop("kernel")
    others = "; ".join(
        f"{RIVALS[name]} {format_number(value)} ms ({format_number(value / ours)} ×)"
        for name, value in best.items()
    )
    return f"{format_number(ours)} ms; {others}"


def precisions(found: Results) -> str:
    digits, wide = found["precision"]["digits"], found["precision"]["wide"]
    fast = [batch["wall"]["times_as_fast_as_fp32"] for batch in wide["calls"].values()]
    rows = [
        (name, f"{share:.3f}", f"{digits['psnr_db_to_fp32'][name]:.1f} dB", f"{digits['fid_share'][name]:.3f}",
         f"{wide['bundle_share'][name]:.3f}", " / ".join(f"{times[name]:.2f}" for times in fast))
        for name, share in digits["graph_share"].items() if name != "fp32"
    ]  # fmt: skip
    heads = ["", "digits: graph / fp32", "PSNR", "FID / fp32", f"width {wide['width']}: bundle / fp32"]
    batches = " / ".join(name.removeprefix("batch ") for name in wide["calls"])
    return table([*heads, f"times as fast, batch {batches}"], rows)


# Name between marks -> results it is made of, and how.
def describe_conditions(found: Mapping) -> str:
    conditions = found["conditions"]
    told = [conditions[name] for name in ("gpu", "driver", "network", "change") if name in conditions]
    versions = found.get("versions") or conditions.get("versions", {})
    told += [f"{name} {version}" for name, version in versions.items()]
    told += [f"commit {conditions['commit']}, {conditions['date']}"]
    command = [f"`{found['command']}`"] if "command" in found else []
    return f"<sub>{'; '.join(command + told)}</sub>"


def gpu_rollouts(found: Results) -> str:
    result = found["h100_gpu_check"]
    rows = []
    for line in result["lines"]:
        us, size = line["us"], "×".join(map(str, line["size"]))
        graph, plain = us["kernel, in a CUDA graph"], us.get("torchscript") or us["torch"]
        rows.append((line["policy"], size, line["batch"], plain, us["kernel"], graph, f"{plain / graph:.0f} ×",
                     f"{line['error']['kernel']:.1e}"))  # fmt: skip
    heads = [
        "policy",
        "K or N, C, H, W",
        "batch",
        "PyTorch, µs",
        "kernel from Python",
        "in a CUDA graph",
        "gain",
        "error",
    ]
    worst = ", ".join(f"{name} {share:.2f}" for name, share in result["checks"]["worst_of_allowed"].items())
    told = f"{result['checks']['count']} random checks: at most this share of the error allowed: {worst}."
    return f"{table(heads, rows)}\n\n{told}\n\n{describe_conditions(result)}"


def gpu_networks(found: Results) -> str:
    notes, parts = found["h100_notes"], []
    rows = [
        ("PyTorch", one["network"], one["dtype"], one["eager"], one["CUDA graph"])
        for one in notes["torch_ms"]
    ]
    parts.append(table(["", "network", "dtype", "eager, ms a call", "CUDA graph, ms a call"], rows))
    rows, heads = (
        [],
        ["", "precision", "ms a call", "image of 4 calls, ms", "engine, MB", "built in, s", "PSNR, dB"],
    )
    for name, what in (
        ("h100_tensorrt86", "TensorRT 8.6"),
        ("h100_tensorrt86_without_pinned_casts", "so, no type fixed on casts"),
    ):
        for line in found[name]["lines"]:
            if "failed" in line:
                rows.append((what, line["precision"], "no engine: castLayer.cpp::validate", *(None,) * 4))
                continue
            (build,), best = line["build"], line["agreement"]["1"]["psnr_db"]
            decibels = "equal" if best >= 999 else f"{best:.1f}"
            rows.append((what, line["precision"], line["ms"]["network on the GPU"]["1"], line["ms"]["images"]["1"],
                         f"{build['engine_bytes'] / 1e6:.1f}", build["seconds"], decibels))  # fmt: skip
    low, high = notes["ort_cuda"]["four_calls_ms"]
    rows.append(("ort-cuda", "fp16", None, f"{low} to {high}", *(None,) * 3))
    parts.append(table(heads, rows))
    images = ", ".join(f"{ms} ms with {calls}" for calls, ms in notes["tensorrt_images_ms"].items())
    counts, crashes = notes["tensorrt_four_calls"], notes["ort_cuda"]
    parts.append(
        f"Images by their calls, in another process: {images}; four calls took {counts['launches']} launches and "
        f"{counts['python_calls']:,} Python calls. `ort-cuda` ended {crashes['ended_by_signal_6']} of "
        f"{crashes['runs']} processes with signal 6."
    )
    parts += [
        describe_conditions(found[name])
        for name in ("h100_tensorrt86", "h100_tensorrt86_without_pinned_casts", "h100_notes")
    ]
    return "\n\n".join(parts)


SEVERAL: dict[str, tuple[Sequence[str], Callable[[Results], str]]] = {
    "digits_figures": (["evaluate_digits"], tell_evaluation),
    "speed_and_memory": ([], speed),
    "precision_figures": (["precision"], precisions),
    "gpu_rollouts": (["h100_gpu_check"], gpu_rollouts),
    "gpu_networks": (["h100_tensorrt86", "h100_tensorrt86_without_pinned_casts", "h100_notes"], gpu_networks),
}


def sizes(found: Mapping) -> Sequence[str]:
    whole, parts = (found["sizes"]["piflow-edge[cpu]"][name] for name in ("mb", "largest"))
    numpy, pillow = parts["numpy"] + parts["numpy.libs"], parts["PIL"] + parts["pillow.libs"]
    torch = found["sizes"]["torch"]["mb"]
    return [f"{mb:.0f}" for mb in (whole, parts["onnxruntime"], numpy, pillow, torch)]


def export_times(found: Mapping) -> Sequence[str]:
    wide, digits = found["wide"], found["digits"]["bundle_share"]
    return [
        f"{digits['fp16']:.2f}", f"{digits['int8']:.2f}", f"{wide['parameters'] / 1e6:.1f}",
        f"{wide['export_seconds_fp32_alone']:.0f}", f"{wide['export_seconds']:.0f}",
    ]  # fmt: skip


def tell_profile(found: Mapping) -> Sequence[str]:
    shares = {name: one["share_by_operator"] for name, one in found["wide"]["profile"].items()}
    return [f"{100 * shares['int8']['DynamicQuantizeMatMul']:.0f}", f"{100 * shares['fp32']['MatMul']:.0f}"]


SENTENCES = (
    Sentence("README.md", "installed_size",
             r"takes (\d+) MB on Linux x86-64 \(onnxruntime (\d+), NumPy (\d+), Pillow (\d+)\), none of\s+it PyTorch, "
             r"whose CPU build alone takes (\d+) MB", sizes),
    Sentence("README.md", "emoji",
             r"in ([\d.]+) ms each on two cores, text encoder included: (\d+) times as fast as 50\s+steps of "
             r"the teacher",
             lambda found: [format_number(found["ms"]["student"]), f"{found['speedup']:.0f}"]),
    Sentence("README.md", "browser", r"in a browser it takes (\d+) ms",
             lambda found: [f"{found['bundles']['emoji']['contenders']['WebAssembly, 1 thread']['image_ms']:.0f}"]),
    Sentence("docs/faq.md", "startup", r"to the first image it was ([\d.]+) s",
             lambda found: [f"{found['ms']['first image'] / 1000:.2f}"]),
    Sentence("docs/export.md", "precision",
             r"A bundle of the digits is ([\d.]+) or ([\d.]+) of fp32's[^.]*\. The ([\d.]+) M weights took (\d+) s to "
             r"export in fp32\s+and (\d+) s in all eight", export_times),
    Sentence("docs/export.md", "precision",
             r"its profile: (\d+) % of an int8 call is DynamicQuantizeMatMul, (\d+) % of an fp32", tell_profile),
)  # fmt: skip
