"""How good and how fast are the demo's students beside their teacher? The README's table, as one JSON line.

Scores and times are those of `piflow-edge evaluate`, as `piflow-edge demo` shows them in its report.

Run: python benchmarks/evaluate_digits.py --demo demo
"""

from pathlib import Path

from piflow_edge.demo import shipped_teacher
from piflow_edge.evaluation import evaluate

from timing import answer, parser


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, required=True, help="folder of piflow-edge demo")
    options.add_argument("--images", type=int, default=2000, help="for each contender")
    options = options.parse_args(arguments)
    bundles = sorted((options.demo / "bundles").iterdir())
    answer(options, evaluate(bundles, shipped_teacher(), count=options.images).as_json())


if __name__ == "__main__":
    main()
