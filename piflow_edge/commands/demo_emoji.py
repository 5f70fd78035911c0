"""The part of the demo that a person shows around: emoji from prompts, by the bundle that comes with the package."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from piflow_edge.bundle.folder import find_bundle
from piflow_edge.bundle.manifest import guidance_trained_with
from piflow_edge.conditioning import Conditioning, ConditionRequest
from piflow_edge.evaluation.contenders import (
    Contender,
    Seeds,
    Teacher,
    measure_milliseconds,
    student_contenders,
    teacher_contenders,
)
from piflow_edge.evaluation.report import Section
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.images import decode
from piflow_edge.runtime.loading import load
from piflow_edge.system.sheets import as_pil, side_by_side, titled_grid

from .references import caption_with, open_source

KNOWN = (
    "grinning face",
    "red apple",
    "fox",
    "kiwi fruit",
    "turtle",
    "woman zombie",
    "musical note",
    "sunflower",
)
# Combinations and words that no picture of the training has.
NEW = ("happy cat", "green heart", "angry face with horns", "blue cat", "a kitten in love", "a cup of coffee",
       "dog with a hat", "golden star")  # fmt: skip
VARIED, NUM_SEEDS = "woman", 12
_TEACHER_STEPS = (50, 4, 2, 1)
_SUBSTEPS_BETWEEN = 12  # looks at a rollout


@dataclass(frozen=True)
class EmojiSources:
    """What the bundle was made of. `teacher`: a run of training. `data`: an .npz of captioned images."""

    teacher: Path
    data: Path


def draw_emoji(sources: EmojiSources | None, seed: int = 0) -> Section:
    """Draw the section of the report; with `sources`, beside the teacher and the pictures it learnt from.

    Raises:
        MissingExtraError: `tokenizers` is not installed.
    """
    with load("emoji") as generator:
        artists = _Artists(generator, sources, seed)
        pictures = {
            "Prompts of the training, every column from the same noise": artists.draw(KNOWN),
            "Prompts it has not seen": artists.draw(NEW),
            f"{NUM_SEEDS} seeds of {VARIED!r}": artists.draw(
                [VARIED] * NUM_SEEDS, titles=[f"seed {number}" for number in range(NUM_SEEDS)]
            ),
            "One call's policy, from noise to image in 128 substeps without the network": _draw_rollout(
                generator, KNOWN[2], seed
            ),
        }
        notes = [_describe(generator), artists.time(KNOWN[0])]
        return Section("Emoji from prompts", notes, pictures)


class _Artists:
    """Teacher and student, and the real images of what they draw; without sources the student alone."""

    def __init__(self, generator: Generator, sources: EmojiSources | None, seed: int):
        self.generator, self.seed = generator, seed
        self.contenders = student_contenders("student, 1 call", generator)
        self.data = None
        if sources is not None:
            teacher, scale, self.data = open_beside(generator, sources)
            self.contenders = teacher_contenders(teacher, scale, _TEACHER_STEPS) + self.contenders

    def draw(self, prompts: Sequence[str], titles: Sequence[str] = ()) -> Image.Image:
        """Return a column for each prompt: the real image, where all have one of their own, and everybody's."""
        real, conditioning = self._read(prompts)
        noise, seeds = self._noise(len(prompts))
        rows = {} if real is None else {"real": real}
        rows |= {one.name: one.sample(noise, conditioning, seeds) for one in self.contenders}
        shown = {name: [_enlarge(image) for image in as_pil(decode(images))] for name, images in rows.items()}
        if len(shown) == 1:
            return titled_grid(next(iter(shown.values())), titles or prompts, columns=8)
        return side_by_side(shown, titles or prompts)

    def time(self, prompt: str) -> str:
        """Say how long one picture takes everybody, in turn."""
        _, conditioning = self._read([prompt])
        noise, seeds = self._noise(1)
        whole = Contender(
            "the student from the prompt on, text encoder included",
            1,
            lambda *given: self.generator(prompt).images,
        )
        ms, _ = measure_milliseconds([*self.contenders, whole], noise, conditioning, seeds)
        told = "; ".join(f"{name}: {milliseconds:.3g}" for name, milliseconds in ms.items())
        return f"Milliseconds for one picture on this machine. {told}."

    def _noise(self, count: int) -> tuple[np.ndarray, Seeds]:
        shape = tuple(self.generator.bundle.manifest.latent.shape)
        return philox_normal(self.seed, range(count), shape), [(self.seed, index) for index in range(count)]

    def _read(self, prompts: Sequence[str]) -> tuple[np.ndarray | None, Conditioning]:
        """Return the real images of prompts, None unless each has one of its own, and what steers."""
        if self.data is None:
            request = ConditionRequest(prompts=list(prompts))
            return None, dict(self.generator.conditioner.encode(request))
        is_real, data = _caption(self.generator, self.data, prompts)
        images, conditioning = data.batch(np.arange(len(prompts)))
        return images if is_real else None, conditioning


def open_beside(generator: Generator, sources: EmojiSources) -> tuple[Teacher, float, Any]:
    """Return the teacher of the bundle, the scale it was guided with, and the pictures it learnt from."""
    from piflow_edge.distill.data.datasets import load_images

    data = load_images(str(sources.data))
    scale = guidance_trained_with(generator.bundle.manifest) or 1.0
    _, captioned = _caption(generator, data, KNOWN[:1])
    return open_source(sources.teacher, "sit", [find_bundle("emoji")], captioned), scale, data


def _caption(generator: Generator, everything: Any, prompts: Sequence[str]) -> tuple[bool, Any]:
    """Return pictures steered by prompts, and whether each is what its prompt says, and shown once."""
    from piflow_edge.distill.data.captions import Captions

    rows = [_find_picture(everything.captions, prompt) for prompt in prompts]
    captions = Captions.of_rows([[prompt] for prompt in prompts])
    chosen = replace(everything, images=everything.images[[row or 0 for row in rows]], captions=captions)
    is_real = None not in rows and len(set(prompts)) == len(prompts)
    return is_real, caption_with(generator, chosen)


def _enlarge(image: Image.Image) -> Image.Image:
    """Twice as large, so that there is room for a prompt above it."""
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)


def _find_picture(captions, prompt: str) -> int | None:
    """Return which image a prompt is a caption of; None if of none."""
    if prompt not in captions.texts:
        return None
    row = captions.texts.index(prompt)
    return int(np.searchsorted(captions.starts, row, side="right")) - 1


def _draw_rollout(generator: Generator, prompt: str, seed: int) -> Image.Image:
    """Return two rows from noise to image: the state, and what the policy then takes the image for."""
    looks: list[tuple[int, Any, Any]] = []
    generator(
        prompt,
        seed=seed,
        nfe=1,
        callback=lambda at: looks.append((at.substep, at.x_t, at.x_0)),
        callback_every=_SUBSTEPS_BETWEEN,
    )
    latent = generator.bundle.manifest.latent
    rows = {"state": [x_t for _, x_t, _ in looks], "image so far": [x_0 for *_, x_0 in looks]}
    shown = {name: as_pil(decode(latent.restore(np.concatenate(each)))) for name, each in rows.items()}
    return side_by_side(shown, [str(substep) for substep, *_ in looks])


def _describe(generator: Generator) -> str:
    size = sum(file.size for file in generator.bundle.manifest.files.values()) / 1e6
    return (
        f"The bundle 'emoji' comes with the package: {size:.0f} MB with its text encoder, in {generator.precision}. "
        "Each of its pictures takes one call of the network."
    )
