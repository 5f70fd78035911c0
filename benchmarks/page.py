"""Write all figures of the documentation anew that come from a result; none of them is typed by hand.

Tables stand between `<!-- NAME -->` and `<!-- end -->`: those of benchmarks/README.md are one for each result
(tables.py), those of other pages put several together (figures.py). Figures within sentences are found by their words.
A result that is not there leaves a line that says so, and sentences as they are. Pictures are those of the scripts, or
are drawn here (drawings.py).

Run: python -m benchmarks.page
     python -m benchmarks.page --check      (writes nothing; says which page holds other figures than the results)
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.drawings import DRAWINGS
from benchmarks.figures import SENTENCES, SEVERAL
from benchmarks.tables import TABLES, conditions, tell_nested
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.files import write_atomic

HERE = Path(__file__).parent
PAGES = ("benchmarks/README.md", "README.md", "docs/benchmark.md", "docs/export.md", "docs/faq.md")


def read(results: Path) -> dict[str, dict]:
    """All results, by name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}


def render(name: str, results: Path) -> str:
    """What stands between the marks of one table."""
    found = read(results)
    if name in SEVERAL:
        needs, make = SEVERAL[name]
        missing = [need for need in needs if need not in found]
        if missing:
            return f"Not measured yet: there is no {', '.join(f'`results/{need}.json`' for need in missing)}."
        return make(found)
    if name not in found:
        return f"Not measured yet: there is no `results/{name}.json`."
    text = TABLES.get(name, tell_nested)(found[name])
    if name in DRAWINGS or (results / f"{name}.png").exists():
        text = f"![{name.replace('_', ' ')}](results/{name}.png)\n\n{text}"
    return f"{text}\n\n{conditions(found[name])}".rstrip()


def rewrite(page: str, results: Path) -> str:
    """The page with every table made anew."""
    parts = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return parts.sub(lambda part: f"{part[1]}{render(part[2], results)}\n{part[3]}", page)


def reword(name: str, page: str, results: Path) -> str:
    """The page with the figures in its sentences as the results have them; sys.exit where a sentence is gone."""
    found = read(results)
    for sentence in SENTENCES:
        if sentence.page != name or sentence.result not in found:
            continue
        said = list(re.finditer(sentence.words.replace(" ", r"\s+"), page))  # however it is wrapped
        if len(said) != 1:
            sys.exit(
                f"{name} should have one sentence like {sentence.words!r}, and has {len(said)}; see figures.py"
            )
        figures = sentence.figures(found[sentence.result])
        for group in range(len(figures), 0, -1):  # from the end, so that places stay
            start, end = said[0].span(group)
            page = page[:start] + figures[group - 1] + page[end:]
    return page


def draw(results: Path) -> None:
    """The pictures of results whose scripts draw none."""
    for name, found in read(results).items():
        if name in DRAWINGS:
            write_atomic(results / f"{name}.png", png_bytes(DRAWINGS[name](found)))


def main() -> None:
    stale = []
    if "--check" not in sys.argv[1:]:
        draw(HERE / "results")
    for name in PAGES:
        page = HERE.parent / name
        text = page.read_text(encoding="utf-8")
        new = reword(name, rewrite(text, HERE / "results"), HERE / "results")
        if new != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                write_atomic(page, new.encode())
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(stale)}: not what benchmarks/page.py writes from benchmarks/results; run it")


if __name__ == "__main__":
    main()
