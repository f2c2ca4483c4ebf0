"""State between calls: a function that keeps some is right once, and wrong ever after."""

from contextlib import contextmanager

from qlora_edu.checks import expect
from qlora_edu.checks.attempt import clone, unchanged


def _alike(one, other) -> bool:
    """Whether two results are the same, be they ever so strange."""
    try:
        return unchanged(one, other)
    except (AttributeError, TypeError, RuntimeError):
        return False


class Calls:
    """Results of the calls so far: a later call must neither change them nor give them again."""

    def __init__(self):
        self.kept = []

    def add(self, got, case: str, right=None):
        """right: what is right here, where two calls may have the same result; else no two have."""
        what = f"the result of an earlier call, after the call {case}"
        for before, copy, _ in self.kept:
            expect.true(_alike(copy, before), what, "state", "as it was", "other numbers")
        again = any(_alike(copy, got) and (right is None or not _alike(right, r)) for _, copy, r in self.kept)
        expect.true(not again, f"the result {case}", "state", "a new result", "that of an earlier call")
        self.kept.append((got, clone(got), right))
        return got


@contextmanager
def once_more():
    """Around what has been right before with other numbers of the same sizes: what is wrong now was remembered."""
    try:
        yield
    except expect.Wrong as wrong:
        wrong.mistake = "remembered"
        wrong.what += ", the second time with these sizes"
        raise
