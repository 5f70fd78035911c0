"""What does a millisecond buy? Quality against time on the digits, by calls, substeps and precision. One JSON line.

The students of `piflow-edge demo` are exported once more in every precision. Each setting makes the same images from
the same noise, which are scored as `piflow-edge evaluate` does; times are those of `piflow-edge bench`, one image at a
time, all settings in turn. The teacher at 50 guided steps and cut short to a few stands beside them.

Run: python -m benchmarks.quality_latency --demo demo --plot quality_latency.png
"""

import tempfile
from itertools import product
from pathlib import Path

import numpy as np

import piflow_edge as pf
from benchmarks.timing import answer, parser
from piflow_edge.bench.benchmark import bench
from piflow_edge.bench.config import BenchConfig, TeacherConfig
from piflow_edge.bench.plots import Series, draw_chart
from piflow_edge.commands.demo import DIGITS_TEMPERATURE, shipped_teacher
from piflow_edge.distill.data.datasets import load_images
from piflow_edge.distill.loop.checkpoint import load_checkpoint
from piflow_edge.distill.sources import load_teacher
from piflow_edge.evaluation.contenders import images_of, teacher_contenders
from piflow_edge.evaluation.features import open_features
from piflow_edge.evaluation.metrics import FeatureSet, frechet_distance
from piflow_edge.evaluation.plan import plan_images
from piflow_edge.export.onnx_graphs.teacher_graph import export_teacher, open_teacher
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.files import write_atomic


class Judge:
    """FID of images made from common noise."""

    def __init__(self, count, seed=0):
        self.data, self.features = load_images("digits"), open_features("digits")
        self.plan = plan_images(self.data, count, steered=True)
        self.noise = philox_normal(seed, range(count), self.data.shape)
        real, _ = self.data.batch(np.arange(len(self.data)))
        self.real = FeatureSet(self.features(real), "the real images")

    def fid(self, sample, name):
        """Of what `sample(noise, conditioning)` makes."""
        pieces = [slice(start, start + 250) for start in range(0, len(self.plan), 250)]
        made = np.concatenate([sample(self.noise[p], self.plan.conditioning(p)) for p in pieces])
        return frechet_distance(FeatureSet(self.features(made), name), self.real)


def students(folders, judge, options):
    """FID of every student, substeps and precision."""
    for folder in folders:
        for precision, substeps in product(options.precisions, options.substeps):
            generator = pf.load(folder, precision=precision)
            nfe = generator.bundle.manifest.schedule.nfe

            def sample(noise, conditioning, generator=generator, substeps=substeps):
                made = generator(
                    conditioning["labels"].tolist(), noise=noise, substeps=substeps, output="latent"
                )
                return images_of(generator, made.latents)

            key = (generator.bundle.name, precision, substeps)
            yield key, {"nfe": nfe, "fid": judge.fid(sample, str(key))}


def picture(lines, teachers):
    series = []
    for precision in dict.fromkeys(line["precision"] for line in lines):
        chosen = [line for line in lines if line["precision"] == precision]
        points = [(line["ms"], line["fid"]) for line in chosen]
        labels = [f"{line['nfe']} x {line['substeps']}" for line in chosen]
        # The others lie beside the first precision's, whose labels are theirs too.
        series.append(Series(f"student, {precision}", points, [] if series else labels))
    points = [(line["ms"], line["fid"]) for line in teachers]
    series.append(Series("teacher", points, [f"{line['steps']} steps" for line in teachers], line=True))
    return draw_chart(
        series,
        title="calls x substeps",
        x_label="ms per image, one at a time",
        y_label="FID in the digits classifier (lower is better)",
        log_x=True,
        size=(1200, 640),
    )


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, required=True, help="folder of piflow-edge demo")
    options.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4], help="students of the demo")
    options.add_argument("--substeps", type=int, nargs="+", default=[8, 32, 128])
    options.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "int8"])
    options.add_argument("--teacher-steps", type=int, nargs="+", default=[4, 8, 16, 50])
    options.add_argument("--images", type=int, default=2000, help="for each FID")
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--plot", type=Path, help="also write a PNG here")
    options = options.parse_args(arguments)

    judge, teachers, lines = Judge(options.images), [], []
    with tempfile.TemporaryDirectory() as work:
        folders = []
        for nfe in options.nfe:
            checkpoint = load_checkpoint(options.demo / "students" / f"nfe{nfe}", kind="student")
            folders.append(Path(work) / f"digits-nfe{nfe}")
            settings = {"temperature": DIGITS_TEMPERATURE, "precisions": options.precisions}
            export_bundle(checkpoint, folders[-1], **settings)
        scale = checkpoint.settings["guidance"]["scale"]
        quality = dict(students(folders, judge, options))
        config = BenchConfig(substeps=options.substeps, rounds=options.rounds, cold_starts=0, warmup=2)
        graph = Path(work) / "teacher.onnx"
        export_teacher(load_teacher(shipped_teacher()).network, graph)
        longest = TeacherConfig(graph, max(options.teacher_steps), scale)
        found = bench(folders, config, longest)
    for row in found.rows:
        key = (row.setting.model, row.setting.precision, row.setting.substeps)
        if key in quality:
            lines.append(
                {
                    "precision": row.setting.precision,
                    "nfe": row.setting.calls,
                    "substeps": row.setting.substeps,
                    "ms": row.median,
                    "fid": quality[key]["fid"],
                }
            )
    opened = open_teacher(load_teacher(shipped_teacher()), judge.data)
    whole = found.rows[-1].median
    contenders = teacher_contenders(opened, scale, options.teacher_steps)
    for steps, contender in zip(options.teacher_steps, contenders, strict=True):
        fid = judge.fid(
            lambda noise, given, sample=contender.sample: sample(noise, given, []), contender.name
        )
        # Its time is that of its steps, which all cost the same.
        teachers.append({"steps": steps, "ms": whole * steps / max(options.teacher_steps), "fid": fid})
    if options.plot:
        write_atomic(options.plot, png_bytes(picture(lines, teachers)))
    conditions = {
        "images": options.images,
        "features": judge.features.description,
        "guidance_scale": scale,
        "rounds": options.rounds,
    }
    answer(options, {**conditions, "lines": lines, "teacher": teachers})


if __name__ == "__main__":
    main()
