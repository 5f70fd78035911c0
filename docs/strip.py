"""The picture at the top of the README: the same noise through the teacher and through students.

python docs/strip.py --out docs/images/strip.png BUNDLE ...
"""

from pathlib import Path

import click

from piflow_edge.commands.demo import shipped_teacher
from piflow_edge.distill.data.datasets import load_images
from piflow_edge.distill.sources import load_teacher
from piflow_edge.evaluation.comparison import evaluate
from piflow_edge.evaluation.features import open_features
from piflow_edge.export.onnx_graphs.teacher_graph import open_teacher
from piflow_edge.runtime.images import decode
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.files import write_atomic
from piflow_edge.system.sheets import as_pil, side_by_side


@click.command()
@click.argument("students", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--teacher", type=click.Path(path_type=Path), help="Checkpoint; else the shipped digits teacher."
)
@click.option("--data", default="digits", help="As for piflow-edge evaluate.")
@click.option("--features", help="As for piflow-edge evaluate.")
@click.option("--teacher-steps", default=50, help="Euler steps of the teacher.")
@click.option("--columns", default=10, help="Images in a row.")
@click.option("--seed", default=0)
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(students, teacher, data, features, teacher_steps, columns, seed, out):
    real = load_images(data)
    evaluation = evaluate(
        list(students),
        real,
        features and open_features(features),
        teacher=open_teacher(load_teacher(teacher or shipped_teacher()), real),
        count=100,
        seed=seed,
        teacher_steps=teacher_steps,
    )
    scores = {score.name: score for score in evaluation.scores}
    wanted = [f"teacher, {teacher_steps} steps", *(path.name for path in students)]
    rows = {}
    for name in wanted:
        calls = scores[name].network_calls
        label = f"{'teacher' if name == wanted[0] else 'student'}, {calls} call{'s' * (calls > 1)}"
        rows[label] = as_pil(decode(evaluation.pictures.rows[name][:columns]))
    write_atomic(out, png_bytes(side_by_side(rows, evaluation.pictures.titles[:columns])))
    print(out)


if __name__ == "__main__":
    main()
