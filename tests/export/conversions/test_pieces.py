"""A graph in pieces: the same figures however it is cut, and few values between pieces however deep it is."""

import numpy as np
import pytest

from piflow_edge.distill.sources import network_of
from piflow_edge.engines import Graph
from piflow_edge.export.conversions import pieces
from piflow_edge.export.conversions.half_twins import add_half_twins
from piflow_edge.export.conversions.pieces import cut_into_pieces
from piflow_edge.export.conversions.twins import measure_twins
from piflow_edge.export.onnx_graphs.large import model_of
from piflow_edge.export.onnx_graphs.to_onnx import export_network
from tests.conftest import make_student

BATCH = {
    "x_t": np.random.default_rng(0).standard_normal((3, 1, 8, 8), np.float32),
    "t": np.full(3, 0.5, np.float32),
    "labels": np.arange(3),
}


def model_of_depth(depth):
    return model_of(Graph(export_network(network_of(make_student(depth=depth)))))


def test_pieces_hold_every_node_once_and_fit_each_other():
    model = model_of_depth(2)
    cut = list(cut_into_pieces(model, BATCH, limit=1))
    assert [node for piece in cut for node in piece.nodes] == list(model.graph.node) and len(cut) > 20
    alive = set(BATCH)
    for piece in cut:
        assert piece.inputs.keys() <= alive
        alive = alive - set(piece.finished) | set(piece.outputs)
    assert alive == set()


@pytest.mark.parametrize("limit", [1, 1 << 16])
def test_values_between_pieces_do_not_grow_with_depth(limit):
    def count_most_alive(depth):
        alive, most = set(BATCH), 0
        for piece in cut_into_pieces(model_of_depth(depth), BATCH, limit=limit):
            alive = alive - set(piece.finished) | set(piece.outputs)
            most = max(most, len(alive))
        return most

    assert count_most_alive(4) <= count_most_alive(1) + 2


def test_figures_are_the_same_however_the_graph_is_cut(monkeypatch):
    model = model_of_depth(1)

    def measure():
        measured = measure_twins(model, [BATCH, BATCH], lambda piece: add_half_twins(piece, {}))
        return {name: measures for _, name, measures in measured}

    whole = measure()
    assert all(len(measures) == 2 and measures[0] == measures[1] for measures in whole.values())
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    assert measure() == whole
