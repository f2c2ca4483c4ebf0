"""The tables against bitsandbytes (all bits), scipy and their definitions."""

import pytest
import torch
from scipy.stats import norm

from qlora_edu import codebooks, reference
from qlora_edu.parity import differing


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_every_bit_is_that_of_bitsandbytes(name):
    theirs = reference.bitsandbytes().functional.get_4bit_type(name, device="cpu")
    ours = codebooks.CODEBOOKS[name]()
    # FP4's second zero may carry a sign there; ours is always +0.
    assert differing(ours, theirs + 0.0) == (16, 0)


def test_the_8_bit_map_is_that_of_bitsandbytes():
    theirs = reference.bitsandbytes().functional.create_dynamic_map()
    assert differing(codebooks.dynamic_map(), theirs) == (256, 0)


def test_nf4_is_made_of_normal_quantiles_as_scipy_computes_them():
    def quantiles(count, dtype):
        return norm.ppf(torch.linspace(0.9677083, 0.5, count + 1, dtype=dtype)[:-1].double().numpy())

    def recipe(dtype):
        levels = torch.tensor([*-quantiles(7, dtype), 0.0, *quantiles(8, dtype)]).float().sort().values
        return levels / levels.max()

    assert differing(codebooks.nf4(), recipe(torch.float32)) == (16, 0)
    # What the docstring says: spacing the probabilities in float64 gives other last bits.
    assert differing(codebooks.nf4(), recipe(torch.float64)) == (16, 8)


def test_nf4_has_an_exact_zero_and_one_more_level_above_it_than_below():
    levels = codebooks.nf4()
    assert levels.dtype == torch.float32 and (levels.diff() > 0).all()
    assert levels[[0, 7, 15]].tolist() == [-1, 0, 1]
    assert not torch.allclose(levels[:8], -levels[8:].flip(0))  # not symmetric


def test_fp4_has_the_values_of_a_float_with_two_exponent_bits_and_one_mantissa_bit():
    # By code, before the division by 12: (1 + m/2) * 2**(4 - e), subnormals m / 16.
    positive = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3])
    levels = codebooks.fp4()
    torch.testing.assert_close(levels[:8] * 12, positive, rtol=2e-7, atol=0)
    assert torch.equal(levels[8:], -levels[:8] + 0.0)
    assert not torch.signbit(levels[[0, 8]]).any()


def test_int4_is_the_integers_from_7_down_to_minus_7():
    assert (codebooks.int4() * 7).round().tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]


def test_the_8_bit_map_has_2_to_the_i_midpoints_of_either_sign_in_decade_i():
    levels = codebooks.dynamic_map().double()
    assert levels[127] == 0 and levels[255] == 1 and (levels.diff() > 0).all()
    for i in range(7):
        low, high = 10.0 ** (i - 7), 10.0 ** (i - 6)
        inside = levels[(levels > low) & (levels < high)]
        width = (high - low) / 2**i
        expected = low + width * (torch.arange(2**i) + 0.5)
        torch.testing.assert_close(inside, expected.double(), rtol=1e-5, atol=0)
        assert ((-levels > low) & (-levels < high)).sum() == 2**i


@pytest.mark.parametrize("name", codebooks.CODEBOOKS)
def test_table_sorts_the_levels_and_puts_thresholds_halfway(name):
    levels, thresholds, order = codebooks.table(name)
    ascending = levels[order.long()]
    assert (ascending.diff() >= 0).all() and sorted(order.tolist()) == list(range(16))
    middle = (ascending[:-1].double() + ascending[1:].double()) / 2
    torch.testing.assert_close(thresholds.double(), middle, rtol=1e-7, atol=0)
    assert codebooks.table(name, "cpu")[0] is levels  # made once


def test_an_unknown_codebook_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"codebook: expected one of nf4, fp4, int4; got 'nf5'"):
        codebooks.table("nf5")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [codebooks.nf4, codebooks.fp4, codebooks.int4, codebooks.dynamic_map])
def test_the_default_dtype_does_not_matter(make, default):
    """Models are loaded under another default dtype, and the first table made is kept for good."""
    expected = make()
    torch.set_default_dtype(default)
    try:
        found = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert differing(found, expected) == (expected.numel(), 0)


@pytest.mark.parametrize("bits", [1, 9, 8.0, True, "8"])
def test_a_dynamic_map_has_2_to_8_bits(bits):
    with pytest.raises(ValueError, match="bits: expected a whole number from 2 to 8"):
        codebooks.dynamic_map(bits)
