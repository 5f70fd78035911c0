"""What does a LoRA run need beyond the frozen model and its activations? Peak memory of processes; one JSON line.

"frozen" holds the model and does one forward and backward pass of the student's network through it; "lora" is a whole
distillation: the same pass, the teacher on the same weights, rollouts, optimiser, averaged weights; "full" trains all
weights. What a process needs that only imports is taken off.

Run: python -m benchmarks.lora_memory
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile

import numpy as np

KINDS = ("imports", "frozen", "lora", "full")


def run(kind, options):
    import torch
    import torch._dynamo  # which the first optimiser would import
    from safetensors.torch import save

    from piflow_edge.conditioning import ClassLabels
    from piflow_edge.distill.data.datasets import ImageData
    from piflow_edge.distill.imitation import ImitationConfig
    from piflow_edge.distill.loop.training import TrainingConfig
    from piflow_edge.distill.networks.dit import DiTConfig
    from piflow_edge.distill.networks.flow_network import DiTNetwork, attach_policy_head
    from piflow_edge.distill.networks.lora import LoRAConfig
    from piflow_edge.distill.sources import TeacherModel
    from piflow_edge.distill.student import distill
    from piflow_edge.distill.teacher import GuidanceConfig
    from piflow_edge.kernels.rollout import integrate
    from piflow_edge.policies import GMPolicySpec

    if kind == "imports":
        save({"x": torch.zeros(1)})
        return
    config = DiTConfig(4, 32, 2, options.hidden_size, options.depth, options.hidden_size // 64, 10)
    teacher = DiTNetwork(config).requires_grad_(False)
    lora, head = LoRAConfig(options.rank, float(options.rank)), GMPolicySpec(8)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((16, *config.sample_shape)).astype(np.float32)
    data = ImageData("noise", images, ClassLabels(tuple("0123456789")), {"labels": np.arange(16) % 10})
    if kind == "frozen":
        student = attach_policy_head(teacher, head, lora=lora)
        for _ in range(options.iterations):
            x_t, labels = torch.from_numpy(images[: options.batch_size]), torch.arange(options.batch_size)
            outputs = student(x_t, torch.ones(len(x_t)), labels=labels)
            sum(part.square().mean() for part in outputs).backward()
        return
    model = TeacherModel(teacher, data.conditioner, {})
    training = TrainingConfig(iterations=options.iterations, batch_size=options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        distill(
            model, data, ImitationConfig(nfe=1), training, folder, guidance=GuidanceConfig(), head=head,
            lora=lora if kind == "lora" else None, integrate=integrate,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=768, help="as DiT-B")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help="only this, in this process")
    options = parser.parse_args()
    if options.kind:
        run(options.kind, options)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # kilobytes on Linux
        return
    peak = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.lora_memory", *sys.argv[1:], "--kind", kind]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak[kind] = float(printed.split()[-1])
    need = {kind: peak[kind] - peak["imports"] for kind in KINDS[1:]}
    print(
        json.dumps(
            {
                "command": " ".join(["python", "-m", "benchmarks.lora_memory", *sys.argv[1:]]),
                "peak_mb": {kind: round(value) for kind, value in peak.items()},
                "beyond_imports_mb": {kind: round(value) for kind, value in need.items()},
                "lora_over_frozen": round(need["lora"] / need["frozen"], 3),
                "full_over_frozen": round(need["full"] / need["frozen"], 3),
                "system": f"{platform.system()} {platform.machine()}",
            }
        )
    )


if __name__ == "__main__":
    main()
