"""Which page should make room? Policies counted on a sequence of touches alone: no bytes, only faults.

A device has `frames` places. A touch of a page that has no place is a fault, and if no place is free, one page leaves.
"""

from collections.abc import Hashable, Sequence

POLICIES = ("lru", "mru", "optimal")


def faults(touches: Sequence[Hashable], frames: int, policy: str = "lru") -> list[bool]:
    """Whether each touch is a fault. Arguments and errors as in `trace`.

    >>> faults("abcabc", 2), sum(faults("abcabc", 2, "mru")), sum(faults("abcabc", 2, "optimal"))
    ([True, True, True, True, True, True], 4, 4)
    """
    return [fault for fault, _ in trace(touches, frames, policy)]


def trace(
    touches: Sequence[Hashable], frames: int, policy: str = "lru"
) -> list[tuple[bool, tuple[Hashable, ...]]]:
    """For each touch, whether it is a fault, and the pages on the device after it. The device is empty at first.

    Args:
        touches: pages, in the order in which they are used.
        frames: places on the device.
        policy: the page that leaves is the one not touched for longest ("lru"), the one touched last ("mru"), or the
            one that is needed last in the future ("optimal", Belady 1966), which nothing can do better than, and no
            driver can know.

    Raises:
        ValueError: if frames is no whole number of at least 1, or the policy none of these.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ValueError(f"frames: expected a whole number of at least 1; got {frames!r}")
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; got {policy!r}")
    following = _next_use(touches) if policy == "optimal" else [0] * len(touches)
    present: dict[Hashable, int] = {}  # page -> when it is needed next; last touched stands last
    found = []
    for page, later in zip(touches, following, strict=True):
        fault = page not in present
        if fault and len(present) == frames:
            del present[_victim(present, policy)]
        present.pop(page, None)
        present[page] = later
        found.append((fault, tuple(present)))
    return found


def _victim(present: dict[Hashable, int], policy: str) -> Hashable:
    if policy == "optimal":
        return max(present, key=present.__getitem__)
    return next(iter(present) if policy == "lru" else reversed(present))


def _next_use(touches: Sequence[Hashable]) -> list[int]:
    """For each touch, the position of the next one of the same page; the length of the sequence if there is none."""
    later, following = {}, []
    for at in range(len(touches) - 1, -1, -1):
        following.append(later.get(touches[at], len(touches)))
        later[touches[at]] = at
    return following[::-1]


def sweep(pages: int, rounds: int) -> list[int]:
    """The touches of an optimizer: every page in order, and again in each of `rounds` steps.

    >>> sweep(3, 2)
    [0, 1, 2, 0, 1, 2]
    """
    return list(range(pages)) * rounds
