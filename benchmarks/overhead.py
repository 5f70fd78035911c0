"""What does the sampler cost beside the bare network calls of the same engine? One JSON line answers.

For every student, its network is called as often as for an image, on inputs that lie ready; and the generator makes
an image, seed in and uint8 pixels out. Both take turns; the ratio of the medians is the overhead, to be at most 1.05
for a Gaussian mixture and 1.01 for DX where a call takes 10 ms or more. As one call of a network differs from the next
by more than that, the generator's own clock says too how long a call took beside the network in it. The students were
never trained: a DiT of 8 million weights with a mixture of 8 and one with a DX policy of 10 nodes, and with --demo the
digits, whose calls are too short for the budget to hold.

Run: python -m benchmarks.overhead --demo demo
"""

import logging
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

import piflow_edge as pf
from benchmarks.networks import students_in
from benchmarks.timing import answer, parser, rounds_of

WARMUP = 3  # rounds


def contenders(generator: pf.Generator, nfe: int, timings: list[dict[str, float]]) -> dict:
    """The bare calls, and the generator with the same number of them, which adds its own timings to the list."""
    manifest = generator.bundle.manifest
    noise = pf.philox_normal(0, [0], manifest.latent.shape)
    steered = generator.conditioner.example(1)
    levels = manifest.schedule.schedule(nfe=nfe).sigmas[:-1].tolist()
    inputs = [generator.student.inputs(noise, sigma_t, steered) for sigma_t in levels]

    def network():
        for given in inputs:
            generator.engine.run(given)

    def image():
        timings.append(generator([1], seed=0, nfe=nfe, output="numpy").timings)

    return {"network": network, "generator": image}


def measure(generator: pf.Generator, nfe: int, options) -> dict:
    timings: list[dict[str, float]] = []
    calls = contenders(generator, nfe, timings)
    times = rounds_of(calls, options.rounds, options.seconds, warmup=WARMUP)
    ms = {name: median(times[name]) for name in calls}
    stages = timings[WARMUP:]
    split = {stage: round(median(each[stage] for each in stages), 4) for stage in stages[0]}
    return {
        "nfe": nfe,
        "ms": {name: round(value, 4) for name, value in ms.items()},
        "per_call_ms": round(ms["network"] / nfe, 4),
        "overhead_ms": round(ms["generator"] - ms["network"], 4),
        "ratio": round(ms["generator"] / ms["network"], 4),
        # Of two neighbours in time: less moved by a machine that is slow now and then.
        "ratio_of_pairs": round(median(np.divide(times["generator"], times["network"]).tolist()), 4),
        # Of one and the same call, so that it is free of the network's own ups and downs.
        "ratio_by_own_clock": round(median(each["total"] / each["network"] for each in stages), 4),
        "split_ms": split,
        "rounds": len(times["network"]),
    }


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, help="folder of piflow-edge demo; else without the digits")
    options.add_argument("--nfe", type=int, nargs="+", default=[1, 4])
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument(
        "--seconds", type=float, default=60, help="most for each student and number of calls"
    )
    options.add_argument("--threads", type=int, help="of the CPU; else one for each core")
    options.add_argument("--small", action="store_true", help="tiny networks, to try the script")
    options = options.parse_args(arguments)

    logging.getLogger("piflow_edge").setLevel(logging.ERROR)  # other calls than trained are wanted here
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = students_in(Path(folder), small=options.small)
        if options.demo:
            bundles["digits, GM of 8"] = options.demo / "bundles" / "digits-nfe1"
        for name, bundle in bundles.items():
            settings = pf.EngineOptions(num_threads=options.threads)
            with pf.load(bundle, options=settings) as generator:
                engine = generator.engine.name
                lines += [{"student": name, **measure(generator, nfe, options)} for nfe in options.nfe]
    answer(options, {"engine": engine, "threads": options.threads, "lines": lines})


if __name__ == "__main__":
    main()
