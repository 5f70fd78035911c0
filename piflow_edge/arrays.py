"""The functions that go with an array, by the array API standard."""

from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

# From 2.1 on NumPy is a namespace of the standard itself; `astype` came last.
_NUMPY_IS_ONE = hasattr(np, "astype")


def array_namespace(*arrays: Any) -> ModuleType:
    """The namespace of arrays of one library: NumPy itself where that will do, else array-api-compat's.

    The latter's for NumPy imports all that NumPy loads late, f2py and testing too: a third of the time to the first
    image.
    """
    if _NUMPY_IS_ONE and all(type(array) is np.ndarray for array in arrays):
        return np
    return array_api_compat.array_namespace(*arrays)
