"""What do compiled rollouts save in training? One pi-ID step with and without them, in turn; one JSON line answers.

The step is the demo's: guided digits teacher, Gaussian mixture of 8, two intermediate states, gradients and Adam. Both
sides draw the same numbers; their losses are compared first.

Run: python benchmarks/training_step.py --nfe 1
"""

import argparse
import functools
import json
import statistics
import time

import torch

from piflow_edge.demo import GUIDANCE_SCALE, NUM_COMPONENTS, shipped_teacher
from piflow_edge.distill import imitation
from piflow_edge.distill.checkpoint import load_checkpoint
from piflow_edge.distill.data import load_images
from piflow_edge.distill.dit import student_from_teacher
from piflow_edge.distill.randomness import IterationRandom
from piflow_edge.distill.student import policy_of
from piflow_edge.distill.teacher import GuidedTeacher
from piflow_edge.evaluation import machine
from piflow_edge.integrator import integrate


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nfe", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()

    checkpoint, data = load_checkpoint(shipped_teacher()), load_images("digits")
    teacher = GuidedTeacher(checkpoint.network(), checkpoint.architecture, GUIDANCE_SCALE)
    student = student_from_teacher(checkpoint.network(), NUM_COMPONENTS).requires_grad_(True)
    optimizer = torch.optim.Adam(
        student.parameters(), lr=0.0, fused=True
    )  # the weights stay, the work is the same
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    config = imitation.ImitationConfig(nfe=options.nfe)

    def step(iteration, kernel):
        imitation.integrate = functools.partial(integrate, kernel=kernel)
        random = IterationRandom(0, iteration)
        picked = torch.from_numpy(random.choice(len(data), options.batch_size))
        y = labels[picked]
        loss = imitation.imitation_loss(
            lambda x_src, sigma: policy_of(student, x_src, sigma, y, eps=config.policy_eps),
            lambda x_t, sigma: teacher.velocity(x_t, sigma, y),
            images[picked],
            config,
            random,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    worst = 0.0
    rounds = []
    for iteration in range(3 + options.repeats):
        taken, losses = {}, []
        for kernel in ("reference", "auto"):
            began = time.perf_counter()
            losses.append(step(iteration, kernel))
            taken[kernel] = 1000 * (time.perf_counter() - began)
        worst = max(worst, abs(losses[1] / losses[0] - 1))
        rounds.append(taken)
    ms = {kernel: statistics.median(r[kernel] for r in rounds[3:]) for kernel in ("reference", "auto")}
    assert worst < 1e-4, f"the two kernels train differently: losses differ by {worst:.1e}"
    print(
        json.dumps(
            {
                "nfe": options.nfe,
                "batch_size": options.batch_size,
                "ms per step": {"plain torch rollouts": ms["reference"], "compiled rollouts": ms["auto"]},
                "speed-up": ms["reference"] / ms["auto"],
                "largest relative difference of the losses": worst,
                "torch_threads": torch.get_num_threads(),
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
