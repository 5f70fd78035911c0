"""Which images an evaluation makes: what steers each of them, and to which group it belongs.

A group is a class where the data have classes, for each image's conditioning is a whole number there; where the data
have captions a group is a prompt, of which several images are made. Diversity is measured inside a group. All other
images are one group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from piflow_edge.conditioning import Conditioner, Conditioning, ConditionRequest, Unconditional, take
from piflow_edge.errors import DataError, PiFlowError

ALL_IMAGES = "all images"
# Images of each prompt: few, so that there are many prompts.
_PER_PROMPT = 4
# What an encoder in four bits is off by, and some more.
_SAME_ENCODINGS = 0.6


class RealImages(Protocol):
    """The real images, such as `distill.data` reads them.

    `shape`: (C, H, W) of one. `latent`: None for pixels. `conditioner`: what steers them; its inputs are those of
    `conditioning`.
    """

    @property
    def name(self) -> str: ...

    @property
    def latent(self) -> Any: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def conditioner(self) -> Conditioner: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, Conditioning]:
        """Return the images at `indices`, float32 (B, C, H, W) in [-1, 1], and what steers them."""
        ...

    def conditioning(self, indices: np.ndarray) -> Conditioning:
        """Return what steers the images at `indices`."""
        ...


class CaptionedImages(RealImages, Protocol):
    """Real images that are steered by what is said of them."""

    def prompts(self, indices: np.ndarray) -> list[str]:
        """Return the prompt of each of the images at `indices`, whose encoding `conditioning` returns."""
        ...


@dataclass(frozen=True)
class Plan:
    """The images that every contender makes, `count` of them.

    `chosen`: (count,) the real image by whose conditioning each is made. `groups`: (count,) and `real_groups`: (M,),
    the group of each image made and of each real one, an index into `group_names`. `steered`: False where no contender
    takes a conditioning. `prompts`: True where groups are prompts; `real_groups` are then one, as are the real images.
    """

    data: RealImages
    chosen: np.ndarray
    groups: np.ndarray
    real_groups: np.ndarray
    group_names: list[str]
    steered: bool
    prompts: bool = False

    def __len__(self) -> int:
        return len(self.chosen)

    def first_of_groups(self) -> np.ndarray:
        """Return the first image of each group."""
        return np.unique(self.groups, return_index=True)[1]

    def conditioning(self, pieces: Any = slice(None)) -> Conditioning:
        """Return what steers some of the images, under the data's names. `pieces`: a slice or indices."""
        return self.data.conditioning(self.chosen[pieces]) if self.steered else {}

    def titles(self, indices: Sequence[int]) -> list[str]:
        """Return a few words for each of some images; empty ones where nothing steers."""
        if self.prompts:
            return [self.group_names[group] for group in self.groups[list(indices)]]
        conditioner = self.data.conditioner if self.steered else Unconditional()
        return find_titles(conditioner, self.conditioning(indices), len(indices))


def plan_images(data: RealImages, count: int, *, steered: bool) -> Plan:
    """Choose what steers each of `count` images: the real images' conditioning, each group as often as in them.

    Args:
        data: the real images.
        count: images to make.
        steered: whether contenders take a conditioning; else all images are one group.

    Raises:
        DataError: too few images for the groups.
    """
    if steered and data.conditioner.example_prompts(1):
        captioned: Any = data  # real images that prompts steer have them
        return _plan_prompts(captioned, count)
    conditioning = data.conditioning(np.arange(len(data))) if steered else {}
    ids = [array for array in conditioning.values() if array.ndim == 1 and array.dtype.kind in "iu"]
    if ids and len(ids) == len(conditioning):
        _, first, real_groups = np.unique(np.stack(ids, 1), axis=0, return_index=True, return_inverse=True)
        names = number_repeated(find_titles(data.conditioner, take(conditioning, first), len(first)))
    else:
        real_groups, names = np.zeros(len(data), np.int64), [ALL_IMAGES]
    real_groups = real_groups.reshape(-1)  # NumPy 2.0 gave it a second axis
    groups = share_groups(real_groups, len(names), count)
    return Plan(data, _choose(groups, real_groups), groups, real_groups, names, steered)


def _plan_prompts(data: "CaptionedImages", count: int) -> Plan:
    """Choose prompts, each another text, from all of the data, and make as many images of each as of the next."""
    texts = data.prompts(np.arange(len(data)))
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    places = np.random.default_rng(0).permutation(sorted(first.values()))  # neighbours are often alike
    places = places[: max(1, count // _PER_PROMPT)]
    groups = np.arange(count) % len(places)
    names = [texts[place] for place in places]
    return Plan(data, places[groups], groups, np.zeros(len(data), np.int64), names, True, prompts=True)


def share_groups(real: np.ndarray, number: int, count: int) -> np.ndarray:
    """Share out `count` images among `number` groups, (count,): each as often as in the real images, so that quality is
    measured and not who has more cats; equally often where the groups' sizes are within a tenth of each other.

    Any stretch of them holds the groups in about those shares, and every group comes twice or more.

    Args:
        real: group of each real image, (M,).
        number: of groups.
        count: images to make.

    Raises:
        DataError: `count` below two images per group, or a group without a real image.
    """
    sizes = np.bincount(real, minlength=number)
    if count < 2 * number:
        raise DataError(
            f"diversity needs two images per class or more: {2 * number} for {number} classes; got {count}"
        )
    if sizes.min() == 0:
        raise DataError(f"every class needs a real image; class {sizes.argmin()} has none")
    if sizes.max() <= 1.1 * sizes.min():
        return np.arange(count) % number
    # Two for each, and the rest by size; what rounding leaves over goes to the largest remainders.
    exact = sizes * (count - 2 * number) / sizes.sum()
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - 2 * number - shares.sum()]] += 1
    shares += 2
    # The j-th of n images of a group stands at (j + 1/2) / n of the way.
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in shares])
    return np.repeat(np.arange(number), shares)[np.argsort(places, kind="stable")]


def _choose(groups: np.ndarray, real_groups: np.ndarray) -> np.ndarray:
    """Choose a real image of its group for each image, another one each time until there is no other."""
    chosen = np.empty(len(groups), np.int64)
    random = np.random.default_rng(0)  # mixed: neighbours in a set are often alike
    for group in np.unique(groups):
        members = random.permutation(np.flatnonzero(real_groups == group))
        places = np.flatnonzero(groups == group)
        chosen[places] = members[np.arange(len(places)) % len(members)]
    return chosen


def choose_columns(groups: np.ndarray, side: int) -> list[int]:
    """Choose the images that are shown: as many as fit a page, each group as often as the next, in their order.

    Args:
        groups: of all images.
        side: of an image, in pixels.
    """
    fit = int(np.clip(1280 // max(side, 64), 5, 20))
    shown = np.unique(groups)
    if len(shown) > fit:  # spread over all groups
        shown = shown[np.linspace(0, len(shown) - 1, fit).round().astype(int)]
    rounds = fit // len(shown)
    where = [np.flatnonzero(groups == group)[:rounds] for group in shown]
    return [int(places[n]) for n in range(rounds) for places in where if n < len(places)]


def find_titles(conditioner: Conditioner, conditioning: Conditioning, count: int) -> list[str]:
    """Return a few words for each of `count` images that a conditioning steers."""
    request = ConditionRequest(arrays=conditioning) if conditioning else ConditionRequest(count=count)
    return [conditioner.title(description) for description in conditioner.describe(request, conditioning)]


def number_repeated(names: Sequence[str]) -> list[str]:
    """Return the names, with their number where two are alike."""
    return [f"{i} {name}" if list(names).count(name) > 1 else str(name) for i, name in enumerate(names)]


def name_inputs(conditioning: Conditioning, conditioner: Conditioner) -> Conditioning:
    """Return what a network takes of the data's arrays, under its own names.

    An input takes the array of its name; else the only array of its kind of number and number of axes, for our networks
    call "labels" what others call "class_labels" or "y".

    Raises:
        DataError: nothing is there for an input.
    """
    return {spec.name: _find_input(conditioning, spec) for spec in conditioner.inputs}


def _find_input(conditioning: Conditioning, spec) -> np.ndarray:
    if spec.name in conditioning:
        return conditioning[spec.name]
    kind = np.dtype(spec.dtype).kind
    alike = [a for a in conditioning.values() if (a.dtype.kind, a.ndim) == (kind, len(spec.shape))]
    if len(alike) != 1:
        raise DataError(f"the network takes {spec}; the data have {', '.join(conditioning) or 'nothing'}")
    return alike[0]


def check_fit(plan: Plan, takers: Mapping[str, Conditioner]) -> None:
    """See that what steers the images means the same to every contender.

    Args:
        plan: of the images.
        takers: name of a contender -> its conditioner, which takes inputs.

    Raises:
        DataError: a contender has other classes or inputs than the data.
    """
    first = plan.first_of_groups()
    conditioning, titles = plan.conditioning(first), plan.titles(first.tolist())
    compare = _compare_encodings if plan.prompts else _compare_titles
    for name, conditioner in takers.items():
        try:
            given = conditioner.encode(ConditionRequest(arrays=name_inputs(conditioning, conditioner)))
            why = compare(conditioner, given, titles)
        except PiFlowError as error:
            why = str(error)
        if why:
            raise DataError(
                f"{name}: {conditioner.summarize()}; of the data {plan.data.name!r}: "
                f"{plan.data.conditioner.summarize()}; give the data that it was trained on ({why})"
            )


def _compare_titles(conditioner: Conditioner, given: Conditioning, titles: list[str]) -> str:
    alike = len(titles) == 1 or titles == find_titles(conditioner, given, len(titles))
    return "" if alike else "the names differ"


def _compare_encodings(conditioner: Conditioner, given: Conditioning, titles: list[str]) -> str:
    """See that a contender that reads prompts reads the first one as it was read for the data."""
    if not conditioner.example_prompts(1):
        return ""
    for name, found in conditioner.encode(ConditionRequest(prompts=titles[0])).items():
        wanted = given[name][:1]
        if found.ndim != 2 or found.dtype.kind != "f":  # of a pooled vector alone: others differ in length
            continue
        if not np.abs(found - wanted).max() <= _SAME_ENCODINGS * np.abs(wanted).max():
            return f"it reads {titles[0]!r:.60} otherwise than the text encoder of the data"
    return ""
