"""The tables of the benchmarks' page, one for each result: found as its JSON has it, text as Markdown has it."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from piflow_edge.bench.tables import format_number

Cell = str | float | int | None


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def cell(value: Cell) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else format_number(value)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    return f"{format_number(value)} ×"


def verdict(holds: bool) -> str:
    return "met" if holds else "missed"


def conditions(found: Mapping) -> str:
    """Where the figures come from, under a table."""
    found = found.get("conditions", found)
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    told = [f"`{found['command']}`"] if "command" in found else []
    told += [f"{found['cpu']}, {found['cores']} cores"] if "cpu" in found else []
    told += [f"instructions of {found['isa']}"] if "isa" in found else []
    told += [found["system"]] if "system" in found else []
    told += [versions] if versions else []
    return f"<sub>{'; '.join(told)}</sub>" if told else ""


def latent(line: Mapping) -> str:
    return "×".join(map(str, line["latent"]))


def startup(found: Mapping) -> str:
    rows = [(name, ms) for name, ms in found["ms"].items()]
    text = table(["a fresh process", "ms"], rows)
    ratio = found["import piflow_edge / import numpy"]
    budgets = [("import of the package over NumPy's", times(ratio), "≤ 1.5 ×", verdict(ratio <= 1.5))]
    if "first image" in found["ms"]:
        first, held = found["ms"]["first image"], found.get("memory_mb", {})
        budgets.append(("first image", f"{format_number(first)} ms", "≤ 1000 ms", verdict(first <= 1000)))
        for name, memory in held.items():
            if memory:
                ours = name == "first image"
                limit = ("≤ 150 MB", verdict(memory["resident"] <= 150)) if ours else (None, None)
                budgets.append((f"held after: {name}", f"{format_number(memory['resident'])} MB", *limit))
    return text + "\n\n" + table(["", "measured", "budget", ""], budgets)


def installed_size(found: Mapping) -> str:
    rows = [
        (name, size["mb"], ", ".join(f"{part} {format_number(mb)}" for part, mb in size["largest"].items()))
        for name, size in found["sizes"].items()
    ]
    text = table(["environment", "MB", "of these the largest"], rows)
    ratio = found.get("torch / piflow-edge[cpu]")
    return text + (f"\n\ntorch over piflow-edge[cpu]: {times(ratio)}" if ratio else "")


def rollout_share(found: Mapping) -> str:
    rows = [
        (one["student"], latent(one), one["nfe"], one["substeps"], one["ms"], one["split"]["network"],
         one["split"]["policy"], percent(one["share"]))
        for one in found["lines"]
    ]  # fmt: skip
    heads = ["student", "state", "calls", "substeps", "ms in all", "network", "policy", "policy's share"]
    return table(heads, rows)


def end_to_end(found: Mapping) -> str:
    parts = []
    for line in found["lines"]:
        rows = [(name, ms) for name, ms in line["ms"].items()]
        calls, runs = line["speedup / ratio of calls"], line["speedup / ratio of sample runs"]
        parts += [
            f"**{line['network']}**, state {latent(line)}, {line['parameters']:,} weights:",
            table(["", "ms"], rows),
            table(
                ["the student's gain over the teacher", ""],
                [
                    *((f"in {name}", times(value)) for name, value in line["speedup"].items()),
                    ("if there were nothing but the networks", times(line["bare_speedup"])),
                    (
                        f"over the ratio of network calls, {found['steps']}; budget ≥ 0.9",
                        f"{calls:.2f}, {verdict(calls >= 0.9)}",
                    ),
                    (f"over the ratio of samples the network runs on, {2 * found['steps']}", f"{runs:.2f}"),
                ],
            ),
        ]
    return "\n\n".join(parts)


def scaling(found: Mapping) -> str:
    rows = [
        (one["what"], "pixels" if one["axis"] == "side" else one["axis"],
         f"{one['sizes'][0]} to {one['sizes'][-1]}" + (" a side" if one["axis"] == "side" else ""),
         f"{format_number(one['ms'][0])} to {format_number(one['ms'][-1])}", one["fixed"], f"{one['exponent']:.2f}",
         None if one["low"] is None else f"{one['low']:.2f} to {one['high']:.2f}", percent(one["off"]),
         ", ".join(f"{exponent:.2f}" for exponent in one["local"]))
        for one in found["lines"]
    ]  # fmt: skip
    heads = [
        "",
        "grows",
        "from, to",
        "ms",
        "fixed, ms",
        "exponent",
        "95 %",
        "off by at most",
        "between neighbours",
    ]
    return table(heads, rows)


def quality_latency(found: Mapping) -> str:
    rows = [
        ("student", one["precision"], one["nfe"], one["substeps"], f"{one['ms']:.2f}", f"{one['fid']:.2f}")
        for one in sorted(found["lines"], key=lambda one: (one["precision"], one["nfe"], one["substeps"]))
    ]
    rows += [
        ("teacher", "fp32", one["steps"], None, f"{one['ms']:.2f}", f"{one['fid']:.2f}")
        for one in found["teacher"]
    ]
    return table(["", "precision", "calls", "substeps", "ms per image", "FID"], rows)


def overhead(found: Mapping) -> str:
    rows = []
    for one in found["lines"]:
        limit = 1.01 if "DX" in one["student"] else 1.05
        long_enough = one["per_call_ms"] >= 10
        judged = (
            f"≤ {limit}, {verdict(one['ratio'] <= limit)}" if long_enough else "a call is shorter than 10 ms"
        )
        ms = one["ms"]
        rows.append(
            (
                one["student"],
                one["nfe"],
                ms["network"],
                ms["generator"],
                f"{one['ratio']:.3f}",
                f"{one['ratio_by_own_clock']:.4f}",
                judged,
            )
        )
    heads = [
        "student",
        "calls",
        "bare calls, ms",
        "generator, ms",
        "ratio",
        "by the generator's clock",
        "budget",
    ]
    return table(heads, rows)


def soak(found: Mapping) -> str:
    first, last = found["readings"][0], found["readings"][-1]
    rows = [(name, first[name], last[name]) for name in ("images", "resident_mb", "open_files", "threads")]
    text = table(
        ["", "after the warm-up", "at the end"], [(name.replace("_", " "), *two) for name, *two in rows]
    )
    return f"{text}\n\nIt {'grew' if found['grew'] else 'did not grow'}."


def prompts(found: Mapping) -> str:
    cost, peaks = found["overhead"], found["peak_mb"]

    def ratio(kind: str) -> str:
        low, high = cost[f"interval_{kind}"]
        return f"{cost[f'ratio_{kind}']:.3f} ({low:.3f} to {high:.3f})"

    files = ", ".join(
        f"{name.split('.')[0]} {format_number(size)}" for name, size in found["files_mb"].items()
    )
    rows = [
        ("ms, a new prompt: the networks' bare calls", cost["ms"]["bare_new"]),
        ("ms, a new prompt: the generator", cost["ms"]["generator_new"]),
        ("median of their ratios, budget ≤ 1.03", ratio("new")),
        ("the same for a prompt that came before", ratio("again")),
        ("MB of the networks' files", files),
        ("MB at the peak, all networks in memory", peaks["all"]),
        ('MB at the peak, one in turn (`keep="one"`)', peaks["one"]),
    ]
    return table(["", ""], rows)


def emoji(found: Mapping) -> str:
    ms = found["ms"]
    rows = [
        ("ms, a new prompt to its picture", ms["student"]),
        ("ms, a prompt that came before", ms["student, a prompt that came before"]),
        (f"ms, {found['steps']} guided steps of the teacher", ms["teacher"]),
        ("times as fast", found["speedup"]),
        ("that, over the ratio of runs of a sample; budget ≥ 0.9", found["speedup / ratio of sample runs"]),
    ]
    return table(["", ""], rows)


def serve_load(found: Mapping) -> str:
    speed, over, growth = found["throughput"], found["overload"], found["growth"]
    callers = f"{over['callers']} callers at once"
    rows = [
        ("images per second, bare batches", speed["bare"]),
        ("images per second, served", speed["served"]),
        ("served over bare, budget ≥ 0.9", speed["ratio"]),
        (f"{callers}: answered", over["answered"]),
        (f"{callers}: refused with 429", over["refused"]),
        (f"{callers}: ms until half of the answers", over["p50_ms"]),
        (f"{callers}: ms until 99 % of them", over["p99_ms"]),
        (f"MB more after {growth['requests']} requests", growth["grown"]["resident_mb"]),
        ("pictures that differ from the generator's", found["wrong_pictures"]),
        ("load of the machine meanwhile", found["load_average"][0]),
    ]
    return table(["", ""], rows)


def browser(found: Mapping) -> str:
    heads = ["", "", "ms to load", "ms of the first picture", "ms of a later one", "of it network", "of it policy",
             "levels off"]  # fmt: skip
    keys = ("load_ms", "first_ms", "image_ms", "network_ms", "policy_ms", "levels_off")
    rows = []
    for bundle, one in found["bundles"].items():
        rows.append((bundle, "Python, ONNX Runtime on the CPU", "", "", one["python_ms"], "", "", ""))
        rows += [
            (bundle, name, *(row.get(key, "") for key in keys)) for name, row in one["contenders"].items()
        ]
    adapter = f"WebGPU's adapter: {found['adapter']}. Load of the machine meanwhile: {found['load_average'][0]:.1f}."
    return f"{table(heads, rows)}\n\n{adapter}"


def quality(found: Mapping) -> str:
    """A row a method and number of calls: means of the seeds, and how far these lie apart."""
    rows_of: dict[tuple[str, int], list[dict]] = {}
    teacher = found["rows"][0]
    for row in found["rows"]:
        kid_ratio = row["kid"] / teacher["kid"]
        rows_of.setdefault((row["method"], row["nfe"]), []).append({**row, "kid_ratio": kid_ratio})
    figures = {"fid_ratio": 2, "kid_ratio": 2, "diversity_ratio": 3, "recall": 3, "mse": 4}
    heads = ["", "calls", "FID × teacher", "KID × teacher", "diversity × teacher", "recall", "MSE to teacher"]
    rows = [
        (method, str(calls), *(mean_and_range(seeds, name, digits) for name, digits in figures.items()))
        for (method, calls), seeds in rows_of.items()
    ]
    about, seeds = found["conditions"], {row["seed"] for row in found["rows"]} - {None}
    budget = about["budget"]
    minutes = budget["minutes_per_method"]
    spent = f"{minutes:g} minutes" if minutes else f"{budget['iterations']} steps"
    told = (
        f"{about['images per row']} images a row, of one noise; {spent} a network, {about['device']}; seeds: "
        f"{len(seeds)}, of several the mean and, after ±, half of the range. The teacher: FID {teacher['fid']:.2f}, "
        f"guided with {about['teacher']['guidance']:g}."
    )
    return f"{table(heads, rows)}\n\n{told}"


def mean_and_range(rows: Sequence[Mapping], name: str, digits: int) -> str:
    """The mean of a figure over rows and, of several, half of their range."""
    values = [row[name] for row in rows]
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def precision(found: Mapping) -> str:
    parts = []
    for name, heading in (("digits", "The digits student"), ("wide", "A DiT of 30 million weights")):
        one = found.get(name)
        if not one:
            continue
        rows = []
        for precision, share in one["graph_share"].items():
            calls = [batch["wall"] for batch in one.get("calls", {}).values()]
            fid = one.get("fid", {}).get(precision)
            rows.append((precision, percent(share), f"{one['psnr_db_to_pytorch'][precision]} dB", fid,
                         *(batch["ms"][precision] for batch in calls)))  # fmt: skip
        heads = ["", "graph's size over fp32's", "images beside PyTorch's", "FID"]
        parts += [f"{heading}:", table([*heads, *(f"ms, {b}" for b in one.get("calls", {}))], rows)]
    return "\n\n".join(parts)


def memory_needs(result: Mapping) -> str:
    """Peaks in MB, measured and estimated."""
    rows = [
        (f"{row['bundle']}, {row['precision']}", row["file_mb"], row["measured_all"], row["estimated_all"],
         row["measured_one"], row["estimated_one"])
        for row in result["rows"]
    ]  # fmt: skip
    return table(["", "files, MB", "peak", "estimated", "peak with keep='one'", "estimated"], rows)


def export_cost(found: Mapping) -> str:
    rows = []
    for line in found["lines"]:
        peak = line.get("peak_mb")
        rows.append((
            line["size"], line["stage"], line.get("failed") or line["seconds"], line.get("cpu_seconds"),
            line.get("cpu_ratio") and times(line["cpu_ratio"]), peak and f"{peak / 1000:.2f}",
        ))  # fmt: skip
    heads = ["weights", "stage", "s", "processor s", "processor time over torch.onnx.export's", "peak GB"]
    load = found["load_at_the_end"]
    busy = (
        f"\n\nOther work was done meanwhile (load {load:.1f}): seconds of the clock are too long."
        if load and load > 2.5
        else ""
    )
    return table(heads, rows) + busy


def noise(found: Mapping) -> str:
    differences = found["differences_of_medians"]
    rows = [
        ("runs of the same bundle, each compared with every other", found["runs"]),
        ("settings compared", found["comparisons"]),
        ("said to have moved, though nothing did", found["false_alarms"]),
        (f"so, had {percent(found['assumed'])} been assumed", found["false_alarms_by_assumption"]),
        ("that the interval alone would have called moved", found["intervals_without_1"]),
        *((f"{share} of the medians differ by at most", percent(off)) for share, off in differences.items()),
        (
            "what a change must exceed by the fresh processes: median of all pairs",
            percent(found["must_exceed"]),
        ),
        ("and at most", percent(found["must_exceed_at_most"])),
    ]
    return table(["", ""], rows)


def training_step(found: Mapping) -> str:
    lines = found["lines"]
    rows = [(one["nfe"], *one["ms per step"].values(), times(one["times faster"])) for one in lines]
    sides = [f"{name}, ms per step" for name in lines[0]["ms per step"]]
    return table(["calls trained for", *sides, "faster"], rows)


def rollout(found: Mapping) -> str:
    rows = []
    for line in found["lines"]:
        if line["substeps"] != 128:
            continue
        ms, size = line["ms"], "×".join(map(str, line["size"]))
        plain = next(name for name in ms if name.startswith("numpy"))
        torch = ms.get("torchscript, 1 thread")
        ours = ms["kernel, 1 thread"]
        rows.append((line["policy"], size, line["batch"], ms[plain], torch, ours, ms["kernel, 2 threads"],
                     times(ms[plain] / ours), times(torch / ours) if torch else None))  # fmt: skip
    heads = [
        "policy",
        "K or N, C, H, W",
        "batch",
        "NumPy, ms",
        "TorchScript",
        "kernel",
        "2 threads",
        "over NumPy",
        "over TorchScript",
    ]
    return table(heads, rows)


def tell_nested(found: Mapping) -> str:
    """Any other result: its numbers by their dotted names."""
    rows = []

    def walk(value, name):
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for i, inner in enumerate(value):
                walk(inner, f"{name}[{i}]")
        elif isinstance(value, int | float):
            rows.append((name, value))

    about = ("command", "cpu", "cores", "system", "versions", "power", "seed", "device")
    walk({key: value for key, value in found.items() if key not in about}, "")
    return table(["", ""], rows)


TABLES: dict[str, Callable[[Mapping], str]] = {
    "startup": startup,
    "installed_size": installed_size,
    "rollout_share": rollout_share,
    "end_to_end": end_to_end,
    "scaling": scaling,
    "quality_latency": quality_latency,
    "quality_digits": quality,
    "quality_emoji": quality,
    "quality_fashion": quality,
    "noise": noise,
    "export_cost": export_cost,
    "export_cost_675m": export_cost,
    "memory_needs": memory_needs,
    "memory_needs_675m": memory_needs,
    "overhead": overhead,
    "precision": precision,
    "soak": soak,
    "prompts": prompts,
    "emoji": emoji,
    "serve_load": serve_load,
    "browser": browser,
    "training_step": training_step,
    "rollout": rollout,
}
