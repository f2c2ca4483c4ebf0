"""The loss with other scales is that of a model whose weights were rounded so; here on a tiny random model."""

from functools import cache

import pytest
import torch

from qlora_edu import blockwise, format_losses, perplexity, scale_losses, second_level
from qlora_edu.double_quantization import quantize_scales, to_blocks
from qlora_edu.parity import stored_weights
from qlora_edu.scale_losses import WAYS


@pytest.fixture
def tiny(tiny_base, monkeypatch):
    monkeypatch.setattr(scale_losses, "quantized", scale_losses.quantized.__wrapped__)
    for module in (format_losses, scale_losses):  # nothing remembered, before or after
        monkeypatch.setattr(module, "_measure", cache(module._measure.__wrapped__))
    return tiny_base


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
    loss = scale_losses.measure(name, 12)
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


@pytest.mark.parametrize(
    ("module", "ways", "change"),
    [
        (scale_losses, WAYS, lambda by: lambda scales: by * scales),
        (format_losses, format_losses.ROUND_TRIPS, lambda by: lambda weight: by * weight),
    ],
)
def test_a_name_given_to_another_function_is_measured_anew(tiny, monkeypatch, module, ways, change):
    monkeypatch.setitem(ways, "mine", change(1.5))
    first = module.measure("mine", tokens=8)
    assert module.measure("mine", tokens=8) is first
    monkeypatch.setitem(ways, "mine", change(0.5))
    second = module.measure("mine", tokens=8)
    assert second is not first and not torch.equal(second.nll, first.nll)


def test_noise_is_as_large_as_it_says_and_differs_between_seeds_and_matrices():
    scales = stored_weights(64 * 14_000).view(-1, 64).abs().amax(dim=1)
    noises = [scale_losses.noisy(s, seed) - s for s in (scales, 2 * scales) for seed in (1, 2, 3)]
    for noise, size in zip(noises, [0.00341] * 3 + [0.00682] * 3, strict=True):
        assert (noise.norm() / scales.norm()).item() == pytest.approx(size, rel=0.05)
    for i, one in enumerate(noises):
        for other in noises[:i]:
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.1
    assert torch.equal(scale_losses.noisy(scales, 3), WAYS["noise, seed 3"](scales))
    few = stored_weights(64 * 2).view(-1, 64).abs().amax(dim=1).repeat(40_000)  # longer than the stored list
    assert scale_losses.noisy(few, 9).isfinite().all()


def test_the_answers_of_chapter_05_are_what_its_lines_print(monkeypatch):
    """On the real model, in thousandths of a nat; half a unit of the last digit, and what kernels may add."""
    plain = scale_losses.measure("32 bits")
    monkeypatch.setitem(WAYS, "mine", lambda scales: second_level.store(scales, "min-max", bits=6))
    assert [1000 * x for x in scale_losses.measure("mine").added_to(plain)] == pytest.approx(
        [0.9, 5.5], abs=0.1
    )
    monkeypatch.setitem(
        format_losses.ROUND_TRIPS,
        "nf4 32",
        lambda w: blockwise.quantize(w, 32, double_quant=True).dequantize(),
    )
    found = format_losses.measure("nf4 32").added_to(plain)
    assert [1000 * x for x in found] == pytest.approx([-34, 30], abs=0.6)


@pytest.mark.parametrize("name", ["none", "Dynamic", ["dynamic"], None])
def test_an_unknown_way_is_named(name):
    with pytest.raises(ValueError, match=r"name: expected one of '32 bits', .*'dynamic, no mean', .*; got "):
        scale_losses.measure(name)
