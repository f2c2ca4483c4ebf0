"""Checks of chapter 07: AdamW and its states, pages, and what an update moves.

Everywhere: p is a parameter, g its gradient, m and v are AdamW's two states, t is the number of the step, from 1 on.
"""

from bisect import bisect
from collections.abc import Callable
from functools import partial
from itertools import accumulate as running

import torch
from torch import Tensor

from qlora_edu.checks import expect
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, Score, exercise


def _moved(p, m, v, c1: float, c2: float, lr: float, eps: float, decay: float) -> Tensor:
    """The new p. m and v are the new states; c1 and c2 what they are divided by."""
    return p * (1 - lr * decay) - lr * (m / c1) / ((v / c2).sqrt() + eps)


@exercise("07-adamw")
def adamw(answer: Answer, draw: Draw) -> None:
    """`f(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)`: new p, m and v, float32."""
    for shape, t in (((7,), 3), ((5, 3), 2), ((1,), 1), ((2, 3, 4), 1), ((6, 2), 40)):
        p, g, m, v = (draw.normal(*shape).transpose(0, -1) for _ in range(4))  # not contiguous
        m, v = (0.5 * m, v**2) if t > 1 else (0 * m, 0 * v)
        g = torch.where(g.abs() < 0.1, 0 * g, g)
        b1, b2, decay = draw.number(0.7, 0.9), draw.number(0.93, 0.98), draw.number(0.2, 0.4)
        lr, eps = draw.number(0.05, 0.1), draw.number(0.03, 0.1)
        case = f"for shape {tuple(p.shape)}, t = {t}"
        got = answer(p, g, m, v, t, lr, b1, b2, eps, decay, crash="t-shifted" if t == 1 else None)
        got = expect.parts(got, f"the result {case}", 3)

        p, g, m, v = p.double(), g.double(), m.double(), v.double()
        new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c2 = 1 - b1**t, 1 - b2**t

        def but(m=new_m, v=new_v, c1=c1, c2=c2, lr=lr, eps=eps, decay=decay, p=p) -> Tensor:
            return _moved(p, m, v, c1, c2, lr, eps, decay)

        new_p = but()
        # A few roundings of each term. 1 - β, if it was taken in float32, is off by half an eps, however small it is.
        e, step = 4 * expect.EPSILON, p * (1 - lr * decay) - new_p
        error_m, error_v, root = e * (m.abs() + g.abs()), e * (v + g**2), (new_v / c2).sqrt()
        error_root = 2 * (((new_v + error_v) / c2).sqrt() - root) + e / c2 * root
        error_p = lr * error_m / c1 / (root + eps) + step.abs() * (2 * e + e / c1 + error_root / (root + eps))
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
            "decay-wrong": [but(decay=d) for d in (-decay, decay / lr, 0, decay * lr)],
            "decay-late": new_p + lr * decay * step,
            "eps-misplaced": [but(v=new_v + eps * c2, eps=0), but(eps=eps / c2**0.5), but(eps=0)],
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


def _touched(room: int, calls: list, leaves: Callable = _oldest, held: bool = True) -> list:
    """For each call, the pages that leave and the faults so far.

    Args:
        calls: lists of pages that are touched together. held: whether none of these leaves for another of them.
        leaves: says which of some pages leaves, given these in the order of their arrival, and all touches so far.
    """
    history, present, faults, found = [], [], 0, []
    for pages in calls:
        left = []
        if len(pages) > room:
            found.append(("ValueError", faults))
            continue
        for page in pages:
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
    """Makes a table for each room, and touches pages: (which table, pages). What came back, and the faults after it."""
    tables, found = [student(room) for room in rooms], []
    for which, pages in calls:
        try:
            left = tables[which].touch(list(pages))
        except ValueError:
            left = "ValueError"
        found.append((list(left) if isinstance(left, list | tuple) else left, tables[which].faults))
    return found


@exercise("07-page-table", probe=_use_tables)
def page_table(answer: Answer, draw: Draw) -> None:
    """`PageTable(room)`: `touch(pages)` gives the list of the pages that leave, `faults` counts."""
    for rooms, together, kinds in (((3, 5), 1, 9), ((4, 7), 2, 10), ((1, 2), 1, 4), ((6, 3), 3, 12)):
        fresh = [draw.whole(1000, 10**6)]  # shows whether one table has what another was asked for
        calls = [(0, fresh), (1, fresh)]
        for at in range(90):
            which, too_many = draw.whole(0, 1), at > 60 and draw.whole(0, 5) == 0
            count = rooms[which] + 1 if too_many else draw.whole(1, min(together, rooms[which]))
            calls.append((which, draw.permutation(kinds)[:count].tolist()))
        result = answer(rooms, calls)
        if repr(result[:2]) == "[([], 1), ([], 0)]":
            expect.fail(f"the faults of a second table after touch({fresh})", 1, 0, "shared")
        for i, room in enumerate(rooms):
            mine = [at for at, (which, _) in enumerate(calls) if which == i]
            _compare(room, [calls[at][1] for at in mine], [result[at] for at in mine])


def _compare(room: int, calls: list, found: list) -> None:
    """Wrong at the first call that gives something else."""
    right = _touched(room, calls)
    variants = {
        "first-in": _touched(room, calls, lambda pages, history: pages[0]),
        "newest": _touched(room, calls, _newest),
        "in-use": _touched(room, calls, held=False),
        "page-zero": [(left if isinstance(left, str) else [p for p in left if p], n) for left, n in right],
        "order": [(left if isinstance(left, str) else sorted(left), n) for left, n in right],
    }
    came = repr([got for got, _ in found])
    fits = [name for name, wrong in variants.items() if repr([left for left, _ in wrong]) == came]
    present, touches, refused = set(), 0, False
    for pages, (left, faults), (got, counted) in zip(calls, right, found, strict=True):
        what = f"touch({pages}) of a table with room {room}"
        raised = isinstance(got, str) and got == "ValueError"
        if left == "ValueError":
            refused = True
            expect.true(raised, what, "too-many", f"a {left}", got)
        else:
            listed = isinstance(got, list) and all(type(page) is int for page in got)
            expect.true(listed, what, "refused" if raised else "wrong-type", left, got)
            if got != left:
                more = "hit-evicts" if present.issuperset(pages) else "evicts-early"
                less = "too-much-room" if len(got) < len(left) else None
                guess = more if len(got) > len(left) else less
                mistake = fits[0] if fits else "half-done" if refused else guess
                expect.fail(f"{what}: the pages that leave", left, got, mistake)
            present, touches = present.union(pages).difference(left), touches + len(pages)
        looks = {"half-done": counted} if refused else {"hits-counted": touches}
        expect.number(counted, faults, f"the faults after {what}", looks_like=looks)


def _pair(got, right: tuple[int, int], what: str, looks_like: dict[str, list[tuple]]) -> None:
    """Refuse unless `got` are two numbers, these."""
    parts = expect.parts(got, what, 2)
    got = tuple(n.item() if isinstance(n, Tensor) and n.numel() == 1 else n for n in parts)
    expect.true(all(type(n) in (int, float) for n in got), f"{what}: two numbers", "wrong-type", right, got)
    if got != right:
        fits = [name for name, some in looks_like.items() if got in some]
        expect.fail(what, right, got, fits[0] if fits else None)


@exercise("07-cliff", seconds=2)
def cliff(answer: Answer, draw: Draw) -> None:
    """`f(pairs, room, steps)`: the pages that come in and the pages that leave."""
    small = [(p, 2 * p + more) for p in (3, 4, 6) for more in (0, -1, -2, 1)]
    large = [(p, 2 * p + more) for more in (-1, 0, -2, -999) for p in [draw.whole(10**5, 10**6)]]
    for pairs, room in [(1, 2), *small, (7, 2), *large]:
        pages, counted = 2 * pairs, pairs < 10
        steps = draw.whole(3, 6) if counted else draw.whole(10**4, 10**6)
        stay, lacking = min(room, pages), max(pages - room, 0)
        again = {0: 0, 1: pairs}.get(lacking, pages)  # faults of a later step; the small cases are counted
        into = pages + (steps - 1) * again
        if counted:
            into = _touched(room, [[2 * i, 2 * i + 1] for i in range(pairs)] * steps)[-1][1]
        out = into - stay
        all_in, slope, half = (pages + (steps - 1) * each for each in (pages, lacking, pairs))
        twice = pages + steps * again
        wrong = {
            "first-forgotten": [(into - pages, out), (out, out), (into - pages, into - pages)],
            "first-twice": [(twice, twice - stay)],
            "stay-forgotten": [(into, into), (into, into - pages)],
            "out-forgotten": [(into, 0)],
            "all-fault": [(all_in, all_in - stay)],
            "slope": [(slope, slope - stay)],
            "half-fault": [(half, half - stay)],
            "one-state": [(pairs, 0), (pairs * steps, pairs * steps - room)],
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
        def each(min_paged=min_paged, min_8bit=min_8bit) -> list[tuple[int, int, bool]]:
            short = [bits == 8 and n >= min_8bit for n in sizes]
            rows = [(n, 4 * _up(n, block)) if s else (4 * n, 0) for n, s in zip(sizes, short, strict=True)]
            return 2 * [(*row, n >= min_paged) for row, n in zip(rows, sizes, strict=True)]  # m and v

        found = each()
        paged, rest = right = _in_all(found, page)
        raw = sum(n for n, _, large in found if large)
        scales, full = sum(s for _, s, _ in found), sum(n // block * 4 for n, s, _ in found if s)
        twins = sum(page * _up(2 * n, page) for n, _, large in found if large) // 2
        once, twice = ([(n, s, times * n >= min_paged) for n, s, _ in found] for times in (1, 2))
        joined = [(n + s, 0, True) if large else (n, s, False) for n, s, large in found]
        apart = [*found, *((s, -s, True) for _, s, large in found if large)]
        wrong = {
            "one-state": [(paged // 2, rest // 2)],
            "pages-partial": [(raw, rest), (raw // page * page, rest)],
            "pages-shared": [(twins, rest), (page * _up(raw, page), rest)],
            "threshold": [_in_all(each(min_paged + 1), page), _in_all(each(min_8bit=min_8bit + 1), page)],
            "bytes-compared": [_in_all(twice, page), _in_all(once, page)],
            "small-in-8": [_in_all(each(min_8bit=0), page)],
            "scales-short": [(paged, rest - scales + some) for some in (0, scales // 4, scales // 2)],
            "scales-partial": [(paged, rest - scales + full)],
            "scales-paged": [_in_all(joined, page), _in_all(apart, page)],
            "rest-rounded": [(paged, page * _up(rest, page))],
        }
        what = f"for sizes {sizes}, bits = {bits}, page = {page}, min_paged = {min_paged}, "
        what = f"bytes paged and not paged, {what}min_8bit = {min_8bit}, block = {block}"
        _pair(answer(sizes, bits, page, min_paged, min_8bit, block), right, what, wrong)

    for bits, page, min_paged in ((32, 4096, 10**5), (8, 4096, 10**5), (8, 1000, 10**4), (32, 2**16, 5001)):
        min_8bit, block = draw.choice([4096, 4500]), draw.choice([256, 100])
        near = [limit + more for limit in (min_paged, min_8bit) for more in (-1, 0, 1)]
        others = [1, block, 3 * block + 1, 7 * page, draw.whole(10, 10**7), draw.whole(10, 10**4)]
        large = [page * draw.whole(150, 999) + more for more in (-1, 5)]
        for sizes in (large, [min_paged // 2 + 1, 77], near, others, []):
            case(sizes, bits, page, min_paged, min_8bit, block)


@exercise("07-accumulate")
def accumulate(answer: Answer, draw: Draw) -> None:
    """`f(w, batches, max_norm)`: gradient of the mean loss over all scored tokens, its norm at most max_norm."""
    # Tokens of each micro-batch, how many of them are not scored, and whether the norm is above max_norm.
    for tokens, unscored, clipped in (
        ((6, 2, 3), (0, 0, 0), False),
        ((5, 9, 2, 1), (1, 6, 0, 0), False),
        ((8, 3, 4), (3, 0, 2), True),
        ((4, 3, 6), (0, 3, 1), True),
        ((3, 2), (3, 2), False),
        ((2, 1), (1, 1), False),
        ((1,), (0,), True),
    ):
        classes, n_in = draw.whole(4, 7), draw.whole(2, 9)
        w, x = draw.normal(classes, n_in), draw.normal(sum(tokens), n_in)
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
        max_norm = 0.3 * min(norms) if clipped else 19 * sum(norms) + 0.1

        def clip(gradient: Tensor, most: float = max_norm) -> Tensor:
            return gradient * min(1, most / max(gradient.norm().item(), 1e-30))

        shares = [part / total for part in parts]
        *_, in_turn = running([0 * right, *shares], lambda a, b, clip=clip: clip(a + b))
        means = sum(part / max(n, 1) for part, n in zip(parts, scored, strict=True))
        weighted = sum(p / max(n, 1) * len(b) for p, n, b in zip(parts, scored, x.split(tokens), strict=True))
        wrong = {
            "mean-of-means": [clip(means / len(parts)), clip(means)],
            "tokens-counted": [clip(sum(parts) / len(x)), clip(weighted / len(x))],
            "not-divided": clip(sum(parts)),
            "clipped-in-turn": [in_turn, sum(map(clip, shares))],
            "clipped-undivided": clip(sum(parts)) / total,
            "not-clipped": right,
            "scaled-up": right * max_norm / max(right.norm().item(), 1e-30),
            "clamped": right.clamp(-max_norm, max_norm),
        }
        # A chance is off by twice what its logits are, and some roundings; the rest is one product of matrices.
        logits = expect.dot_error(x, w.T).amax(dim=1, keepdim=True).expand(-1, classes)
        error = (expect.dot_error(off.T, x) + (2 * logits + 8 * expect.EPSILON).T @ x.double().abs()) / total
        if clipped:  # torch's way of clipping divides by the norm + 1e-6
            share, norm = max_norm / right.norm(), right.norm()
            error = share * (error + right.abs() * ((error.norm() + 1e-6) / norm + 8 * expect.EPSILON))
        what = f"the gradient, for micro-batches {tokens} with {scored} scored, max_norm = {max_norm:.3g}"
        batches = list(zip(x.split(tokens), labels.split(tokens), strict=True))
        got = expect.tensor(answer(w, batches, max_norm, inplace=True), what, right.shape)
        expect.true(not got.isnan().any(), what, "nothing-scored", right.flatten()[0].item(), float("nan"))
        expect.close(got, clip(right), what, error, wrong, torch.float32)


def _programs(draw: Draw) -> dict[str, tuple[list[int], int]]:
    """Three programs: the pages that they touch, and the room. What number a page has says nothing."""
    names, times = draw.permutation(1000).tolist(), range(300)
    sweep, loop = draw.whole(18, 21), draw.whole(22, 25)
    chances = list(running(1 / (i + 1) for i in range(40)))
    favourites = [bisect(chances, draw.number(0, 0.999999 * chances[-1])) for _ in times]
    both = [loop + draw.whole(0, 5) if i % 3 == 2 else (i - i // 3) % loop for i in times]
    programs = {
        "sweep": ([i % sweep for i in times], sweep - 4),
        "favourites": (favourites, 12),
        "both": (both, loop - 8),
    }
    return {name: ([names[page] for page in touches], room) for name, (touches, room) in programs.items()}


def _belady(touches: list[int], pages: list[int], history: list[int]) -> int:
    ahead = touches[len(history) :]
    return max(pages, key=lambda page: ahead.index(page) if page in ahead else len(ahead))


def _faults(sets: list[dict], leaves: Callable | None = None) -> dict[str, int]:
    """The faults in each program, summed over sets of them.

    leaves: as for `_touched`; None for the choice of one who knows the future.
    """
    faults = dict.fromkeys(sets[0], 0)
    for programs in sets:
        for name, (touches, room) in programs.items():
            calls = [[page] for page in touches]
            faults[name] += _touched(room, calls, leaves or partial(_belady, touches))[-1][1]
    return faults


@exercise("07-evict")
def evict(answer: Answer, draw: Draw) -> Score:
    """`f(history, pages)`: which of the pages leaves, given all touches so far."""

    def asked(pages: list[int], history: list[int]) -> int:
        page = answer(history, sorted(pages))
        page = page.item() if isinstance(page, Tensor) and page.numel() == 1 else page
        expect.true(type(page) is int, "the page that leaves", "wrong-type", "a page", page)
        expect.true(page in pages, "the page that leaves", "not-there", f"one of {sorted(pages)}", page)
        return page

    rivals = {
        "least recently used": _oldest,
        "first in, first out": lambda pages, history: pages[0],
        "most recently used": _newest,
        "Belady, knowing the future": None,
    }
    # Two fresh sets, so that chance decides little; then that of the scoreboard.
    for sets in ([_programs(draw), _programs(draw)], [_programs(Draw(7))]):
        faults, found = _faults(sets, asked), [_faults(sets, rival) for rival in rivals.values()]
        total, bound = sum(faults.values()), found[-1]
        if len(sets) > 1 and 3 * total > 4 * sum(bound.values()):
            worst = max(faults, key=lambda name, f=faults, b=bound: f[name] / b[name])
            known = zip(("like-lru", "like-fifo", "like-mru"), found[:-1], strict=True)
            mistake = next((name for name, other in known if other == faults), f"{worst}-lost")
            got = ", ".join(f"{name} {faults[name]} (Belady {bound[name]})" for name in faults)
            most = f"at most {4 * sum(bound.values()) // 3}"
            expect.fail("the faults in two times three programs", most, f"{total}: {got}", mistake)
    scores = [sum(faults.values()) for faults in found]
    return Score(total, "page faults", dict(zip(rivals, scores, strict=True)))
