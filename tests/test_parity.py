"""Every comparison with bitsandbytes, PEFT and transformers, and that a difference of one bit would be seen."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_edu import parity
from qlora_edu.parity import Row, differing, row, stored_weights

QUICK = (
    parity.compare_codebooks,
    parity.compare_sizes,
    parity.compare_extremes,
    parity.compare_linear4bit,
)


def assert_equal_to_the_last_bit(comparison, least_rows):
    rows = list(comparison())
    assert len(rows) >= least_rows
    for found in rows:
        assert found.compared > 0 and found.mismatches == 0, found
    assert len({found.what for found in rows}) == len(rows)  # no row stands in for another


LEAST_ROWS = {
    "compare_codebooks": 3,
    "compare_quantization": 36,
    "compare_sizes": 6,
    "compare_extremes": 19,
    "compare_linear4bit": 24,
    "compare_lora": 28,
    "compare_real_model": 5,
}


@pytest.mark.parametrize("comparison", parity.COMPARISONS, ids=lambda comparison: comparison.__name__)
def test_no_bit_differs(comparison):
    assert_equal_to_the_last_bit(comparison, LEAST_ROWS[comparison.__name__])


def test_no_comparison_is_left_out():
    made = {name for name in vars(parity) if name.startswith("compare_")}
    assert made == {comparison.__name__ for comparison in parity.COMPARISONS} == set(LEAST_ROWS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("comparison", QUICK, ids=lambda comparison: comparison.__name__)
def test_no_bit_differs_with_one_thread_or_two(comparison, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_equal_to_the_last_bit(comparison, LEAST_ROWS[comparison.__name__])
    finally:
        torch.set_num_threads(before)


class TestDiffering:
    DTYPES = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.uint8,
        torch.int64,
        torch.bool,
    )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equal_tensors_do_not_differ(self, dtype):
        tensor = stored_weights(100).to(dtype)
        assert differing(tensor, tensor.clone()) == (100, 0)
        assert differing(tensor.view(10, 10).T, tensor.view(10, 10).T.contiguous()) == (100, 0)

    @given(st.integers(0, 99), st.integers(0, 31))
    def test_one_flipped_bit_is_seen(self, where, bit):
        ours, theirs = stored_weights(100), stored_weights(100)
        theirs.view(torch.int32)[where] ^= -(2**31) if bit == 31 else 1 << bit
        assert differing(ours, theirs) == (100, 1)

    def test_zeros_of_different_sign_differ(self):
        assert differing(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0])) == (2, 1)

    def test_nan_equals_the_same_nan_only(self):
        nan = torch.tensor([math.nan])
        other = (nan.view(torch.int32) + 1).view(torch.float32)
        assert other.isnan() and differing(nan, nan.clone()) == (1, 0) and differing(nan, other) == (1, 1)

    @pytest.mark.parametrize(
        "theirs", [torch.ones(6).bfloat16(), torch.ones(2, 3), torch.ones(5), torch.ones(6, 1), torch.ones(0)]
    )
    def test_another_shape_or_dtype_counts_as_all(self, theirs):
        assert differing(torch.ones(6), theirs) == (6, 6)
        assert differing(theirs, torch.ones(6)) == (6, 6)

    def test_a_scalar_is_one_value_and_empty_shapes_can_differ(self):
        assert differing(torch.tensor(1.0), torch.tensor(1.0)) == (1, 0)
        assert differing(torch.ones(0), torch.ones(0, 3)) == (1, 1)

    def test_a_parameter_and_its_data_are_compared_by_value(self):
        parameter = torch.nn.Parameter(stored_weights(4))
        assert differing(parameter, stored_weights(4)) == (4, 0)


def test_a_row_adds_up_its_pairs():
    one, two = torch.ones(3), torch.ones(3)
    two[1] = 2
    assert row("what", (one, one), (one, two), (two, two)) == Row("what", 9, 1)


def test_stored_weights_are_numbers_like_weights_and_the_same_wherever_they_start():
    weights = stored_weights(200_000)
    assert weights.dtype == torch.float32 and weights.isfinite().all()
    assert torch.equal(stored_weights(100, start=150_000), weights[150_000:150_100])
    assert abs(weights.mean()) < 0.05 and 0.5 < weights.std() < 3
    assert weights.unique().numel() > 100_000


def fake(mismatches):
    def comparison():
        yield Row("equal", 10, 0)
        yield Row("perhaps not", 5, mismatches)

    return comparison


@pytest.mark.parametrize(("mismatches", "status"), [(0, 0), (1, 1), (5, 1)])
def test_the_command_fails_when_a_bit_differs(monkeypatch, capsys, mismatches, status):
    monkeypatch.setattr(parity, "COMPARISONS", (fake(0), fake(mismatches)))
    assert parity.main() == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1].split() == ["total", "30", str(mismatches)]
    assert lines[-2].split()[-2:] == ["5", str(mismatches)]
