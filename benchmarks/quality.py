"""Which way to few network calls gives the best images: pi-Flow, or the alternatives at the same budget?

Every distilled network starts from the weights of one teacher and sees the same images, batch size, optimiser and
learning rate. With `--minutes-per-method` each gets that much time (in which direct regression also has to make its
pairs), with `--iterations` that many steps. pi-Flow and direct regression train one network for each NFE, each with
the whole budget; consistency distillation and MeanFlow one for all. Of the other methods, see `baselines.py`.

A minute is one on the clock; on a CPU it is one of processor time per thread, which is the same on an idle machine and
fair on a busy one. For a budget in minutes, steps are timed first, all methods in turn; then their number is fixed.
What is trained is kept under --out and a run that was cut short goes on from there.

Run: python -m benchmarks.quality --data digits --teacher shipped --minutes-per-method 2.5 --out runs/quality-digits
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from benchmarks import baselines
from benchmarks.methods import (
    CUT_SHORT,
    DISTILLED,
    SAMPLING_BATCH,
    TEACHER_STEPS,
    Method,
    Regression,
    Sampler,
    Setting,
    seconds,
    without,
)
from benchmarks.tables import mean_and_range
from piflow_edge.commands.demo import GUIDANCE_SCALE, shipped_teacher
from piflow_edge.distill.data.datasets import ImageData, load_images
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.training import TrainingConfig
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.sources import TeacherModel, load_teacher
from piflow_edge.distill.teacher import FlowMatchingConfig, GuidanceConfig, train_teacher
from piflow_edge.errors import PiFlowError
from piflow_edge.evaluation.features import Features, open_features
from piflow_edge.evaluation.metrics import (
    FeatureSet,
    agreement,
    class_diversity,
    frechet_distance,
    kernel_distance,
    territory,
)
from piflow_edge.export.feature_extractor import train_features
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.files import write_atomic
from piflow_edge.system.hardware import machine
from piflow_edge.system.sheets import side_by_side

# Steps that are timed in each of a few rounds, and those before them that warm up.
ROUNDS, TIMED, WARMING = 3, 8, 3
# Share of a budget in minutes that direct regression spends on its pairs, the rest on training.
PAIRS_SHARE = 0.5


class ClockedData:
    """Images that note when each batch was asked for, which is once a step."""

    def __init__(self, data: ImageData, device: torch.device):
        self._data, self._device = data, device
        self.asked: list[tuple[float, float]] = []

    def __len__(self):
        return len(self._data)

    def __getattr__(self, name):
        return getattr(self._data, name)

    def batch(self, indices, draws=None):
        self.asked.append((seconds(self._device), time.perf_counter()))
        return self._data.batch(indices, draws)

    def step_seconds(self, skipped: int = WARMING) -> np.ndarray:
        """By the budget's clock and by that on the wall, (S, 2), without the first few steps."""
        return np.diff(np.array(self.asked).reshape(-1, 2), axis=0)[skipped:]


@dataclass(frozen=True)
class Run:
    """One network to train: `method` is a key of `DISTILLED`, `nfe` what it is trained for; None is any."""

    method: str
    nfe: int | None
    seed: int

    @property
    def kind(self) -> str:
        return f"{self.method}-nfe{self.nfe}" if self.nfe else self.method

    @property
    def name(self) -> str:
        return f"{self.kind}-seed{self.seed}"


class Benchmark:
    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out
        self.device = torch.device(
            options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        self.out.mkdir(parents=True, exist_ok=True)
        self.data = sized_data(options.data, options.size, self.out)

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    # Training.

    def setting(self, seed: int) -> Setting:
        training = TrainingConfig(
            batch_size=self.options.batch_size,
            learning_rate=self.options.learning_rate,
            seed=seed,
        )
        return Setting(self.teacher, self.data, GuidanceConfig(self.options.guidance), training, self.device)

    @cached_property
    def teacher(self) -> TeacherModel:
        folder = shipped_teacher() if self.options.teacher == "shipped" else self.options.teacher
        if folder is None:
            folder = self.out / "teacher"
            self._train_teacher(folder)
        teacher = load_teacher(folder)
        teacher.network.to(self.device)
        return teacher

    def _train_teacher(self, folder: Path) -> None:
        options = self.options
        channels, side, _ = self.data.shape
        architecture = DiTConfig(
            in_channels=channels,
            sample_size=side,
            patch_size=options.patch,
            hidden_size=options.width,
            depth=options.depth,
            num_heads=options.heads,
            num_classes=len(self.data.conditioner.names),
        )
        training = TrainingConfig(
            iterations=options.teacher_iterations,
            batch_size=options.teacher_batch_size,
            learning_rate=options.teacher_learning_rate,
            ema_decay=0.9995,
        )
        watched = ClockedData(self.data, self.device)
        train_teacher(watched, architecture, FlowMatchingConfig(), training, folder, resume=True)
        self._note_time(folder, watched, training.iterations, 0.0)

    @cached_property
    def runs(self) -> list[Run]:
        runs = []
        for seed in self.options.seeds:
            for method in self.options.methods:
                if method in DISTILLED:
                    one = DISTILLED[method][1](self.setting(seed)).one_network_for_all
                    runs += [Run(method, nfe, seed) for nfe in ([None] if one else self.options.nfe)]
        return runs

    def method(self, run: Run) -> Method:
        return DISTILLED[run.method][1](self.setting(run.seed))

    def folder(self, run: Run) -> Path:
        return self.out / "students" / run.name

    @cached_property
    def plan(self) -> dict[str, dict]:
        """By `Run.kind`: `iterations`, `pairs` and, as they were timed, seconds a step and before the first."""
        file = self.out / "plan.json"
        budget = {
            "minutes_per_method": self.options.minutes_per_method,
            "iterations": self.options.iterations,
        }
        known = json.loads(file.read_text()) if file.exists() else {"budget": budget, "runs": {}}
        if known["budget"] != budget:
            raise SystemExit(f"{file} was made for {known['budget']}, not for {budget}; give another --out")
        missing = {run.kind: run for run in self.runs if run.kind not in known["runs"]}
        if missing:
            known["runs"] |= (
                self._plan_by_time(missing)
                if self.options.minutes_per_method
                else self._plan_by_count(missing)
            )
            write_atomic(file, (json.dumps(known, indent=2) + "\n").encode())
        return known["runs"]

    def _plan_by_count(self, runs: dict[str, Run]) -> dict[str, dict]:
        """As many steps as were asked for, and as many calls of the teacher as pi-Flow makes in them."""
        options = self.options
        calls = options.iterations * options.batch_size * ImitationConfig().num_intermediate_states
        pairs = max(calls // TEACHER_STEPS, 1)
        return {
            kind: {
                "iterations": options.iterations,
                "pairs": pairs if isinstance(self.method(run), Regression) else 0,
            }
            for kind, run in runs.items()
        }

    def _plan_by_time(self, runs: dict[str, Run]) -> dict[str, dict]:
        """Time a few steps of each kind of run, in turn, and share out the budget."""
        self.say("timing a few steps of each method")
        steps, before, per_pair = ({kind: [] for kind in runs} for _ in range(3))
        for _ in range(ROUNDS):
            for kind, run in runs.items():
                method, watched = self.method(run), ClockedData(self.data, self.device)
                training = replace(method.setting.training, iterations=WARMING + TIMED)
                with TemporaryDirectory() as folder, redirect_stderr(StringIO()):
                    spent = method.train(Path(folder), watched, training, run.nfe, SAMPLING_BATCH)
                if isinstance(method, Regression):
                    per_pair[kind].append(spent / SAMPLING_BATCH)
                else:
                    before[kind].append(spent)
                steps[kind] += watched.step_seconds()[:, 0].tolist()
        plan = {}
        for kind in runs:
            step, pair, start = (statistics.median(v[kind] or [0.0]) for v in (steps, per_pair, before))
            iterations, pairs = self._shared_out(step, pair, start)
            timed = {"step_seconds": step, "pair_seconds": pair, "start_seconds": start}
            plan[kind] = {"iterations": iterations, "pairs": pairs, "timed": timed}
        return plan

    def _shared_out(self, step: float, pair: float, start: float) -> tuple[int, int]:
        budget = 60 * self.options.minutes_per_method
        share = PAIRS_SHARE if pair else 0.0
        pairs = int(share * budget / pair) if pair else 0
        return max(int(((1 - share) * budget - start) / step), 1), max(pairs, 1) if pair else 0

    def train_all(self) -> None:
        for run in self.runs:
            plan = self.plan[run.kind]
            method, watched = self.method(run), ClockedData(self.data, self.device)
            training = replace(method.setting.training, iterations=plan["iterations"])
            self.say(f"{run.name}: {plan['iterations']} steps")
            before = method.train(self.folder(run), watched, training, run.nfe, plan["pairs"])
            self._note_time(self.folder(run), watched, plan["iterations"], before)

    def _note_time(self, folder: Path, watched: ClockedData, iterations: int, before: float) -> None:
        """Write down how long it took; of a run that was cut, the steps seen now stand for all of them."""
        taken = watched.step_seconds()
        if not len(taken):
            return  # it was finished before
        per_step, on_the_wall = taken.mean(0)
        noted = {"seconds": before + iterations * per_step, "wall_step_seconds": on_the_wall}
        noted |= {"step_seconds": per_step, "seconds_before_first_step": before}
        noted["load_average"] = os.getloadavg() if hasattr(os, "getloadavg") else None
        write_atomic(folder / "time.json", (json.dumps(noted) + "\n").encode())

    def time_of(self, folder: Path) -> dict:
        file = folder / "time.json"
        return json.loads(file.read_text()) if file.exists() else {}

    # Comparing.

    def compare(self) -> dict:
        options, count = self.options, self.options.images
        order = np.random.default_rng(0).permutation(len(self.data))
        labels = self.data.arrays["labels"][
            np.resize(order, count)
        ]  # classes as often as among the real images
        features = self._features()
        real = FeatureSet(features(self._real(np.arange(len(self.data)))), "the real images")
        images, rows = {}, []
        for name, calls, seed, sample, extra in self._contenders():
            self.say(f"sampling {name}, {calls} calls")
            images[name, calls, seed] = made = self._draw(sample, labels, calls)
            full = images[next(iter(images))]
            figures = self._figures(features, real, made, full, labels)
            rows.append({"method": name, "nfe": calls, "seed": seed, **extra, **figures})
        first = rows[0]
        for row in rows:
            row["fid_ratio"] = row["fid"] / first["fid"]
            row["diversity_ratio"] = row["diversity"] / first["diversity"]
        self._write_picture(images, labels)
        return {
            "conditions": {
                "command": " ".join(["python", "-m", "benchmarks.quality", *sys.argv[1:]]),
                "data": self.data.name,
                "images of the data": len(self.data),
                "shape": list(self.data.shape),
                "images per row": count,
                "features": features.description,
                "real_diversity": class_diversity(real, self.data.arrays["labels"]),
                "teacher": {
                    "steps": TEACHER_STEPS,
                    "guidance": options.guidance,
                    "network": asdict(self.teacher.network.config),
                    "training": self.teacher.provenance["settings"]["training"],
                    "time": self.time_of(self.out / "teacher"),
                },
                "training": without(asdict(self.setting(0).training), "iterations", "seed"),
                "budget": {
                    "minutes_per_method": options.minutes_per_method,
                    "iterations": options.iterations,
                },
                "device": torch.cuda.get_device_name(self.device)
                if self.device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} thread(s)",
                **machine(),
            },
            "rows": rows,
        }

    def _contenders(self):
        """Name, network calls, seed, sampler and what else a row says, one by one; the full teacher first."""
        setting = self.setting(0)

        def cut(solver):
            def sample(noise, labels, steps, fresh):
                sigmas = np.linspace(1, 0, steps + 1).tolist()
                return solver(setting.velocity(labels=labels), noise, sigmas)

            return sample

        runs = setting.runs_per_call
        yield "teacher", TEACHER_STEPS, None, cut(baselines.euler), {"network_runs": TEACHER_STEPS * runs}
        for key in self.options.methods:
            if key in CUT_SHORT:
                name, solver, calls = CUT_SHORT[key]
                for nfe in self.options.nfe:
                    if nfe % calls == 0:
                        sample = cut(solver)
                        yield (
                            name,
                            nfe,
                            None,
                            lambda x, y, n, fresh, s=sample, c=calls: s(x, y, n // c, fresh),
                            {"network_runs": nfe * runs},
                        )
        for run in self.runs:
            method, plan = self.method(run), self.plan[run.kind]
            extra = {
                "run": run.name,
                "settings": method.settings,
                "steps": plan["iterations"],
                "pairs": plan["pairs"],
                "network evaluations per step and sample": {
                    "teacher": method.work.teacher * runs,
                    **without(asdict(method.work), "teacher"),
                },
                "training": self.time_of(self.folder(run)),
            }
            for nfe in [run.nfe] if run.nfe else self.options.nfe:
                sample = method.sampler(self.folder(run))
                yield DISTILLED[run.method][0], nfe, run.seed, sample, {"network_runs": nfe, **extra}

    @torch.no_grad()
    def _draw(self, sample: Sampler, labels: np.ndarray, nfe: int) -> np.ndarray:
        """One image for each label, from the noise that belongs to its number."""
        made = []
        for start in range(0, len(labels), SAMPLING_BATCH):
            numbers = range(start, min(start + SAMPLING_BATCH, len(labels)))

            def noise(draw, numbers=numbers):
                values = philox_normal(self.options.noise_seed, numbers, self.data.shape, draw=draw)
                return torch.from_numpy(values).to(self.device)

            given = torch.from_numpy(labels[numbers.start : numbers.stop]).to(self.device)
            made.append(sample(noise(0), given, nfe, noise).cpu().numpy())
        return np.concatenate(made)

    def _features(self) -> Features:
        if self.options.features:
            return open_features(self.options.features)
        if self.options.data == "digits":
            return open_features("digits")
        file = self.out / "features.onnx"
        if not file.exists():
            trained = train_features(self.data, file)
            self.say(f"the classifier whose features are compared: accuracy {trained.accuracy}")
        return open_features(str(file))

    def _figures(self, features, real, made, full, labels) -> dict:
        found = FeatureSet(features(made))
        kid = kernel_distance(found, real)
        return {
            "fid": frechet_distance(found, real),
            "kid": kid.mean,
            **territory(real, found)._asdict(),
            "diversity": class_diversity(found, labels),
            "mse": agreement(made, full),
        }

    def _real(self, indices: np.ndarray) -> np.ndarray:
        return self.data.batch(indices)[0]

    def _write_picture(self, images: dict, labels: np.ndarray) -> None:
        """Rows: real images, the teacher, each method at each NFE; in every column the same noise and class."""
        turns = [np.flatnonzero(labels == label) for label in range(len(self.data.conditioner.names))]
        columns = [turn[i] for i in range(12) for turn in turns if len(turn) > i][:12]
        of_label = [np.flatnonzero(self.data.arrays["labels"] == labels[c]) for c in columns]
        seen = {}
        real = []
        for column, candidates in zip(columns, of_label, strict=True):
            label = int(labels[column])
            seen[label] = seen.get(label, -1) + 1
            real.append(candidates[seen[label] % len(candidates)])
        rows = {"real": pil(self._real(np.array(real)))}
        first_seed = self.options.seeds[0]
        for (name, nfe, seed), made in images.items():
            if seed in (None, first_seed):
                rows[f"{name}, {nfe}"] = pil(made[columns])
        headings = [self.data.conditioner.names[labels[c]] for c in columns]
        write_atomic(self.out / "quality.png", png_bytes(side_by_side(rows, headings)))


def sized_data(source: str, size: int | None, out: Path) -> ImageData:
    """The images, those of an .npz averaged down to `size` and kept in `out`."""
    if size is None or source == "digits" or Path(source).is_dir():
        return load_images(source, size=size)
    file = out / f"{Path(source).stem}-{size}.npz"
    if not file.exists():
        with np.load(source) as arrays:
            images = [
                np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
                for image in arrays["images"]
            ]
            kept = {name: arrays[name] for name in ("labels", "class_names") if name in arrays}
        np.savez_compressed(file, images=np.stack(images), **kept)
    return load_images(str(file))


def pil(images: np.ndarray) -> list[Image.Image]:
    """Images in [-1, 1], (M, C, H, W)."""
    levels = np.rint(np.clip((images + 1) * 127.5, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in levels]


def table(report: dict) -> str:
    """The rows as Markdown: means over the seeds and, where there are several, half of their range."""
    lines = [
        "| | NFE | network runs | FID | × teacher | precision | recall | coverage | diversity × teacher "
        "| MSE to teacher | steps | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in report["rows"]:
        groups.setdefault((row["method"], row["nfe"]), []).append(row)
    for (name, nfe), rows in groups.items():
        times = [row["training"]["seconds"] for row in rows if row.get("training")]
        cells = [
            name,
            str(nfe),
            str(rows[0]["network_runs"]),
            *(mean_and_range(rows, key, 2) for key in ("fid", "fid_ratio")),
        ]
        names = ("precision", "recall", "coverage", "diversity_ratio")
        cells += [mean_and_range(rows, key, 3) for key in names]
        cells += [mean_and_range(rows, "mse", 4), str(rows[0].get("steps", ""))]
        cells.append(f"{statistics.mean(times) / 60:.1f}" if times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="digits, an .npz file, or a folder of class folders")
    parser.add_argument("--size", type=int, help="side the images are brought to")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps all that is trained")
    parser.add_argument("--methods", nargs="+", choices=(*DISTILLED, *CUT_SHORT))
    parser.add_argument("--nfe", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="every network is trained with each"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes-per-method", type=float, help="training time of each network")
    budget.add_argument("--iterations", type=int, help="training steps of each network")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=TrainingConfig().batch_size)
    parser.add_argument("--learning-rate", type=float, default=TrainingConfig().learning_rate)
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE, help="of the teacher")
    parser.add_argument("--teacher", help="its folder, or 'shipped', the digits teacher; else one is trained")
    parser.add_argument("--teacher-iterations", type=int, default=3000)
    parser.add_argument("--teacher-batch-size", type=int, default=128)
    parser.add_argument("--teacher-learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--patch", type=int, default=2, help="of a teacher that is trained, like the next three"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--images", type=int, default=2000, help="per row of the table")
    parser.add_argument("--noise-seed", type=int, default=0, help="of the noise that all rows start from")
    parser.add_argument(
        "--features", help="see piflow-edge evaluate; else the digits', or some that are trained"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON, not the table")
    options = parser.parse_args(arguments)
    if not (options.minutes_per_method or options.iterations):
        options.minutes_per_method = 2.5
    options.methods = options.methods or [*CUT_SHORT, *DISTILLED]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        benchmark = Benchmark(options)
        benchmark.train_all()
        report = benchmark.compare()
    except PiFlowError as error:
        raise SystemExit(f"error: {error}") from error
    text = json.dumps(report, indent=2)
    write_atomic(options.out / "quality.json", (text + "\n").encode())
    write_atomic(options.out / "quality.md", (table(report) + "\n").encode())
    print(text if options.json else table(report))


if __name__ == "__main__":
    main()
