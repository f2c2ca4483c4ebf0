"""Ways to store scales, against their definitions in NumPy, bitsandbytes' tables and torch's float8."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_edu import codebooks, reference, second_level
from qlora_edu.claims.double import cuda_search
from qlora_edu.double_quantization import quantize_scales
from qlora_edu.parity import stored_weights
from qlora_edu.second_level import GRIDS, bits_per_weight, levels, nearest, store

WITH_LEVELS = [grid for grid in GRIDS if grid != "min-max"]


def scales_of(count: int, start: int = 0) -> torch.Tensor:
    """The absmax of `count` blocks of 64 stored weights."""
    return stored_weights(count * 64, start).view(count, 64).abs().amax(dim=1)


def by_numpy(scales: np.ndarray, grid: str, bits: int, block_size: int, offset: bool) -> np.ndarray:
    """The definition in float64, one scale after the other."""
    mean = scales.mean() if offset else 0.0
    found = []
    for start in range(0, len(scales), block_size):
        block = scales[start : start + block_size] - mean
        if grid == "min-max":
            row = np.linspace(block.min(), block.max(), 2**bits)
        else:
            row = levels(grid, bits).numpy().astype(np.float64) * np.abs(block).max()
        found += [row[np.abs(row - value).argmin()] + mean for value in block]
    return np.array(found)


@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic_levels_are_those_of_bitsandbytes(bits):
    create = reference.bitsandbytes().functional.create_dynamic_map
    for grid, signed in (("dynamic", True), ("unsigned dynamic", False)):
        theirs = create(signed=signed, max_exponent_bits=bits - 1, total_bits=bits)  # filled up with zeros
        assert torch.equal(levels(grid, bits), theirs.unique())
        assert len(levels(grid, bits)) == 2**bits


def test_eight_bits_are_the_course_s_map():
    assert torch.equal(levels("dynamic"), codebooks.dynamic_map())


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_levels_are_integers_over_the_largest(bits):
    assert (levels("uniform", bits) * (2 ** (bits - 1) - 1)).round().tolist() == list(
        range(1 - 2 ** (bits - 1), 2 ** (bits - 1))
    )
    assert (levels("unsigned uniform", bits) * (2**bits - 1)).round().tolist() == list(range(2**bits))


def test_e4m3_has_the_numbers_of_the_specification():
    """Sign, 4 exponent bits with bias 7, 3 bits of fraction; exponent 0 is subnormal, 0x7f and 0xff are NaN."""
    numbers = {0.0}
    for exponent in range(16):
        for fraction in range(8):
            if (exponent, fraction) != (15, 7):
                value = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6
                numbers |= {value, -value}
    assert (levels("e4m3") * 448).tolist() == pytest.approx(sorted(numbers), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 700),
    st.integers(0, 5_000),
    st.sampled_from(GRIDS),
    st.integers(2, 8),
    st.sampled_from([2, 7, 64, 256]),
    st.booleans(),
)
def test_no_scale_is_further_than_its_nearest_level(count, start, grid, bits, block_size, offset):
    bits, offset = 8 if grid == "e4m3" else bits, offset and "unsigned" not in grid
    scales = scales_of(count, start)
    found = store(scales, grid, bits, block_size, offset).double().numpy()
    exact = scales.double().numpy()
    distance, least = abs(found - exact), abs(by_numpy(exact, grid, bits, block_size, offset) - exact)
    assert (distance <= least + 2e-6 * exact.max()).all()


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 4_096])
def test_the_defaults_differ_from_bitsandbytes_by_its_table_only(count):
    """No scale is further from what bitsandbytes returns than a neighbouring position of its table allows."""
    scales = scales_of(count)
    stored = quantize_scales(scales)
    ours, theirs = store(scales), stored.dequantize()
    largest = stored.absmax.repeat_interleave(256)[:count]
    excess = (theirs - scales).abs() - (ours - scales).abs()
    assert (excess <= largest * 2 / 65_535 + 1e-6 * scales).all()
    assert (ours != theirs).float().mean() < 0.01


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", [0.0, 0.25, 1e-30])
def test_equal_scales_come_back(grid, scale):
    scales = torch.full((300,), scale)
    found = store(scales, grid, offset="unsigned" not in grid)
    torch.testing.assert_close(found, scales, rtol=1e-6, atol=0)


def test_the_input_and_the_shared_levels_are_left_alone():
    scales = scales_of(300)
    before, shared = scales.clone(), levels("dynamic").clone()
    for grid in GRIDS:
        store(scales, grid, offset=False).zero_()
    assert torch.equal(scales, before) and torch.equal(levels("dynamic"), shared)


def test_bits_are_counted():
    weights = 64 * 256 * 8
    stored = quantize_scales(scales_of(weights // 64))
    counted = 8 * (stored.codes.nbytes + stored.absmax.nbytes) / weights
    assert bits_per_weight(64) == 4 + counted
    assert bits_per_weight(32, 5, 128, "min-max") == 4 + 5 / 32 + 2 * 32 / (32 * 128)


def test_the_search_of_the_cuda_kernel_finds_the_nearest_level():
    x = torch.cat([torch.linspace(-1, 1, 20_001), levels("dynamic")])
    table = levels("dynamic").double()
    found = cuda_search(x)
    distance = (x.double() - table[found.long()]).abs()
    assert (distance <= (x[:, None].double() - table).abs().amin(dim=1) + 1e-7).all()
    assert torch.equal(cuda_search(levels("dynamic")).int(), torch.arange(256, dtype=torch.int32))
    assert (found.long() != nearest(x, "dynamic")).sum() < 10  # ties


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scales": torch.ones(0)}, r"scales: expected a non-empty 1-D float32.*shape \(0,\)"),
        ({"scales": torch.ones(2, 2)}, r"scales: .*shape \(2, 2\)"),
        ({"scales": torch.ones(2).double()}, r"scales: .*torch.float64"),
        ({"scales": [1.0]}, r"scales: .*got \[1.0\]"),
        ({"scales": torch.tensor([1.0, float("nan")])}, "scales: expected finite values"),
        ({"scales": torch.tensor([1.0, float("inf")])}, "scales: expected finite values"),
        ({"scales": None}, r"scales: .*got None\. Convert"),
        ({"scales": np.ones(2, np.float32)}, r"scales: .*got array\(.*torch.as_tensor"),
        ({"scales": torch.tensor([3e38, 3e38])}, r"scales: .*sums fit float32; got 3.00e\+38"),
        ({"scales": torch.tensor([-3e38, 3e38]), "grid": "min-max", "offset": False}, "scales: .*sums fit"),
        ({"scales": torch.full((300,), 8e37)}, "scales: their mean overflows"),
        (
            {"scales": torch.tensor([-1.0, -2.0, 3.0]), "grid": "unsigned dynamic", "offset": False},
            "scales: expected none below 0 with the grid 'unsigned dynamic'; got -2.0",
        ),
        (
            {"scales": torch.tensor([-1.0, 3.0]), "grid": "unsigned uniform", "offset": False},
            "scales: expected none below 0",
        ),
        ({"offset": "no"}, "offset: expected True .* or False; got 'no'"),
        ({"offset": 0.3}, "offset: .*got 0.3"),
        ({"offset": None}, "offset: .*got None"),
        ({"grid": "log"}, "grid: expected one of dynamic, .*got 'log'"),
        ({"bits": 9}, "bits: expected a whole number from 2 to 8; got 9"),
        ({"bits": 1}, "bits: .*got 1"),
        ({"bits": 8.0}, "bits: .*got 8.0"),
        ({"grid": "e4m3", "bits": 7}, "bits: expected 8 with the grid 'e4m3'; got 7"),
        ({"block_size": 1}, "block_size: expected a whole number of 2 or more; got 1"),
        ({"block_size": True}, "block_size: .*got True"),
        ({"grid": "unsigned uniform"}, "offset: expected False with the grid 'unsigned uniform'"),
    ],
)
def test_what_cannot_be_stored_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        store(**({"scales": torch.ones(4)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-64,), "first: expected a whole number of 1 or more; got -64"),
        ((0,), "first: .*got 0"),
        (("64",), "first: .*got '64'"),
        ((64, 9), "bits: .*got 9"),
        ((64, 8, 1), "second: expected a whole number of 2 or more; got 1"),
        ((64, 8, 256, "foo"), "grid: .*got 'foo'"),
    ],
)
def test_what_no_weight_can_cost_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        bits_per_weight(*arguments)


@pytest.mark.parametrize("x", [torch.tensor([float("nan")]), [0.5], torch.tensor([1])])
def test_what_has_no_nearest_level_is_refused(x):
    with pytest.raises(ValueError, match="x: expected a floating tensor of finite values"):
        nearest(x, "dynamic")


def test_levels_check_what_they_are_asked_for_each_time():
    levels("dynamic", 8)
    with pytest.raises(ValueError, match=r"bits: .*got 8\.0"):
        levels("dynamic", 8.0)
    with pytest.raises(ValueError, match=r"grid: .*got \['dynamic'\]"):
        levels(["dynamic"])
    assert levels("dynamic") is levels("dynamic", 8)


def test_min_max_has_no_levels_of_its_own():
    with pytest.raises(ValueError, match=r"min-max.*no levels of its own"):
        second_level.levels("min-max")
