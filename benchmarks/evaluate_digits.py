"""How good and how fast are the demo's students beside their teacher? The README's table, as one JSON line.

Scores and times are those of `piflow-edge evaluate`, as `piflow-edge demo` shows them in its report.

Run: python -m benchmarks.evaluate_digits --demo demo
"""

from pathlib import Path

from benchmarks.timing import answer, parser
from piflow_edge.commands.demo import shipped_teacher
from piflow_edge.distill.data.datasets import load_images
from piflow_edge.distill.sources import load_teacher
from piflow_edge.evaluation.comparison import evaluate
from piflow_edge.export.onnx_graphs.teacher_graph import open_teacher


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, required=True, help="folder of piflow-edge demo")
    options.add_argument("--images", type=int, default=2000, help="for each contender")
    options = options.parse_args(arguments)
    bundles = sorted((options.demo / "bundles").iterdir())
    data = load_images("digits")
    teacher = open_teacher(load_teacher(shipped_teacher()), data)
    answer(options, evaluate(bundles, data, teacher=teacher, count=options.images).as_json())


if __name__ == "__main__":
    main()
