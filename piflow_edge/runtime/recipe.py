"""How an image was made, in full, and inside its PNG file: enough to make it again."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from piflow_edge.conditioning import ClassLabels
from piflow_edge.errors import RecipeError
from piflow_edge.sampling_settings import SETTING_NAMES, SamplingSettings
from piflow_edge.system.files import sha256

# Key of the text chunk in a PNG file, and the longest such text that is read: some 10,000 images.
CHUNK = "piflow-edge"
# Elsewhere it stands in EXIF's ImageDescription, behind this text.
EXIF_TAG, EXIF_START = 0x010E, "piflow-edge "
RECIPE_VERSION = 2
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """All that determines the images of one call. Lists hold one entry for each image, in order.

    `bundle`: its name; `bundle_sha256`: of its manifest, which holds the hashes of all its files. `precision`,
    `engine`, `device`: what ran it; another engine makes the same image but for rounding. `conditioning`: what steers
    each image, as the bundle's conditioner describes it. `seeds`: (seed, index). `settings`: those of the call, with
    nothing left open. `noise`, `image`, `mask`: SHA-256 of the arrays that the caller gave, or None. `release`: of
    piflow-edge.
    """

    version: int
    bundle: str
    bundle_sha256: str
    precision: str
    engine: str
    device: str
    conditioning: list[dict[str, Any]]
    seeds: list[tuple[int, int]]
    settings: SamplingSettings
    noise: list[str] | None
    image: list[str] | None
    mask: list[str] | None
    release: str

    def of(self, index: int) -> "Recipe":
        """The recipe of one image of the call alone."""
        lists = ("conditioning", "seeds", "noise", "image", "mask")
        given = {name: getattr(self, name) for name in lists}
        return replace(self, **{name: [value[index]] for name, value in given.items() if value is not None})

    def as_json(self) -> str:
        """One line of JSON in ASCII, which `parse_recipe` reads."""
        return json.dumps(asdict(self), allow_nan=False)


def hash_each(array: np.ndarray | None) -> list[str] | None:
    """SHA-256 of each of the arrays (B, ...), of their values in float32, or in bool as they are."""
    if array is None:
        return None
    plain = array if array.dtype == bool else array.astype("<f4")
    return [sha256(np.ascontiguousarray(one).tobytes()) for one in plain]


def parse_recipe(text: str) -> Recipe:
    """The recipe in `text`. Nothing in it is run or opened, and a generator checks every value again.

    Raises:
        RecipeError: it is no recipe, or one of another release.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the recipe is not JSON: {error}") from error
    version = body.get("version") if isinstance(body, dict) else None
    kinds = {1: _KINDS_OF_VERSION_1, RECIPE_VERSION: _KINDS}.get(version) if type(version) is int else None
    if kinds is None or sorted(body) != sorted(kinds):
        raise RecipeError(
            f"this release reads recipes of version {RECIPE_VERSION} and 1; got one of version {version!r}"
        )
    _check_kinds(body, kinds)
    body["seeds"] = [tuple(pair) for pair in body["seeds"]]
    if version == 1:
        body = _update_version_1(body)
    _check_kinds(body["settings"], _SETTING_KINDS)
    recipe = Recipe(**{**body, "settings": SamplingSettings(**body["settings"])})
    per_image = (recipe.conditioning, recipe.noise, recipe.image, recipe.mask)
    if any(given is not None and len(given) != len(recipe.seeds) for given in per_image):
        raise RecipeError("the recipe's lists differ in length; it was altered")
    return recipe


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a PNG, WebP or JPEG file that this package wrote. Safe on files of unknown origin: pixels are not
    decoded.

    Raises:
        RecipeError: not such a picture, without a recipe, or with an unusable one.
    """
    from PIL import Image  # only needed where pictures are read

    try:
        with Image.open(path, formats=["PNG", "WEBP", "JPEG"]) as image:
            text = image.info.get(CHUNK) if image.format == "PNG" else _read_exif(image)
    except OSError as error:
        reason = error.strerror or "it is no PNG, WebP or JPEG"
        raise RecipeError(f"{os.fspath(path)} cannot be read: {reason}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{os.fspath(path)} cannot be read: {error}") from error
    if not isinstance(text, str) or len(text) > _LONGEST:
        state = "holds no recipe" if not isinstance(text, str) else "holds more text than a recipe has"
        raise RecipeError(
            f"{os.fspath(path)} {state}; piflow-edge sample writes one, other programs drop it when they save"
        )
    return parse_recipe(text)


def _read_exif(image: Any) -> str | None:
    text = image.getexif().get(EXIF_TAG)
    is_ours = isinstance(text, str) and text.startswith(EXIF_START)
    return text.removeprefix(EXIF_START) if is_ours else None


def _update_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """A recipe of version 1 as one of version 2. It had labels, null without classes, and settings beside them."""
    labels, count = body.pop("labels"), len(body["seeds"])
    conditioning = [{}] * count if labels is None else ClassLabels.describe_labels(labels)
    settings = {name: body.pop(name) for name in SETTING_NAMES if name in body}
    sizes = {"height": None, "width": None}
    return {
        **body,
        "version": RECIPE_VERSION,
        "conditioning": conditioning,
        "settings": {**settings, **sizes},
    }


def _check_kinds(body: Any, kinds: dict[str, Callable[[Any], bool]]) -> None:
    wrong = [name for name, fits in kinds.items() if name not in body or not fits(body[name])]
    if wrong:
        raise RecipeError(f"the recipe has an unusable {wrong[0]}; it was altered")


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**64


def _is_count(value: Any) -> bool:
    return _is_whole(value, 1)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(kind, value))


def _none_or(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


_SETTING_KINDS = {
    **dict.fromkeys(("nfe", "substeps"), _is_count),
    "solver": _is_text,
    "temperature": _is_number,
    "h": lambda value: _is_number(value) or value == "inf",
    "strength": _is_number,
    "resamples": _is_whole,
    **dict.fromkeys(("height", "width"), _none_or(_is_count)),
}
_SHARED_KINDS = {
    "version": _is_count,
    **dict.fromkeys(("bundle", "bundle_sha256", "precision", "engine", "device", "release"), _is_text),
    "seeds": _list_of(_is_pair),
    **dict.fromkeys(("noise", "image", "mask"), _none_or(_list_of(_is_text))),
}
_KINDS = {
    **_SHARED_KINDS,
    "conditioning": _list_of(_is_object),
    "settings": lambda value: isinstance(value, dict) and sorted(value) == sorted(_SETTING_KINDS),
}
_KINDS_OF_VERSION_1 = {
    **_SHARED_KINDS,
    "labels": _none_or(_list_of(_is_whole)),
    **{name: fits for name, fits in _SETTING_KINDS.items() if name not in ("height", "width")},
}
