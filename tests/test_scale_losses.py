"""The loss with other scales is that of a model whose weights were rounded so; here on a tiny random model."""

import pytest
import torch

from qlora_edu import blockwise, format_losses, models, perplexity, scale_losses
from qlora_edu.double_quantization import quantize_scales, to_blocks
from qlora_edu.parity import stored_weights
from qlora_edu.scale_losses import WAYS


@pytest.fixture
def tiny(monkeypatch):
    model, tokenizer = models.tiny()
    model = model.float().eval()
    monkeypatch.setattr(format_losses, "base", lambda: (model, tokenizer))
    monkeypatch.setattr(scale_losses, "quantized", scale_losses.quantized.__wrapped__)
    return model, tokenizer


@pytest.mark.parametrize(("name", "double_quant"), [("32 bits", False), ("dynamic", True)])
def test_the_loss_is_that_of_the_weights_that_blockwise_makes(tiny, name, double_quant):
    model, tokenizer = tiny
    lost, size = [], []

    def expected(weight):
        back = blockwise.quantize(weight, double_quant=double_quant).dequantize()
        lost.append((back - weight).double().square().sum())
        size.append(weight.double().square().sum())
        return back

    texts = perplexity.passages()
    with perplexity.rounded_weights(model, expected):
        nll = perplexity.token_nll(model, tokenizer, texts, 12)
    loss = scale_losses.measure.__wrapped__(name, 12)
    assert torch.equal(loss.nll, nll)
    assert loss.error == pytest.approx((sum(lost) / sum(size)).sqrt().item(), rel=1e-6)
    assert loss.lengths == tuple(perplexity.scored_lengths(tokenizer, texts, 12))


def test_every_way_gives_other_scales_of_the_same_size():
    scales = stored_weights(64 * 1_000).view(-1, 64).abs().amax(dim=1)
    for name, way in WAYS.items():
        found = way(scales)
        assert found.shape == scales.shape and found.dtype == torch.float32
        assert torch.equal(found, scales) == (name == "32 bits")
        assert ((found - scales).norm() / scales.norm()) < (0.1 if "4 bits" in name else 0.03)


def test_three_times_rounds_the_scales_of_scales_as_well():
    scales = stored_weights(64 * 1_000).view(-1, 64).abs().amax(dim=1)
    second = quantize_scales(scales)
    largest = quantize_scales(second.absmax).dequantize()
    assert not torch.equal(largest, second.absmax)
    level = to_blocks(second.dequantize() - second.offset, 256) / second.absmax[:, None]
    expected = (level * largest[:, None]).flatten()[:1_000] + second.offset
    torch.testing.assert_close(scale_losses.triple(scales), expected, rtol=1e-6, atol=1e-6)


def test_an_unknown_way_is_named():
    with pytest.raises(ValueError, match=r"name: expected one of 32 bits, dynamic, .*; got 'none'"):
        scale_losses.measure("none")
