"""What the tests of all pipelines share."""

import pytest

pytest.importorskip("torch")

import torch


@pytest.fixture(scope="module")
def pipeline(request, place):
    """The pipeline in the module's `place`, of the module's class `PIPELINE`, without gradients."""
    torch.set_grad_enabled(False)
    yield request.module.PIPELINE.from_pretrained(place / "pipeline")
    torch.set_grad_enabled(True)
