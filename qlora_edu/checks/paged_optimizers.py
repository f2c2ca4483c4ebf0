"""Checks of chapter 07: AdamW and its states, pages, and what an update moves.

Everywhere: p is a parameter, g its gradient, m and v are AdamW's two states, t is the number of the step, from 1 on.
"""

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import accumulate as running
from itertools import pairwise

import torch
from torch import Tensor

from qlora_edu.checks import expect
from qlora_edu.checks.attempt import clone, plain, unchanged
from qlora_edu.checks.calls import once_more
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise


def _moved(p, m, v, c1: float, c2: float, lr: float, eps: float, decay: float) -> Tensor:
    """The new p. m and v are the new states; c1 and c2 what they are divided by."""
    return p * (1 - lr * decay) - lr * (m / c1) / ((v / c2).sqrt() + eps)


@exercise("07-adamw")
def adamw(answer: Answer, draw: Draw) -> None:
    """`f(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)`: new p, m and v, float32."""
    late = [((2, 1, 3, 2), draw.whole(60, 150)), ((3, 4), draw.whole(300, 1000))]
    for shape, t in (((7,), 3), ((5, 3), 2), ((), 4), ((1,), 1), ((2, 3, 4), 1), ((6, 2), 40), *late):
        _check_adamw(answer, draw, shape, t)
    with once_more():
        _check_adamw(answer, draw, (5, 3), draw.whole(2, 4))
    for zero in ("lr", "β₁", "weight_decay"):
        _check_adamw(answer, draw, (3, 2), 2, zero)


def _check_adamw(answer: Answer, draw: Draw, shape: tuple, t: int, zero: str = "") -> None:
    p, g, m, v = (draw.normal(*shape).transpose(0, -1) for _ in range(4))  # not contiguous
    m, v = (0.5 * m, v**2) if t > 1 else (0 * m, 0 * v)
    g = torch.where(g.abs() < 0.1, 0 * g, g)
    b1, b2, decay = draw.number(0.7, 0.9), draw.number(0.93, 0.98), draw.number(0.2, 0.4)
    if not shape:  # 1 - β is not 1 % β
        b1, b2 = draw.number(0.2, 0.45), draw.number(0.3, 0.45)
    if t > 50:  # so slow that the corrections still show
        b1, b2 = draw.number(0.97, 0.99), draw.number(0.995, 0.999)
    lr, eps = draw.number(0.05, 0.1), draw.number(0.03, 0.1)
    lr, b1, decay = (
        0.0 if zero == "lr" else lr,
        0.0 if zero == "β₁" else b1,
        0.0 if zero[:1] == "w" else decay,
    )
    case = f"for shape {tuple(p.shape)}, t = {t}" + (f", {zero} = 0" if zero else "")
    got = answer(
        p, g, m, v, t, lr, b1, b2, eps, decay, crash="t-shifted" if t == 1 else None, fresh=bool(zero)
    )
    got = expect.parts(got, f"the result {case}", 3)
    if not shape:  # NumPy makes numbers of arrays without dimensions
        got = [torch.tensor(x) if isinstance(x, float) else x for x in got]

    p, g, m, v = p.double(), g.double(), m.double(), v.double()
    new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    c1, c2 = 1 - b1**t, 1 - b2**t

    def but(m=new_m, v=new_v, c1=c1, c2=c2, lr=lr, eps=eps, decay=decay, p=p) -> Tensor:
        return _moved(p, m, v, c1, c2, lr, eps, decay)

    new_p = but()
    # A few roundings of each term. 1 - β, if it was taken in float32, is off by half an eps, however small it is.
    e, step = 4 * expect.EPSILON, p * (1 - lr * decay) - new_p
    error_m, error_v, root = e * (m.abs() + g.abs()), e * (v + g**2), (new_v / c2).sqrt()
    # The power of a β in float32 is off by t roundings.
    e1, e2 = (e + t * expect.EPSILON * b**t for b in (b1, b2))
    error_root = 2 * (((new_v + error_v) / c2).sqrt() - root) + e2 / c2 * root
    error_p = lr * error_m / c1 / (root + eps) + step.abs() * (2 * e + e1 / c1 + error_root / (root + eps))
    wrong_m = {
        "states-old": m,
        "decay-coupled": b1 * m + (1 - b1) * (g + decay * p),
        "betas-swapped": b2 * m + (1 - b2) * g,
        "weights-swapped": [(1 - b1) * m + b1 * g, b1 * m + g],
        "corrected-kept": new_m / c1,
    }
    wrong_v = {
        "states-old": v,
        "betas-swapped": b1 * v + (1 - b1) * g**2,
        "weights-swapped": [(1 - b2) * v + b2 * g**2, b2 * v + g**2],
        "corrected-kept": new_v / c2,
        "not-squared": [b2 * v + (1 - b2) * g, b2 * v + (1 - b2) * g.abs()],
    }
    wrong_p = {
        "correction-missing": [but(c1=1, c2=1), but(c1=1), but(c2=1)],
        "t-shifted": [but(c1=1 - b1**s, c2=1 - b2**s) for s in (t - 1, t + 1) if s],
        "t-forgotten": [but(c1=one, c2=two) for one in (c1, 1 - b1) for two in (c2, 1 - b2)],
        "betas-swapped": [but(c2=c1), but(c1=c2), but(c1=c2, c2=c1)],
        "root-missing": but(v=(new_v / c2) ** 2 * c2),
        "decay-wrong": [but(decay=d) for d in (-decay, decay / (lr or 1), 0, decay * lr)],
        "decay-late": new_p + lr * decay * step,
        "eps-misplaced": [
            *(but(v=new_v + eps * c2, eps=0), but(v=new_v + eps, eps=0), but(eps=eps / c2**0.5)),
            but(eps=0) - lr * eps,
        ],
        "eps-missing": [but(eps=some) for some in (0, 1e-8, 1e-6)],
        "states-old": [but(m=m, v=v), but(m=m), but(v=v)],
        "uphill": but(lr=-lr, decay=-decay),
    }
    # Where m and g are zero nothing is allowed; a little is, so that a decay in g is still recognised.
    expect.close(got[1], new_m, f"the new m, {case}", error_m + e / 10, wrong_m, torch.float32)
    expect.close(got[2], new_v, f"the new v, {case}", error_v, wrong_v, torch.float32)
    expect.close(got[0], new_p, f"the new p, {case}", error_p + e * p.abs(), wrong_p, torch.float32)


def _ago(page, history: list) -> int:
    return history[::-1].index(page)


def _oldest(pages: list, history: list):
    return max(pages, key=partial(_ago, history=history))


def _newest(pages: list, history: list):
    return min(pages, key=partial(_ago, history=history))


def _as_listed(pages: list, present: list) -> list:
    return pages


def _hits_first(pages: list, present: list) -> list:
    return sorted(pages, key=lambda page: page not in present)


def _touched(
    room: int, calls: list, leaves: Callable = _oldest, held: bool = True, order: Callable = _as_listed
) -> list:
    """For each call, the pages that leave and the faults so far.

    Args:
        calls: lists of pages that are touched together. held: whether none of these leaves for another of them.
        leaves: says which of some pages leaves, given these in the order of their arrival, and all touches so far.
        order: the order in which the pages of a call are touched, given these and what is on the device.
    """
    history, present, faults, found = [], [], 0, []
    for pages in calls:
        left = []
        if len(pages) > room:
            found.append(("ValueError", faults))
            continue
        for page in order(pages, present):
            history.append(page)
            if page not in present:
                faults += 1
                if len(present) == room:
                    left.append(leaves([q for q in present if not held or q not in pages], history))
                    present.remove(left[-1])
                present.append(page)
        found.append((left, faults))
    return found


def _use_tables(student, rooms, calls) -> list:
    """Makes a table for each room, and touches pages: (which table, pages).

    What came back, the faults after it, whether the pages that were given changed; in the end, of each call, whether
    what came back is still the same.
    """
    tables, found, came = [student(room) for room in rooms], [], []
    for which, pages in calls:
        given = [int(str(page)) for page in pages]  # equal numbers, but no longer the same objects
        try:
            left = tables[which].touch(given)
        except ValueError:
            left = "ValueError"
        except Exception as error:
            if len(pages) <= rooms[which] or isinstance(error, NotImplementedError):
                raise
            left = type(error).__name__
        came.append(left)
        left = list(left) if isinstance(left, list | tuple) else left
        found.append((left, tables[which].faults, given != pages))
    still = [not isinstance(now, list) or now == left for now, (left, _, _) in zip(came, found, strict=True)]
    return [found, still]


@exercise("07-page-table", probe=_use_tables)
def page_table(answer: Answer, draw: Draw) -> None:
    """`PageTable(room)`: `touch(pages)` gives the list of the pages that leave, `faults` counts."""
    for rooms, together, kinds in (((3, 5), 1, 9), ((4, 7), 2, 12), ((1, 2), 1, 4), ((6, 3), 6, 12)):
        fresh = [draw.whole(10**5, 10**6)]  # shows whether one table has what another was asked for
        calls = [(0, fresh), (1, fresh), (0, fresh)]
        for at in range(120):
            which, special = draw.whole(0, 1), draw.whole(0, 5) if at > 60 else 6
            count = draw.whole(1, min(together, rooms[which]))
            count = {0: rooms[which] + draw.whole(1, 2), 1: 0}.get(special, count)
            calls.append((which, (1000 * draw.permutation(kinds)[:count]).tolist()))
        result, still = answer(rooms, calls)
        if repr(result[:2]) == "[([], 1, False), ([], 0, False)]":
            expect.fail(f"the faults of a second table after touch({fresh})", 1, 0, "shared")
        for i, room in enumerate(rooms):
            mine = [at for at, (which, _) in enumerate(calls) if which == i]
            _compare(room, [calls[at][1] for at in mine], [result[at] for at in mine])
        same = all(now is True for now in still)
        expect.true(same, "a list that came back was changed by a later call", "same-list")


def _compare(room: int, calls: list, found: list) -> None:
    """Wrong at the first call that gives something else."""
    right = _touched(room, calls)

    def but(change: Callable) -> list:
        return [(left if isinstance(left, str) else change(left), n) for left, n in right]

    variants = {
        "first-in": [_touched(room, calls, lambda pages, history: pages[0])],
        "newest": [_touched(room, calls, _newest)],
        "in-use": [_touched(room, calls, held=False)],
        "list-order": [
            _touched(room, calls, order=lambda pages, present: sorted(pages)),
            _touched(room, calls, order=lambda pages, present: list(set(pages))),
            _touched(room, calls, order=lambda pages, present: pages[::-1]),
            _touched(room, calls, order=_hits_first),
        ],
        "page-zero": [but(lambda left: [p for p in left if p])],
        "order": [but(sorted), but(lambda left: left[::-1])],
        "not-all": [but(lambda left: left[-1:]), but(lambda left: left[:1])],
    }
    came = repr([got for got, _, _ in found])
    fits = [
        name for name, some in variants.items() if any(repr([left for left, _ in w]) == came for w in some)
    ]
    present, touches, refused = set(), 0, False
    for pages, (left, faults), (got, counted, changed) in zip(calls, right, found, strict=True):
        what = f"touch({pages}) of a table with room {room}"
        raised = isinstance(got, str) and got == "ValueError"
        if left == "ValueError":
            refused = True
            expect.true(raised, what, "too-many", f"a {left}", got)
        else:
            listed = isinstance(got, list) and all(type(page) is int for page in got)
            expect.true(listed, what, "refused" if raised else "wrong-type", left, got)
            expect.true(not changed, f"{what} changed the list that it was given", "changed-pages")
            if got != left:
                more = "hit-evicts" if present.issuperset(pages) else "evicts-early"
                less = "too-much-room" if not got else None
                guess = more if len(got) > len(left) else less
                mistake = fits[0] if fits else "half-done" if refused else guess
                expect.fail(f"{what}: the pages that leave", left, got, mistake)
            present, touches = present.union(pages).difference(left), touches + len(pages)
        expect.true(not changed, f"{what} changed the list that it was given", "changed-pages")
        what_of, shown = f"the faults after {what}: an int", repr(counted)[:80]
        expect.true(type(counted) is int, what_of, "faults-no-int", faults, shown)
        looks = {"half-done": counted} if refused else {"hits-counted": touches}
        expect.number(counted, faults, f"the faults after {what}", looks_like=looks)


def _pair(got, right: tuple[int, int], what: str, looks_like: dict[str, list[tuple]]) -> None:
    """Refuse unless `got` are two numbers, these."""
    parts = expect.parts(got, what, 2)
    got = tuple(n.item() if isinstance(n, Tensor) and n.numel() == 1 else n for n in parts)
    expect.true(all(type(n) in (int, float) for n in got), f"{what}: two ints", "wrong-type", right, got)
    expect.true(all(type(n) is int for n in got), f"{what}: two ints", "floats", right, repr(got))
    if got != right:
        fits = [name for name, some in looks_like.items() if got in some]
        expect.fail(what, right, got, fits[0] if fits else None)


@exercise("07-cliff", seconds=2)
def cliff(answer: Answer, draw: Draw) -> None:
    """`f(pairs, room, steps)`: the pages that come in and the pages that leave."""
    small = [(p, 2 * p + more, draw.whole(3, 6)) for p in (3, 4, 2, 6) for more in (0, -1, -2, 1)]
    small += [(2, 3, 2), (7, 2, 4), (1, draw.whole(3, 99), 3), (5, 10 + draw.whole(2, 99), 2)]
    small += [(p, 2 * p + more, steps) for p in (1, 2, 5) for more in (0, -1, -2, 1, 9) for steps in (1, 2)]
    p, steps = draw.whole(10**5, 10**6), draw.whole(10**4, 10**6)
    large = [(p, 2 * p + more, steps) for more in (-1, 0, -2, -999, draw.whole(1, 10**6))]
    large += [(p, 2, steps), (p, 2 * p - 1, 1), (2, 3, steps), (p, draw.whole(2, p), 2)]
    for pairs, room, steps in [(1, 2, 4), *small, *large]:
        if room < 2:
            continue
        pages, counted = 2 * pairs, pairs * steps < 100
        stay, lacking = min(room, pages), max(pages - room, 0)
        again = {0: 0, 1: pairs}.get(lacking, pages)  # faults of a later step; the small cases are counted
        into = pages + (steps - 1) * again
        if counted:
            into = _touched(room, [[2 * i, 2 * i + 1] for i in range(pairs)] * steps)[-1][1]
        out = into - stay
        all_in, slope, half = (pages + (steps - 1) * each for each in (pages, lacking, pairs))
        twice = pages + steps * again
        wrong = {
            "first-forgotten": [
                *((into - pages, out), (out, out), (into - pages, into - pages)),
                *((again * steps, left) for left in (max(again * steps - stay, 0), again * steps)),
            ],
            "all-fit": [(n, n - left) for n in (all_in, half) for left in (stay, room) if not lacking],
            "first-twice": [(twice, twice - stay)],
            "stay-forgotten": [(into, into), (into, into - pages)],
            "out-forgotten": [(into, 0)],
            "all-fault": [(all_in, all_in - stay)],
            "slope": [(slope, slope - stay)],
            "half-fault": [(half, half - stay)],
            "one-state": [(pairs, 0), (pairs * steps, pairs * steps - room)],
            "swapped": [(out, into)],
        }
        what = f"pages in and pages out, for pairs = {pairs:,}, room = {room:,}, steps = {steps:,}"
        _pair(answer(pairs, room, steps), (into, out), what, wrong)


def _up(count: int, unit: int) -> int:
    """The units that hold so many, the last one perhaps in part."""
    return -(-count // unit)


def _in_all(states: list[tuple[int, int, bool]], page: int) -> tuple[int, int]:
    """Bytes that are paged and that are not. states: (bytes of numbers, bytes of scales, whether it is paged)."""
    paged = sum(page * _up(numbers, page) for numbers, _, large in states if large)
    return paged, sum(scales + (0 if large else numbers) for numbers, scales, large in states)


@exercise("07-states")
def states(answer: Answer, draw: Draw) -> None:
    """`f(sizes, bits, page, min_paged, min_8bit, block)`: bytes of the states that are paged and that are not."""

    def case(sizes: list[int], bits: int, page: int, min_paged: int, min_8bit: int, block: int) -> None:
        def each(
            min_paged=min_paged, min_8bit=min_8bit, sizes=sizes, block=block
        ) -> list[tuple[int, int, bool]]:
            short = [bits == 8 and n >= min_8bit for n in sizes]
            rows = [(n, 4 * _up(n, block)) if s else (4 * n, 0) for n, s in zip(sizes, short, strict=True)]
            return 2 * [(*row, n >= min_paged) for row, n in zip(rows, sizes, strict=True)]  # m and v

        found = each()
        paged, rest = right = _in_all(found, page)
        raw = sum(n for n, _, large in found if large)
        scales, full = sum(s for _, s, _ in found), sum(n // block * 4 for n, s, _ in found if s)
        twins = sum(page * _up(2 * n, page) for n, _, large in found if large) // 2
        once, twice = ([(n, s, times * n >= min_paged) for n, s, _ in found] for times in (1, 2))
        floor, over = (sum(page * (n // page + more) for n, _, large in found if large) for more in (0, 1))
        more = 2 * sum(4 * (n // block + 1) for n in sizes if bits == 8 and n >= min_8bit)
        with_pages = sum(s for _, s, large in found if large)
        joined = [(n + s, 0, True) if large else (n, s, False) for n, s, large in found]
        apart = [*found, *((s, -s, True) for _, s, large in found if large)]
        wrong = {
            "one-state": [(paged // 2, rest // 2)],
            "pages-partial": [(raw, rest), (raw // page * page, rest), (floor, rest)],
            "one-too-many": [(over, rest), (paged, rest - scales + more), (over, rest - scales + more)],
            "pages-shared": [(twins, rest), (page * _up(raw, page), rest)],
            "threshold": [_in_all(each(min_paged + 1), page), _in_all(each(min_8bit=min_8bit + 1), page)],
            "bytes-compared": [_in_all(twice, page), _in_all(once, page)],
            "small-in-8": [_in_all(each(min_8bit=0), page)],
            "small-paged": [_in_all(each(max(min_paged, min_8bit) if bits == 8 else min_paged), page)],
            "equal-sizes": [_in_all(each(sizes=sorted(set(sizes))), page)],
            "scales-short": [(paged, rest - scales + some) for some in (0, scales // 4, scales // 2)],
            "scales-partial": [(paged, rest - scales + full)],
            "scales-paged": [
                *(_in_all(joined, page), _in_all(apart, page)),
                (paged + with_pages, rest - with_pages),
            ],
            "constants": [
                *(_in_all(each(block=256), page), _in_all(each(block=4096), page), _in_all(found, 4096)),
                *(_in_all(each(min_paged=10**5), page), _in_all(each(min_8bit=4096), page)),
            ],
            "rest-rounded": [(paged, page * _up(rest, page))],
            "swapped": [(rest, paged)],
        }
        what = f"for sizes {sizes}, bits = {bits}, page = {page}, min_paged = {min_paged}, "
        what = f"bytes paged and not paged, {what}min_8bit = {min_8bit}, block = {block}"
        _pair(answer(sizes, bits, page, min_paged, min_8bit, block), right, what, wrong)

    # Those of bitsandbytes, then others: which of the two thresholds is larger, blocks that are no power of two.
    low, high, odd = draw.whole(900, 3000), draw.whole(5000, 20_000), 2 * draw.whole(15, 60) + 1
    for bits, page, min_paged, min_8bit, block in (
        (32, 4096, 10**5, 4096, 256),
        (8, 4096, 10**5, 4096, 256),
        (8, 1000, high, low, odd),
        (8, draw.whole(300, 900), low, high, draw.choice([64, 512, 2048])),
        (32, 2**16, high, low, odd),
        (8, 1, 30, 20, 1),
    ):
        near = [limit + more for limit in (min_paged, min_8bit) for more in (-1, 0, 1)]
        others = [1, block, 3 * block + 1, 7 * page, draw.whole(10, 10**7), draw.whole(10, 10**4)]
        large = [page * draw.whole(150, 999) + more for more in (-1, 5)]
        between = [(min_paged + min_8bit) // 2]
        exact = [100 * page * block]  # pages and blocks that are all full
        same = [min_paged + 3, min_paged + 3, 7, 7, 7]
        for sizes in (large, [min_paged // 2 + 1, 77], between, exact, near, others, same, []):
            case(sizes, bits, page, min_paged, min_8bit, block)


def _called_twice(student, w, batches, max_norm) -> list:
    """The result, that of a second call with the same objects, what the first one is after it, and what was changed."""
    before = clone((w, batches))
    came = student(w, batches, max_norm)
    first, written = clone(plain(came)), not unchanged(before, (w, batches))
    try:
        second = clone(plain(student(w, batches, max_norm)))
    except Exception as error:
        second = f"{type(error).__name__} in a second call"
    return [first, second, plain(came), written]


@exercise("07-accumulate", probe=_called_twice)
def accumulate(answer: Answer, draw: Draw) -> None:
    """`f(w, batches, max_norm)`: gradient of the mean loss over all scored tokens, its norm at most max_norm."""
    # Tokens of each micro-batch, how many of them are not scored, what the gradient's norm is (None: as it comes), and
    # max_norm beside it (None: far above or far below that of every part).
    nearly = [((4, 1, 3), (1, 0, 1), norm, share) for norm in (0.2, 6) for share in (1.05, 0.95)]
    size = draw.whole(4, 7), draw.whole(2, 9)
    for case in (
        ((6, 2, 3), (0, 0, 0), None, 99),
        ((5, 9, 2, 1), (1, 6, 0, 0), None, 99),
        ((8, 3, 4), (3, 0, 2), None, 0, size),
        ((4, 3, 6), (0, 3, 1), None, 0, (draw.whole(4, 7), 1)),
        *nearly,
        ((3, 4, 2), (3, 1, 0), None, 99),
        ((3, 2), (3, 2), None, 99),
        ((2, 1), (1, 1), None, 99),
        ((1,), (0,), None, 0),
        ((3, 5), (1, 0), None, "large logits"),
        ((5, 2), (1, 0), None, 99, (2, 1)),
    ):
        _check_accumulate(answer, draw, *case)
    with once_more():
        _check_accumulate(answer, draw, (8, 3, 4), (5, 1, 2), None, 99, size)


def _check_accumulate(answer: Answer, draw: Draw, tokens, unscored, length, limit, size=None) -> None:
    classes, n_in = size or (draw.whole(4, 7), draw.whole(2, 9))
    w, x = draw.normal(classes, n_in), draw.normal(sum(tokens), n_in)
    if limit == "large logits":
        w, limit = 200 * w, 99
    labels = draw.integers(sum(tokens), low=0, high=classes - 1)
    for part, skipped in zip(labels.split(tokens), unscored, strict=True):
        part[draw.permutation(len(part))[:skipped]] = -100

    # The gradient of -log softmax(w x)[label] is (softmax(w x) - one at the label) xᵀ.
    off = (x.double() @ w.double().T).softmax(dim=1)
    off[range(len(x)), labels.clamp(min=0)] -= 1
    off[labels == -100] = 0
    parts = [a.T @ b for a, b in zip(off.split(tokens), x.double().split(tokens), strict=True)]
    scored = [int((part != -100).sum()) for part in labels.split(tokens)]
    total = max(sum(scored), 1)
    right = sum(parts) / total
    norms = [norm for part in parts if (norm := part.norm().item() / total)]
    if length:  # the logits stay, and the gradient becomes so long
        scale = length / right.norm().item()
        x, w, parts, right = x * scale, w / scale, [part * scale for part in parts], right * scale
    max_norm = {0: 0.3 * min(norms, default=0), 99: 19 * sum(norms) + 0.1}.get(limit)
    max_norm = limit * right.norm().item() if max_norm is None else max_norm
    clipped = max_norm < right.norm()

    def clip(gradient: Tensor, most: float = max_norm) -> Tensor:
        return gradient * min(1, most / max(gradient.norm().item(), 1e-30))

    shares, top = [part / total for part in parts], right.abs().max().item()
    *_, in_turn = running([0 * right, *shares], lambda a, b, clip=clip: clip(a + b))
    means = sum(part / max(n, 1) for part, n in zip(parts, scored, strict=True))
    weighted = sum(p / max(n, 1) * len(b) for p, n, b in zip(parts, scored, x.split(tokens), strict=True))
    wrong = {
        "not-clipped": right,
        "scaled-up": right * max_norm / max(right.norm().item(), 1e-30),
        "mean-of-means": [clip(means / len(parts)), clip(means)],
        "tokens-counted": [clip(sum(parts) / len(x)), clip(weighted / len(x))],
        "not-divided": clip(sum(parts)),
        "clipped-in-turn": [in_turn, sum(map(clip, shares))],
        "clipped-undivided": clip(sum(parts)) / total,
        "zero-too-soon": 0 * right,
        "clamped": right.clamp(-max_norm, max_norm),
        "other-norm": [
            *(right * min(1, max_norm / max(n, 1e-30)) for n in (right.abs().sum().item(), top)),
            *(right * max_norm / max(n, 1e-30) for n in (right.square().sum().item(),)),
        ],
        "sign": [-clip(right), -right],
    }
    # A chance is off by twice what its logits are, and some roundings; the rest is one product of matrices.
    logits = expect.dot_error(x, w.T).amax(dim=1, keepdim=True).expand(-1, classes)
    error = (expect.dot_error(off.T, x) + (2 * logits + 8 * expect.EPSILON).T @ x.double().abs()) / total
    if clipped:  # torch's way of clipping divides by the norm + 1e-6
        share, norm = max_norm / right.norm(), right.norm()
        error = share * (error + right.abs() * ((error.norm() + 1e-6) / norm + 8 * expect.EPSILON))
    what = f"the gradient, for micro-batches of {list(tokens)} tokens, {scored} of them scored, "
    what += f"max_norm = {max_norm:.3g}"
    batches = list(zip(x.split(tokens), labels.split(tokens), strict=True))
    got, second, later, written = answer(w, batches, max_norm)
    expect.true(not written, f"an argument has changed after the first call, {what[14:]}", "changed-input")
    expect.tensor(got, what, right.shape, torch.float32)
    lost = "nothing-scored" if 0 in scored else "overflow" if w.abs().max() > 90 else None
    expect.true(not got.isnan().any(), what, lost, right.flatten()[0].item(), float("nan"))
    # Only what a mistake changes can show it.
    wrong = {
        name: [
            one
            for one in ([some] if isinstance(some, Tensor) else some)
            if ((one - clip(right)).abs() > error).any()
        ]
        for name, some in wrong.items()
    }
    expect.close(got, clip(right), what, error, wrong)
    expect.true(
        isinstance(second, Tensor),
        f"{what}: a second call with the same inputs",
        "kept",
        "the same",
        second,
    )
    expect.close(
        second, clip(right), f"{what}, in a second call with the same inputs", error, {"kept": second}
    )
    expect.true(
        isinstance(later, Tensor) and torch.equal(later, got),
        "the first gradient was changed by a second call",
        "kept",
    )


_KINDS = ("sweep", "favourites", "both")


def _program(kind: str, draw: Draw) -> tuple[int, Iterator[int]]:
    """The room, and the 300 pages that are touched, each drawn when it is asked for. The pages' numbers say nothing."""
    names, sweep, loop = draw.permutation(1000).tolist(), draw.whole(18, 21), draw.whole(22, 25)
    chances = list(running(1 / (i + 1) for i in range(40)))

    def page(i: int) -> int:
        if kind == "sweep":
            return i % sweep
        if kind == "favourites":
            return bisect(chances, draw.number(0, 0.999999 * chances[-1]))
        return loop + draw.whole(0, 5) if i % 3 == 2 else (i - i // 3) % loop

    room = {"sweep": sweep - 4, "favourites": 12, "both": loop - 8}[kind]
    return room, (names[page(i)] for i in range(300))


def _played(room: int, touches: Iterable[int], leaves: Callable) -> tuple[int, list[int]]:
    """The faults and the touches. leaves: says which page leaves, given those on the device and all touches so far."""
    history, present, faults = [], [], 0
    for page in touches:
        history.append(page)
        if page not in present:
            faults += 1
            if len(present) == room:
                present.remove(leaves(present, history))
            present.append(page)
    return faults, history


def _belady(pages: list[int], history: list[int], touches: list[int]) -> int:
    ahead = touches[len(history) :]
    return max(pages, key=lambda page: ahead.index(page) if page in ahead else len(ahead))


def _regular_or_rare(pages: list[int], history: list[int]) -> int:
    """What comes at regular times is needed when it is due; other pages the later, the rarer they are."""
    now = len(history)

    def needed(page: int) -> float:
        times = [at for at, touched in enumerate(history) if touched == page]
        if len(times) == 1:
            return 3 * now + times[0]
        gaps = [b - a for a, b in pairwise(times)]
        due = times[-1] + sum(gaps) / len(gaps)
        regular = max(gaps) - min(gaps) <= 0.15 * (due - times[-1]) and due >= now - 1
        return due if regular else now + (now - times[0]) / len(times)

    return max(pages, key=needed)


_RIVALS = {
    "least recently used": _oldest,
    "first in, first out": lambda pages, history: pages[0],
    "most recently used": _newest,
    "the best that we know": _regular_or_rare,
    "Belady, knowing the future": None,
}


def _rivals(programs: list[tuple[str, int, list[int]]]) -> dict[str, dict[str, int]]:
    """What each rival's faults are, by kind. programs: kind, room and touches of each."""
    found = {name: dict.fromkeys(_KINDS, 0) for name in _RIVALS}
    for kind, room, touches in programs:
        for name, leaves in _RIVALS.items():
            leaves = leaves or partial(_belady, touches=touches)
            found[name][kind] += _played(room, touches, leaves)[0]
    return found


@cache
def _on_the_board() -> dict[str, int]:
    """The rivals on the scoreboard's programs."""
    drawn = [(kind, *_program(kind, Draw(seed))) for seed in range(7) for kind in _KINDS]
    rivals = _rivals([(kind, room, list(touches)) for kind, room, touches in drawn])
    return {name: sum(faults.values()) for name, faults in rivals.items()}


@exercise("07-evict")
def evict(answer: Answer, draw: Draw) -> Score:
    """`f(history, pages)`: which of the pages leaves, given all touches so far."""

    def asked(pages: list[int], history: list[int]) -> int:
        page = answer(history, sorted(pages))
        page = page.item() if isinstance(page, Tensor) and page.numel() == 1 else page
        expect.true(type(page) is int, "the page that leaves: an int", "wrong-type", "a page", repr(page))
        expect.true(page in pages, "the page that leaves", "not-there", f"one of {sorted(pages)}", page)
        return page

    # Seven fresh programs of each kind, so that chance decides little. What comes later is drawn later.
    faults, programs = dict.fromkeys(_KINDS, 0), []
    for kind in 7 * _KINDS:
        room, touches = _program(kind, Draw(draw.whole(10**6, 2**40)))
        more, history = _played(room, touches, asked)
        faults[kind] += more
        programs.append((kind, room, history))
    rivals = _rivals(programs)
    bound, total = rivals["Belady, knowing the future"], sum(faults.values())
    most = 5 * sum(bound.values()) // 4
    if not total <= most:
        worst = max(faults, key=lambda name: faults[name] / bound[name])
        known = zip(("like-lru", "like-fifo", "like-mru"), rivals.values(), strict=False)
        mistake = next((name for name, other in known if other == faults), f"{worst}-lost")
        got = ", ".join(f"{name} {faults[name]} (Belady {bound[name]})" for name in faults)
        expect.fail(
            "the faults in seven programs of each kind", f"at most {most}", f"{total}: {got}", mistake
        )

    scored = 0
    for seed in range(7):
        for kind in _KINDS:
            scored += _played(*_program(kind, Draw(seed)), asked)[0]
    return Score(scored, "page faults", _on_the_board())
