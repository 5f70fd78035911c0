"""Hooks of the documentation's site: pages of the repository that lie outside docs/, and links that lead to them.

On GitHub the README is the first page and links lead from file to file. The site has the same pages, so the same links
are bent to where the site has them; what the site does not have (code, JSON) is left as plain text.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Page of the site -> file of the repository.
PAGES = {
    "index.md": "README.md",
    "results.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the repository's pages, and the pictures that pages show."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Bend the links of a page."""
    source = PAGES.get(page.file.src_uri)
    folder = (ROOT / source).parent if source else ROOT / "docs"
    return LINK.sub(lambda match: _bend(match, folder, files), markdown)


def _bend(match, folder: Path, files) -> str:
    picture, text, target = match.groups()
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return match[0]
    place = (folder / path).resolve().relative_to(ROOT).as_posix()
    there = {source: page for page, source in PAGES.items()}.get(place)
    there = there or place.removeprefix("docs/").replace("benchmarks/results/", "results/")
    if files.get_file_from_path(there) is None:
        return f"`{place}`" if picture else f"{text} (`{place}`)"
    return f"{picture}[{text}]({there}{'#' + anchor if anchor else ''})"
