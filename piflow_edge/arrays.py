"""The type of an array of any library, and the functions that go with it, by the array API standard."""

from typing import Any, Protocol

import array_api_compat
import numpy as np

# From 2.1 on NumPy is a namespace of the standard itself; `astype` came last.
_NUMPY_IS_ONE = hasattr(np, "astype")

# A module of array functions: NumPy, or what array-api-compat gives for another library. It differs by library, so
# that a type checker cannot know what is in it.
Namespace = Any


# What a function returns that computes with arrays of its caller's: of the same library, which a type checker cannot
# know. `Array` is for what it takes.
SameArray = Any


class Array(Protocol):
    """An array of NumPy, torch or another library that follows the array API standard.

    Only what all of them share is listed. Results are `Any`, because they are of the library's own type.
    """

    @property
    def dtype(self) -> Any: ...
    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> Any: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __neg__(self) -> Any: ...
    def __add__(self, other: Any, /) -> Any: ...
    def __radd__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __rsub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...
    def __pow__(self, other: Any, /) -> Any: ...


def array_namespace(*arrays: Any) -> Namespace:
    """The namespace of arrays of one library: NumPy itself where that will do, else array-api-compat's.

    The latter's for NumPy imports all that NumPy loads late, f2py and testing too: a third of the time to the first
    image.
    """
    if _NUMPY_IS_ONE and set(map(type, arrays)) == {np.ndarray}:
        return np
    return array_api_compat.array_namespace(*arrays)
