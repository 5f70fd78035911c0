"""Which students are compared, and under which names. The figures themselves: test_metrics.py and test_demo.py."""

from types import SimpleNamespace

import pytest

from piflow_edge.errors import DataError
from piflow_edge.evaluation import common_guidance, evaluate, unique_names


def student(scale):
    provenance = {"settings": {"guidance": {"scale": scale}}}
    return SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(provenance=provenance)))


def test_students_are_named_by_as_little_of_their_path_as_tells_them_apart(tmp_path):
    assert unique_names([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]
    assert unique_names([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert unique_names([]) == []


def test_a_student_given_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="given twice"):
        unique_names([tmp_path / "a", tmp_path / "x" / ".." / "a"])


def test_the_teacher_is_guided_as_the_students_were_taught():
    assert common_guidance({"a": student(1.5), "b": student(1.5)}) == 1.5
    assert common_guidance({}) == 1.0
    with pytest.raises(DataError, match="guided differently"):
        common_guidance({"a": student(1.5), "b": student(2.0)})


def test_a_handful_of_images_is_refused():
    pytest.importorskip("torch", reason="evaluation needs the 'train' extra")
    with pytest.raises(DataError, match="fewer than 100"):
        evaluate([], "nowhere", count=99)
