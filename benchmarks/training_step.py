"""How much faster is a pi-ID step than a straightforward PyTorch loop with the same settings? One JSON line answers.

The straightforward loop is what an engineer would write from the paper: the policy's Euler substeps in torch, samples
that are done masked out, guidance as two calls of the teacher, textbook DiT blocks, Adam, and a loop for the averaged
weights. The step is the demo's: guided digits teacher, Gaussian mixture of 8, two intermediate states. Both sides start
from the same weights and draw the same numbers; their losses are compared at every step. They take turns.

Run: python -m benchmarks.training_step                            (half a minute)
"""

import copy
import os
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import answer, parser
from piflow_edge.commands.demo import GUIDANCE_SCALE, NUM_COMPONENTS, shipped_teacher
from piflow_edge.distill.data.datasets import load_images
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.processes import Processes
from piflow_edge.distill.loop.randomness import IterationRandom
from piflow_edge.distill.loop.state import State
from piflow_edge.distill.loop.training import TrainingConfig, gradients, learning_rate
from piflow_edge.distill.networks.dit import Block
from piflow_edge.distill.networks.flow_network import attach_policy_head
from piflow_edge.distill.sources import load_teacher
from piflow_edge.distill.student import student_loss
from piflow_edge.distill.teacher import GuidanceConfig, GuidedTeacher
from piflow_edge.kernels.rollout import integrate
from piflow_edge.policies import GMPolicySpec

EMA_DECAY = 0.999


class TextbookBlock(nn.Module):
    """A DiT block as facebookresearch/DiT has it, with the weights of one of ours."""

    def __init__(self, block: Block):
        super().__init__()
        self.num_heads, self.qkv, self.proj = block.num_heads, block.qkv, block.attention_out
        self.mlp, self.modulation = block.mlp, block.modulation
        width = block.qkv.in_features
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, emb):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(emb).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    def attention(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def textbook(network):
    network = copy.deepcopy(network)
    network.module.blocks = nn.ModuleList(TextbookBlock(block) for block in network.module.blocks)
    return network


class Policy:
    """GMFlow's velocity as the paper gives it, in torch."""

    def __init__(self, means, logweights, logstds, x_src, sigma_src, eps):
        self.x_src, self.sigma_src, self.eps = x_src, sigma_src.clamp(min=eps), eps
        self.x_0_means = x_src.unsqueeze(1) - column(sigma_src, 5) * means
        self.variance = torch.exp(2 * logstds) * column(sigma_src, 5) ** 2
        self.logweights = logweights

    def detach(self):
        policy = object.__new__(Policy)
        policy.__dict__ = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        return policy

    def velocity(self, x_t, sigma_t):
        a, b = column(self.sigma_src, 5), column(sigma_t.clamp(min=self.eps), 5)
        zeta = ((1 - b) / b) ** 2 - ((1 - a) / a) ** 2
        nu = (1 - b) / b**2 * x_t.unsqueeze(1) - (1 - a) / a**2 * self.x_src.unsqueeze(1)
        denominator = (self.variance * zeta + 1).clamp(min=self.eps)
        evidence = (self.x_0_means * nu).sum(2, keepdim=True) - zeta * self.x_0_means.square().sum(
            2, keepdim=True
        ) / 2
        weights = torch.softmax(self.logweights + evidence / denominator, dim=1)
        mean = (weights * self.x_0_means).sum(1, keepdim=True)
        x_0 = ((self.variance * nu + mean) / denominator).squeeze(1)
        return (x_t - x_0) / column(sigma_t.clamp(min=self.eps), 4)


def column(values, dims):
    return values.to(torch.float32).view(-1, *(1,) * (dims - 1))


class Straightforward:
    """The loop an engineer would write from the paper."""

    def __init__(self, teacher, data, config, training):
        self.teacher = textbook(teacher)
        self.student = textbook(attach_policy_head(teacher, GMPolicySpec(NUM_COMPONENTS)))
        self.ema = [p.detach().clone() for p in self.student.parameters()]
        self.optimizer = torch.optim.Adam(
            self.student.parameters(), lr=training.learning_rate, betas=(0.9, 0.95)
        )
        images, _ = data.batch(np.arange(len(data)))
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(data.arrays["labels"])
        self.config, self.training = config, training

    @torch.no_grad()
    def guide(self, x_t, sigma_t, labels):
        u_cond = self.teacher(x_t, sigma_t.float(), labels=labels)
        u_uncond = self.teacher(x_t, sigma_t.float(), labels=torch.full_like(labels, 10))
        return u_uncond + GUIDANCE_SCALE * (u_cond - u_uncond)

    @torch.no_grad()
    def rollout(self, policy, x_t, raw_t, raw_t_end):
        substeps = (self.config.total_substeps * (raw_t - raw_t_end)).round().clamp(min=1)
        for step in range(int(substeps.max())):
            now = raw_t + (raw_t_end - raw_t) * (step / substeps)
            after = raw_t + (raw_t_end - raw_t) * ((step + 1) / substeps)
            moved = x_t + policy.velocity(x_t, now) * column(after - now, 4)
            x_t = torch.where(column(step < substeps, 4).bool(), moved, x_t)
        return x_t

    def step(self, iteration):
        random = IterationRandom(self.training.seed, iteration)
        picked = torch.from_numpy(random.choice(len(self.images), self.training.batch_size))
        x_0, labels = self.images[picked], self.labels[picked]
        nfe, states = self.config.nfe, self.config.num_intermediate_states
        raw_t = (1 - torch.from_numpy(random.uniform((len(x_0),)))).clamp(min=1e-4)
        raw_t_src = (torch.ceil(raw_t * nfe) / nfe).clamp(max=1.0)
        noise = torch.from_numpy(random.normal(x_0.shape))
        x_src = x_0 + (noise - x_0) * column(raw_t_src, 4)
        output = self.student(x_src, raw_t_src.float(), labels=labels)
        policy = Policy(*output, x_src, raw_t_src, 1e-6)
        followed = policy.detach()
        ends = torch.from_numpy(np.sort(random.uniform((len(x_0), states)), axis=1)) / nfe
        random.uniform((len(x_0), states - 1))  # the teacher's share of the way, of which there is none
        x_t, raw_t, loss = x_src, raw_t_src, 0.0
        for i in range(states):
            raw_t_next = raw_t_src - ends[:, i]
            x_t = self.rollout(followed, x_t, raw_t, raw_t_next)
            raw_t = raw_t_next
            target = self.guide(x_t, raw_t, labels)
            loss = loss + 0.5 * F.mse_loss(policy.velocity(x_t, raw_t), target) / states
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, iteration)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        decay = min(EMA_DECAY, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.student.parameters(), strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)
        return loss.item()


class Ours:
    """The steps of `train`, without its checkpoints and log."""

    def __init__(self, teacher, data, config, training):
        head, teacher = GMPolicySpec(NUM_COMPONENTS), copy.deepcopy(teacher)
        network = attach_policy_head(teacher, head)
        processes = Processes(training.mixed_precision)
        processes.place(teacher)
        self.state, self.pieces = State(network, processes), processes.share(training.batch_size)
        guided = GuidedTeacher(teacher, GuidanceConfig(GUIDANCE_SCALE))
        self.loss, self.data, self.training = student_loss(guided, head, config, integrate), data, training

    def step(self, iteration):
        value = gradients(self.state, self.loss, self.data, self.training, self.pieces, iteration)
        norm = self.state.clip(self.training.max_grad_norm)
        value, _ = self.state.processes.mean(value, norm)
        self.state.step(
            learning_rate(self.training, iteration), min(EMA_DECAY, (1 + iteration) / (10 + iteration))
        )
        return value


def measure(nfe, teacher, data, options):
    config = ImitationConfig(nfe=nfe)
    training = TrainingConfig(
        iterations=1400, batch_size=options.batch_size, mixed_precision=options.mixed_precision
    )
    sides = {"straightforward loop": Straightforward, "piflow-edge": Ours}
    sides = {name: side(teacher, data, config, training) for name, side in sides.items()}

    rounds, worst = [], 0.0
    for iteration in range(3 + options.repeats):
        taken, losses = {}, []
        for name, side in sides.items():
            began, worked = time.perf_counter(), time.process_time()
            losses.append(float(side.step(iteration)))
            taken[name] = 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - worked)
        worst = max(worst, abs(losses[1] / losses[0] - 1))
        rounds.append(taken)
    assert worst < {"no": 1e-3, "bf16": 0.2}[options.mixed_precision], (
        f"the two loops train differently: losses differ by {worst:.1e}"
    )
    # Processor time beside that of the clock: it does not depend on what else runs.
    wall, cpu = ({name: statistics.median(r[name][i] for r in rounds[3:]) for name in sides} for i in (0, 1))
    return {
        "nfe": nfe,
        "mixed_precision": options.mixed_precision,
        "batch_size": options.batch_size,
        "ms per step": wall,
        "images per s": {name: 1000 * options.batch_size / ms for name, ms in wall.items()},
        "times faster": wall["straightforward loop"] / wall["piflow-edge"],
        "CPU ms per step": cpu,
        "largest relative difference of the losses": worst,
    }


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--nfe", type=int, nargs="+", default=[1, 4])
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument(
        "--mixed-precision", choices=["no", "bf16"], default="no", help="of ours; the loop stays in float32"
    )
    options = options.parse_args(arguments)
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    teacher, data = load_teacher(shipped_teacher()).network, load_images("digits")
    lines = [measure(nfe, teacher, data, options) for nfe in options.nfe]
    answer(
        options,
        {
            "torch_threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "load": load,
            "lines": lines,
        },
    )


if __name__ == "__main__":
    main()
