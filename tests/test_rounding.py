"""Uniform grids against exact fractions, NumPy, PyTorch's quantizer, gguf's Q4_1 and the theory of rounding."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from gguf.quants import Q4_1
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_edu import blockwise, rounding
from qlora_edu.parity import stored_weights
from qlora_edu.rounding import GRANULARITIES, quantize, relative_rmse, round_trip, snr_db

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
shapes = st.one_of(st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 20), st.integers(1, 40)))
few = settings(deadline=None, max_examples=40)


def make(shape, start=0, dtype=torch.float32):
    return stored_weights(torch.Size(shape).numel(), start).view(shape).to(dtype)


def in_groups(weight, granularity, block_size):
    """The definition: which weights share a step, as a list of 1-D tensors in row-major order."""
    if granularity == "tensor":
        return [weight.flatten()]
    if granularity == "row":
        return list(weight.reshape(-1, weight.shape[-1]))
    return list(weight.flatten().split(block_size))


@few
@given(
    shapes,
    st.integers(0, 50_000),
    st.sampled_from(FLOATS),
    st.integers(2, 8),
    st.sampled_from(GRANULARITIES),
    st.integers(1, 70),
    st.booleans(),
)
def test_every_weight_goes_to_a_nearest_level(shape, start, dtype, bits, granularity, block_size, symmetric):
    """The oracle makes all levels in float64. Three float32 roundings of a position up to 255 may turn a near-tie."""
    weight = make(shape, start, dtype)
    back = round_trip(weight, bits, granularity, block_size, symmetric)
    assert back.dtype == torch.float32 and back.shape == weight.shape
    backs = in_groups(back, granularity, block_size)
    for group, found in zip(in_groups(weight.double(), granularity, block_size), backs, strict=True):
        if symmetric:
            largest = 2 ** (bits - 1) - 1
            levels = group.abs().max() / largest * torch.arange(-largest, largest + 1, dtype=torch.float64)
        else:
            step = (group.max() - group.min()) / (2**bits - 1)
            levels = group.min() + step * torch.arange(2**bits, dtype=torch.float64)
        span = group.abs().max().item()
        nearest = (group[:, None] - levels).abs().amin(dim=1)
        assert ((group - found.double()).abs() <= nearest + 1e-6 * span).all()
        assert ((found.double()[:, None] - levels).abs().amin(dim=1) <= 1e-6 * span).all()


def test_by_exact_fractions():
    """Step 1/4: every division is exact, so are the ties, and they go to the even code."""
    weight = torch.tensor([1.75, 0.125, 0.375, 0.625, -0.125, -0.375, -1.0, 0.3125])
    expected = [round(Fraction(w) / Fraction(1, 4)) for w in weight.tolist()]  # Python rounds half to even
    stored = quantize(weight, 4)
    assert stored.step.item() == 0.25
    assert stored.codes[0, :8].tolist() == expected == [7, 0, 2, 2, 0, -2, -4, 1]
    assert stored.dequantize().tolist() == [c / 4 for c in expected]


def test_min_max_by_exact_fractions():
    weight = torch.tensor([-1.0, 2.75, 0.125, 0.375, 0.0])  # step 3.75 / 15 = 1/4
    stored = quantize(weight, 4, symmetric=False)
    expected = [round((Fraction(w) + 1) / Fraction(1, 4)) for w in weight.tolist()]
    assert (stored.step.item(), stored.start.item()) == (0.25, -1.0)
    assert stored.codes[0, :5].tolist() == expected == [0, 15, 4, 6, 4]
    assert stored.dequantize().tolist() == [c / 4 - 1 for c in expected]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_codes_are_those_of_numpy_and_but_for_ties_of_torch(bits, granularity):
    weight = make((64, 97), start=3)
    stored = quantize(weight, bits, granularity)
    largest = 2 ** (bits - 1) - 1
    axis = None if granularity == "tensor" else 1
    step = np.abs(weight.numpy()).max(axis=axis, keepdims=True) / np.float32(largest)
    assert np.array_equal(np.rint(weight.numpy() / step).astype(np.int16), stored.codes.view(64, 97).numpy())

    zero = torch.zeros(64, dtype=torch.int32)
    steps = stored.step.flatten().expand(64).contiguous()
    fake = torch.fake_quantize_per_channel_affine(weight, steps, zero, 0, -largest, largest)
    different = fake != stored.dequantize()
    from_tie = (((weight / stored.step)[different] % 1) - 0.5).abs()  # PyTorch multiplies by 1 / step
    assert different.sum() < 0.001 * weight.numel() and (from_tie < 3 * largest * 2**-24).all()


def test_min_max_in_blocks_of_32_is_q4_1():
    weight = make((40, 96), start=17)
    raw = torch.from_numpy(Q4_1.quantize_blocks(weight.numpy().reshape(-1, 32)))[:, 4:]
    theirs = torch.cat([raw & 15, raw >> 4], dim=1)
    stored = quantize(weight, 4, "block", 32, symmetric=False)
    position = (weight.view(-1, 32) - stored.start) / stored.step
    different = theirs != stored.codes
    assert ((position[different] % 1 - 0.5).abs() < 3 * 15 * 2**-24).all()
    assert different.sum() < 5


def test_int4_in_blocks_of_64_is_the_int4_codebook_but_for_ties():
    """`blockwise` sends a tie to the lower level, this module to the even one."""
    weight = make((33, 64), start=5)
    theirs = blockwise.quantize(weight, 64, "int4").dequantize()
    stored = quantize(weight, 4)
    steps_apart = (theirs - stored.dequantize()).view(-1, 64) / stored.step
    position = weight.view(-1, 64) / stored.step
    different = steps_apart.abs() > 1e-5  # they multiply in another order
    assert ((position[different] % 1 - 0.5).abs() < 1e-5).all()


def test_the_error_is_uniform_in_a_step():
    """Mean square: 1/12 (nearest), 1/3 (truncation), 1/6 (stochastic) of a step's; the largest of 64 has none."""
    weight = make((65_536,))
    for how, square in (("nearest", 1 / 12), ("truncate", 1 / 3), ("stochastic", 1 / 6)):
        stored = quantize(weight, 8, rounding=how, generator=torch.Generator().manual_seed(1))
        error = (stored.dequantize() - weight).view(-1, 64) / stored.step
        # 65,536 squares in [0, 1], so a standard error below 0.3 / 256 = 0.0012
        assert abs(error.square().mean().item() - square * 63 / 64) < 0.005
        inwards = (error * weight.view(-1, 64).sign()).mean().item()
        assert abs(inwards + (0.5 * 63 / 64 if how == "truncate" else 0)) < 0.01


def test_stochastic_rounding_is_right_on_average_and_repeats_with_its_generator():
    x = torch.tensor([2.3, -2.3, 4.0, -0.9]).expand(20_000, 4)
    rounded = rounding.round_to_integer(x, "stochastic", torch.Generator().manual_seed(3))
    # one rounding has a variance of at most 1/4: 5 standard errors are 5 * 0.5 / sqrt(20,000) = 0.018
    assert (rounded.mean(dim=0) - x[0]).abs().max() < 0.018
    assert (rounded[:, 2] == 4).all()
    assert set(rounded[:, 1].tolist()) == {-3.0, -2.0}
    again = rounding.round_to_integer(x, "stochastic", torch.Generator().manual_seed(3))
    assert torch.equal(rounded, again)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_come_back_as_zeros_and_equal_weights_as_they_were(granularity, symmetric):
    weight = torch.zeros(3, 50)
    weight[1, :14] = 1.5  # the second block of 50 stays zero
    back = round_trip(weight, 4, granularity, 50, symmetric)
    assert back.isfinite().all() and torch.equal(back, weight)
    assert not round_trip(torch.zeros(7), 8, granularity, 4, symmetric).any()
    assert torch.equal(round_trip(torch.full((70,), -0.3), 4, "block", 64, False), torch.full((70,), -0.3))


def test_a_short_last_block_has_its_own_step():
    weight = torch.cat([make((64,)), torch.tensor([7e-3, 1e-3, -2.2e-3])])
    back = round_trip(weight, 4)
    assert torch.allclose(back[64:], torch.tensor([7e-3, 1e-3, -2e-3]), rtol=1e-6)
    assert torch.equal(back[:64], round_trip(weight[:64], 4))


def test_the_smallest_and_the_largest_numbers():
    tiny = torch.tensor([1e-45, -1e-44, 3e-43, 0.0])
    assert round_trip(tiny, 4).isfinite().all() and (round_trip(tiny, 4) - tiny).abs().max() < 1e-43
    huge = torch.tensor([3e38, -3e38, 1e38])
    assert relative_rmse(huge, round_trip(huge, 8)) < 0.01
    with pytest.raises(ValueError, match="weight: expected a range below"):
        round_trip(huge, 8, symmetric=False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_input_is_left_as_it_was(dtype):
    weight = torch.nn.Parameter(make((9, 70), dtype=dtype))
    before = weight.detach().clone()
    for symmetric in (True, False):
        back = round_trip(weight, 4, symmetric=symmetric)
        assert not back.requires_grad
        back.fill_(9)
    assert torch.equal(weight, before)


@few
@given(st.integers(2, 20), st.integers(2, 40), st.sampled_from(GRANULARITIES), st.booleans())
def test_a_tensor_that_is_not_contiguous_counts_as_its_values(rows, columns, granularity, symmetric):
    base = make((rows, 2 * columns))
    for view in (base.T, base[:, ::2], base[0, 0]):
        plain = view.clone(memory_format=torch.contiguous_format)
        args = (5, granularity, 16, symmetric)
        assert torch.equal(round_trip(view, *args), round_trip(plain, *args))


def test_bits_per_weight_counts_codes_steps_and_starts():
    weight = make((16, 96))
    assert quantize(weight, 4).bits_per_weight() == 4 + 32 / 64
    assert quantize(weight, 4).bits_per_weight(scale_bits=16) == 4 + 16 / 64
    assert quantize(weight, 4, "block", 32, symmetric=False).bits_per_weight() == 4 + 2 * 32 / 32
    assert quantize(weight, 8, "row").bits_per_weight() == 8 + 32 / 96
    assert quantize(weight, 8, "tensor").bits_per_weight() == 8 + 32 / (16 * 96)
    assert quantize(make((65,)), 4).bits_per_weight() == 4 + 2 * 32 / 65  # two blocks


def test_error_and_signal_to_noise():
    weight = torch.tensor([3.0, 4.0])
    assert relative_rmse(weight, weight) == 0 and snr_db(weight, weight) == math.inf
    assert relative_rmse(weight, torch.zeros(2)) == 1 and snr_db(weight, torch.zeros(2)) == 0
    half = snr_db(weight, weight + 0.1) - snr_db(weight, weight + 0.2)
    assert half == pytest.approx(20 * math.log10(2), abs=1e-5)
    with pytest.raises(ValueError, match=r"approximation: expected shape \(2,\); got \(2, 1\)"):
        relative_rmse(weight, weight[:, None])
    with pytest.raises(ValueError, match="weight: expected a value that is not zero"):
        relative_rmse(torch.zeros(2), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 63, 70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_are_refused_and_found(value, where, dtype):
    weight = make((71,), dtype=dtype)
    weight[where] = value
    with pytest.raises(
        ValueError, match=rf"weight: expected finite values; got {value} at flat index {where} "
    ):
        round_trip(weight, 4)


WRONG = [
    ({"weight": [1.0, 2.0]}, TypeError, r"weight: expected a torch\.Tensor; got list"),
    ({"weight": torch.ones(4, dtype=torch.int8)}, TypeError, r"weight: expected float32.*got torch\.int8"),
    ({"weight": torch.ones(4).double()}, TypeError, r"got torch\.float64. Convert it first"),
    ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight: .*meta device"),
    ({"weight": torch.ones(3, 0)}, ValueError, r"weight: expected at least one element; got shape \(3, 0\)"),
    *[
        ({"bits": bits}, ValueError, r"bits: expected a whole number from 2 to 8")
        for bits in (1, 9, 4.0, True)
    ],
    *[
        ({"block_size": size}, ValueError, r"block_size: expected a whole number")
        for size in (0, -64, 64.0, True)
    ],
    ({"granularity": "column"}, ValueError, r"granularity: expected one of tensor, row, block; got 'column'"),
    ({"rounding": "up"}, ValueError, r"rounding: expected one of nearest, stochastic, truncate; got 'up'"),
    (
        {"rounding": "stochastic", "generator": 0},
        TypeError,
        r"generator: expected a torch.Generator or None; got 0",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(case[0])[:40] for case in WRONG])
def test_what_cannot_be_rounded_is_refused_by_name(wrong, error, message):
    with pytest.raises(error, match=message):
        quantize(**{"weight": make((64,)), "bits": 4} | wrong)
