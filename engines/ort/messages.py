"""What ONNX Runtime's errors say, without where in its own source they were raised."""

import re

_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
# "reshape_helper.h:91 type space::function(arguments) const ", or with the function's bare name.
_PLACE = re.compile(
    r"\S+\.(?:cc|cpp|cu|cuh|h):\d+ (?:[\w:<>,&*~ ]*::[\w~<>]+\([^()\n]*\)(?: const)? |[A-Za-z_]\w* )?"
)


def plain_reason(error: Exception) -> str:
    """Return an error's own words: no error codes, no paths, lines and functions of ONNX Runtime's source."""
    return _PLACE.sub("", _CODE.sub("", str(error))).strip()
