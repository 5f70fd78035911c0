"""Weights that stay in their files: the same network, in less memory."""

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn

from piflow_edge.distill.stored_weights import (
    find_stored,
    find_stored_type,
    leave_in_files,
    read_weights,
)

pytestmark = pytest.mark.torch
LEAST = 500


class Network(nn.Module):
    """Two layers of one weight, one whose weight is small, and a buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 24)
        self.wide = nn.Linear(24, 40)
        self.again = nn.Linear(24, 40, bias=False)
        self.again.weight = self.wide.weight
        self.small = nn.Linear(40, 3)
        self.register_buffer("offset", torch.full((3,), 0.3))

    def forward(self, ids):
        found = self.table(ids)
        return self.small(self.wide(found).relu() + self.again(found)) + self.offset


def make_pair():
    """A network in float32, and the same in bfloat16 with its large weights left where they are."""
    torch.manual_seed(0)
    narrow = Network().to(torch.bfloat16)
    exact = Network()
    exact.load_state_dict(narrow.state_dict())
    leave_in_files(narrow, LEAST)
    return exact.requires_grad_(False), narrow


IDS = torch.tensor([[1, 5, 39]])


def test_it_computes_what_the_network_does_in_float32():
    exact, stored = make_pair()
    torch.testing.assert_close(stored(IDS), exact(IDS), rtol=0, atol=0)
    assert stored(IDS).dtype == torch.float32 and stored.offset.dtype == torch.float32
    for name, weight in stored.named_parameters():
        assert (find_stored(weight) is not None) == (weight.numel() >= LEAST), name


def test_between_calls_a_layer_holds_nothing_that_could_be_taken_for_its_weights():
    _, stored = make_pair()
    for _ in range(2):
        assert torch.isnan(stored.wide.weight).all() and stored.wide.weight.untyped_storage().nbytes() == 4
        assert stored.wide.weight is stored.again.weight
        stored(IDS)
    with pytest.raises(IndexError):
        stored(torch.tensor([[1000]]))
    assert torch.isnan(stored.table.weight).all()  # after an error, too


def test_what_is_added_to_a_weight_is_there_each_time():
    exact, stored = make_pair()
    up, down = torch.randn(40, 2).bfloat16(), torch.randn(2, 24).bfloat16()
    exact.wide.weight += 0.5 * up.float() @ down.float()
    find_stored(stored.wide.weight).add_product(up, down, 0.5)
    for _ in range(2):
        torch.testing.assert_close(stored(IDS), exact(IDS))
    read = dict(read_weights(stored))
    assert list(read) == sorted(exact.state_dict())
    for name, weight in exact.state_dict().items():
        torch.testing.assert_close(read[name], weight)
    other = torch.randn(40, 24)
    find_stored(stored.wide.weight).replace(other)
    torch.testing.assert_close(find_stored(stored.again.weight).widen(), other)


@pytest.mark.parametrize(
    ("types", "found"),
    [
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ([torch.float16], torch.float16),
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([], torch.float32),
    ],
)
def test_files_are_read_in_their_own_type_only_where_nothing_is_lost(types, found, tmp_path):
    for i, kind in enumerate(types):
        save_file({"weight": torch.ones(2, dtype=kind)}, tmp_path / f"model-{i}.safetensors")
    assert find_stored_type(tmp_path) == found


def test_a_network_in_files_is_mapped_and_not_read(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the 'diffusers' extra")
    from piflow_edge.distill.networks.text_encoders import load_text_encoder
    from piflow_edge.system.hardware import memory
    from tests.helpers.text_encoders import transformers_tokenizer

    if (before := memory()) is None:
        pytest.skip("this system does not tell how much memory a process has")
    config = transformers.T5Config(
        vocab_size=300, d_model=4096, d_ff=2048, num_layers=2, num_heads=4, d_kv=16
    )
    torch.manual_seed(0)
    transformers.T5EncoderModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    transformers_tokenizer("unigram").save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 60e6
    before = memory()
    encoder = load_text_encoder(tmp_path, in_files=True)
    assert (memory().resident - before.resident) * 1e6 < size / 2
    wide = load_text_encoder(tmp_path)
    import numpy as np

    inputs = {"input_ids": np.array([[5, 7, 1]]), "attention_mask": np.ones((1, 3), np.int64)}
    np.testing.assert_allclose(
        encoder.run(inputs)["hidden_states"], wide.run(inputs)["hidden_states"], atol=1e-5
    )
    assert encoder.inputs() == wide.inputs()
