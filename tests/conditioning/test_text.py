"""Prompts: the ids are those of `transformers`, and what an encoder makes of them reaches the network's inputs."""

import json
import logging

import numpy as np
import pytest

from piflow_edge.conditioning import (
    ConditionRequest,
    TensorSpec,
    TextEncoderSpec,
    TextPrompts,
    conditioner_from_json,
)
from piflow_edge.conditioning.tokenizer import LONGEST_PROMPT, PromptTokenizer
from piflow_edge.errors import ConditioningError
from tests.helpers.text_encoders import nasty_prompts, trained_vocabulary, transformers_tokenizer

pytest.importorskip("tokenizers")

KINDS = ("wordpiece", "unigram", "clip", "qwen")
TEMPLATE = "<|im_start|>user\nDraw: {}<|im_end|>\n<|im_start|>assistant\n"
TEXT = TextPrompts(
    (
        TextEncoderSpec(
            "words", 8, hidden_input="hidden", mask_input="mask", pooled_input="pooled", fixed_length=False
        ),
    ),
    (
        TensorSpec("hidden", "float32", ("batch", "tokens", 4)),
        TensorSpec("mask", "int64", ("batch", "tokens")),
        TensorSpec("pooled", "float32", ("batch", 4)),
    ),
    examples=("a red apple", "a cat"),
)


@pytest.fixture(scope="module")
def fast():
    """`transformers`' tokenizers by kind; the runtime has no need of that package."""
    pytest.importorskip("transformers")
    return {kind: transformers_tokenizer(kind) for kind in KINDS}


def table_encoder(calls=None):
    """An encoder that says for every id a row of numbers: pooled is their mean over what the mask shows."""
    table = np.random.default_rng(0).standard_normal((1000, 4), np.float32)

    def run(network, inputs):
        if calls is not None:
            calls.append((network, inputs["input_ids"].tolist()))
        hidden, mask = table[inputs["input_ids"]], inputs["attention_mask"][..., None]
        return {"hidden_states": hidden, "pooled": (hidden * mask).sum(1) / mask.sum(1)}

    return run


def words(spec=TEXT, calls=None):
    file = trained_vocabulary("wordpiece").to_str().encode()
    return spec.open({"tokenizer.words.json": file}.__getitem__, table_encoder(calls))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"pad_to_max": True}], ids=["own length", "padded"])
def test_ids_are_those_of_transformers(fast, kind, settings):
    theirs = fast[kind]
    pad = theirs.pad_token_id or 0
    ours = PromptTokenizer(theirs.backend_tokenizer.to_str().encode(), max_tokens=24, pad_id=pad, **settings)
    theirs.pad_token_id = pad
    theirs.padding_side = "right"
    how = {"padding": "max_length" if settings else False, "truncation": True, "max_length": 24}
    # The tokenizer of Qwen adds nothing to a prompt, so that of "" nothing is left to be encoded.
    prompts = [prompt for prompt in nasty_prompts(600) if theirs(prompt).input_ids]
    differences = [p for p in prompts if ours.encode(p).ids.tolist() != theirs(p, **how).input_ids]
    assert differences == []
    for prompt in set(nasty_prompts(600)) - set(prompts):
        with pytest.raises(ConditioningError, match="holds nothing"):
            ours.encode(prompt)
    assert len(prompts) >= 590
    for prompt in prompts[:50]:
        assert ours.encode(prompt).mask.tolist() == theirs(prompt, **how).attention_mask


def test_a_template_stands_around_the_prompt_whatever_braces_it_holds(fast):
    theirs = fast["qwen"]
    ours = PromptTokenizer(theirs.backend_tokenizer.to_str().encode(), template=TEMPLATE, max_tokens=500)
    for prompt in nasty_prompts(200):
        assert ours.encode(prompt).ids.tolist() == theirs(TEMPLATE.replace("{}", prompt)).input_ids[:500]


def test_padding_may_stand_before_the_prompt():
    file = trained_vocabulary("wordpiece").to_str().encode()
    right, left = (
        PromptTokenizer(file, max_tokens=9, pad_to_max=True, pad_id=7, pad_left=side).encode("cat")
        for side in (False, True)
    )
    said = int(right.mask.sum())
    assert left.ids.tolist() == [7] * (9 - said) + right.ids[:said].tolist()
    assert left.mask.tolist() == right.mask[::-1].tolist()


@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        ("apple \ud83c", "position 6"),
        ("a" * (LONGEST_PROMPT + 1), f"{LONGEST_PROMPT + 1:,}"),
        (3, "3"),
        (b"apple", "apple"),
        (None, "None"),
        ([], "none"),
        (["apple", 3], "3"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_value(prompt, fact):
    asked = ConditionRequest(prompts=prompt) if prompt is not None else ConditionRequest(prompts=[None])
    with pytest.raises(ConditioningError, match=fact):
        words().encode(asked)


@pytest.mark.parametrize("file", [b"", b"{}", b"[", b"\xff\xfe", b'{"version":"1.0"}', b"[" * 100_000])
def test_what_is_no_tokenizer_is_refused(file):
    with pytest.raises(ConditioningError, match=r"tokenizer\.json"):
        PromptTokenizer(file, max_tokens=8)


def test_prompts_reach_the_inputs_each_encoded_alone():
    calls = []
    text = words(calls=calls)
    both = text.encode(ConditionRequest(prompts=["a red apple", "cat"]))
    assert [len(ids) for _, ids in calls] == [1, 1]
    assert {network for network, _ in calls} == {"encoder.words"}
    alone = text.encode(ConditionRequest(prompts="cat"))
    length = alone["mask"].shape[1]
    np.testing.assert_array_equal(both["hidden"][1, :length], alone["hidden"][0])
    assert not both["hidden"][1, length:].any()
    assert not both["mask"][1, length:].any()
    np.testing.assert_array_equal(both["pooled"][1], alone["pooled"][0])


def test_a_repeated_prompt_costs_no_encoder_call_and_old_ones_are_forgotten():
    calls = []
    text = words(calls=calls)
    for _ in range(3):
        text.encode(ConditionRequest(prompts=["cat", "cat"], count=2))
    assert len(calls) == 1
    for number in range(100):
        text.encode(ConditionRequest(prompts=str(number)))
    text.encode(ConditionRequest(prompts="cat"))
    assert len(calls) == 102


def test_what_is_cut_off_is_said_once(caplog):
    text = words()
    with caplog.at_level(logging.WARNING, "piflow_edge"):
        for _ in range(2):
            text.encode(ConditionRequest(prompts="a red apple on a wooden table"))
    assert len(caplog.records) == 1
    assert "table" in caplog.text
    assert "'a red" not in caplog.text


def test_a_fixed_length_drops_the_template_and_hides_padding():
    spec = TextEncoderSpec("words", 12, template="a photo of {}", drop_tokens=4, pooled_input=None,
                           hidden_input="hidden", mask_input="mask")  # fmt: skip
    text = words(TextPrompts((spec,), TEXT.inputs[:2]))
    encoded = text.encode(ConditionRequest(prompts="a cat"))
    tokens = text.tokenize("a cat")["words"]
    assert encoded["hidden"].shape == (1, 8, 4)
    assert encoded["mask"].sum() == len(tokens.ids) - 4
    table = np.random.default_rng(0).standard_normal((1000, 4), np.float32)
    np.testing.assert_array_equal(encoded["hidden"][0, : len(tokens.ids) - 4], table[tokens.ids[4:]])


def test_no_condition_is_the_encoding_of_the_null_prompt():
    text = words()
    null, empty = text.null(3), text.encode(ConditionRequest(prompts=[""] * 3))
    for name, array in empty.items():
        np.testing.assert_array_equal(null[name], array)
    assert words(TextPrompts(TEXT.encoders, TEXT.inputs, None)).null(1) is None


def test_descriptions_hold_the_prompts_and_recall_them():
    text = words()
    asked = ConditionRequest(prompts=["a cat", "קוד 👩‍🚀"], count=2)
    told = json.loads(json.dumps(text.describe(asked, text.encode(asked))))
    assert [text.title(one) for one in told] == ["a cat"] * 2 + ["קוד 👩‍🚀"] * 2
    again = text.encode(text.recall(told, ConditionRequest()))
    for name, array in text.encode(asked).items():
        np.testing.assert_array_equal(again[name], array)


def test_encodings_made_elsewhere_are_taken_checked_and_recognised():
    text = words()
    given = text.example(3)
    asked = ConditionRequest(arrays=given)
    told = text.describe(asked, text.encode(asked))
    assert text.recall(told, asked).arrays.keys() == given.keys()
    with pytest.raises(ConditioningError, match="other ones"):
        text.recall(told, ConditionRequest(arrays={**given, "pooled": given["pooled"] + 1}))


def test_it_comes_back_from_json_and_altered_json_is_refused():
    body = json.loads(json.dumps(TEXT.to_json()))
    assert conditioner_from_json(body) == TEXT
    for name, wrong in [
        ("max_tokens", -1), ("max_tokens", 10**9), ("max_tokens", "8"), ("max_tokens", True), ("drop_tokens", 8),
        ("template", "no place"), ("template", "{} {}"), ("name", ""), ("name", "../x"),
        ("layers", [0.5]), ("hidden_input", 3), ("pad_left", 1),
    ]:  # fmt: skip
        altered = json.loads(json.dumps(body))
        altered["encoders"][0][name] = wrong
        with pytest.raises(ConditioningError):
            conditioner_from_json(altered)
    for name, wrong in [("encoders", []), ("encoders", {}), ("examples", []), ("examples", [3]), ("inputs", []),
                        ("null_prompt", 3), ("inputs", body["inputs"][:1])]:  # fmt: skip
        with pytest.raises(ConditioningError):
            conditioner_from_json({**body, name: wrong})
    with pytest.raises(ConditioningError):
        conditioner_from_json({**body, "more": 1})
