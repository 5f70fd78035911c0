"""How an image was made, in full, and inside its PNG file: enough to make it again."""

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from piflow_edge.errors import RecipeError
from piflow_edge.system.files import sha256

# Key of the text chunk in a PNG file, and the longest such text that is read: some 10,000 images.
CHUNK = "piflow-edge"
_LONGEST = 1 << 20
_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """All that determines the images of one call. Lists hold one entry for each image, in order.

    `bundle`: its name; `bundle_sha256`: of its manifest, which holds the hashes of all its files. `precision`,
    `engine`, `device`: what ran it; another engine makes the same image but for rounding. `labels`: class ids, None
    without classes. `seeds`: (seed, index). `nfe`, `substeps`, `solver`, `temperature`, `h`, `strength`,
    `resamples`: as given to a `Generator`, or the bundle's. `noise`, `image`, `mask`: SHA-256 of the arrays that the
    caller gave, or None. `release`: of piflow-edge.
    """

    version: int
    bundle: str
    bundle_sha256: str
    precision: str
    engine: str
    device: str
    labels: list[int] | None
    seeds: list[tuple[int, int]]
    nfe: int
    substeps: int
    solver: str
    temperature: float
    h: float | str
    strength: float
    resamples: int
    noise: list[str] | None
    image: list[str] | None
    mask: list[str] | None
    release: str

    def of(self, index: int) -> "Recipe":
        """The recipe of one image of the call alone."""
        lists = ("labels", "seeds", "noise", "image", "mask")
        given = {name: getattr(self, name) for name in lists}
        return replace(self, **{name: [value[index]] for name, value in given.items() if value is not None})

    def as_json(self) -> str:
        """One line of JSON in ASCII, which `parse_recipe` reads."""
        return json.dumps(asdict(self), allow_nan=False)


def hashes(array: np.ndarray | None) -> list[str] | None:
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
    names = [field.name for field in fields(Recipe)]
    if not isinstance(body, dict) or body.get("version") != _VERSION or sorted(body) != sorted(names):
        version = body.get("version") if isinstance(body, dict) else None
        raise RecipeError(f"this release reads recipes of version {_VERSION}; got one of version {version!r}")
    wrong = [name for name in names if not _KINDS[name](body[name])]
    if wrong:
        raise RecipeError(f"the recipe has an unusable {wrong[0]}; it was altered")
    body["seeds"] = [tuple(pair) for pair in body["seeds"]]
    recipe = Recipe(**body)
    per_image = (recipe.labels, recipe.noise, recipe.image, recipe.mask)
    if any(given is not None and len(given) != len(recipe.seeds) for given in per_image):
        raise RecipeError("the recipe's lists differ in length; it was altered")
    return recipe


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a PNG file that `png_bytes` wrote. Safe on files of unknown origin: pixels are not decoded.

    Raises:
        RecipeError: not a PNG, without a recipe, or with an unusable one.
    """
    from PIL import Image  # only needed where pictures are read

    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(CHUNK)
    except OSError as error:
        reason = error.strerror or "it is not a PNG"
        raise RecipeError(f"{os.fspath(path)} cannot be read: {reason}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{os.fspath(path)} cannot be read: {error}") from error
    if not isinstance(text, str) or len(text) > _LONGEST:
        state = "holds no recipe" if not isinstance(text, str) else "holds more text than a recipe has"
        raise RecipeError(
            f"{os.fspath(path)} {state}; piflow-edge sample writes one, other programs drop it when they save"
        )
    return parse_recipe(text)


def _whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**64


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list(of):
    return lambda value: isinstance(value, list) and bool(value) and all(map(of, value))


def _maybe(kind):
    return lambda value: value is None or kind(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole, value))


_KINDS = {
    **dict.fromkeys(("bundle", "bundle_sha256", "precision", "engine", "device", "solver", "release"), _text),
    **dict.fromkeys(("version", "nfe", "substeps"), lambda value: _whole(value, 1)),
    **dict.fromkeys(("noise", "image", "mask"), _maybe(_list(_text))),
    **dict.fromkeys(("temperature", "strength"), _number),
    "labels": _maybe(_list(_whole)),
    "seeds": _list(_pair),
    "resamples": _whole,
    "h": lambda value: _number(value) or value == "inf",
}
