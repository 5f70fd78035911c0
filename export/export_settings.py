"""How a student is exported."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

from piflow_edge.bundle.precisions import EXACT, PRECISIONS
from piflow_edge.bundle.sections import AxisSpec
from piflow_edge.errors import BundleError, ScheduleError
from piflow_edge.export.onnx_graphs.opset import OPSETS
from piflow_edge.export.onnx_graphs.to_onnx import OPSET
from piflow_edge.schedule import check_temperature

NO_LICENSE = (
    "No licence was stated for these weights. Ask whoever gave them to you what you may do with them.\n"
)


@dataclass(frozen=True)
class ExportSettings:
    """What a bundle is to hold beside the student.

    Args:
        name: of the bundle; None is the folder's.
        temperature: of GM policies at every call but the last, 0 or more, recorded as the bundle's default; "auto" is
            the published rule min(0.1 (nfe - 1), 1), 1 leaves the policies as they were trained.
        eps: floor inside the policy at run time; None is the student's own, 1e-4 but for the authors' students.
        samplers: calls per image for which the whole sampler is written as one graph too.
        precisions: of `PRECISIONS`; the first is what the bundle runs in unless asked. The decoder of int8 is fp32.
        network_precisions: for some networks another precision, the same in all of the bundle's: by the name of a
            network ("encoder.t5") or the part before the dot ("encoder", "decoder", "student").
        axes: how long named axes of what steers the student may be, by name; else any length.
        opset: of all graphs: 18, or 17 for TensorRT 8.5 and 8.6.
        license_text, license_name: content of LICENSE, and its short name for the manifest.

    Raises:
        ScheduleError: `temperature` or `eps` out of range.
        BundleError: precisions or an opset that are not known.
    """

    name: str | None = None
    temperature: float | str = "auto"
    eps: float | None = None
    samplers: tuple[int, ...] = ()
    precisions: tuple[str, ...] = (EXACT,)
    network_precisions: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, AxisSpec] = field(default_factory=dict)
    opset: int = OPSET
    license_text: str = NO_LICENSE
    license_name: str = "unstated"

    def __post_init__(self):
        object.__setattr__(self, "samplers", tuple(sorted(set(self.samplers))))
        object.__setattr__(self, "precisions", tuple(dict.fromkeys(self.precisions)))
        if self.eps is not None and not (isinstance(self.eps, numbers.Real) and 0 < self.eps < math.inf):
            raise ScheduleError(f"eps is above 0, and finite; got {self.eps!r}")
        check_temperature(self.temperature)
        chosen = {*self.precisions, *self.network_precisions.values()}
        if not self.precisions or not chosen <= set(PRECISIONS):
            raise BundleError(
                f"precisions are of {', '.join(PRECISIONS)}; got {', '.join(sorted(chosen)) or 'none'}"
            )
        for name, axis in self.axes.items():
            if axis.min < 1 or axis.multiple_of < 1 or (axis.longest or axis.shortest) < axis.shortest:
                raise BundleError(f"lengths of an axis rise from 1 or more; got {name}={axis}")
        if self.opset not in OPSETS:
            raise BundleError(f"opset is {' or '.join(map(str, OPSETS))}; got {self.opset!r}")

    def precision_of(self, network: str, precision: str) -> str:
        """Return what a network of the bundle is in, where the bundle is in `precision`."""
        kind = network.partition(".")[0]
        return self.network_precisions.get(network) or self.network_precisions.get(kind) or precision
