"""What conditioners make of what is asked for, and what they refuse."""

import json

import numpy as np
import pytest

from piflow_edge.conditioning import (
    Arrays,
    ClassLabels,
    ConditionRequest,
    TensorSpec,
    Unconditional,
    build_condition_request,
    conditioner_from_json,
    count_of,
    find_conditioner_kind,
)
from piflow_edge.errors import ConditioningError, LabelError, ShapeError

PETS = ClassLabels(("cat", "dog", "Hedgehog"))
ENCODINGS = (
    TensorSpec("hidden", "float32", ("batch", "tokens", 4)),
    TensorSpec("mask", "bool", ("batch", "tokens")),
)
TEXT = Arrays(ENCODINGS)
EVERY_KIND = [PETS, TEXT, Unconditional()]


def encodings(count=2, tokens=3):
    hidden = np.random.default_rng(1).standard_normal((count, tokens, 4), np.float32)
    return {"hidden": hidden, "mask": np.ones((count, tokens), bool)}


def ids(labels, conditioner=PETS, **asked):
    return conditioner.encode(ConditionRequest(labels=labels, **asked))["labels"].tolist()


@pytest.mark.parametrize("conditioner", EVERY_KIND, ids=lambda c: c.kind)
def test_every_kind_is_registered_and_comes_back_from_json(conditioner):
    assert find_conditioner_kind(conditioner.kind) is type(conditioner)
    body = json.loads(json.dumps(conditioner.to_json()))
    assert conditioner_from_json(body) == conditioner


@pytest.mark.parametrize("conditioner", EVERY_KIND, ids=lambda c: c.kind)
def test_an_example_is_what_encode_takes_as_arrays(conditioner):
    example = conditioner.example(5)
    assert list(example) == [spec.name for spec in conditioner.inputs]
    assert count_of(example, 5) == 5
    again = conditioner.encode(ConditionRequest(arrays=example, count=None if example else 5))
    for name, array in example.items():
        np.testing.assert_array_equal(again[name], array)
        np.testing.assert_array_equal(conditioner.example(5)[name], array)


@pytest.mark.parametrize("conditioner", EVERY_KIND, ids=lambda c: c.kind)
def test_descriptions_recall_the_same_conditioning(conditioner):
    example = conditioner.example(3)
    told = json.loads(json.dumps(conditioner.describe(ConditionRequest(count=3), example)))
    given = ConditionRequest(arrays=example) if conditioner.kind == "arrays" else ConditionRequest()
    asked = conditioner.recall(told, given)
    again = conditioner.encode(asked)
    assert count_of(again, asked.count) == 3
    for name, array in example.items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("conditioner", EVERY_KIND, ids=lambda c: c.kind)
def test_what_a_kind_has_no_meaning_for_is_refused_by_name(conditioner):
    with pytest.raises(ConditioningError, match=r"prompts .*'an apple'"):
        conditioner.encode(ConditionRequest(prompts="an apple"))
    with pytest.raises(ConditioningError, match=r"count .* 0"):
        conditioner.encode(ConditionRequest(count=0))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (2, [2]),
        (np.int64(1), [1]),
        ("dog", [1]),
        (["dog", 0, "Hedgehog"], [1, 0, 2]),
        (np.array([2, 0]), [2, 0]),
        ("all", [0, 1, 2]),
        ("0-1, Hedgehog", [0, 1, 2]),
        ("2,0", [2, 0]),
        (range(2), [0, 1]),
    ],
)
def test_labels_are_ids_names_lists_and_ranges(labels, expected):
    assert ids(labels) == expected


def test_a_name_goes_before_every_other_reading_of_a_text():
    names = ClassLabels(("1", "0", "all", "tench, Tinca tinca"))
    assert ids("1", names) == [0]
    assert ids("all", names) == [2]
    assert ids("tench, Tinca tinca", names) == [3]


def test_count_is_of_each_label():
    assert ids(["cat", "dog"], count=2) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("hedgehog", r"'hedgehog' \(did you mean 'Hedgehog'\?\)"),
        ("DOG", "did you mean 'dog'"),
        ("cta", "did you mean 'cat'"),
        ("unicorn", r"got label 'unicorn'; .* 3 classes, 0 to 2: cat, dog, Hedgehog"),
        ("cat,,dog", "got label ''"),
        ("2-0", "got label '2-0'"),
        ("1-7", "got label '1-7'"),
        (3, "got label 3;"),
        (-1, "got label -1;"),
        ("3", "got label 3;"),
        (True, "got label True"),
        (1.0, "got label 1.0"),
        (b"cat", "got label b'cat'"),
        ([], "one label or more"),
        (None, "give labels"),
    ],
)
def test_a_label_error_names_the_value_and_the_classes(label, told):
    with pytest.raises(LabelError, match=told):
        PETS.encode(ConditionRequest(labels=label))


def test_a_thousand_names_do_not_fill_the_screen():
    many = ClassLabels(tuple(f"class {i}" for i in range(1000)))
    with pytest.raises(LabelError, match=r"1000 .* 999") as caught:
        many.encode(ConditionRequest(labels="unicorn"))
    assert len(str(caught.value)) < 500


def test_ids_as_arrays_are_held_to_the_classes():
    np.testing.assert_array_equal(PETS.encode(ConditionRequest(arrays={"labels": [2, 1]}))["labels"], [2, 1])
    with pytest.raises(LabelError, match="got label 3"):
        PETS.encode(ConditionRequest(arrays={"labels": [0, 3]}))
    with pytest.raises(LabelError, match="give labels"):
        PETS.encode(ConditionRequest(labels=[0], arrays={"labels": [0]}))


def test_no_condition_is_the_class_after_the_last():
    assert PETS.null(2)["labels"].tolist() == [3, 3]


def test_the_input_of_a_network_may_have_another_name():
    renamed = ClassLabels(("a", "b"), "class_labels")
    assert renamed.encode(ConditionRequest(labels="b"))["class_labels"].tolist() == [1]
    assert renamed.inputs == (TensorSpec("class_labels", "int64", ("batch",)),)


def test_titles_are_names_and_equal_for_what_is_the_same():
    assert [PETS.title(d) for d in PETS.describe(ConditionRequest(), PETS.example(4))] == [
        "cat",
        "dog",
        "Hedgehog",
        "cat",
    ]
    same = TEXT.encode(ConditionRequest(arrays=encodings(1), count=2))
    titles = [
        TEXT.title(d) for e in (same, encodings(1, tokens=2)) for d in TEXT.describe(ConditionRequest(), e)
    ]
    assert titles[0] == titles[1] != titles[2]


def test_arrays_become_what_the_network_takes():
    given = {"mask": np.ones((2, 3), bool), "hidden": np.zeros((2, 3, 4), np.float64).transpose(0, 1, 2)}
    encoded = TEXT.encode(ConditionRequest(arrays=given))
    assert list(encoded) == ["hidden", "mask"]
    assert encoded["hidden"].dtype == np.float32
    assert TEXT.encode(ConditionRequest(arrays=given, count=3))["mask"].shape == (6, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"extra": np.zeros(2)}, "no input 'extra'"),
        ({"hidden": np.zeros((2, 3, 5), np.float32)}, r"hidden float32 \(batch, tokens, 4\).* \(2, 3, 5\)"),
        ({"hidden": np.zeros((2, 3), np.float32)}, r"\(2, 3\)"),
        ({"hidden": np.zeros((2, 3, 4), np.int64)}, "got int64"),
        ({"hidden": np.full((2, 3, 4), 1e300)}, r"'hidden' .*finite"),
        ({"mask": np.ones((2, 5), bool)}, r"mask bool .* with batch=2, tokens=3; .*bool \(2, 5\)"),
        ({"mask": np.ones((1, 3), bool)}, "batch=2"),
        ({"mask": np.ones((2, 3))}, "got float64"),
        ({"mask": [[True], [True, False]]}, "'mask'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, told):
    with pytest.raises((ShapeError, ConditioningError), match=told):
        TEXT.encode(ConditionRequest(arrays=encodings() | change))


def test_missing_arrays_are_named():
    with pytest.raises(ConditioningError, match=r"hidden float32 \(batch, tokens, 4\)"):
        TEXT.encode(ConditionRequest())
    with pytest.raises(ConditioningError, match="'mask' is missing"):
        TEXT.encode(ConditionRequest(arrays={"hidden": encodings()["hidden"]}))
    with pytest.raises(ConditioningError, match="got none"):
        TEXT.encode(ConditionRequest(arrays=encodings(count=0)))


def test_whole_numbers_must_fit():
    short = Arrays((TensorSpec("ids", "int32", ("batch",)),))
    with pytest.raises(ShapeError, match="fit into int32"):
        short.encode(ConditionRequest(arrays={"ids": np.array([2**40])}))


def test_no_condition_of_arrays_may_be_shorter_than_what_is_given():
    steered = Arrays(ENCODINGS, encodings(1, tokens=1))
    assert steered.null(2)["hidden"].shape == (2, 1, 4)
    assert TEXT.null(2) is None
    assert steered == TEXT  # a bundle has no use for it


def test_examples_of_arrays_are_rows_that_were_seen():
    rows = encodings(2)
    example = Arrays(ENCODINGS, rows=rows).example(3)
    np.testing.assert_array_equal(example["hidden"], rows["hidden"][[0, 1, 0]])


def test_recall_wants_the_arrays_that_were_used():
    rows = encodings(2)
    told = TEXT.describe(ConditionRequest(), rows)
    with pytest.raises(ConditioningError, match="give arrays"):
        TEXT.recall(told, ConditionRequest())
    other = rows | {"hidden": rows["hidden"] + 1}
    with pytest.raises(ConditioningError, match="image 0"):
        TEXT.recall(told, ConditionRequest(arrays=other))
    one = {name: array[:1] for name, array in rows.items()}
    assert count_of(TEXT.recall([told[0]] * 3, ConditionRequest(arrays=one)).arrays) == 3


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"kind": "smell"},
        {"kind": ["class"]},
        {"kind": "none", "names": []},
        {"kind": "class", "names": [], "input": "labels"},
        {"kind": "class", "names": "cat", "input": "labels"},
        {"kind": "class", "names": [1], "input": "labels"},
        {"kind": "class", "names": ["cat"], "input": ""},
        {"kind": "class", "names": ["cat"]},
        {"kind": "arrays", "inputs": []},
        {"kind": "arrays", "inputs": [{"name": "a", "dtype": "object", "shape": ["batch"]}]},
        {"kind": "arrays", "inputs": [{"name": "a", "dtype": "float32", "shape": [2]}]},
        {"kind": "arrays", "inputs": [{"name": "a", "dtype": "float32", "shape": ["batch", 0]}]},
        {"kind": "arrays", "inputs": [{"name": "a", "dtype": "float32", "shape": ["batch", True]}]},
        {"kind": "arrays", "inputs": [{"name": "a", "dtype": "bool", "shape": ["batch"]}] * 2},
    ],
)
def test_json_that_makes_no_sense_is_refused(body):
    with pytest.raises(ConditioningError):
        conditioner_from_json(body)


def test_the_first_argument_of_a_call_is_what_the_kind_is_asked_with():
    assert build_condition_request(PETS, 3, count=2) == ConditionRequest(labels=3, count=2)
    assert build_condition_request(Unconditional(), 4) == ConditionRequest(count=4)
    assert build_condition_request(TEXT, None, labels=None) == ConditionRequest()
    with pytest.raises(ConditioningError, match=r"labels .*twice"):
        build_condition_request(PETS, 3, labels=[3])


def test_nothing_steers_an_unconditional_model():
    none = Unconditional()
    assert none.encode(ConditionRequest(count=4)) == {}
    assert none.null(2) is None
    with pytest.raises(ConditioningError, match=r"labels .* count; got 3"):
        none.encode(ConditionRequest(labels=3))
    with pytest.raises(ConditioningError, match="give count"):
        none.encode(ConditionRequest())
