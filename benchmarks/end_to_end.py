"""How much faster is one call of a student than 50 guided steps of its teacher, end to end? One JSON line answers.

The teacher runs in ONNX Runtime, in PyTorch, and in PyTorch driven by diffusers' DiTPipeline: the same network and
weights each time, from the same noise, and the images must agree. Guidance needs the network on two samples per step;
all teachers run them in one call, as a batch of two. So 50 guided steps are 50 network calls, or 100 runs of a sample:
both ratios are given. Students are measured as an app calls them, labels in and images out, and their network alone.

Networks: the demo's digits, whose call is so short that all else counts, and a DiT of 8 million weights that was never
trained, whose call takes over 10 ms.

Run: python -m benchmarks.end_to_end --demo demo
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Idle OpenMP threads of torch shall sleep, not spin: they would take the core from the next contender.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

import piflow_edge as pf
from benchmarks.networks import GUIDANCE_SCALE, LARGE, student_of, teacher_of, write_bundle
from benchmarks.timing import answer, medians_of, parser
from piflow_edge.commands.demo import shipped_teacher
from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.loop.checkpoint import load_checkpoint
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.sources import load_teacher, network_of
from piflow_edge.distill.teacher import GuidanceConfig, GuidedTeacher
from piflow_edge.engines import Graph, open_engine
from piflow_edge.export.onnx_graphs.teacher_graph import export_teacher
from piflow_edge.runtime.teacher_engine import EngineTeacher

# Of the largest value: 50 steps of a network in another library, float32.
TOLERANCE = 2e-3


def pipeline(network, num_classes):
    """diffusers' DiTPipeline around our network and its weights, without a decoder: its states are the images."""
    from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class Transformer(ModelMixin, ConfigMixin):
        """Takes diffusers' times, 1000 for noise, and its null label."""

        config_name = "config.json"

        @register_to_config
        def __init__(self, in_channels=1, out_channels=1, sample_size=8):
            super().__init__()
            self.network = network

        def forward(self, latents, timestep, class_labels):
            labels = class_labels.masked_fill(class_labels == 1000, num_classes)
            return SimpleNamespace(sample=self.network.velocity(latents, timestep / 1000, labels=labels))

    class Decoder(ModelMixin, ConfigMixin):
        """States are images already."""

        config_name = "config.json"

        @register_to_config
        def __init__(self, scaling_factor=1.0):
            super().__init__()
            self.place = torch.nn.Parameter(torch.zeros(1))  # by which a pipeline finds its device

        def decode(self, latents):
            return SimpleNamespace(sample=latents)

    class Scheduler(FlowMatchEulerDiscreteScheduler):
        """With our noise levels, and the one method DiTPipeline asks for that flow matching has no use for."""

        def set_timesteps(self, steps, device=None):
            super().set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)

        def scale_model_input(self, sample, timestep):
            return sample

    channels, side, _ = network.sample_shape
    made = DiTPipeline(Transformer(channels, channels, side), Decoder(), Scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def contenders(teacher, student, bundle, engine, options):
    """Everything that is timed, and the worst difference between the teachers' images."""
    generator = pf.load(bundle, engine="ort-cpu")
    count, num_classes, steps = options.batch, teacher.config.num_classes, options.steps
    labels = np.arange(count) % num_classes
    # As DiTPipeline draws it, so that all start from the same noise.
    noise = torch.randn((count, *teacher.sample_shape), generator=torch.Generator().manual_seed(0))
    ids = torch.from_numpy(labels)
    exported = EngineTeacher(engine, ClassLabels(tuple(map(str, range(num_classes)))))
    in_torch = GuidedTeacher(teacher, GuidanceConfig(GUIDANCE_SCALE))

    def student_in_torch():
        with torch.no_grad():
            outputs = student(noise, torch.ones(count), labels=ids)
        return pf.rollout(pf.GMPolicy(*outputs, noise, 1.0), noise, 1.0, 0.0, 128)

    teachers = {
        "ONNX Runtime": lambda: exported.sample(
            noise.numpy(), {"labels": labels}, steps, guidance_scale=GUIDANCE_SCALE
        ),
        "PyTorch": lambda: in_torch.sample(noise, steps, labels=ids).numpy(),
    }
    if importlib.util.find_spec("diffusers"):
        pipe = pipeline(teacher, num_classes)

        def diffusers_pipeline():
            made = pipe(
                labels.tolist(), GUIDANCE_SCALE, torch.Generator().manual_seed(0), steps, output_type="pt"
            )
            return made.images.numpy() * 2 - 1

        teachers["diffusers"] = diffusers_pipeline
    made = {name: call() for name, call in teachers.items()}
    ours = made["ONNX Runtime"]
    if "diffusers" in made:  # which clips, so that only what lies inside can be compared
        made["diffusers"] = np.where(np.abs(ours) < 1, made["diffusers"], ours)
        assert (np.abs(ours) < 1).mean() > 0.2, "too little of the images lies where they can be compared"
    error = {name: float(np.abs(images - ours).max() / np.abs(ours).max()) for name, images in made.items()}
    assert max(error.values()) < TOLERANCE, f"the teachers make different images: {error}"

    x_t, t = noise.numpy(), np.ones(count, np.float32)
    once = {"x_t": x_t, "t": t, "labels": labels}
    twice = {name: np.concatenate([value, value]) for name, value in once.items()}
    calls = {f"teacher in {name}": call for name, call in teachers.items()} | {
        "student in ONNX Runtime": lambda: generator(labels.tolist(), output="numpy"),
        "student in PyTorch": student_in_torch,
        "student's network": lambda: generator.engine.run(once),
        "teacher's network": lambda: engine.run(once),
        "teacher's network, two samples": lambda: engine.run(twice),
    }
    return calls, error


def measure(name, teacher, student, bundle, graph, options):
    calls, error = contenders(teacher, student, bundle, open_engine(graph, engine="ort-cpu"), options)
    ms = medians_of(calls, options.rounds, options.seconds, warmup=1)
    speedup = ms["teacher in ONNX Runtime"] / ms["student in ONNX Runtime"]
    return {
        "network": name,
        "latent": list(teacher.sample_shape),
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "ms": ms,
        "speedup": {rival: ms[f"teacher in {rival}"] / ms["student in ONNX Runtime"] for rival in error},
        "ratio_of_calls": options.steps,
        "ratio_of_sample_runs": 2 * options.steps,
        "speedup / ratio of calls": speedup / options.steps,
        "speedup / ratio of sample runs": speedup / (2 * options.steps),
        # What the student would gain if there were nothing but the networks themselves.
        "bare_speedup": options.steps * ms["teacher's network, two samples"] / ms["student's network"],
        "worst_difference_of_images": error,
    }


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, help="folder of piflow-edge demo; else without the digits")
    options.add_argument("--steps", type=int, default=50, help="of the teacher")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--seconds", type=float, default=90, help="for each network, about")
    options.add_argument("--small", action="store_true", help="a tiny network, to try the script")
    options = options.parse_args(arguments)

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        large = teacher_of(DiTConfig(hidden_size=16, depth=1, num_heads=2) if options.small else LARGE)
        student = student_of(large)
        cases = [("DiT", large, student, write_bundle(student, Path(folder) / "large"))]
        if options.demo:
            digits = network_of(load_checkpoint(options.demo / "students" / "nfe1", kind="student"))
            bundle = options.demo / "bundles" / "digits-nfe1"
            cases.insert(0, ("digits", load_teacher(shipped_teacher()).network, digits, bundle))
        for name, teacher, student, bundle in cases:
            file = Path(folder) / "teacher.onnx"
            export_teacher(teacher, file)
            lines.append(measure(name, teacher, student, bundle, Graph(file.read_bytes()), options))
    conditions = {
        "batch": options.batch,
        "steps": options.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "rounds": options.rounds,
        "torch_threads": torch.get_num_threads(),
    }
    answer(options, {**conditions, "lines": lines})


if __name__ == "__main__":
    main()
