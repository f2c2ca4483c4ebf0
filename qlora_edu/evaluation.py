"""How far to trust a score: the interval around a share, and two models on the same questions.

The score of a model on 200 questions is a sample. Wilson's interval says which true shares are compatible
with it (Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference"). Two models that
answered the same questions are compared question by question: only those count that one got right and the
other wrong (McNemar 1947, "Note on the sampling error of the difference between correlated proportions").
"""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Score:
    """A share of right answers with its interval; all but the two counts lie between 0 and 1."""

    successes: int
    n: int
    low: float
    high: float
    confidence: float

    @property
    def rate(self) -> float:
        """The share itself."""
        return self.successes / self.n

    def __str__(self) -> str:
        return (
            f"{self.rate:.1%} ({self.successes} of {self.n};"
            f" {self.confidence:.0%} interval {self.low:.1%} to {self.high:.1%})"
        )


@dataclass(frozen=True)
class PairedComparison:
    """What two models did on the same questions.

    `only_a` and `only_b` count the questions that only one of them got right. `p_value` is the probability of
    a split at least as uneven if each of those questions had been decided by a fair coin.
    """

    only_a: int
    only_b: int
    p_value: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of which `successes` out of `n` were observed, as (low, high).

    It holds every share p with |p̂ − p| ≤ z·√(p(1−p)/n), where p̂ = successes/n and z is the normal quantile
    (1.96 for 95%). Solving for p gives

        (p̂ + z²/2n ± z·√(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n)

    Unlike p̂ ± z·√(p̂(1−p̂)/n) it never leaves [0, 1], and at 0 or n successes it does not shrink to a point.

    Raises TypeError if a count is not an integer, and ValueError if it is out of range or `confidence` is not
    strictly between 0 and 1.

    >>> low, high = wilson_interval(174, 200)
    >>> round(low, 3), round(high, 3)
    (0.816, 0.91)
    """
    successes, n = _count("successes", successes), _count("n", n)
    if n < 1:
        raise ValueError(f"n must be 1 or more: an interval needs at least one answer, but n is {n}.")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n = {n}, but it is {successes}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95, but it is {confidence}.")
    z = -NormalDist().inv_cdf((1 - confidence) / 2)
    share = successes / n
    middle = share + z**2 / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low = 0.0 if successes == 0 else (middle - half_width) / scale  # exactly, whatever the rounding
    high = 1.0 if successes == n else (middle + half_width) / scale
    return low, high


def summarise(rights: Iterable[bool], confidence: float = 0.95) -> Score:
    """The score of a list of right (True) and wrong (False) answers, with Wilson's interval.

    >>> print(summarise([True] * 174 + [False] * 26))
    87.0% (174 of 200; 95% interval 81.6% to 91.0%)
    """
    rights = _rights("rights", rights)
    low, high = wilson_interval(sum(rights), len(rights), confidence)
    return Score(sum(rights), len(rights), low, high, confidence)


def mcnemar(a_right: Sequence[bool], b_right: Sequence[bool]) -> PairedComparison:
    """Compare two models on the same questions; `a_right[i]` and `b_right[i]` belong to the same one.

    The exact, two-sided McNemar test. Of the m = only_a + only_b questions on which the models differ, a fair
    coin gives model A at most k = min(only_a, only_b) with probability Σ_{i≤k} C(m, i) / 2^m; twice that, at
    most 1, is the p-value. Questions that both got right, or both wrong, say nothing about the difference.

    Raises ValueError if the lists differ in length, are empty, or hold anything but True and False.

    >>> mcnemar([True, True, True, True, False], [True, False, False, False, False])
    PairedComparison(only_a=3, only_b=0, p_value=0.25)
    """
    a, b = _rights("a_right", a_right), _rights("b_right", b_right)
    if len(a) != len(b):
        raise ValueError(
            f"a_right and b_right must judge the same questions, but they hold {len(a)} and {len(b)} answers."
        )
    if not a:
        raise ValueError("a_right and b_right are empty: a comparison needs at least one question.")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    differing = only_a + only_b
    tail = sum(math.comb(differing, i) for i in range(min(only_a, only_b) + 1))
    return PairedComparison(only_a, only_b, min(1.0, 2 * tail / 2**differing))


def _count(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, but it is {value!r}.") from None


def _rights(name: str, answers: Iterable[bool]) -> list[bool]:
    """The answers as Python bools; bools of NumPy and PyTorch and the numbers 0 and 1 are welcome."""
    answers = list(answers)
    for i, answer in enumerate(answers):
        if answer not in (0, 1):
            raise ValueError(f"{name}[{i}] must be True (right) or False (wrong), but it is {answer!r}.")
    return [bool(answer) for answer in answers]
