"""Pictures of results whose scripts draw none: bars, from the JSON alone. page.py writes them beside it."""

from collections.abc import Callable, Mapping

from PIL import Image

from piflow_edge.bench.plots import draw_bars

WIDTH = 1000


def startup(found: Mapping) -> Image.Image:
    rows = {name: {"ms": ms} for name, ms in found["ms"].items()}
    return draw_bars(rows, title="a fresh process, from start to end", x_label="ms", width=WIDTH)


def rollout_share(found: Mapping) -> Image.Image:
    rows = {}
    for one in found["lines"]:
        calls = f"{one['nfe']} call{'s' * (one['nfe'] > 1)}"
        whole = sum(one["split"].values())
        shares = {stage: 100 * max(0.0, ms) / whole for stage, ms in one["split"].items()}
        rows[f"{one['student']}, {calls}, {one['substeps']} substeps"] = shares
    return draw_bars(rows, title="where an image's time goes", x_label="% of the time", width=WIDTH)


def end_to_end(found: Mapping) -> Image.Image:
    rows = {
        f"{line['network']}: teacher in {rival}": {"times as fast": gain}
        for line in found["lines"]
        for rival, gain in line["speedup"].items()
    }
    title = f"one call of the student beside {found['steps']} guided steps of its teacher"
    return draw_bars(rows, title=title, x_label="times as fast", width=WIDTH)


DRAWINGS: dict[str, Callable[[Mapping], Image.Image]] = {
    "startup": startup,
    "rollout_share": rollout_share,
    "end_to_end": end_to_end,
}
