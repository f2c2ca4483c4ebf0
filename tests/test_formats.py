"""Formats and the best levels, against bitsandbytes (all bits), scipy's integrals, and plain loops."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from qlora_edu import (
    blockwise,
    format_losses,
    formats,
    lloyd,
    normalised,
    perplexity,
    reference,
    rounding,
)
from qlora_edu.blockwise import FLOATS
from qlora_edu.parity import differing, stored_weights

NAMES = list(formats.LEVELS)
shapes = st.one_of(st.tuples(st.integers(1, 2_000)), st.tuples(st.integers(1, 50), st.integers(1, 50)))
few = settings(deadline=None, max_examples=40)


def make(shape, start=0, dtype=torch.float32):
    return stored_weights(torch.Size(shape).numel(), start).view(shape).to(dtype)


@pytest.mark.parametrize("module", [formats, lloyd, normalised])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


# The levels


@pytest.mark.parametrize(("name", "theirs"), [("nf4", "nf4"), ("fp4", "fp4"), ("af4", "af4")])
def test_tables_are_those_of_bitsandbytes(name, theirs):
    table = reference.bitsandbytes().functional.get_4bit_type(theirs, device="cpu").unique()
    ours = formats.levels(name)
    assert len(ours) == len(table)
    # AF4 was published with 8 decimals; the others are equal in all bits.
    torch.testing.assert_close(ours, table, rtol=0, atol=6e-8 if name == "af4" else 0)


def test_the_dynamic_map_is_that_of_bitsandbytes():
    theirs = reference.bitsandbytes().functional.create_dynamic_map(True, 3, 4).unique()
    assert torch.equal(formats.levels("dynamic4"), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_levels_ascend_between_minus_one_and_one(name):
    levels = formats.levels(name)
    assert levels.dtype == torch.float32 and (levels.diff() > 0).all()
    assert len(levels) == 16 if name not in ("fp4", "e2m1", "e3m0", "int4", "eq4") else len(levels) == 15
    assert levels.abs().max() <= 1 and (0 in levels) == (name not in ("lloyd-max", "uniform16"))


def test_integers_and_equal_steps():
    assert (formats.levels("int4") * 7).tolist() == pytest.approx(list(range(-7, 8)), abs=1e-6)
    assert (formats.levels("uniform16") * 15).tolist() == pytest.approx(list(range(-15, 16, 2)), abs=1e-6)
    steps = formats.levels("uniform16-zero")
    assert (steps[:8] * 7).tolist() == pytest.approx(list(range(-7, 1)), abs=1e-6)
    assert (steps[7:] * 8).tolist() == list(range(9))


def test_floats_by_their_bits():
    def value(exponent_bits, mantissa_bits, code):
        """Sign left out; subnormals where the exponent is zero; bias 1 for E2M1, none needed for a power of two."""
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        if exponent == 0:
            return mantissa / 2**mantissa_bits
        return (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - 1)

    for name, bits in {"e2m1": (2, 1), "e3m0": (3, 0)}.items():
        positive = torch.tensor([value(*bits, code) for code in range(8)])
        torch.testing.assert_close(formats.levels(name)[7:], positive / positive.max(), rtol=2e-7, atol=0)


def test_equation_4_as_scipy_computes_it():
    q = (stats.norm.ppf(np.arange(16) / 17) + stats.norm.ppf(np.arange(1, 17) / 17)) / 2
    assert q[0] == -math.inf
    np.testing.assert_allclose(formats.levels("eq4").numpy(), q[1:] / q[-1], rtol=1e-7, atol=1e-16)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"name: expected one of nf4, fp4, .*; got 'nf5'"):
        formats.levels("nf5")


# The round trip


@few
@given(shapes, st.integers(0, 50_000), st.sampled_from(FLOATS), st.sampled_from([32, 64, 4096]))
def test_it_is_what_blockwise_gives(shape, start, dtype, block_size):
    weight = make(shape, start, dtype)
    for name in ("nf4", "fp4", "int4"):
        theirs = blockwise.quantize(weight, block_size, name).dequantize(torch.float32)
        ours = formats.round_trip(weight, formats.levels(name), block_size)
        assert differing(ours + 0.0, theirs + 0.0) == (weight.numel(), 0)


@few
@given(shapes, st.integers(0, 50_000), st.sampled_from(FLOATS), st.integers(2, 200), st.sampled_from(NAMES))
def test_it_is_the_nearest_level_found_by_trying_all(shape, start, dtype, block_size, name):
    weight = make(shape, start, dtype)
    levels = formats.levels(name).double()
    flat = weight.double().flatten()
    scale = torch.cat([block.abs().amax().expand(len(block)) for block in flat.split(block_size)])
    least = (flat[:, None] - levels * scale[:, None]).abs().amin(dim=1)
    ours = formats.round_trip(weight, levels, block_size).double().flatten()
    assert ((flat - ours).abs() <= least + 3e-7 * scale).all()  # two float32 roundings may decide a near-tie


@few
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=16, unique=True), st.integers(0, 50_000))
def test_the_fast_path_is_the_definition(thousandths, start):
    """Also for hand-made levels that are closer than a cell, where it steps aside; ties and borders included."""
    levels = torch.tensor(sorted(thousandths)) / 1000
    borders = (levels[:-1] + levels[1:]) / 2
    near = torch.cat(
        [borders, borders.nextafter(torch.tensor(2.0)), borders.nextafter(torch.tensor(-2.0)), levels]
    )
    x = torch.cat([near.clamp(-1, 1), (make((2_000,), start) / 8).clamp(-1, 1)])
    fast = formats.nearest(x, levels, formats._tables(levels))
    assert differing(fast, formats.nearest(x, levels)) == (len(x), 0)


def test_a_tie_goes_to_the_lower_level():
    levels = torch.tensor([-1.0, 0.0, 1.0])
    assert formats.round_trip(torch.tensor([1.0, 0.5, -0.5, 0.0]), levels, 4).tolist() == [1, 0, -1, 0]


def test_zeros_stay_zeros_and_the_input_is_left_alone():
    weight = torch.nn.Parameter(make((3, 65), dtype=torch.bfloat16))
    before = weight.detach().clone()
    out = formats.round_trip(weight, formats.levels("nf4")).fill_(9)
    assert torch.equal(weight, before) and not out.requires_grad
    for name in NAMES:
        zeros = formats.round_trip(torch.zeros(130), formats.levels(name))
        assert not zeros[:128].any() and zeros.abs().max() <= 1e-38  # a short last block has a scale of 1e-38


GOOD = {"weight": torch.ones(4), "levels": torch.tensor([-1.0, 1.0]), "block_size": 64}
WRONG = [
    ({"weight": [1.0]}, TypeError, r"weight: expected a torch\.Tensor; got list"),
    ({"weight": torch.ones(4).double()}, TypeError, r"weight: expected float32.*float64"),
    ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight: .*meta device"),
    ({"weight": torch.ones(0)}, ValueError, r"weight: expected at least one element; got shape \(0,\)"),
    (
        {"weight": torch.tensor([1.0, float("nan")])},
        ValueError,
        r"weight: expected finite.*nan at flat index 1",
    ),
    ({"weight": torch.tensor([1.0] * 64 + [float("inf")])}, ValueError, r"got inf at flat index 64"),
    ({"levels": torch.tensor([1.0, -1.0])}, ValueError, r"levels: expected ascending"),
    ({"levels": torch.tensor([-1.0, 2.0])}, ValueError, r"levels: expected ascending numbers in \[-1, 1\]"),
    ({"levels": torch.tensor([0.0, 0.0, 1.0])}, ValueError, r"levels: expected ascending"),
    ({"levels": torch.tensor([0.0, float("nan")])}, ValueError, r"levels: expected ascending"),
    ({"levels": torch.tensor([1.0])}, ValueError, r"levels: expected a tensor of shape \(n,\)"),
    ({"levels": [-1.0, 1.0]}, ValueError, r"levels: expected a tensor"),
    *[
        ({"block_size": size}, ValueError, r"block_size: expected a whole number")
        for size in (0, 1, 64.0, True)
    ],
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(case[0])[:50] for case in WRONG])
def test_what_will_not_do_is_refused_by_name(wrong, error, message):
    with pytest.raises(error, match=message):
        formats.round_trip(**GOOD | wrong)


def test_min_max_with_a_zero_point():
    weight = make((40, 64))
    out = format_losses.int4_zero_point(weight)
    step = ((weight.amax(1) - weight.amin(1)) / 15)[:, None]
    assert ((out / step).round() - out / step).abs().max() < 1e-4  # on the grid, which holds zero
    for row in out:
        assert len(row.unique()) <= 16
    inside = (weight > weight.amin(1, keepdim=True) + step) & (weight < weight.amax(1, keepdim=True) - step)
    assert ((out - weight).abs() <= 0.5001 * step)[inside].all()  # the ends may lose half a step more
    assert not format_losses.int4_zero_point(torch.zeros(64)).any()
    assert rounding.relative_rmse(weight, out) > rounding.relative_rmse(
        weight, rounding.round_trip(weight, 4, symmetric=False)
    )
    for wrong in (torch.ones(65), torch.ones(0), [1.0]):
        with pytest.raises(ValueError, match="weight: expected a tensor of whole blocks of 64"):
            format_losses.int4_zero_point(wrong)


# The distribution of w / absmax


@pytest.mark.parametrize("block_size", [16, 64, 4096])
def test_the_mean_absmax_as_scipy_integrates_it(block_size):
    """E[max] = ∫ P(max > m) dm, and P(max <= m) = (2Φ(m) - 1)^B."""
    expected, _ = integrate.quad(lambda m: 1 - math.erf(m / math.sqrt(2)) ** block_size, 0, 12, epsabs=1e-12)
    assert normalised.expected_scale(block_size) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("block_size", [16, 64, 4096])
@pytest.mark.parametrize("x", [-0.9, -0.2, 0.0, 0.31, 0.99])
def test_the_distribution_as_scipy_integrates_it(block_size, x):
    def integrand(m):
        return (
            stats.truncnorm.cdf(m * x, -m, m)
            * block_size
            * stats.halfnorm.cdf(m) ** (block_size - 1)
            * (2 * stats.norm.pdf(m))
        )

    continuous, _ = integrate.quad(integrand, 0, 10, epsabs=1e-11, limit=200)
    expected = 0.5 / block_size + (block_size - 1) / block_size * continuous
    assert normalised.cdf(torch.tensor(x, dtype=torch.float64), block_size).item() == pytest.approx(
        expected, abs=1e-9
    )


def test_spikes_density_and_quantiles_fit_the_distribution():
    at = torch.tensor([-1.01, -1.0, 1.0, 2.0], dtype=torch.float64)
    assert normalised.cdf(at, 64).tolist() == pytest.approx([0, 1 / 128, 1, 1])
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    assert torch.trapezoid(normalised.density(x, 64), x).item() == pytest.approx(63 / 64, abs=1e-8)
    p = torch.tensor([0.005, 0.1, 0.5, 0.77, 0.999], dtype=torch.float64)
    q = normalised.quantile(p, 64)
    assert q[0] == -1 and q[-1] == pytest.approx(1)
    torch.testing.assert_close(normalised.cdf(q[1:4], 64), p[1:4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_errors_and_use_as_a_sum_over_fine_slices(name):
    """The oracle: x on a fine grid, its density, and the spikes."""
    levels = formats.levels(name).double()
    x = torch.linspace(-1, 1, 40_001, dtype=torch.float64)
    x = (x[:-1] + x[1:]) / 2
    distance, which = (x[:, None] - levels).abs().min(dim=1)
    share = normalised.density(x, 64) * 5e-5
    ends = torch.stack([(-1 - levels).abs().min(), (1 - levels).abs().min()])
    for power in (1, 2):
        expected = (share * distance**power).sum() + (ends**power).sum() / 128
        assert normalised.error(levels, 64, power, of_weights=False) == pytest.approx(
            expected.item(), rel=1e-6
        )
    used = torch.zeros(len(levels), dtype=torch.float64).index_add(0, which, share)
    used[[0, -1]] += 1 / 128
    torch.testing.assert_close(normalised.usage(levels, 64), used, rtol=0, atol=1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_the_error_of_weights_as_measured_on_stored_numbers(power):
    weight = torch.cat([make((2**16,), start) for start in (0,)])
    weight = torch.sign(weight) * weight.abs().argsort().argsort().add(0.5).div(2**16).add(1).div(2)
    normal = torch.special.ndtri(weight.abs()) * torch.sign(weight)  # normal scores: exactly N(0, 1) in shape
    for name in ("nf4", "int4", "e3m0", "lloyd-max"):
        lost = (formats.round_trip(normal, formats.levels(name)) - normal).abs() ** power
        measured = (lost.mean() / (normal.abs() ** power).mean()).item()
        assert normalised.error(formats.levels(name), 64, power) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("size", [15, 0, 64.0, True, "64", None])
def test_a_block_size_that_will_not_do_is_refused(size):
    with pytest.raises(ValueError, match="block_size: expected a whole number of at least 16"):
        normalised.scales(size)


def test_levels_and_powers_that_will_not_do_are_refused():
    for levels in ([1.0, 0.0], [0.0], [-2.0, 1.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match="levels: expected ascending"):
            normalised.error(torch.tensor(levels), 64)
    with pytest.raises(ValueError, match="power: expected 1 or 2; got 3"):
        normalised.error(torch.tensor([-1.0, 1.0]), 64, power=3)


# The best levels


@pytest.mark.parametrize("pinned", [(), (-1, 0, 1)])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("block_size", [64, 1024])
@pytest.mark.parametrize("of_weights", [True, False])
def test_no_small_move_of_one_level_makes_them_better(block_size, power, pinned, of_weights):
    levels = lloyd.best_levels(block_size, power, pinned, of_weights)
    least = normalised.error(levels, block_size, power, of_weights)
    for k in range(16):
        for move in (-0.003, 0.003):
            moved = levels.clone()
            moved[k] += move
            if min(abs(levels[k] - pin) for pin in (*pinned, 9)) > 1e-9 and moved.abs().max() <= 1:
                assert normalised.error(moved, block_size, power, of_weights) > least
    assert set(pinned) <= set(levels.tolist())


def test_best_levels_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="power: expected 1 or 2; got 3"):
        lloyd.best_levels(64, 3)
    with pytest.raises(ValueError, match="pinned: expected some of -1, 0, 1"):
        lloyd.best_levels(64, 2, (0.5,))


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    lloyd.best_levels(128)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


# On a model


@pytest.fixture
def tiny(tiny_base, monkeypatch):
    """Nothing is remembered."""
    monkeypatch.setattr(format_losses, "_measure", format_losses._measure.__wrapped__)
    return tiny_base


def test_losses_refuse_what_they_do_not_know(tiny):
    for name in ("NF5", ["NF4"]):
        with pytest.raises(ValueError, match="name: expected one of 'NF4', 'AF4'"):
            format_losses.measure(name)
    with pytest.raises(ValueError, match=r"only: .*got 'no_such_layer'"):
        format_losses.measure("NF4", only="no_such_layer")


@pytest.mark.parametrize("only", ["v_proj", ""])
def test_a_loss_is_that_of_the_rounded_model(tiny, only):
    model, tokenizer = tiny
    got, unrounded = format_losses.measure("NF4", only, tokens=8), format_losses.measure(tokens=8)
    lost = size = 0.0
    for name, parameter in model.named_parameters():
        if only in name and name.endswith("proj.weight"):
            rounded = blockwise.quantize(parameter).dequantize(torch.float32)
            lost += (rounded - parameter.data).double().square().sum().item()
            size += parameter.data.double().square().sum().item()
            parameter.data = rounded
    expected = perplexity.token_nll(model, tokenizer, perplexity.passages(), 8)
    assert differing(got.nll, expected) == (len(expected), 0)
    assert got.error == pytest.approx(math.sqrt(lost / size), rel=1e-7)  # squares in float32, sums in float64
    assert sum(got.lengths) == len(got.nll) > 12
    assert got.added_to(unrounded)[0] == pytest.approx((got.nll - unrounded.nll).mean().item(), rel=1e-12)
    assert got.added_to(unrounded)[1] == perplexity.paired_standard_error(unrounded.nll, got.nll, got.lengths)


@pytest.mark.parametrize("name", format_losses.ROUND_TRIPS)
def test_every_round_trip_returns_the_shape_and_comes_near(name):
    weight = make((30, 192), dtype=torch.bfloat16)
    out = format_losses.ROUND_TRIPS[name](weight)
    assert out.shape == weight.shape and out.dtype == torch.float32
    assert 0.05 < rounding.relative_rmse(weight, out) < 0.3
