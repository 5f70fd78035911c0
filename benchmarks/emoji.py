"""How long does an emoji take, from a new prompt to the picture, beside its teacher? One JSON line answers.

The student is the bundle that ships, in eight bits, as an app calls it: prompt in, image out, text encoder included.
The teacher takes 50 guided Euler steps from the same encodings, in ONNX Runtime and float32; each step is one call on
two samples, so that 100 runs of a sample stand against one. Every round has a prompt that none had before, for what was
encoded once is remembered. The picture is that of README.md.

Run: python -m benchmarks.emoji --out benchmarks/results/emoji.json --picture docs/images/emoji.png
"""

from itertools import count
from pathlib import Path

import piflow_edge as pf
from benchmarks.timing import answer, medians_of, parser
from piflow_edge.commands.demo_emoji import EmojiSources, open_beside
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.noise import philox_normal
from piflow_edge.system.files import write_atomic
from piflow_edge.system.sheets import encode_png, image_grid

SOURCES = EmojiSources(Path("benchmarks/state/emoji-teacher"), Path("benchmarks/data/noto_emoji_64.npz"))
STEPS = 50
# What README.md says is shown.
SHOWN, SEED = (
    "grinning face", "woman zombie", "joystick", "kiwi fruit", "a red apple", "blue heart", "happy cat",
    "man with red hair", "fox", "santa claus", "woman lifting weights", "snowman",
), 2  # fmt: skip
COLORS = ("red", "green", "blue", "yellow", "purple", "white", "black", "pink", "orange", "brown")
THINGS = ("apple", "car", "heart", "cat", "face", "hat", "flower", "bird", "book", "ball")


def main():
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--picture", type=Path, help="write the picture of README.md here")
    chosen = options.parse_args()
    with pf.load("emoji") as generator:
        teacher, guidance, _ = open_beside(generator, SOURCES)
        noise = philox_normal(0, range(1), teacher.sample_shape)
        prompts = (f"{COLORS[n % 10]} {THINGS[n // 10 % 10]} {n}" for n in count())

        def sample_teacher():
            encodings = dict(generator.conditioner.encode(ConditionRequest(prompts=[next(prompts)])))
            return teacher.sample(noise, encodings, STEPS, guidance_scale=guidance)

        contenders = {
            "teacher": sample_teacher,
            "student": lambda: generator(next(prompts), seed=0),
            "student, a prompt that came before": lambda: generator("fox", seed=0),
        }
        ms = medians_of(contenders, chosen.rounds, warmup=2)
        if chosen.picture is not None:
            images = generator(list(SHOWN), seed=SEED).images
            write_atomic(chosen.picture, encode_png(image_grid([images])))
    speedup, runs = ms["teacher"] / ms["student"], STEPS * (2 if guidance > 1 else 1)
    answer(
        chosen,
        {
            "ms": ms,
            "steps": STEPS,
            "guidance_scale": guidance,
            "speedup": speedup,
            "speedup / ratio of sample runs": speedup / runs,
        },
    )


if __name__ == "__main__":
    main()
