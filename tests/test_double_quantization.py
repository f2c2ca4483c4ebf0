"""8-bit scales against bitsandbytes (all bits) and against the exact nearest level."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_edu import blockwise, codebooks, reference, scale_losses
from qlora_edu.double_quantization import QuantizedScales, quantize_scales, to_blocks
from qlora_edu.parity import differing, stored_weights

STEP = 2 / 65_535  # between two of the 65,536 positions at which the nearest level is known


def scales_of(count: int, start: int = 0) -> torch.Tensor:
    """`count` scales as they occur: the absmax of blocks of 64 weights."""
    return stored_weights(count * 64, start).view(count, 64).abs().amax(dim=1)


def theirs(scales: torch.Tensor) -> QuantizedScales:
    """By bitsandbytes' own functions, in the order in which its 4-bit quantization calls them."""
    functional = reference.bitsandbytes().functional
    offset = scales.mean()
    codes, state = functional.quantize_blockwise(scales - offset, blocksize=256)
    return QuantizedScales(codes, state.absmax, offset), functional.dequantize_blockwise(
        codes, state
    ) + offset


def assert_same_bits(ours: QuantizedScales, expected: QuantizedScales) -> None:
    for name in ("codes", "absmax", "offset"):
        assert differing(getattr(ours, name), getattr(expected, name))[1] == 0, name


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 1_200), st.integers(0, 10_000))
def test_every_bit_is_that_of_bitsandbytes(count, start):
    scales = scales_of(count, start)
    ours, (expected, decoded) = quantize_scales(scales), theirs(scales)
    assert_same_bits(ours, expected)
    assert differing(ours.dequantize(), decoded) == (count, 0)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 512, 15_625, 65_537])
def test_rows_of_256_and_the_short_last_one(count):
    scales = scales_of(count)
    ours, (expected, decoded) = quantize_scales(scales), theirs(scales)
    assert_same_bits(ours, expected)
    assert differing(ours.dequantize(), decoded) == (count, 0)
    assert (ours.codes.numel(), ours.absmax.numel(), ours.offset.dim()) == (count, -(-count // 256), 0)


@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-30, 2.5, 1e30])
def test_equal_scales_and_extreme_ones(scale):
    scales = torch.full((300,), scale)
    assert_same_bits(quantize_scales(scales), theirs(scales)[0])
    torch.testing.assert_close(quantize_scales(scales).dequantize(), scales, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 600), st.integers(0, 10_000))
def test_no_code_is_further_from_its_value_than_the_nearest_by_more_than_a_position(count, start):
    """A value is looked up at the next position, half a step away: that may cost twice half a step, not more."""
    scales = scales_of(count, start)
    stored = quantize_scales(scales)
    rows = to_blocks(scales - stored.offset, 256).double()
    exact = (rows / stored.absmax[:, None].double()).flatten()[:count]
    levels = codebooks.dynamic_map().double()
    distance = (exact - levels[stored.codes.long()]).abs()
    nearest = (exact[:, None] - levels).abs().amin(dim=1)
    assert (distance <= nearest + STEP + 1e-6).all()


def test_some_codes_near_zero_are_not_the_nearest():
    """What the module's docstring says of bitsandbytes on a CPU, and why an exact search would not equal it."""
    scales = scales_of(15_625)
    stored = quantize_scales(scales)
    rows = to_blocks(scales - stored.offset, 256)
    normalised = (rows / stored.absmax[:, None]).flatten()[: scales.numel()]
    levels = codebooks.dynamic_map()
    nearest = torch.bucketize(normalised, (levels[:-1] + levels[1:]) / 2)
    odd = nearest != stored.codes
    assert 0 < odd.sum() < 0.01 * len(scales)
    assert normalised[odd].abs().median() < 0.1


def test_it_costs_an_eighth_of_a_bit_a_weight():
    weight = stored_weights(64 * 256 * 8)
    stored = blockwise.quantize(weight, 64, double_quant=True)
    assert stored.nbytes * 8 / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert stored.stored_scales.nbytes == 2_048 + 8 * 4 + 4


def test_threads_do_not_change_the_mean(threads_1_and_2):
    scales = scales_of(100_000)
    one, two = threads_1_and_2(lambda: quantize_scales(scales))
    assert_same_bits(one, two)


@pytest.fixture
def threads_1_and_2():
    before = torch.get_num_threads()

    def run(function):
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


def test_the_input_is_left_as_it_was():
    scales = scales_of(512)
    before = scales.clone()
    stored = quantize_scales(scales)
    stored.dequantize().zero_()
    assert torch.equal(scales, before)
    assert torch.equal(stored.to("cpu").codes, stored.codes)


@given(st.integers(1, 300), st.sampled_from([1, 2, 7, 64]))
def test_to_blocks_fills_the_last_row_with_zeros(count, block_size):
    flat = torch.arange(1.0, count + 1)
    rows = to_blocks(flat, block_size)
    assert rows.shape == (-(-count // block_size), block_size)
    assert torch.equal(rows.flatten()[:count], flat) and not rows.flatten()[count:].any()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (
            torch.ones(4, dtype=torch.bfloat16),
            r"scales: expected a non-empty 1-D float32.*got torch.bfloat16",
        ),
        (torch.ones(2, 2), r"scales: expected a non-empty 1-D.*shape \(2, 2\)"),
        (torch.ones(0), r"scales: expected a non-empty 1-D.*shape \(0,\)"),
        (torch.tensor([1.0, float("nan")]), r"scales: expected finite values; got nan"),
        (torch.tensor([1.0, float("inf")]), r"scales: expected finite values; got inf"),
        (torch.full((300,), 3e38), r"scales: their mean overflows.*double_quant=False"),
        (None, r"scales: .*got None\. Convert them first: torch.as_tensor"),
        ([1.0], r"scales: .*got \[1.0\]\. Convert"),
        (np.ones(2, np.float32), r"scales: .*got array\(.*Convert"),
    ],
)
def test_what_cannot_be_quantized_is_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        quantize_scales(scales)


@pytest.mark.parametrize(
    ("flat", "block_size", "message"),
    [
        ([1.0], 2, r"flat: expected a non-empty 1-D tensor; got \[1.0\]"),
        (torch.ones(2, 2), 2, r"flat: .*shape \(2, 2\)"),
        (torch.ones(0), 2, r"flat: .*shape \(0,\)"),
        (torch.ones(2), 0, "block_size: expected a whole number of 1 or more; got 0"),
        (torch.ones(2), -3, "block_size: .*got -3"),
        (torch.ones(2), 2.0, "block_size: .*got 2.0"),
    ],
)
def test_what_has_no_rows_is_refused(flat, block_size, message):
    with pytest.raises(ValueError, match=message):
        to_blocks(flat, block_size)


def test_three_times_refuses_what_is_no_tensor():
    for way in (scale_losses.double, scale_losses.triple):
        with pytest.raises(ValueError, match="scales: expected a non-empty 1-D float32 tensor; got None"):
            way(None)
