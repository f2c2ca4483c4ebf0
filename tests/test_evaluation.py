import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from qlora_edu import evaluation
from qlora_edu.evaluation import PairedComparison, Score, mcnemar, summarise, wilson_interval

settings.register_profile("evaluation", deadline=None)
settings.load_profile("evaluation")

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300)


@given(counts, st.floats(0.01, 0.9999))
def test_the_interval_is_scipys(counts, confidence):
    successes, n = counts
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(successes, n, confidence)
    assert low == pytest.approx(expected.low, rel=1e-9, abs=1e-12)
    assert high == pytest.approx(expected.high, rel=1e-9, abs=1e-12)


@given(counts)
def test_the_interval_holds_the_share_and_mirrors_for_failures(counts):
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_the_ends_of_the_interval_are_where_the_score_test_just_accepts():
    """The definition, solved for nothing: at both ends |p̂ − p| equals z standard errors of p."""
    z = 1.959963984540054
    for end in wilson_interval(174, 200):
        assert abs(174 / 200 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 200), rel=1e-12)


def test_the_examples_in_the_documentation():
    assert doctest.testmod(evaluation) == doctest.TestResults(failed=0, attempted=4)


def test_the_interval_at_the_edges():
    assert wilson_interval(0, 40)[0] == 0.0
    assert wilson_interval(40, 40)[1] == 1.0
    assert wilson_interval(0, 1)[1] < 1.0
    assert wilson_interval(np.int64(3), np.int64(7)) == wilson_interval(3, 7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0), ValueError, "n must be 1 or more"),
        ((1, -3), ValueError, "n must be 1 or more"),
        ((5, 4), ValueError, "successes must lie between 0 and n = 4, but it is 5"),
        ((-1, 4), ValueError, "successes must lie between"),
        ((1, 4, 0), ValueError, "confidence must lie between 0 and 1"),
        ((1, 4, 1), ValueError, "confidence must lie between 0 and 1"),
        ((1, 4, 95), ValueError, "confidence must lie between 0 and 1"),
        ((1, 4, float("nan")), ValueError, "confidence must lie between 0 and 1"),
        ((0.5, 4), TypeError, "successes must be an integer"),
        ((1, 4.0), TypeError, "n must be an integer"),
        (("1", 4), TypeError, "successes must be an integer"),
    ],
)
def test_a_bad_interval_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        wilson_interval(*arguments)


@given(pairs)
def test_mcnemar_is_scipys_binomial_test_of_the_differing_questions(pairs):
    a, b = zip(*pairs, strict=True)
    only_a = pairs.count((True, False))
    only_b = pairs.count((False, True))
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (only_a, only_b)
    assert result.p_value == pytest.approx(expected, rel=1e-9)


@given(pairs)
def test_mcnemar_does_not_care_who_is_a_nor_about_questions_that_agree(pairs):
    a, b = zip(*pairs, strict=True)
    forward, backward = mcnemar(a, b), mcnemar(b, a)
    assert backward == PairedComparison(forward.only_b, forward.only_a, forward.p_value)
    assert mcnemar([*a, True, False], [*b, True, False]) == forward


def test_mcnemar_by_hand():
    # Six coins all on one side, either side: 2 / 2^6.
    assert mcnemar([True] * 6 + [False], [False] * 7) == PairedComparison(6, 0, 2 / 64)
    # 1 of 5: 2 * (C(5,0) + C(5,1)) / 2^5.
    assert mcnemar([1, 1, 1, 1, 0], [0, 0, 0, 0, 1]) == PairedComparison(4, 1, 12 / 32)
    # An even split cannot be more probable than certain.
    assert mcnemar([True, False], [False, True]) == PairedComparison(1, 1, 1.0)


def test_mcnemar_with_thousands_of_differing_questions():
    a = [True] * 2600 + [False] * 2400
    b = [not right for right in a]
    assert mcnemar(a, b).p_value == pytest.approx(binomtest(2600, 5000).pvalue, rel=1e-9)


def test_mcnemar_takes_arrays():
    a, b = np.array([True, True, False]), np.array([False, True, False])
    assert mcnemar(a, b) == PairedComparison(1, 0, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "empty"),
        ([True], [True, False], "hold 1 and 2 answers"),
        ([True, "yes"], [True, False], r"a_right\[1\] must be True"),
        ([True], [0.5], r"b_right\[0\] must be True"),
        ([True], [None], r"b_right\[0\] must be True"),
    ],
)
def test_a_bad_comparison_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        mcnemar(a, b)


def test_a_summary_holds_the_share_and_its_interval():
    score = summarise([True] * 174 + [False] * 26)
    assert score == Score(174, 200, *wilson_interval(174, 200), confidence=0.95)
    assert score.rate == 0.87
    assert str(score) == "87.0% (174 of 200; 95% interval 81.6% to 91.0%)"
    assert summarise(iter([True, False]), confidence=0.5).high == wilson_interval(1, 2, 0.5)[1]


def test_a_bad_summary_is_refused():
    with pytest.raises(ValueError, match="n must be 1 or more"):
        summarise([])
    with pytest.raises(ValueError, match=r"rights\[0\] must be True"):
        summarise(["tool: set_alarm"])
