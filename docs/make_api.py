# ruff: noqa: E501
"""Writes docs/api.md from signatures and docstrings, which are read and not imported: python docs/make_api.py

A name stands here as soon as it is listed below; a test holds the page to the code.
"""

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

# Heading, module, whether the names are reached as pf.NAME, the file, and the names: a class with those of its methods.
SECTIONS = (
    ("Open a bundle", "piflow_edge", "piflow_edge/runtime/loading.py", {"load": ()}),
    ("Make images", "piflow_edge", "piflow_edge/runtime/generator.py", {
        "Generator": ("__call__", "decode", "trained_nfes"), "Result": (),
    }),
    ("While images are made", "piflow_edge", "piflow_edge/sampling.py", {"Progress": ("x_t", "x_0")}),
    ("What a PNG file holds", "piflow_edge", "piflow_edge/runtime/recipe.py", {"Recipe": (), "read_recipe": ()}),
    ("Noise levels", "piflow_edge", "piflow_edge/schedule.py", {
        "warp": (), "unwarp": (), "Schedule": ("sigmas", "segments"),
        "Segment": ("renoises", "renoise_scales", "renoise"),
    }),
    ("Policies", "piflow_edge", "piflow_edge/policies.py", {
        "GMPolicy": ("velocity", "tempered"), "DXPolicy": ("velocity",),
    }),
    ("Rollout", "piflow_edge", "piflow_edge/integrator.py", {"rollout": ()}),
    ("Starting noise", "piflow_edge", "piflow_edge/noise.py", {"philox_normal": ()}),
    ("Errors", "piflow_edge.errors", "piflow_edge/errors.py", None),
    ("The bundle that comes with the package", "piflow_edge", "piflow_edge/bundle/folder.py", {"demo_bundle": ()}),
    ("Bundles", "piflow_edge.bundle.folder", "piflow_edge/bundle/folder.py", {
        "Bundle": ("graph", "decoder", "sampler", "read"),
    }),
    ("What a bundle's latents are", "piflow_edge.bundle.manifest", "piflow_edge/bundle/manifest.py", {"LatentSpec": ()}),
    ("Checks", "piflow_edge.runtime.verification", "piflow_edge/runtime/verification.py", {
        "verify": (), "check": (), "Row": ("passed",),
    }),
    ("This machine", "piflow_edge.doctor.examination", "piflow_edge/doctor/examination.py", {"diagnose": ()}),
    ("What doctor reports", "piflow_edge.doctor.findings", "piflow_edge/doctor/findings.py", {"Finding": ()}),
    ("Engines", "piflow_edge.engines", "engines/__init__.py", {
        "open_engine": (), "Graph": (), "EngineOptions": (), "Engine": ("run",),
    }),
    ("Building engines", "piflow_edge.engines.building", "engines/building.py", {
        "BuildSettings": (), "plan": (), "build": (),
    }),
    ("What is built", "piflow_edge.engines.build_targets", "engines/build_targets.py", {
        "targets": (), "Batch": ("parse",),
    }),
    ("Teachers and students", "piflow_edge.distill.networks.flow_network", "piflow_edge/distill/networks/flow_network.py", {
        "Convention": (), "FlowNetwork": (), "ModuleNetwork": (), "attach_policy_head": (),
    }),
    ("Policy heads", "piflow_edge.distill.networks.heads", "piflow_edge/distill/networks/heads.py", {"GMHead": (), "DXHead": ()}),
    ("Loading teachers and students", "piflow_edge.distill.sources", "piflow_edge/distill/sources.py", {
        "load_teacher": (), "TeacherModel": (), "load_student": (), "StudentModel": (),
    }),
    ("The DiT that train-teacher trains", "piflow_edge.distill.networks.dit", "piflow_edge/distill/networks/dit.py", {"DiTConfig": ()}),
    ("Data", "piflow_edge.distill.data.datasets", "piflow_edge/distill/data/datasets.py", {"load_images": ()}),
    ("What data are", "piflow_edge.distill.data.datasets", "piflow_edge/distill/data/image_data.py", {
        "ImageData": ("batch",), "Latent": (),
    }),
    ("Distilling", "piflow_edge.distill.student", "piflow_edge/distill/student.py", {"distill": ()}),
    ("Settings of the loss", "piflow_edge.distill.imitation", "piflow_edge/distill/imitation.py", {
        "ImitationConfig": (),
    }),
    ("Settings of the run", "piflow_edge.distill.loop.training", "piflow_edge/distill/loop/training.py", {
        "TrainingConfig": (), "RunConfig": (), "train": (),
    }),
    ("Guidance, and training a teacher", "piflow_edge.distill.teacher", "piflow_edge/distill/teacher.py", {
        "GuidanceConfig": (), "GuidedTeacher": (), "train_teacher": (),
    }),
    ("Export", "piflow_edge.export.to_bundle", "export/to_bundle.py", {"export_bundle": ()}),
    ("Evaluation", "piflow_edge.evaluation.comparison", "piflow_edge/evaluation/comparison.py", {"evaluate": ()}),
    ("What an evaluation finds", "piflow_edge.evaluation.comparison", "piflow_edge/evaluation/scores.py", {"Score": ()}),
)  # fmt: skip

HEAD = """# API reference

Written by `python docs/make_api.py` from the docstrings; edit those. Letters: B batch, C channels, H, W height and
width, K mixture components, N grid points, T frames. Noise levels `sigma` run from 1 (pure noise) down to 0 (data) and
have no unit; latents and pixels are floating point, pixels from −1 to 1, unless a line says otherwise. `Array` is any
array of the array API standard: NumPy, torch, CuPy. Every error raised on purpose is a `pf.PiFlowError`.

What stands under `piflow_edge` below is reached as `pf.NAME` after `import piflow_edge as pf`; the rest is imported
from the module named in its heading.
"""


def page() -> str:
    """The whole page, as Markdown."""
    parts = [HEAD.rstrip()]
    parts.append("\n".join(_contents()))
    for heading, module, file, names in SECTIONS:
        nodes = _definitions(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        parts.append(f"## {heading}\n\n`{module}`")
        for name, members in (names or dict.fromkeys(nodes, ())).items():
            parts.append(_entry(nodes[name], "pf." if module == "piflow_edge" else ""))
            inside = _definitions(nodes[name]) if members else {}
            parts += [_member(name, inside[member]) for member in members]
    return "\n\n".join(parts) + "\n"


def _contents() -> list[str]:
    return [
        f"- [{heading}](#{re.sub('[^a-z -]', '', heading.lower()).replace(' ', '-')})"
        for heading, *_ in SECTIONS
    ]


def _definitions(tree) -> dict:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def _entry(node, prefix: str) -> str:
    lines = [f"### `{prefix}{node.name}`"]
    if isinstance(node, ast.FunctionDef):
        lines.append(_code(node.name, node))
    elif "__init__" in (inside := _definitions(node)):
        lines.append(_code(node.name, inside["__init__"]))
    elif fields := [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]:
        lines.append(_listing(f"{node.name}(", fields, ")"))
    elif node.bases:
        lines.append(f"Is a {' and a '.join(f'`{ast.unparse(base)}`' for base in node.bases)}.")
    return "\n\n".join([*lines, _text(ast.get_docstring(node))])


def _member(owner: str, node: ast.FunctionDef) -> str:
    is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
    shown = owner[0].lower() + owner[1:] if node.name == "__call__" else f".{node.name}"
    if is_property:
        result = f": {ast.unparse(node.returns)}" if node.returns else ""
        return f"**`{shown}{result}`**\n\n{_text(ast.get_docstring(node))}"
    return f"#### `{owner}.{node.name}`\n\n{_code(shown, node)}\n\n{_text(ast.get_docstring(node))}"


def _code(name: str, node: ast.FunctionDef) -> str:
    arguments = node.args
    pieces, positional = [], [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pieces += [_argument(a, d) for a, d in zip(positional, defaults, strict=True) if a.arg != "self"]
    if arguments.vararg:
        pieces.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        pieces.append("*")
    pieces += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        pieces.append(f"**{_argument(arguments.kwarg, None)}")
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return _listing(f"{name}(", pieces, f"){result}")


def _argument(argument: ast.arg, default) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return argument.arg + kind
    return argument.arg + kind + (" = " if kind else "=") + ast.unparse(default)


def _listing(start: str, pieces: list[str], end: str) -> str:
    line = start + ", ".join(pieces) + end
    if len(line) > 100:
        line = "\n".join([start, *(f"    {piece}," for piece in pieces), end])
    return f"```python\n{line}\n```"


def _text(docstring: str | None) -> str:
    """A docstring as Markdown: its sections become lists of names."""
    lines = []
    for paragraph in inspect.cleandoc(docstring or "").split("\n\n"):
        title, _, body = paragraph.partition("\n")
        if title not in ("Args:", "Returns:", "Raises:"):
            lines.append(paragraph)
            continue
        body = inspect.cleandoc("\n" + body)
        items = re.split(r"\n(?=\S)", body)
        if title == "Returns:" or not all(re.match(r"[\w, *`.]+:", item) for item in items):
            lines.append(f"**{title[:-1]}.** {body}")
        else:
            rows = [re.sub(r"^([^:]+):", r"- `\1`:", re.sub(r"\n\s*", "\n  ", item)) for item in items]
            lines.append(f"**{title[:-1]}**\n\n" + "\n".join(rows))
    return "\n\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
