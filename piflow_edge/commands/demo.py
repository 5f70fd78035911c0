"""The main job on the built-in digits, end to end: teacher, students, bundles, evaluation, report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from piflow_edge.evaluation.comparison import Evaluation, evaluate
from piflow_edge.evaluation.report import write_report
from piflow_edge.runtime.loading import load

from .demo_emoji import EmojiSources, draw_emoji

if TYPE_CHECKING:
    from piflow_edge.distill.data.image_data import ImageData
    from piflow_edge.distill.loop.checkpoint import Checkpoint
    from piflow_edge.distill.sources import TeacherModel

# Above 1 the strokes are cleaner; at 2 the teacher has lost a fifth of the real digits' diversity.
GUIDANCE_SCALE = 1.5
NUM_COMPONENTS = 8

LICENSE_NAME = "Apache-2.0 (weights); CC-BY-4.0 (data)"
LICENSE_TEXT = """The weights in this bundle are under the Apache License 2.0, like piflow-edge which made them.

They were trained on scikit-learn's copy of the test set of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49), CC BY 4.0.
"""


@dataclass(frozen=True)
class DemoConfig:
    """How long the demo trains and what it compares.

    `iterations`: training steps by network calls per image; a student is distilled for each. One call has the longest
    way to go in one stretch and learns slowest. `images`: per contender in the evaluation.
    """

    iterations: Mapping[int, int] = field(default_factory=lambda: {1: 1400, 2: 400, 4: 300})
    images: int = 2000
    seed: int = 0


def shipped_teacher() -> Path:
    """Checkpoint of the digits teacher that comes with the package."""
    return Path(__file__).parents[1] / "distill" / "assets" / "digits_teacher"


# Of the digits' bundles. The published rule sharpens too much here: it makes FID 36.5 instead of 16.8 at 2 calls and
# 18.7 instead of 15.6 at 4. 1 is the default of the authors' own test loop; the rule is their text-to-image pipelines'.
DIGITS_TEMPERATURE = 1.0


def export_digits(student: "Checkpoint", folder: Path) -> None:
    """Write a student of the digits as a bundle, in place of one that may be there."""
    from piflow_edge.export.to_bundle import export_bundle

    export_bundle(
        student,
        folder,
        temperature=DIGITS_TEMPERATURE,
        license_text=LICENSE_TEXT,
        license_name=LICENSE_NAME,
        overwrite=True,
    )


def run_demo(
    folder: Path,
    config: DemoConfig,
    *,
    emoji: EmojiSources | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, Evaluation]:
    """Distil, export, evaluate and report into `folder`; go on where an earlier run stopped.

    Args:
        folder: gets `students/`, `bundles/`, `teacher.onnx` and `report/`.
        config: see `DemoConfig`.
        emoji: what the bundle of emoji was made of, to be shown beside it.
        say: told each step as it begins.

    Returns:
        The report's page, and the evaluation it shows.

    Raises:
        CheckpointError: `folder` holds students that were trained with other settings.
        MissingExtraError: the 'text' extra is not installed; said before anything is trained.
        CheckFailedError: training diverged, or a bundle does not reproduce its student.
    """
    from piflow_edge.distill.data.datasets import load_images
    from piflow_edge.distill.sources import load_teacher
    from piflow_edge.export.onnx_graphs.teacher_graph import export_teacher, open_teacher

    load("emoji").close()  # prompts can be read here
    teacher, data = load_teacher(shipped_teacher()), load_images("digits")
    bundles = [
        _make_bundle(teacher, data, config, nfe, iterations, folder, say)
        for nfe, iterations in config.iterations.items()
    ]
    export_teacher(teacher.network, folder / "teacher.onnx")  # for piflow-edge bench --teacher
    say(f"sampling {config.images} digits from every contender and scoring them")
    opened = open_teacher(teacher, data)
    evaluation = evaluate(bundles, data, teacher=opened, count=config.images, seed=config.seed)
    notes = [
        f"A guided teacher of {evaluation.scores[0].network_calls} network calls, distilled with pi-Flow to "
        f"{', '.join(map(str, config.iterations))} calls per image.",
        "FID, diversity, precision and recall are measured in the features of a small classifier of 8x8 digits that "
        "ships with piflow-edge. They compare these rows with each other and cannot be set beside FIDs elsewhere.",
        "Teacher and students run on ONNX Runtime; the students need no PyTorch.",
    ]
    say("drawing emoji")
    title = "pi-Flow: emoji from prompts, and digits distilled here"
    sections = [draw_emoji(emoji, config.seed)]
    page = write_report(folder / "report", evaluation, title=title, notes=notes, sections=sections)
    return page, evaluation


def _make_bundle(
    teacher: "TeacherModel",
    data: "ImageData",
    config: DemoConfig,
    nfe: int,
    iterations: int,
    folder: Path,
    say: Callable[[str], None],
) -> Path:
    """Distil a student of the digits and export it; return the bundle's folder."""
    from piflow_edge.distill.configs import GuidanceConfig, ImitationConfig, TrainingConfig
    from piflow_edge.distill.student import distill
    from piflow_edge.kernels.rollout import integrate
    from piflow_edge.policies import GMPolicySpec

    say(f"distilling a student for {nfe} network call{'s' if nfe > 1 else ''} per image")
    student = distill(
        teacher,
        data,
        ImitationConfig(nfe=nfe),
        TrainingConfig(iterations=iterations, seed=config.seed),
        folder / "students" / f"nfe{nfe}",
        guidance=GuidanceConfig(GUIDANCE_SCALE),
        head=GMPolicySpec(NUM_COMPONENTS),
        resume=True,
        integrate=integrate,
    )
    say("exporting it, and checking the bundle against PyTorch")
    bundle = folder / "bundles" / f"digits-nfe{nfe}"
    export_digits(student, bundle)
    return bundle
