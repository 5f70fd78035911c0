"""Do images show what their prompts say? Measured by pairs of networks, on images whose prompts are a direction."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from piflow_edge.conditioning import Arrays, TensorSpec
from piflow_edge.errors import DataError, FeatureError, ShapeError
from piflow_edge.evaluation.comparison import evaluate
from piflow_edge.evaluation.metrics import prompt_agreement
from piflow_edge.evaluation.plan import plan_images
from piflow_edge.evaluation.prompt_features import PromptFeatures
from piflow_edge.evaluation.report import text_table, write_report

COUNT = 60
ANGLES = np.linspace(0, 2 * np.pi, COUNT, endpoint=False)
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1).astype(np.float32)


@dataclass(frozen=True)
class Directions(Arrays):
    """Reads "to the 7th" as the seventh direction. `turned`: by another encoder, as the opposite one."""

    inputs: tuple = (TensorSpec("pooled", "float32", ("batch", 2)),)
    turned: bool = False

    def example_prompts(self, count):
        return ["to the 0th"] * count

    def encode(self, request):
        if request.prompts is None:
            return super().encode(request)
        number = int(request.prompts.removeprefix("to the ").removesuffix("th"))
        return {"pooled": DIRECTIONS[number : number + 1] * (-1 if self.turned else 1)}


@dataclass(frozen=True)
class Captioned:
    """Pictures 1x8x8 whose left half is the cosine, and whose right half is the sine, of a direction."""

    conditioner: object = Directions()
    name: str = "directions"
    latent: None = None
    shape: tuple = (1, 8, 8)

    def __len__(self):
        return COUNT

    def prompts(self, indices):
        return [f"to the {index}th" for index in indices]

    def conditioning(self, indices):
        return {"pooled": DIRECTIONS[indices]}

    def batch(self, indices):
        return paint(DIRECTIONS[indices]), self.conditioning(indices)


def paint(directions):
    return np.repeat(directions[:, None, None, :], 4, 3).repeat(8, 2).astype(np.float32)


class Painter:
    """A teacher that paints what it is asked for; or, deaf, whatever comes."""

    sample_shape = (1, 8, 8)

    def __init__(self, *, deaf=False, conditioner=None):
        self.conditioner, self.deaf = conditioner or Directions(), deaf

    def sample(self, noise, conditioning, steps, *, guidance_scale):
        wanted = noise[:, 0, 0, :2] if self.deaf else conditioning["pooled"]
        return np.clip(paint(wanted), -1, 1) + 0.05 * noise


class Pixels:
    description, source = "the pixels", {}

    def __call__(self, images):
        return images.reshape(len(images), -1)


def write_graph(file, name, shape, nodes, *, kind="FLOAT", outputs=("features",), tables=()):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    given = helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)
    made = [helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, None) for one in outputs]
    nodes = [helper.make_node(op, inputs, results, **more) for op, inputs, results, more in nodes]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in tables]
    graph = helper.make_graph(nodes, "graph", [given], made, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    return file


@pytest.fixture
def pair(tmp_path):
    pytest.importorskip("onnxruntime")
    halves = [
        ("ReduceMean", ["images"], ["columns"], {"axes": [1, 2], "keepdims": 0}),
        ("Reshape", ["columns", "halves"], ["split"], {}),
        ("ReduceMean", ["split"], ["features"], {"axes": [2], "keepdims": 0}),
    ]
    shape = [("halves", np.array([-1, 2, 4], np.int64))]
    images = write_graph(tmp_path / "images.onnx", "images", ["batch", 1, 8, 8], halves, tables=shape)
    same = [("Identity", ["pooled"], ["features"], {})]
    return images, write_graph(tmp_path / "prompts.onnx", "pooled", ["batch", 2], same)


def judge(pair, teacher, **settings):
    return evaluate(
        [], Captioned(), Pixels(), teacher=teacher, count=120, teacher_steps=2, cut_steps=(1,),
        prompt_features=PromptFeatures(*pair), **settings,
    )  # fmt: skip


def test_images_that_show_their_prompts_are_told_from_those_that_do_not(pair, tmp_path):
    good, deaf = (judge(pair, Painter(deaf=deaf)) for deaf in (False, True))
    assert good.scores[0].prompt_accuracy > 0.9 and good.scores[0].prompt_similarity > 0.99
    # One of 30 prompts, by chance.
    assert deaf.scores[0].prompt_accuracy < 0.15 and abs(deaf.scores[0].prompt_similarity) < 0.3
    said = good.conditions["prompt_features"]
    assert said["prompts"] == 30 and said["other_prompts"] == 29 and said["real_images"]["accuracy"] == 1
    page = write_report(tmp_path / "report", good, title="prompts", notes=[]).read_text(encoding="utf-8")
    assert "prompt found" in page and "to the " in page
    assert [column.header for column in text_table(good).columns][-3:-1] == ["prompt", "sim."]


def test_several_images_of_each_prompt_are_made_and_diversity_is_of_each():
    plan = plan_images(Captioned(), 120, steered=True)
    assert plan.prompts and len(plan.group_names) == 30
    assert set(np.bincount(plan.groups)) == {4}
    np.testing.assert_array_equal(plan.conditioning()["pooled"], DIRECTIONS[plan.chosen])
    assert plan.titles([0, 31]) == Captioned().prompts(plan.chosen[[0, 31]])
    found = evaluate([], Captioned(), Pixels(), teacher=Painter(), count=120, teacher_steps=2, cut_steps=())
    assert found.scores[0].class_diversity.keys() == set(plan.group_names)
    # The noise is a twentieth; two directions are much farther apart.
    assert found.scores[0].diversity < 1 < found.conditions["real_diversity"]
    assert not found.compares_prompts and "prompt" not in [c.header for c in text_table(found).columns]


def test_a_model_that_reads_prompts_otherwise_than_the_data_is_refused():
    with pytest.raises(DataError, match="otherwise than the text encoder"):
        evaluate([], Captioned(), Pixels(), teacher=Painter(conditioner=Directions(turned=True)), count=120)


def test_prompts_are_not_compared_where_none_steer(pair):
    @dataclass(frozen=True)
    class Bare(Captioned):
        conditioner: object = Arrays(Directions().inputs)

        def titles(self, indices):
            return [""] * len(indices)

    with pytest.raises(DataError, match="no prompts steer"):
        evaluate([], Bare(), Pixels(), teacher=Painter(conditioner=Bare().conditioner), count=120,
                 prompt_features=PromptFeatures(*pair))  # fmt: skip


def test_agreement_is_the_share_of_own_prompts_that_are_nearest():
    prompts = np.eye(4)
    images = np.eye(4)[[0, 1, 2, 3, 1]]
    found = prompt_agreement(images, prompts, np.array([0, 1, 2, 0, 2]))
    assert found == (0.6, 0.6)
    # A tie is no find.
    assert prompt_agreement(np.ones((1, 4)) / 2, prompts, np.array([0])).accuracy == 0
    with pytest.raises(ShapeError, match="one length"):
        prompt_agreement(np.eye(3), prompts, np.arange(3))


def test_a_prompts_network_with_a_tokenizer_reads_the_prompts_themselves(pair, tmp_path):
    pytest.importorskip("tokenizers")
    from tests.helpers.text_encoders import trained_vocabulary

    words = trained_vocabulary("wordpiece")
    table = np.random.default_rng(0).standard_normal((words.get_vocab_size(), 2)).astype(np.float32)
    nodes = [
        ("Gather", ["table", "input_ids"], ["rows"], {}),
        ("ReduceMean", ["rows"], ["text_embeds"], {"axes": [1], "keepdims": 0}),
    ]
    file = write_graph(
        tmp_path / "text.onnx", "input_ids", ["batch", "tokens"], nodes, kind="INT64",
        outputs=("text_embeds", "rows"), tables=[("table", table)],
    )  # fmt: skip
    with pytest.raises(FeatureError, match=r"tokenizer\.json"):
        PromptFeatures(pair[0], file)
    words.save(str(tmp_path / "tokenizer.json"))
    texts = ["a red apple", "a cat wearing a hat"]
    found = PromptFeatures(pair[0], file).encode_prompts(texts, {})
    wanted = np.stack([table[words.encode(text).ids].mean(0) for text in texts])
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)


def test_a_prompts_network_that_takes_something_else_is_refused(pair, tmp_path):
    other = write_graph(tmp_path / "other.onnx", "sound", [1, 2], [("Identity", ["sound"], ["features"], {})])
    with pytest.raises(FeatureError, match="'sound'"):
        PromptFeatures(pair[0], other).encode_prompts(["a"], {"pooled": DIRECTIONS[:1]})
    two = write_graph(
        tmp_path / "two.onnx", "pooled", ["batch", 2],
        [("Identity", ["pooled"], ["a"], {}), ("Identity", ["pooled"], ["b"], {})], outputs=("a", "b"),
    )  # fmt: skip
    with pytest.raises(FeatureError, match="a, b"):
        PromptFeatures(pair[0], two)


@pytest.mark.torch
def test_a_pair_that_is_trained_on_captions_finds_those_of_held_out_images(tmp_path):
    pytest.importorskip("torch")
    from piflow_edge.distill.data.captions import Captions
    from piflow_edge.distill.data.image_data import CaptionedData
    from piflow_edge.export.feature_extractor import train_prompt_features

    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, 300)
    directions = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    images = paint(directions) + random.normal(0, 0.1, (300, 1, 8, 8)).astype(np.float32)
    captions = Captions.of_rows([["it"]] * 300)
    pooled = directions @ random.standard_normal((2, 8)).astype(np.float32)
    reads = Arrays((TensorSpec("pooled", "float32", ("batch", 8)),))
    data = CaptionedData("directions", images, reads, {"pooled": pooled}, None, captions)
    trained, file = train_prompt_features(data, tmp_path / "pair.onnx", iterations=60)
    # Near directions are hard to tell apart: 100 prompts are 4 degrees apart.
    assert trained.accuracy["held_out"] > 0.3
    judge = PromptFeatures(tmp_path / "pair.onnx", file)
    shown = judge.encode_images(images[:50])
    said = judge.encode_prompts(["it"] * 50, {"pooled": pooled[:50]})
    assert prompt_agreement(shown, said, np.arange(50)).similarity > 0.8
    with pytest.raises(DataError, match="pooled"):
        hidden = replace(data, conditioner=Arrays((TensorSpec("hidden", "float32", ("batch", 3, 2)),)))
        train_prompt_features(hidden, tmp_path / "other.onnx")
