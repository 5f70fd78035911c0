"""A start from nothing: a fresh process opens a bundle, makes images, and tells how long it took and how large it is.

Both sides are here: `cold_start` starts the process and asks, `main` is that process. It does what an app would and no
more, so that its memory is an app's; what it imports, it imports late.
"""

import json
import sys
import time
from collections.abc import Mapping

# What the process says once it has images.
_DONE = "images\n"
# Calls after the first, of which the median is taken, and the time after which no more are made.
_WARM_CALLS, _WARM_SECONDS = 20, 1.0


def cold_start(task: Mapping, *, device: str = "cpu") -> dict[str, float | None]:
    """One fresh process that opens a bundle, or a teacher, makes images, then the same images again.

    Args:
        told: what `main` reads.
        device: where the engine runs; memory of GPUs is asked for where it is not the CPU.

    Returns:
        In ms: `first_images`, from the start of the process until they are made; of this `open`, from import to an
        opened generator, and `first_call`; `second_call`; `warm`, the median of up to 20 calls after the first. In MB:
        `resident` after that, and `peak`; and `device_memory`, what all NVIDIA GPUs hold more than before the process,
        so other programs must be still. None where the system does not tell.

    Raises:
        EngineError: the process failed.
    """
    import subprocess
    import tempfile

    from piflow_edge.errors import EngineError
    from piflow_edge.system.hardware import gpu_memory_used

    used = gpu_memory_used() if device != "cpu" else None
    command = [sys.executable, "-m", "piflow_edge.bench.cold_start", json.dumps(task)]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would stop a talkative engine
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as child:
            assert child.stdin is not None and child.stdout is not None
            lines = iter(child.stdout)  # an engine may print lines of its own
            next((line for line in lines if line == _DONE), None)  # images are there
            first = time.perf_counter() - began
            answer = next((line for line in lines if line.startswith("{")), "")
            held = gpu_memory_used() if used is not None else None
            child.stdin.close()  # for which it waits
        errors.seek(0)
        if child.returncode:
            raise EngineError(
                f"a fresh process could not make images: {errors.read().strip() or 'no reason given'}"
            )
    grown = None if used is None or held is None else max(0.0, held - used)
    return {"first_images": 1000 * first, **json.loads(answer), "device_memory": grown}


def main() -> None:
    task = json.loads(sys.argv[1])
    began = time.perf_counter()
    draw = _teacher(task) if "teacher" in task else _student(task)
    opened = time.perf_counter()
    draw()
    first = time.perf_counter()
    print(_DONE, end="", flush=True)
    calls: list[float] = []
    while not calls or (len(calls) < _WARM_CALLS and sum(calls) < _WARM_SECONDS):
        again = time.perf_counter()
        draw()
        calls.append(time.perf_counter() - again)
    from statistics import median

    from piflow_edge.system.hardware import memory

    used = memory()
    answer = {
        "open": 1000 * (opened - began),
        "first_call": 1000 * (first - opened),
        "second_call": 1000 * calls[0],
        "warm": 1000 * median(calls),
        "resident": used and used.resident,
        "peak": used and used.peak,
    }
    print(json.dumps(answer), flush=True)
    sys.stdin.read()  # what the GPU holds is read meanwhile


def _student(task):
    from piflow_edge.runtime.loading import load

    generator = load(task["bundle"], precision=task["precision"], **_place(task))
    example = build_example(generator.conditioner, task["batch"])
    return lambda: generator(**example, **task["request"])


def build_example(conditioner, batch: int) -> dict:
    """Return what a generator is asked for: example prompts, other examples, or a count where nothing steers."""
    if prompts := conditioner.example_prompts(batch):
        return {"prompt": prompts}
    example = conditioner.example(batch)
    return {"arrays": example} if example else {"count": batch}


def _place(task):
    from piflow_edge.engines import EngineOptions

    cores = task["options"]["cpu_affinity"]  # JSON has lists
    options = EngineOptions(**{**task["options"], "cpu_affinity": cores and tuple(cores)})
    return {"engine": task["engine"], "device": task["device"], "options": options}


def _teacher(task):
    from pathlib import Path

    from piflow_edge.conditioning import conditioner_from_json
    from piflow_edge.engines import open_engine, read_graph_file
    from piflow_edge.noise import philox_normal
    from piflow_edge.runtime.teacher_engine import EngineTeacher

    engine = open_engine(read_graph_file(Path(task["teacher"])), **_place(task))
    conditioner = conditioner_from_json(task["conditioner"])
    teacher = EngineTeacher(engine, conditioner)
    return lambda: teacher.sample(
        philox_normal(task["seed"], range(task["batch"]), task["shape"]),
        conditioner.example(task["batch"]),
        task["steps"],
        guidance_scale=task["guidance"],
        shift=task["shift"],
    )


if __name__ == "__main__":
    main()
