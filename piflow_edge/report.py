"""An evaluation as a picture and as one self-contained HTML page."""

import base64
import html
import json
from pathlib import Path

import numpy as np
from PIL import Image

from .evaluation import Evaluation
from .files import write_atomic
from .pictures import image_grid, png_bytes
from .sampling import as_pil, decode

# Columns of the pictures: two of each of ten classes.
_COLUMNS = 20

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr { border-bottom: 1px solid #ddd; } thead { background: #f4f4f4; }
img { max-width: 100%; image-rendering: pixelated; display: block; } figure { margin: 1rem 0; }
figcaption { font-weight: 600; } pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } thead, pre { background: #2a2a2a; } tr { border-color: #444; }
}
"""

_COLUMNS_OF_TABLE = [  # heading, attribute of Score, format, what it means
    (
        "network calls",
        "network_calls",
        "{}",
        "per image; a guided teacher's call runs the network on two samples",
    ),
    ("FID", "fid", "{:.3f}", "Fréchet distance to the real images; lower is better"),
    ("× teacher", "fid_ratio", "{:.2f}", "FID over the full teacher's"),
    ("diversity", "diversity", "{:.3f}", "mean feature distance between two images of one class"),
    ("× teacher", "diversity_ratio", "{:.3f}", "diversity over the full teacher's"),
    ("precision", "precision", "{:.3f}", "share of the images that lie among the real ones"),
    ("recall", "recall", "{:.3f}", "share of the real images that lie among these"),
    ("MSE to teacher", "mse", "{:.4f}", "from the same noise and label; pixel values run from -1 to 1"),
    ("ms per image", "ms_per_image", "{:.2f}", "median, one image at a time, ONNX Runtime on the CPU"),
]


def write_report(folder: Path, evaluation: Evaluation, *, title: str, notes: list[str]) -> Path:
    """Write `report.html` with everything inside it, and beside it the same pictures as PNGs and `evaluation.json`.

    Args:
        folder: where the files go.
        evaluation: scores and images.
        title: heading of the page.
        notes: paragraphs of plain text under the heading.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    real = real_row(evaluation)
    rows = {"real images": real, **{name: first_images(evaluation, name) for name in evaluation.images}}
    figures = []
    for name, row in rows.items():
        picture = png_bytes(image_grid([row]))
        write_atomic(folder / f"{_slug(name)}.png", picture)
        source = base64.b64encode(picture).decode()
        figures.append(
            f"<figure><figcaption>{html.escape(name)}</figcaption>"
            f'<img alt="{html.escape(name)}" src="data:image/png;base64,{source}"></figure>'
        )
    write_atomic(folder / "all.png", png_bytes(image_grid(list(rows.values()))))
    write_atomic(folder / "evaluation.json", (json.dumps(evaluation.as_json(), indent=2) + "\n").encode())
    legend = "".join(
        f"<li><b>{html.escape(heading)}</b>: {html.escape(meaning)}</li>"
        for heading, _, _, meaning in _COLUMNS_OF_TABLE
        if heading != "× teacher"
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{"".join(f"<p>{html.escape(note)}</p>" for note in notes)}
<h2>Figures</h2>
{_html_table(evaluation)}
<ul>{legend}</ul>
<h2>Pictures</h2>
<p>Every row but the first starts from the same noise and labels, column by column.</p>
{"".join(figures)}
<h2>Conditions</h2>
<pre>{html.escape(json.dumps(evaluation.conditions, indent=2))}</pre>
</body></html>
"""
    path = folder / "report.html"
    write_atomic(path, page.encode())
    return path


def text_table(evaluation: Evaluation):
    """The scores as a rich table for the terminal."""
    from rich.table import Table

    table = Table(caption=f"FID in {evaluation.conditions['features']}")
    table.add_column("")
    for heading, *_ in _COLUMNS_OF_TABLE:
        table.add_column(heading, justify="right")
    for cells in _cells(evaluation):
        table.add_row(*cells)
    return table


def first_images(evaluation: Evaluation, name: str) -> list[Image.Image]:
    """The first images of one contender, as pictures."""
    return _pictures(evaluation.images[name][:_COLUMNS])


def real_row(evaluation: Evaluation) -> list[Image.Image]:
    """Real images with the labels of the other rows."""
    from .distill.data import load_images

    real = load_images("digits")
    taken, chosen = set(), []
    for label in evaluation.labels[:_COLUMNS]:
        index = next(i for i in np.flatnonzero(real.labels == label).tolist() if i not in taken)
        taken.add(index)
        chosen.append(index)
    return _pictures(real.batch(np.array(chosen))[0])


def _pictures(images: np.ndarray) -> list[Image.Image]:
    return as_pil(decode(images))


def _cells(evaluation: Evaluation) -> list[list[str]]:
    return [
        [score.name, *(form.format(getattr(score, attribute)) for _, attribute, form, _ in _COLUMNS_OF_TABLE)]
        for score in evaluation.scores
    ]


def _html_table(evaluation: Evaluation) -> str:
    head = "".join(
        f'<th title="{html.escape(meaning)}">{html.escape(heading)}</th>'
        for heading, _, _, meaning in _COLUMNS_OF_TABLE
    )
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in _cells(evaluation)
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())
