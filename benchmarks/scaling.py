"""How does time grow with resolution, batch, components and substeps? Fitted exponents answer, as one JSON line.

The rollout of a Gaussian mixture in the compiled kernel, and the network of a DiT in ONNX Runtime, each along one axis
at a time, the others held at a middle size. Exponents are of the number of pixels for resolution (side squared), and
so 1 where the cost is one of pixels. They are fitted beside a fixed cost, which weighs on the small sizes.

Run: python -m benchmarks.scaling
"""

from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.networks import LARGE, student_of, teacher_of
from benchmarks.timing import answer, growth, parser, rounds_of
from piflow_edge import GMPolicy, rollout
from piflow_edge.bench.plots import Series, draw_chart
from piflow_edge.engines import Graph, open_engine
from piflow_edge.export.onnx_graphs.to_onnx import export_network
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.files import write_atomic

# Held while another one grows.
MIDDLE = {"side": 64, "batch": 1, "components": 8, "substeps": 128}
CHANNELS = 4
AXES = {
    "side": [16, 32, 64, 128, 256],
    "batch": [1, 2, 4, 8, 16],
    "components": [4, 8, 16, 32, 64],
    "substeps": [8, 16, 32, 64, 128, 256, 512],
}
NETWORK_SIDES, NETWORK_BATCHES = [8, 16, 24, 32, 48, 64], [1, 2, 4, 8, 16]


def rollout_call(side, batch, components, substeps):
    random = np.random.default_rng(0)
    means = random.standard_normal((batch, components, CHANNELS, side, side), np.float32)
    logweights = random.standard_normal((batch, components, 1, side, side), np.float32)
    logstds = np.full((batch, 1, 1, 1, 1), -2, np.float32)
    x_src = random.standard_normal((batch, CHANNELS, side, side), np.float32)
    return lambda: rollout(
        GMPolicy(means, logweights, logstds, x_src, 1.0), x_src, 1.0, 0.0, substeps, kernel="cpu"
    )


def network_call(engine, side, batch):
    inputs = {
        "x_t": np.random.default_rng(0).standard_normal((batch, CHANNELS, side, side), np.float32),
        "t": np.ones(batch, np.float32),
        "labels": np.zeros(batch, np.int64),
    }
    return lambda: engine.run(inputs)


def network_at(side, config):
    student = student_of(teacher_of(replace(config, in_channels=CHANNELS, sample_size=side)))
    return open_engine(Graph(export_network(student)), engine="ort-cpu")


def count_work(axis, sizes):
    """Of a side its pixels."""
    return [side**2 for side in sizes] if axis == "side" else sizes


def line(what, axis, sizes, rounds):
    found = growth(count_work(axis, sizes), rounds)
    ms, count = [median(times) for times in rounds], len(rounds[0])
    return {"what": what, "axis": axis, "sizes": sizes, "ms": ms, "rounds": count, **found}


def relative(line):
    """(times its smallest size, times as long)."""
    sizes, ms = count_work(line["axis"], line["sizes"]), line["ms"]
    return [(size / sizes[0], time / ms[0]) for size, time in zip(sizes, ms, strict=True)]


def picture(lines):
    series = [
        Series(f"{one['what']}, {one['axis']}", relative(one), [f"{one['exponent']:.2f}"], line=True)
        for one in lines
    ]
    largest = max(size for one in lines for size, _ in relative(one))
    series.append(Series("in proportion", [(1, 1), (largest, largest)], line=True))
    return draw_chart(
        series,
        title="fitted exponents",
        x_label="times its smallest size, of a side in pixels",
        y_label="times as long",
        log_x=True,
        log_y=True,
        size=(1200, 640),
    )


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--seconds", type=float, default=12, help="for each axis, about")
    options.add_argument("--plot", type=Path, help="also write a PNG here")
    options.add_argument("--small", action="store_true", help="small sizes, to try the script")
    options = options.parse_args(arguments)
    axes, sides, batches, config, middle = AXES, NETWORK_SIDES, NETWORK_BATCHES, LARGE, MIDDLE
    if options.small:
        axes = {name: sizes[:3] for name, sizes in AXES.items()}
        sides, batches, middle = [4, 8], [1, 2], {**MIDDLE, "side": 8, "substeps": 8}
        config = replace(LARGE, hidden_size=16, depth=1, num_heads=2, num_classes=4)
    limits = (options.rounds, options.seconds)

    def times(calls):
        return [*rounds_of(calls, *limits, warmup=1).values()]

    lines = []
    for axis, sizes in axes.items():
        calls = {str(size): rollout_call(**{**middle, axis: size}) for size in sizes}
        lines.append(line("rollout", axis, sizes, times(calls)))
    engines = {side: network_at(side, config) for side in sides}
    calls = {str(side): network_call(engine, side, 1) for side, engine in engines.items()}
    lines.append(line("network", "side", sides, times(calls)))
    side = 32 if 32 in sides else sides[-1]
    calls = {str(batch): network_call(engines[side], side, batch) for batch in batches}
    lines.append(line("network", "batch", batches, times(calls)))
    if options.plot:
        write_atomic(options.plot, png_bytes(picture(lines)))
    conditions = {"middle": middle, "channels": CHANNELS, "network": vars(config), "rounds": options.rounds}
    answer(options, {**conditions, "lines": lines})


if __name__ == "__main__":
    main()
