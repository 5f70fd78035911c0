"""The house holds: who may import whom, no circles, small folders, short functions, one meaning per module name.

The rules are those of CONTRIBUTING.md, "The house". Imports are read from the syntax trees, so that late
ones and those for type checkers count too, and no module is run. A violation that is known stands in a list
below; the tests fail for one that is new and for one that is gone, so that the lists only shrink.
"""

import ast
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The wheel's tests run beside tests and docs alone.
pytestmark = pytest.mark.skipif(not (ROOT / "piflow_edge").is_dir(), reason="the sources are not here")
SOURCES = {"piflow_edge": "piflow_edge", "piflow_edge.export": "export", "piflow_edge.engines": "engines"}

METHOD = ("schedule", "policies", "integrator", "sampling", "sampling_settings", "noise", "arrays")
MEASURING = ("evaluation", "bench", "doctor")
RUNTIME_AND_BELOW = ("runtime", "bundle", "conditioning", "engines", "method", "system")
GROUND = ("errors", "option", "version")  # every room may import these
# Room -> the rooms that it may import beside itself and the ground. "package" is piflow_edge/__init__.py.
MAY_IMPORT = {
    "package": (*RUNTIME_AND_BELOW, "kernels"),
    "cli": ("commands", "package", "system"),
    "commands": ("package", "export", "distill", *MEASURING, *RUNTIME_AND_BELOW, "kernels"),
    "export": ("distill", *RUNTIME_AND_BELOW),
    "distill": ("conditioning", "method", "system"),
    "evaluation": RUNTIME_AND_BELOW,
    "bench": RUNTIME_AND_BELOW,
    "doctor": RUNTIME_AND_BELOW,
    "runtime": ("bundle", "conditioning", "engines", "method", "kernels", "system"),
    "bundle": ("conditioning", "method", "system"),
    "conditioning": ("method", "system"),
    "engines": ("kernels", "system"),
    "kernels": ("method", "system"),
    "frozen": (*RUNTIME_AND_BELOW, "kernels"),
    "system": (),
    "method": (),
    "errors": (),
    "option": (),
    "version": (),
}
KNOWN_IMPORTS: set[str] = set()
KNOWN_CIRCLES: set[str] = set()

MOST_FILES = 14  # beside __init__.py
MOST_LINES = 40  # of a function's body, its docstring aside
KNOWN_FULL_FOLDERS = {"benchmarks"}
# Two rooms may each have a module of these names, because each means the same there.
SHARED_NAMES = {
    "images": "the commands about what runtime/images.py makes",
    "training": "the commands about what distill/loop/training.py does",
}
KNOWN_SHARED_NAMES: set[str] = {"arrays"}


def room_of(module: str) -> str:
    """Return the room in which a module stands: `piflow_edge.distill.loop.state` stands in "distill"."""
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    return "method" if parts[1] in METHOD else parts[1]


def shorten(module: str) -> str:
    return module.removeprefix("piflow_edge.") if "." in module else "package"


@cache
def read_modules() -> dict[str, ast.Module]:
    """Parse every module of the package: its name as it is imported -> its syntax tree."""
    trees = {}
    for package, folder in SOURCES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part != "__init__")
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def is_package(module: str) -> bool:
    return any(other.startswith(f"{module}.") for other in read_modules())


def find_imports(module: str) -> set[str]:
    """Name the modules of ours that a module imports anywhere in its text."""
    trees, imported = read_modules(), set()
    for node in ast.walk(trees[module]):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            above = above[: len(above) - node.level + is_package(module)] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            # `from .room import x` imports the module room/x.py, or else a name that room/__init__.py has.
            imported |= {full if (full := f"{home}.{alias.name}") in trees else home for alias in node.names}
    return {name for name in imported if name in trees and name != module}


def find_named_modules(module: str) -> set[str]:
    """Name the modules of ours that a module has in a string, as a registry does ("piflow_edge.x:Class")."""
    texts = {
        node.value.split(":")[0]
        for node in ast.walk(read_modules()[module])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {text for text in texts if text in read_modules() and "." in text}


@cache
def import_graph() -> dict[str, set[str]]:
    return {module: find_imports(module) for module in read_modules()}


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Find the groups of modules that import one another (Tarjan's strongly connected components).

    The groups come in such an order that a group imports only from groups before it.
    """
    number, low, stack, groups = {}, {}, [], []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            start = stack.index(module)
            groups.append(sorted(stack[start:]))
            del stack[start:]

    for module in graph:
        if module not in number:
            visit(module)
    return groups


def count_levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """Give every module its import level: 1 where it imports nothing of ours, else one above the highest."""
    levels = {}
    for group in find_circles(graph):
        below = [levels[other] for module in group for other in graph[module] - set(group)]
        levels |= dict.fromkeys(group, 1 + max(below, default=0))
    return levels


def check_list_only_shrinks(found: set, known: set, rule: str) -> None:
    new, gone = sorted(found - known), sorted(known - found)
    assert not new, f"{rule}: {new}"
    assert not gone, f"no violation any more, delete it from the list in tests/test_house.py: {gone}"


def test_rooms_import_only_what_the_table_allows():
    found = set()
    for module in read_modules():
        room = room_of(module)
        for other in import_graph()[module] | find_named_modules(module):
            if room_of(other) not in (room, *GROUND, *MAY_IMPORT[room]):
                found.add(f"{shorten(module)} -> {room_of(other)}")
    check_list_only_shrinks(found, KNOWN_IMPORTS, "a room imports another that it may not know")


def test_every_room_stands_in_the_table():
    assert {room_of(module) for module in read_modules()} <= set(MAY_IMPORT)


def test_no_modules_import_one_another():
    groups = find_circles(import_graph())
    circles = {" <-> ".join(map(shorten, group)) for group in groups if len(group) > 1}
    check_list_only_shrinks(circles, KNOWN_CIRCLES, "modules import one another")


def test_folders_stay_small():
    files = Counter(
        path.parent.relative_to(ROOT).as_posix()
        for folder in (*SOURCES.values(), "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    )
    full = {folder for folder, count in files.items() if count > MOST_FILES}
    check_list_only_shrinks(full, KNOWN_FULL_FOLDERS, f"a folder has above {MOST_FILES} files")


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_stay_short():
    long = {
        f"{shorten(module)}.{node.name}"
        for module, tree in read_modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and count_lines(node) > MOST_LINES
    }
    check_list_only_shrinks(long, set(), f"a function has above {MOST_LINES} lines")


def test_a_module_name_means_one_thing():
    homes = defaultdict(list)
    for module in read_modules():
        homes[module.rpartition(".")[2]].append(module)
    shared = {name for name, modules in homes.items() if len(modules) > 1}
    check_list_only_shrinks(
        shared - set(SHARED_NAMES), KNOWN_SHARED_NAMES, "modules of one name in two rooms"
    )


def test_import_levels_can_be_counted():
    """Print the levels: `pytest tests/test_house.py -k levels -s`, or run this file."""
    levels = count_levels(import_graph())
    assert levels["piflow_edge.errors"] == 1
    print_levels(levels)


def print_levels(levels: dict[str, int]) -> None:
    for level in range(1, max(levels.values()) + 1):
        names = [shorten(name) for name, own in sorted(levels.items()) if own == level]
        print(f"{level:3} {', '.join(names)}")


if __name__ == "__main__":
    print_levels(count_levels(import_graph()))
