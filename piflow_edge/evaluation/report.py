"""An evaluation as a picture and as one self-contained HTML page."""

import base64
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

from piflow_edge.runtime.images import decode
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.files import sha256, write_atomic
from piflow_edge.system.sheets import as_pil, at_most, image_grid, side_by_side

from .comparison import Evaluation
from .made_images import REAL
from .scores import Score

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; }
th, td { padding: .3rem .45rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } td { white-space: nowrap; }
tr { border-bottom: 1px solid #ddd; } thead { background: #f4f4f4; } .table { overflow-x: auto; }
img { max-width: 100%; image-rendering: pixelated; display: block; } figure { margin: 1rem 0; }
figcaption { font-weight: 600; } pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } thead, pre { background: #2a2a2a; } tr { border-color: #444; }
}
"""


@dataclass(frozen=True)
class Section:
    """Pictures under a heading of their own. `notes`: paragraphs of plain text. `pictures`: by caption."""

    heading: str
    notes: Sequence[str]
    pictures: Mapping[str, Image]


@dataclass(frozen=True)
class _Column:
    """One of the table's columns. `short`: its heading in a terminal. `beside_teacher`: only where there is one.

    `of_prompts`: only where images are compared with their prompts.

    `page_only`: never in a terminal; `spare`: left out there where the columns beside the teacher need the room.
    """

    heading: str
    short: str
    cell: Callable[[Score], str]
    meaning: str
    beside_teacher: bool = False
    of_prompts: bool = False
    spare: bool = False
    page_only: bool = False


_COLUMNS = [
    _Column(
        "network calls",
        "calls",
        lambda s: f"{s.network_calls}",
        "per image; one with guidance runs the network on two samples",
    ),
    _Column(
        "MSE to teacher",
        "MSE",
        lambda s: _or_nothing(s.mse, ".4f"),
        "from the same noise and conditioning; pixel values run from -1 to 1",
        True,
    ),
    _Column(
        "distance to teacher",
        "dist.",
        lambda s: _or_nothing(s.feature_distance, ".3f"),
        "on features, from the same noise and conditioning, over the teacher's diversity: 0 for the same image, 1 for "
        "any other of the class",
        True,
    ),
    _Column(
        "FID",
        "FID",
        lambda s: _short(s.fid),
        "Fréchet distance to the real images; lower is better",
    ),
    _Column(
        "FID, 95 %",
        "",
        lambda s: _interval(s.fid_interval),
        "interval of the FID by bootstrap; none above 256 features",
        page_only=True,
    ),
    _Column("× teacher", "FID×", lambda s: f"{s.fid_ratio:.2f}", "FID over the full teacher's", True),
    _Column(
        "KID",
        "KID",
        lambda s: f"{_short(s.kid)} ± {_short(s.kid_std, 2)}",
        "kernel distance to the real images, and its spread over random subsets; lower is better",
    ),
    _Column(
        "precision",
        "prec.",
        lambda s: f"{s.precision:.3f}",
        "share of the images that lie among the real ones",
    ),
    _Column("recall", "recall", lambda s: f"{s.recall:.3f}", "share of the real images that lie among these"),
    _Column(
        "density",
        "dens.",
        lambda s: f"{s.density:.3f}",
        "how many real images' surroundings an image lies in, over those it would at equal distributions",
    ),
    _Column(
        "coverage",
        "cov.",
        lambda s: f"{s.coverage:.3f}",
        "share of real images with one of these in their surroundings",
    ),
    _Column(
        "diversity",
        "diversity",
        lambda s: _short(s.diversity),
        "mean feature distance between two images of one class",
        spare=True,
    ),
    _Column(
        "× teacher", "div.×", lambda s: f"{s.diversity_ratio:.3f}", "diversity over the full teacher's", True
    ),
    _Column(
        "worst class",
        "worst",
        lambda s: f"{min((s.class_diversity_ratio or {}).values()):.3f}",
        "diversity over the full teacher's in the class where that is lowest; see the table of classes",
        True,
    ),
    _Column(
        "prompt found",
        "prompt",
        lambda s: f"{s.prompt_accuracy:.3f}",
        "share of the images whose own prompt is nearer than all of some others; see the conditions for how many, and "
        "for the share of the real images",
        of_prompts=True,
    ),
    _Column(
        "similarity",
        "sim.",
        lambda s: f"{s.prompt_similarity:.3f}",
        "mean cosine of an image and its prompt",
        of_prompts=True,
    ),
    _Column(
        "ms per image",
        "ms",
        lambda s: _or_nothing(s.ms_per_image, ".2f"),
        "median, one image at a time, ONNX Runtime on the CPU",
    ),
]


# What a reader asks, the figures that answer it, and whether they need a teacher.
_QUESTIONS = [
    ("Does it make its teacher's images?", "MSE, distance: from the same noise, image by image", True),
    ("Do its images look real, one by one?", "the pictures; precision, density", False),
    ("Is the set of them like the real set?", "FID, KID: quality and variety in one number", False),
    ("Did variety survive?", "recall, coverage, diversity, worst class", False),
    (
        "Does an image show what its prompt says?",
        "prompt found, similarity: where prompts are compared with",
        False,
    ),
]


def write_report(
    folder: Path,
    evaluation: Evaluation,
    *,
    title: str,
    notes: Sequence[str],
    sections: Sequence[Section] = (),
) -> Path:
    """Write `report.html` with everything inside it, and beside it the same pictures as PNGs and `evaluation.json`.

    Args:
        folder: where the files go.
        evaluation: scores and images.
        title: heading of the page.
        notes: paragraphs of plain text under the heading.
        sections: shown between those and the evaluation's pictures.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "evaluation.json", (json.dumps(evaluation.as_json(), indent=2) + "\n").encode())
    path = folder / "report.html"
    shown = "".join(_write_section(folder, section) for section in sections)
    write_atomic(path, _page(evaluation, title, notes, shown, _write_pictures(folder, evaluation)).encode())
    return path


def _write_section(folder: Path, section: Section) -> str:
    figures = "".join(_figure(folder, caption, image) for caption, image in section.pictures.items())
    return f"<h2>{html.escape(section.heading)}</h2>{_paragraphs(section.notes)}{figures}"


def _figure(folder: Path, caption: str, image: Image) -> str:
    """Write a picture as PNG, and return it as HTML that holds it."""
    picture = png_bytes(image)
    write_atomic(folder / picture_name(caption), picture)
    source = base64.b64encode(picture).decode()
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption>"
        f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{source}"></figure>'
    )


def _write_pictures(folder: Path, evaluation: Evaluation) -> str:
    """Write the pictures as PNGs, and return them as HTML that holds them."""
    rows = {name: [at_most(i) for i in as_pil(decode(row))] for name, row in evaluation.pictures.rows.items()}
    figures = [_figure(folder, name, image_grid([row])) for name, row in rows.items()]
    write_atomic(folder / "all.png", png_bytes(side_by_side(rows, evaluation.pictures.titles)))
    return "".join(figures)


def _page(evaluation: Evaluation, title: str, notes: Sequence[str], sections: str, pictures: str) -> str:
    legend = "".join(
        f"<li><b>{html.escape(column.heading)}</b>: {html.escape(column.meaning)}</li>"
        for column in _columns(evaluation)
        if column.heading != "× teacher"
    )
    questions = [question[:2] for question in _QUESTIONS if evaluation.has_teacher or not question[2]]
    titles = ", ".join(filter(None, evaluation.pictures.titles))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{_paragraphs(notes)}
{_paragraphs(f"Warning: {warning}." for warning in evaluation.warnings)}
{sections}
<h2>Pictures</h2>
<p>Every row but the first starts from the same noise and conditioning, column by column.
{html.escape(titles)}</p>
{pictures}
<h2>Figures</h2>
{_html_table([("question", ""), ("figures that answer it", "")], questions)}
<p>In {html.escape(evaluation.conditions["features"])}.</p>
{_figures_table(evaluation)}
<ul>{legend}</ul>
{_classes_section(evaluation)}
<h2>Conditions</h2>
<pre>{html.escape(json.dumps(evaluation.conditions, indent=2))}</pre>
</body></html>
"""


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def text_table(evaluation: Evaluation):
    """The scores as a rich table for the terminal; the classes' own figures are in the report and the JSON."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(
        box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), caption=f"in {evaluation.conditions['features']}"
    )
    table.add_column("", overflow="fold")
    columns = [
        column
        for column in _columns(evaluation)
        if not column.page_only and not (column.spare and evaluation.has_teacher)
    ]
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    for score in evaluation.scores:
        table.add_row(score.name, *(column.cell(score) for column in columns))
    return table


def _columns(evaluation: Evaluation) -> list[_Column]:
    has = {"beside_teacher": evaluation.has_teacher, "of_prompts": evaluation.compares_prompts}
    return [column for column in _COLUMNS if all(has[what] or not getattr(column, what) for what in has)]


def _figures_table(evaluation: Evaluation) -> str:
    columns = _columns(evaluation)
    return _html_table(
        [("", "")] + [(column.heading, column.meaning) for column in columns],
        [[score.name, *(column.cell(score) for column in columns)] for score in evaluation.scores],
    )


def _classes_section(evaluation: Evaluation) -> str:
    """Write the diversity of every class, where there are several."""
    if len(evaluation.conditions["real_class_diversity"]) < 2:
        return ""
    return f"""<h2>Diversity, class by class</h2>
<p>Mean feature distance between two images of the class{_ratio_note(evaluation)}.</p>
{_classes_table(evaluation)}"""


def _classes_table(evaluation: Evaluation) -> str:
    real = evaluation.conditions["real_class_diversity"]
    heads = [("class", ""), (REAL, "")] + [(score.name, "") for score in evaluation.scores]
    rows = []
    for name, value in real.items():
        cells = []
        for score in evaluation.scores:
            ratios = score.class_diversity_ratio or {}
            ratio = f" ({ratios[name]:.2f})" if evaluation.has_teacher else ""
            cells.append(_short(score.class_diversity[name]) + ratio)
        rows.append([name, "one image" if value is None else _short(value), *cells])
    return _html_table(heads, rows)


def _ratio_note(evaluation: Evaluation) -> str:
    return "; in brackets over the full teacher's" if evaluation.has_teacher else ""


def _html_table(heads: list[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th title="{html.escape(hint)}">{html.escape(text)}</th>' for text, hint in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>" for cells in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _short(value: float, digits: int = 4) -> str:
    """So many digits that count, or all before the point, and no exponent for the sizes that figures have."""
    if abs(value) < 1e-4:
        return f"{value:.1g}"
    return f"{value:.{max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))}f}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{_short(ends[0])} to {_short(ends[1])}"


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def picture_name(name: str) -> str:
    """Return the name of the file that shows the images of a contender."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    # Of 255 bytes that a file's name may have, with room for a suffix; a letter takes up to four.
    return f"{slug if len(slug.encode()) <= 240 else f'{slug[:50]}-{sha256(slug.encode())[:8]}'}.png"
