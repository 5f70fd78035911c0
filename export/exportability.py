"""Whether a student can be exported, found out before it is trained."""

import logging

from piflow_edge.distill.student_model import StudentModel
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.errors import MissingExtraError
from piflow_edge.export.export_settings import ExportSettings
from piflow_edge.export.manifest_draft import draft_manifest
from piflow_edge.export.onnx_graphs.to_onnx import network_graph

log = logging.getLogger(__name__)


def check_exportable(student: StudentModel) -> None:
    """Refuse a student that `export_bundle` would refuse, whatever it is trained to.

    Of videos nothing is refused: there is no bundle of them, which is logged, and they are trained for PyTorch. Of
    others the manifest is drafted. A network of the user's own code is made a graph of too, unless it has adapters,
    which are folded into its weights at export only.

    Raises:
        BundleError: a bundle may not have such numbers or names.
        CheckpointError: torch cannot make a graph of the network's code.
        CheckFailedError: the exported graph is not valid ONNX.
    """
    if len(student.network.sample_shape) != 3:
        log.warning("there are no bundles of videos: PyTorch alone will run the student")
        return
    manifest = draft_manifest(student, "student", ExportSettings(), None)
    if student.network.is_untried and student.network.lora is None:
        network_graph(student.network, manifest.conditioner.inputs, manifest.axes)
    try:
        import_onnxruntime()
    except MissingExtraError as error:
        log.warning("the student can be trained here, and not be exported: %s", error)
