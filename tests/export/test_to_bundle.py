import errno

import numpy as np
import onnx
import pytest
import torch

from piflow_edge.bundle.folder import Bundle
from piflow_edge.distill.sources import network_of
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import BundleError, CheckFailedError, ScheduleError
from piflow_edge.export import bundle_graphs
from piflow_edge.export.onnx_graphs.to_onnx import OPSET, export_network, network_graph
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.system import files
from tests.conftest import make_student


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("architecture", [{}, dict(in_channels=3, sample_size=12, patch_size=3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_computes_what_pytorch_does(architecture, batch):
    network = network_of(make_student(**architecture))
    engine = open_engine(Graph(export_network(network)))
    x_t = torch.randn(batch, *network.sample_shape)
    t, labels = torch.linspace(1, 0.01, batch), torch.arange(batch)
    with torch.no_grad():
        expected = network(x_t, t, labels=labels)
    found = engine.run({"x_t": x_t.numpy(), "t": t.numpy(), "labels": labels.numpy()})
    for name, value in zip(("means", "logweights", "logstds"), expected, strict=True):
        # Float32 sums of 16 to 64 terms in another order.
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_the_graph_states_its_opset_and_carries_no_paths():
    model = onnx.load_from_string(export_network(network_of(make_student())))
    assert [o.version for o in model.opset_import if o.domain == ""] == [OPSET]
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b".py" not in model.SerializeToString()


def test_a_student_that_gives_nan_is_not_exported(tmp_path):
    student = make_student()
    student.tensors["ema.module.head.out.bias"][3] = float("nan")  # of the first log-weight
    with pytest.raises(CheckFailedError, match=r"NaN .*logweights\.0"):
        export_bundle(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_differs_from_pytorch_is_not_exported(tmp_path, monkeypatch):
    other = network_of(make_student(seed=1))
    monkeypatch.setattr(bundle_graphs, "network_graph", lambda *given: network_graph(other))
    with pytest.raises(CheckFailedError, match="network outputs differ"):
        export_bundle(make_student(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_published_temperature_is_recorded_unless_another_is_given(shared_bundle, tmp_path):
    assert Bundle(shared_bundle).manifest.schedule.temperature == "auto"
    with pytest.raises(ScheduleError, match=r"temperature .*'auto'; .*'warm'"):
        export_bundle(make_student(), tmp_path / "odd", temperature="warm")
    with pytest.raises(ScheduleError, match=r"eps .*above 0.*; got 0"):
        export_bundle(make_student(), tmp_path / "odd", eps=0)
    assert not (tmp_path / "odd").exists()


def test_a_bundle_is_not_replaced_unasked(shared_bundle):
    before = snapshot(shared_bundle)
    with pytest.raises(BundleError, match="exists"):
        export_bundle(make_student(), shared_bundle)
    assert snapshot(shared_bundle) == before


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        export_bundle(make_student(), tmp_path, overwrite=True)
    with pytest.raises(BundleError, match="not a bundle"):
        export_bundle(make_student(), tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "Ctrl-C"],
)
@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_save_cut_short_leaves_the_previous_bundle_whole(bundle, monkeypatch, failure, after):
    before = snapshot(bundle)
    fail_after(monkeypatch, after, failure)
    with pytest.raises(type(failure)):
        export_bundle(make_student(seed=1), bundle, overwrite=True)
    assert snapshot(bundle) == before
    assert [file.name for file in bundle.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("after", [0, 1])
def test_a_swap_cut_short_leaves_the_previous_bundle_whole(bundle, monkeypatch, after):
    before = snapshot(bundle)
    calls, rename = [], files.os.rename

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(files.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(make_student(seed=1), bundle, overwrite=True)
    assert snapshot(bundle) == before
    assert [file.name for file in bundle.parent.iterdir()] == ["tiny"]


def test_a_bundle_behind_a_link_is_replaced_behind_it(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    export_bundle(make_student(seed=1), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "tiny"]


def fail_after(monkeypatch, count, failure):
    """The file system gives up when the (count + 1)-th file is synced."""
    calls, sync = [], files.os.fsync

    def fsync(handle):
        calls.append(handle)
        if len(calls) > count:
            raise failure
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
