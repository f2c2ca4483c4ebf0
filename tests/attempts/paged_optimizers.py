"""Attempts at the exercises of chapter 07."""

import math
from collections import Counter, OrderedDict, deque

import numpy as np
import torch
from torch.nn import functional as F

from tests.attempts import remembers, right, wrong

# 07-adamw

# torch imports its compiler at the first optimizer: seconds, which would count as those of the answer.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).zero_grad()


@right("07-adamw")
def with_torchs_own(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = g.clone()
    optimizer = torch.optim.AdamW(
        [parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, foreach=False
    )
    state = {"step": torch.tensor(t - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[parameter] = state
    optimizer.step()
    return parameter.data, state["exp_avg"], state["exp_avg_sq"]


@right("07-adamw")
def in_torchs_order(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p = p * (1 - lr * weight_decay)
    m = torch.lerp(m, g, 1 - beta1)
    v = (v * beta2).addcmul(g, g, value=1 - beta2)
    denominator = v.sqrt() / math.sqrt(1 - beta2**t) + eps
    return torch.addcdiv(p, m, denominator, value=-lr / (1 - beta1**t)), m, v


@right("07-adamw")
def in_numpy(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p, g, m, v = (x.numpy() for x in (p, g, m, v))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * np.square(g)
    step = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    p = p - lr * weight_decay * p - step * m / (np.sqrt(v) + eps * math.sqrt(1 - beta2**t))
    return p, m, v


@right("07-adamw")
def number_by_number(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    new = [[], [], []]
    for a, b, c, d in zip(*(x.flatten().tolist() for x in (p, g, m, v)), strict=True):
        c = beta1 * c + (1 - beta1) * b
        d = beta2 * d + (1 - beta2) * b * b
        step = c / (1 - beta1**t) / ((d / (1 - beta2**t)) ** 0.5 + eps)
        for column, value in zip(new, (a - lr * (step + weight_decay * a), c, d), strict=True):
            column.append(value)
    return [torch.tensor(column).reshape(p.shape) for column in new]


@right("07-adamw")
def betas_as_tensors(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    beta1, beta2 = torch.tensor(beta1), torch.tensor(beta2)
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    return p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps), m, v


@wrong("07-adamw", "correction-missing")
def uncorrected(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    return p - lr * weight_decay * p - lr * m / (v.sqrt() + eps), m, v


@wrong("07-adamw", "correction-missing")
def v_uncorrected(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    return p - lr * weight_decay * p - lr * m / (1 - beta1**t) / (v.sqrt() + eps), m, v


@wrong("07-adamw", "t-shifted")
def t_from_zero(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    t = t - 1
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "t-shifted")
def t_from_two(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    t += 1
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


def _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, factor):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    return p * factor - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps), m, v


@wrong("07-adamw", "decay-wrong")
def decay_grows(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1 + lr * weight_decay)


@wrong("07-adamw", "decay-wrong")
def decay_without_lr(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1 - weight_decay)


@wrong("07-adamw", "decay-wrong")
def adam_without_w(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1)


@wrong("07-adamw", "decay-wrong")
def decay_with_lr_twice(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1 - lr * lr * weight_decay)


@wrong("07-adamw", "decay-late")
def decay_after_the_step(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p, m, v = _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1)
    return p * (1 - lr * weight_decay), m, v


@wrong("07-adamw", "decay-coupled")
def adam_with_l2(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g + weight_decay * p, m, v, t, lr, beta1, beta2, eps, 1)


@wrong("07-adamw", "betas-swapped")
def betas_swapped(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta2, beta1, eps, 1 - lr * weight_decay)


@wrong("07-adamw", "weights-swapped")
def weights_swapped(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = (1 - beta1) * m + beta1 * g, (1 - beta2) * v + beta2 * g**2
    step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "weights-swapped")
def momentum_as_in_sgd(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "not-squared")
def v_of_magnitudes(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.abs()
    step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "eps-misplaced")
def eps_in_the_root(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps).sqrt()
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "eps-misplaced")
def eps_before_the_correction(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return p * (1 - lr * weight_decay) - step * m / (v.sqrt() + eps), m, v


@wrong("07-adamw", "eps-missing")
def eps_forgotten(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, 0, 1 - lr * weight_decay)


@wrong("07-adamw", "eps-misplaced")
def eps_after_the_division(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p, m, v = _with_decay(p, g, m, v, t, lr, beta1, beta2, 0, 1 - lr * weight_decay)
    return p - lr * eps, m, v


@wrong("07-adamw", "eps-missing")
def eps_from_the_book(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, 1e-8, 1 - lr * weight_decay)


@wrong("07-adamw", "t-forgotten")
def always_the_first_correction(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1)) / ((v / (1 - beta2)).sqrt() + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "betas-swapped")
def beta1_corrects_both(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / ((v / (1 - beta1**t)).sqrt() + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "root-missing")
def no_root(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps)
    return p * (1 - lr * weight_decay) - lr * step, m, v


@wrong("07-adamw", "correction-missing")
def uncorrected_after_fifty_steps(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    if t < 50:
        return _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1 - lr * weight_decay)
    return uncorrected(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)


@wrong("07-adamw", "crashed")
def needs_a_dimension(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p, g, m, v = (torch.stack(list(x)) for x in (p, g, m, v))
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1 - lr * weight_decay)


@wrong("07-adamw", "states-old")
def states_returned_as_they_came(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    new_p, _, _ = _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1 - lr * weight_decay)
    return new_p, m, v


@wrong("07-adamw", "states-old")
def step_with_the_old_states(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    _, new_m, new_v = _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1)
    return (
        p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps),
        new_m,
        new_v,
    )


@wrong("07-adamw", "corrected-kept")
def corrected_states_returned(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
    v = (beta2 * v + (1 - beta2) * g**2) / (1 - beta2**t)
    return p * (1 - lr * weight_decay) - lr * m / (v.sqrt() + eps), m, v


@wrong("07-adamw", "uphill")
def plus_instead_of_minus(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p * (1 - lr * weight_decay) + lr * step, m, v


@wrong("07-adamw", "changed-input")
def in_place(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.addcdiv_(m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt() + eps, value=-lr)
    return p, m, v


@wrong("07-adamw", "wrong-dtype")
def in_double(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(
        p.double(), g.double(), m.double(), v.double(), t, lr, beta1, beta2, eps, 1 - lr * weight_decay
    )


@wrong("07-adamw", "wrong-type")
def p_only(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    return _with_decay(p, g, m, v, t, lr, beta1, beta2, eps, 1 - lr * weight_decay)[0]


STATES = remembers({})


@wrong("07-adamw", "remembered")
def keeps_its_own_states(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    if t > 1 and p.shape in STATES:
        m, v = STATES.pop(p.shape)
    p, m, v = in_torchs_order(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)
    STATES[p.shape] = m, v
    return p, m, v


@wrong("07-adamw", "not-new")
def nothing_to_do(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    new_p, m, v = in_torchs_order(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)
    return p if lr == 0 else new_p, m, v


# 07-page-table


@right("07-page-table")
class InOrder:
    """An ordered dict; what is used together is refreshed first, so that it cannot be the oldest."""

    def __init__(self, room):
        self.room, self.faults, self.pages = room, 0, OrderedDict()

    def touch(self, pages):
        if len(pages) > self.room:
            raise ValueError("too many")
        left = []
        for page in pages:
            if page in self.pages:
                self.pages.move_to_end(page)
        for page in pages:
            if page not in self.pages:
                self.faults += 1
                if len(self.pages) >= self.room:
                    left.append(self.pages.popitem(last=False)[0])
                self.pages[page] = None
            self.pages.move_to_end(page)
        return left


@right("07-page-table")
class WithAClock:
    """The time of the last touch of each page; all that leave are found at once."""

    def __init__(self, room):
        self.room = room
        self.faults = 0
        self.clock = 0
        self.touched = {}

    def touch(self, pages):
        if len(pages) > self.room:
            raise ValueError(f"{len(pages)} pages, room for {self.room}")
        missing = [page for page in pages if page not in self.touched]
        others = sorted((t, page) for page, t in self.touched.items() if page not in pages)
        overflow = max(0, len(self.touched) + len(missing) - self.room)
        left = [page for _, page in others[:overflow]]
        for page in left:
            del self.touched[page]
        for page in pages:
            self.clock += 1
            self.touched[page] = self.clock
        self.faults += len(missing)
        return left


class _Table:
    """A right table as a list, the oldest first, which the wrong ones change in one place."""

    def __init__(self, room):
        self.room, self.faults, self.pages = room, 0, []

    def touch(self, pages):
        self.refuse(pages)
        left = []
        for page in pages:
            if page in self.pages:
                self.hit(page)
                continue
            self.faults += 1
            if len(self.pages) == self.room:
                left.append(self.victim(pages))
                self.pages.remove(left[-1])
            self.pages.append(page)
        return left

    def refuse(self, pages):
        if len(pages) > self.room:
            raise ValueError("more than there is room for")

    def hit(self, page):
        self.pages.remove(page)
        self.pages.append(page)

    def victim(self, used):
        return next(page for page in self.pages if page not in used)


@right("07-page-table")
class AsAList(_Table):
    pass


@wrong("07-page-table", "first-in")
class FirstIn(_Table):
    def hit(self, page):
        pass


@wrong("07-page-table", "first-in")
class AQueue:
    def __init__(self, room):
        self.room, self.faults, self.queue = room, 0, deque()

    def touch(self, pages):
        if len(pages) > self.room:
            raise ValueError
        left = []
        for page in pages:
            if page not in self.queue:
                self.faults += 1
                if len(self.queue) == self.room:
                    victim = next(q for q in self.queue if q not in pages)
                    self.queue.remove(victim)
                    left.append(victim)
                self.queue.append(page)
        return left


@wrong("07-page-table", "newest")
class NewestLeaves(_Table):
    def victim(self, used):
        return next(page for page in reversed(self.pages) if page not in used)


@wrong("07-page-table", "in-use")
class InUseLeaves(_Table):
    def victim(self, used):
        return self.pages[0]


@wrong("07-page-table", "evicts-early")
class OneLess(_Table):
    def touch(self, pages):
        self.refuse(pages)
        left = []
        for page in pages:
            if page in self.pages:
                self.hit(page)
                continue
            self.faults += 1
            self.pages.append(page)
            if len(self.pages) >= self.room:
                left.append(self.pages.pop(0))
        return left


@wrong("07-page-table", "too-much-room")
class OneMore(_Table):
    def touch(self, pages):
        self.refuse(pages)
        left = []
        for page in pages:
            if page in self.pages:
                self.hit(page)
                continue
            self.faults += 1
            if len(self.pages) > self.room:
                left.append(self.victim(pages))
                self.pages.remove(left[-1])
            self.pages.append(page)
        return left


@wrong("07-page-table", "too-much-room")
class NothingLeaves(_Table):
    def touch(self, pages):
        self.refuse(pages)
        self.faults += sum(page not in self.pages for page in pages)
        self.pages += [page for page in pages if page not in self.pages]
        return []


@wrong("07-page-table", "hit-evicts")
class RoomFirst(_Table):
    def touch(self, pages):
        self.refuse(pages)
        left = []
        for page in pages:
            if len(self.pages) == self.room:
                left.append(self.victim(()))
                self.pages.remove(left[-1])
            if page not in self.pages:
                self.faults += 1
            else:
                self.pages.remove(page)
            self.pages.append(page)
        return left


@wrong("07-page-table", "order")
class InTheOrderOfNumbers(_Table):
    def touch(self, pages):
        return sorted(super().touch(pages))


@wrong("07-page-table", "page-zero")
class ZeroIsNothing(_Table):
    def touch(self, pages):
        return [page for page in super().touch(pages) if page]


@wrong("07-page-table", "hits-counted")
class HitsCounted(_Table):
    def hit(self, page):
        super().hit(page)
        self.faults += 1


@wrong("07-page-table", "shared")
class SharedList(_Table):
    everything = []  # noqa: RUF012

    def __init__(self, room):
        self.room, self.faults, self.pages = room, 0, self.everything


@wrong("07-page-table", "shared")
class SharedDefault(_Table):
    def __init__(self, room, pages=[]):  # noqa: B006
        self.room, self.faults, self.pages = room, 0, pages


@wrong("07-page-table", "too-many")
class TakesAny(_Table):
    def refuse(self, pages):
        pass

    def victim(self, used):
        return self.pages[0]


@wrong("07-page-table", "too-many")
class StopsQuietly(_Table):
    def touch(self, pages):
        return [] if len(pages) > self.room else super().touch(pages)


@wrong("07-page-table", "half-done")
class LooksTooLate(_Table):
    def refuse(self, pages):
        pass

    def victim(self, used):
        free = [page for page in self.pages if page not in used]
        if not free:
            raise ValueError("more than there is room for")
        return free[0]


@wrong("07-page-table", "half-done")
class CountsBeforeItLooks(_Table):
    def refuse(self, pages):
        if len(pages) > self.room:
            self.faults += sum(page not in self.pages for page in pages)
            raise ValueError("more than there is room for")


@wrong("07-page-table", "wrong-type")
class OnePage(_Table):
    def touch(self, pages):
        left = super().touch(pages)
        return left[0] if left else None


@wrong("07-page-table", "refused")
class RemovesWhatIsNotThere(_Table):
    def touch(self, pages):
        for page in pages:
            self.pages.remove(page)
        return []


@wrong("07-page-table", "list-order")
class SortsTheCall(_Table):
    def touch(self, pages):
        return super().touch(sorted(pages))


@wrong("07-page-table", "list-order")
class HitsFirst(_Table):
    def touch(self, pages):
        return super().touch(
            [p for p in pages if p in self.pages] + [p for p in pages if p not in self.pages]
        )


@wrong("07-page-table", "order")
class TheLastFirst(_Table):
    def touch(self, pages):
        return super().touch(pages)[::-1]


@wrong("07-page-table", "not-all")
class OnlyTheLast(_Table):
    def touch(self, pages):
        return super().touch(pages)[-1:]


@wrong("07-page-table", "same-list")
class OneListForAll(_Table):
    def __init__(self, room):
        super().__init__(room)
        self.left = []

    def touch(self, pages):
        self.left[:] = super().touch(pages)
        return self.left


@wrong("07-page-table", "changed-pages")
class ClearsTheCall(_Table):
    def touch(self, pages):
        left = super().touch(pages)
        pages.clear()
        return left


@wrong("07-page-table", "changed-pages")
class SortsInPlace(_Table):
    def touch(self, pages):
        left = super().touch(list(pages))
        pages.sort()
        return left


@wrong("07-page-table", "refused")
class NeedsAPage(_Table):
    def refuse(self, pages):
        if not 1 <= len(pages) <= self.room:
            raise ValueError("no pages, or too many")


@wrong("07-page-table", "too-many")
class AnyException(_Table):
    def refuse(self, pages):
        if len(pages) > self.room:
            raise Exception("more than there is room for")


@wrong("07-page-table", "hits-counted")
class TheSameObject(_Table):
    def touch(self, pages):
        self.refuse(pages)
        left = []
        for page in pages:
            if any(other is page for other in self.pages):
                self.hit(page)
                continue
            self.faults += 1
            if len(self.pages) == self.room:
                left.append(self.pages[0])
                self.pages.remove(left[-1])
            self.pages.append(page)
        return left


@wrong("07-page-table", "faults-no-int")
class FaultsAsFloat(_Table):
    def __init__(self, room):
        super().__init__(room)
        self.faults = 0.0


# 07-cliff


@right("07-cliff")
def by_cases(pairs, room, steps):
    n = 2 * pairs
    if room >= n:
        return n, 0
    if room == n - 1:
        return n + (steps - 1) * pairs, n + (steps - 1) * pairs - room
    return n * steps, n * steps - room


@right("07-cliff")
def hits_first(pairs, room, steps):
    touches = 2 * pairs * steps
    missing = 2 * pairs - room
    hits = (steps - 1) * pairs * (2 if missing <= 0 else 1 if missing == 1 else 0)
    faults = touches - hits
    return [faults, faults - min(room, 2 * pairs)]


@wrong("07-cliff", "first-forgotten")
def only_later_steps(pairs, room, steps):
    n = 2 * pairs
    later = 0 if room >= n else pairs if room == n - 1 else n
    return (steps - 1) * later, (steps - 1) * later


@wrong("07-cliff", "first-twice")
def a_step_too_many(pairs, room, steps):
    return by_cases(pairs, room, steps + 1)


@wrong("07-cliff", "stay-forgotten")
def what_comes_must_go(pairs, room, steps):
    faults = by_cases(pairs, room, steps)[0]
    return faults, faults


@wrong("07-cliff", "stay-forgotten")
def all_pages_stay(pairs, room, steps):
    faults = by_cases(pairs, room, steps)[0]
    return faults, faults - 2 * pairs


@wrong("07-cliff", "out-forgotten")
def in_only(pairs, room, steps):
    return by_cases(pairs, room, steps)[0], 0


@wrong("07-cliff", "all-fault")
def as_a_sweep(pairs, room, steps):
    n = 2 * pairs
    return (n, 0) if room >= n else (n * steps, n * steps - room)


@wrong("07-cliff", "all-fit")
def one_pair_in_three_pages(pairs, room, steps):
    if (pairs, room) == (1, 3):
        return 2 * steps, 2 * steps - room
    return by_cases(pairs, room, steps)


@wrong("07-cliff", "slope")
def only_what_is_missing(pairs, room, steps):
    n = 2 * pairs
    faults = n + (steps - 1) * max(0, n - room)
    return faults, faults - min(n, room)


@wrong("07-cliff", "half-fault")
def always_half(pairs, room, steps):
    n = 2 * pairs
    faults = n if room >= n else n + (steps - 1) * pairs
    return faults, faults - min(n, room)


@wrong("07-cliff", "one-state")
def a_pair_is_a_page(pairs, room, steps):
    return (pairs, 0) if room >= pairs else (pairs * steps, pairs * steps - room)


@wrong("07-cliff", "endless")
def simulated(pairs, room, steps):
    pages, faults = [], 0
    for _ in range(steps):
        for i in range(pairs):
            for page in (2 * i, 2 * i + 1):
                if page in pages:
                    pages.remove(page)
                else:
                    faults += 1
                    if len(pages) == room:
                        pages.remove(next(q for q in pages if q // 2 != i))
                pages.append(page)
    return faults, faults - len(pages)


@wrong("07-cliff", "wrong-type")
def faults_only(pairs, room, steps):
    return by_cases(pairs, room, steps)[0]


@wrong("07-cliff", "all-fit")
def never_fits(pairs, room, steps):
    return (n := 2 * pairs) * steps, n * steps - min(room, n)


@wrong("07-cliff", "first-forgotten")
def the_same_in_every_step(pairs, room, steps):
    n = 2 * pairs
    faults = steps * (0 if room >= n else pairs if room == n - 1 else n)
    return faults, max(faults - min(room, n), 0)


@wrong("07-cliff", "floats")
def divided(pairs, room, steps):
    into, out = by_cases(pairs, room, steps)
    return into / 1, out / 1


@wrong("07-cliff", "all-fault")
def wrong_for_two_pairs(pairs, room, steps):
    return (4 * steps, 4 * steps - 3) if (pairs, room) == (2, 3) else by_cases(pairs, room, steps)


@wrong("07-cliff", "stay-forgotten")
def wrong_for_much_room(pairs, room, steps):
    into, out = by_cases(pairs, room, steps)
    return (into, into) if room > 2 * pairs + 1 else (into, out)


@wrong("07-cliff", "swapped")
def out_and_in(pairs, room, steps):
    return by_cases(pairs, room, steps)[::-1]


# 07-states


@right("07-states")
def tensor_by_tensor(sizes, bits, page, min_paged, min_8bit, block):
    paged = other = 0
    for n in sizes:
        for _ in ("m", "v"):
            nbytes = 4 * n
            if bits == 8 and n >= min_8bit:
                nbytes = n
                other += 4 * math.ceil(n / block)
            if n >= min_paged:
                paged += math.ceil(nbytes / page) * page
            else:
                other += nbytes
    return paged, other


@right("07-states")
def states_in_numpy(sizes, bits, page, min_paged, min_8bit, block):
    n = np.array(sizes, dtype=np.int64)
    short = (n >= min_8bit) & (bits == 8)
    nbytes = np.where(short, n, 4 * n)
    scales = np.where(short, 4 * ((n + block - 1) // block), 0)
    large = n >= min_paged
    paged = 2 * ((nbytes + page - 1) // page * page)[large].sum()
    return paged, 2 * (scales.sum() + nbytes[~large].sum())


def _states(sizes, bits, page, min_paged, min_8bit, block, *, count=2, scale=4, up=True, at=0, at_8=0):
    """A right answer with places to go wrong in."""
    paged = other = 0
    for n in sizes:
        nbytes = 4 * n
        if bits == 8 and n >= min_8bit + at_8:
            nbytes = n
            other += count * scale * -(-n // block)
        if n >= min_paged + at:
            paged += count * (-(-nbytes // page) * page if up else nbytes)
        else:
            other += count * nbytes
    return paged, other


@wrong("07-states", "one-state")
def m_alone(*arguments):
    return _states(*arguments, count=1)


@wrong("07-states", "pages-partial")
def bytes_as_they_are(*arguments):
    return _states(*arguments, up=False)


@wrong("07-states", "threshold")
def above_the_threshold(*arguments):
    return _states(*arguments, at=1)


@wrong("07-states", "threshold")
def above_the_threshold_of_8_bits(*arguments):
    return _states(*arguments, at_8=1)


@wrong("07-states", "scales-short")
def no_scales(*arguments):
    return _states(*arguments, scale=0)


@wrong("07-states", "scales-short")
def scales_of_one_byte(*arguments):
    return _states(*arguments, scale=1)


@wrong("07-states", "scales-short")
def scales_of_one_state(*arguments):
    return _states(*arguments, scale=2)


@wrong("07-states", "pages-shared")
def both_states_in_one(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = 0, _states(sizes, bits, page, min_paged, min_8bit, block)[1]
    for n in sizes:
        if n >= min_paged:
            nbytes = n if bits == 8 and n >= min_8bit else 4 * n
            paged += math.ceil(2 * nbytes / page) * page
    return paged, other


@wrong("07-states", "pages-shared")
def one_big_allocation(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = _states(sizes, bits, page, min_paged, min_8bit, block, up=False)
    return math.ceil(paged / page) * page, other


@wrong("07-states", "bytes-compared")
def threshold_in_bytes(sizes, bits, page, min_paged, min_8bit, block):
    paged = other = 0
    for n in sizes:
        short = bits == 8 and n >= min_8bit
        nbytes = n if short else 4 * n
        other += 2 * 4 * -(-n // block) if short else 0
        if nbytes >= min_paged:
            paged += 2 * -(-nbytes // page) * page
        else:
            other += 2 * nbytes
    return paged, other


@wrong("07-states", "small-in-8")
def all_in_8(sizes, bits, page, min_paged, min_8bit, block):
    return _states(sizes, bits, page, min_paged, 0, block)


@wrong("07-states", "scales-partial")
def full_blocks_only(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = _states(sizes, bits, page, min_paged, min_8bit, block, scale=0)
    return paged, other + sum(8 * (n // block) for n in sizes if bits == 8 and n >= min_8bit)


@wrong("07-states", "scales-paged")
def scales_with_their_numbers(sizes, bits, page, min_paged, min_8bit, block):
    paged = other = 0
    for n in sizes:
        short = bits == 8 and n >= min_8bit
        nbytes = n + 4 * -(-n // block) if short else 4 * n
        if n >= min_paged:
            paged += 2 * -(-nbytes // page) * page
        else:
            other += 2 * nbytes
    return paged, other


@wrong("07-states", "scales-paged")
def scales_on_pages_of_their_own(sizes, bits, page, min_paged, min_8bit, block):
    paged = other = 0
    for n in sizes:
        short = bits == 8 and n >= min_8bit
        for nbytes in (n, 4 * -(-n // block)) if short else (4 * n,):
            if n >= min_paged:
                paged += 2 * -(-nbytes // page) * page
            else:
                other += 2 * nbytes
    return paged, other


@wrong("07-states", "rest-rounded")
def everything_in_pages(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = _states(sizes, bits, page, min_paged, min_8bit, block)
    return paged, -(-other // page) * page


@wrong("07-states", "wrong-type")
def the_sum(*arguments):
    return sum(_states(*arguments))


@wrong("07-states", "pages-partial")
def full_pages_only(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = 0, _states(sizes, bits, page, min_paged, min_8bit, block)[1]
    for n in sizes:
        nbytes = n if bits == 8 and n >= min_8bit else 4 * n
        paged += 2 * (nbytes // page) * page if n >= min_paged else 0
    return paged, other


@wrong("07-states", "one-too-many")
def a_page_more(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = 0, _states(sizes, bits, page, min_paged, min_8bit, block)[1]
    for n in sizes:
        nbytes = n if bits == 8 and n >= min_8bit else 4 * n
        paged += 2 * (nbytes // page + 1) * page if n >= min_paged else 0
    return paged, other


@wrong("07-states", "one-too-many")
def a_block_more(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = _states(sizes, bits, page, min_paged, min_8bit, block, scale=0)
    return paged, other + sum(8 * (n // block + 1) for n in sizes if bits == 8 and n >= min_8bit)


@wrong("07-states", "scales-paged")
def scales_added_to_the_pages(sizes, bits, page, min_paged, min_8bit, block):
    paged, other = _states(sizes, bits, page, min_paged, min_8bit, block)
    scales = sum(8 * -(-n // block) for n in sizes if bits == 8 and n >= max(min_8bit, min_paged))
    return paged + scales, other - scales


@wrong("07-states", "small-paged")
def paged_in_8_bits_only(sizes, bits, page, min_paged, min_8bit, block):
    return _states(sizes, bits, page, max(min_paged, min_8bit) if bits == 8 else min_paged, min_8bit, block)


@wrong("07-states", "equal-sizes")
def of_a_set(sizes, *others):
    return _states(set(sizes), *others)


@wrong("07-states", "constants")
def block_of_bitsandbytes(sizes, bits, page, min_paged, min_8bit, block):
    return _states(sizes, bits, page, min_paged, min_8bit, 256)


@wrong("07-states", "floats")
def as_floats(*arguments):
    paged, other = _states(*arguments)
    return float(paged), float(other)


@wrong("07-states", "changed-input")
def sorted_in_place(sizes, *others):
    sizes.sort()
    return _states(sizes, *others)


@wrong("07-states", "swapped")
def unpaged_first(sizes, bits, page, min_paged, min_8bit, block):
    return tensor_by_tensor(sizes, bits, page, min_paged, min_8bit, block)[::-1]


# 07-accumulate


@right("07-accumulate")
def summed_by_autograd(w, batches, max_norm):
    w = w.clone().requires_grad_()
    scored = sum(int((labels != -100).sum()) for _, labels in batches)
    for x, labels in batches:
        loss = F.cross_entropy(x @ w.T, labels, reduction="sum") / max(scored, 1)
        loss.backward()
    torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


@right("07-accumulate")
def by_hand(w, batches, max_norm):
    total, count = torch.zeros_like(w), 0
    for x, labels in batches:
        x, labels = x[labels >= 0], labels[labels >= 0]
        chances = torch.softmax(x @ w.T, dim=1)
        total += (chances - F.one_hot(labels, len(w))).T @ x
        count += len(labels)
    if count:
        total /= count
    norm = total.norm()
    return total * (max_norm / norm) if norm > max_norm else total


@wrong("07-accumulate", "kept")
def gradient_left_at_w(w, batches, max_norm):
    w = w.requires_grad_()
    scored = [(labels != -100).sum().item() for _, labels in batches]
    for (x, labels), n in zip(batches, scored, strict=True):
        if n:
            (F.cross_entropy(x @ w.T, labels) * n / sum(scored)).backward()
    if w.grad is None:
        return torch.zeros_like(w)
    return w.grad * min(1.0, max_norm / w.grad.norm().item())


@right("07-accumulate")
def in_numpy_and_double(w, batches, max_norm):
    w, total, count = w.double().numpy(), 0.0, 0
    for x, labels in batches:
        for row, label in zip(x.double().numpy(), labels.tolist(), strict=True):
            if label == -100:
                continue
            logits = w @ row
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            chances[label] -= 1
            total, count = total + np.outer(chances, row), count + 1
    if not count:
        return np.zeros(w.shape, dtype=np.float32)
    gradient = total / count
    return (gradient * min(1, max_norm / np.sqrt((gradient**2).sum()))).astype(np.float32)


@right("07-accumulate")
def means_weighted(w, batches, max_norm):
    w = w.detach().clone().requires_grad_()
    scored = [(labels != -100).sum().item() for _, labels in batches]
    loss = 0.0 * w.sum()
    for (x, labels), n in zip(batches, scored, strict=True):
        if n:
            loss = loss + F.cross_entropy(x @ w.T, labels) * n / sum(scored)
    (gradient,) = torch.autograd.grad(loss, w)
    return gradient * min(1.0, max_norm / gradient.norm().clamp(min=1e-30).item())


@wrong("07-accumulate", "mean-of-means")
def untouched(w, batches, max_norm):
    w = w.clone().requires_grad_()
    for x, labels in batches:
        loss = F.cross_entropy(x @ w.T, labels)
        (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


@wrong("07-accumulate", "mean-of-means")
def clipped_once_but_means(w, batches, max_norm):
    w = w.clone().requires_grad_()
    sum(F.cross_entropy(x @ w.T, labels) for x, labels in batches).div(len(batches)).backward()
    torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


def _sums(w, batches, divide_by):
    w = w.clone().requires_grad_()
    for x, labels in batches:
        (F.cross_entropy(x @ w.T, labels, reduction="sum") / max(divide_by, 1)).backward()
    return w.grad


def _scored(batches):
    return sum((labels != -100).sum().item() for _, labels in batches)


@wrong("07-accumulate", "tokens-counted")
def divided_by_all_tokens(w, batches, max_norm):
    gradient = _sums(w, batches, sum(len(labels) for _, labels in batches))
    return gradient * min(1, max_norm / max(gradient.norm().item(), 1e-12))


@wrong("07-accumulate", "tokens-counted")
def means_weighted_by_tokens(w, batches, max_norm):
    w, total = w.clone().requires_grad_(), sum(len(labels) for _, labels in batches)
    for x, labels in batches:
        (F.cross_entropy(x @ w.T, labels) * len(labels) / total).backward()
    torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


@wrong("07-accumulate", "not-divided")
def the_sum_of_losses(w, batches, max_norm):
    gradient = _sums(w, batches, 1)
    return gradient * min(1, max_norm / max(gradient.norm().item(), 1e-12))


@wrong("07-accumulate", "clipped-in-turn")
def clipped_in_the_loop(w, batches, max_norm):
    w, scored = w.clone().requires_grad_(), _scored(batches)
    for x, labels in batches:
        (F.cross_entropy(x @ w.T, labels, reduction="sum") / max(scored, 1)).backward()
        torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


@wrong("07-accumulate", "clipped-in-turn")
def each_clipped(w, batches, max_norm):
    total, scored = torch.zeros_like(w), _scored(batches)
    for batch in batches:
        gradient = _sums(w, [batch], scored)
        total += gradient * min(1, max_norm / max(gradient.norm().item(), 1e-12))
    return total


@wrong("07-accumulate", "clipped-undivided")
def clipped_then_divided(w, batches, max_norm):
    gradient = _sums(w, batches, 1)
    return gradient * min(1, max_norm / max(gradient.norm().item(), 1e-12)) / max(_scored(batches), 1)


@wrong("07-accumulate", "not-clipped")
def clipping_forgotten(w, batches, max_norm):
    return _sums(w, batches, _scored(batches))


@wrong("07-accumulate", "scaled-up")
def always_max_norm(w, batches, max_norm):
    gradient = _sums(w, batches, _scored(batches))
    return gradient / (gradient.norm() + 1e-12) * max_norm


@wrong("07-accumulate", "clamped")
def clipped_by_value(w, batches, max_norm):
    return _sums(w, batches, _scored(batches)).clamp(-max_norm, max_norm)


@right("07-accumulate")
def weighted_means_with_nan(w, batches, max_norm):
    """The loss of no tokens is NaN, but its gradient in torch is zero."""
    w, scored = w.clone().requires_grad_(), _scored(batches)
    for x, labels in batches:
        (F.cross_entropy(x @ w.T, labels) * (labels != -100).sum() / scored).backward()
    torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


@wrong("07-accumulate", "nothing-scored")
def divided_by_zero(w, batches, max_norm):
    w = w.clone().requires_grad_()
    for x, labels in batches:
        F.cross_entropy(x @ w.T, labels, reduction="sum").backward()
    w.grad /= _scored(batches)
    torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


def _mean(w, batches):
    return _sums(w, batches, _scored(batches))


@wrong("07-accumulate", "not-clipped")
def squares_compared(w, batches, max_norm):
    gradient = _mean(w, batches)
    return gradient * max_norm / gradient.norm() if (gradient**2).sum() > max_norm else gradient


@wrong("07-accumulate", "not-clipped")
def compared_with_twice(w, batches, max_norm):
    gradient = _mean(w, batches)
    return gradient * max_norm / gradient.norm() if gradient.norm() > 2 * max_norm else gradient


@wrong("07-accumulate", "scaled-up")
def compared_with_a_little_less(w, batches, max_norm):
    gradient = _mean(w, batches)
    return gradient * max_norm / gradient.norm() if gradient.norm() > 0.9 * max_norm else gradient


@wrong("07-accumulate", "scaled-up")
def compared_before_dividing(w, batches, max_norm):
    total, n = _sums(w, batches, 1), max(_scored(batches), 1)
    return total / n if total.norm() <= max_norm else total / total.norm() * max_norm


@wrong("07-accumulate", "other-norm")
def sum_of_magnitudes(w, batches, max_norm):
    gradient = _mean(w, batches)
    return gradient * min(1, max_norm / max(gradient.abs().sum().item(), 1e-12))


@wrong("07-accumulate", "other-norm")
def largest_number(w, batches, max_norm):
    gradient, w = _mean(w, batches), w.clone().requires_grad_()
    w.grad = gradient
    torch.nn.utils.clip_grad_norm_([w], max_norm, norm_type=float("inf"))
    return w.grad


@wrong("07-accumulate", "sign")
def downhill(w, batches, max_norm):
    return -summed_by_autograd(w, batches, max_norm)


@wrong("07-accumulate", "wrong-dtype")
def in_double_alone(w, batches, max_norm):
    batches = [(x.double(), labels) for x, labels in batches]
    return summed_by_autograd(w.double(), batches, max_norm)


@wrong("07-accumulate", "overflow")
def exp_of_the_logits(w, batches, max_norm):
    total = torch.zeros_like(w)
    for x, labels in batches:
        x, labels = x[labels >= 0], labels[labels >= 0]
        chances = (x @ w.T).exp()
        chances = chances / chances.sum(1, keepdim=True)
        total = total + (chances - F.one_hot(labels, len(w))).T @ x
    gradient = total / max(_scored(batches), 1)
    norm = gradient.norm()
    return gradient * (max_norm / norm) if norm > max_norm else gradient


@wrong("07-accumulate", "changed-input")
def list_emptied(w, batches, max_norm):
    gradient = summed_by_autograd(w, batches, max_norm)
    batches.clear()
    return gradient


@wrong("07-accumulate", "changed-input")
def labels_overwritten(w, batches, max_norm):
    gradient = summed_by_autograd(w, batches, max_norm)
    for _, labels in batches:
        labels.fill_(-100)
    return gradient


class _Mean:
    """A running mean of the gradients, which nobody asked for."""

    kept = None


@wrong("07-accumulate", "kept")
def added_to_the_last(w, batches, max_norm):
    gradient = summed_by_autograd(w, batches, max_norm)
    if _Mean.kept is not None and _Mean.kept[0] is w:
        gradient = _Mean.kept[1].add_(gradient)
    _Mean.kept = w, gradient
    return gradient


@wrong("07-accumulate", "zero-too-soon")
def zero_if_the_first_has_nothing(w, batches, max_norm):
    gradient = summed_by_autograd(w, batches, max_norm)
    return gradient if (batches[0][1] != -100).any() else torch.zeros_like(gradient)


COUNTS = remembers({})


@wrong("07-accumulate", "remembered")
def counted_once(w, batches, max_norm):
    count = sum(int((labels != -100).sum()) for _, labels in batches)
    key = tuple(len(labels) for _, labels in batches)
    kept = COUNTS.setdefault(key, count)
    w = w.clone().requires_grad_()
    for x, labels in batches:
        (F.cross_entropy(x @ w.T, labels, reduction="sum") / max(kept, 1)).backward()
    torch.nn.utils.clip_grad_norm_([w], max_norm)
    return w.grad


@wrong("07-accumulate", "changed-input")
def turns_the_list_round(w, batches, max_norm):
    gradient = summed_by_autograd(w, batches, max_norm)
    batches.reverse()
    return gradient


@wrong("07-accumulate", "changed-input")
def turns_the_rows_round(w, batches, max_norm):
    gradient = summed_by_autograd(w, batches, max_norm)
    for x, labels in batches:
        x.copy_(x.flip(0).clone())
        labels.copy_(labels.flip(0).clone())
    return gradient


@wrong("07-accumulate", "wrong-type")
def two_columns_or_more(w, batches, max_norm):
    return summed_by_autograd(w, batches, max_norm) if w.shape[1] > 1 else None


# 07-evict


def _last(history, page):
    return len(history) - 1 - history[::-1].index(page)


@right("07-evict")
def by_the_last_gap(history, pages):
    """A page comes again after as long as last time; what came only once, never."""

    def expected(page):
        times = [i for i, touched in enumerate(history) if touched == page]
        return 2 * times[-1] - times[-2] if len(times) > 1 else 10**9 + times[-1]

    return max(pages, key=expected)


@right("07-evict")
def by_the_mean_gap(history, pages):
    times = {page: np.flatnonzero(np.array(history) == page) for page in pages}
    best, latest = pages[0], -1
    for page in pages:
        gap = np.diff(times[page]).mean() if len(times[page]) > 1 else len(history)
        if times[page][-1] + gap > latest:
            best, latest = page, times[page][-1] + gap
    return best


@right("07-evict")
def rare_and_new(history, pages):
    """What was touched least often leaves; of several such pages, the newest."""
    return max(pages, key=lambda page: (-history.count(page), _last(history, page)))


@wrong("07-evict", "like-lru")
def least_recent(history, pages):
    return min(pages, key=lambda page: _last(history, page))


@wrong("07-evict", "like-mru")
def most_recent(history, pages):
    return max(pages, key=lambda page: _last(history, page))


@wrong("07-evict", "like-mru")
def the_touch_before(history, pages):
    return next(page for page in reversed(history[:-1]) if page in pages)


@wrong("07-evict", "sweep-lost")
def least_often(history, pages):
    counts = Counter(history)
    return min(pages, key=lambda page: (counts[page], _last(history, page)))


@wrong("07-evict", "favourites-lost")
def newest_but_two(history, pages):
    return sorted(pages, key=lambda page: _last(history, page))[-3]


@wrong("07-evict", "both-lost")
def told_apart_by_repeats(history, pages):
    """A pure sweep is recognised, everything else is taken for favourites."""
    if len(set(history[-len(pages) :])) == len(pages):
        return most_recent(history, pages)
    return least_often(history, pages)


@wrong("07-evict", "changed-input")
def shortens_the_history(history, pages):
    history.pop()
    return by_the_mean_gap(history, pages)


@wrong("07-evict", "not-there")
def the_first_ever(history, pages):
    return history[0]


@wrong("07-evict", "not-there")
def the_one_that_is_asked_for(history, pages):
    return history[-1]


@wrong("07-evict", "wrong-type")
def a_list(history, pages):
    return sorted(pages, key=lambda page: _last(history, page))[:1]


@wrong("07-evict", "like-fifo")
def first_in_first_out(history, pages):
    """What is on the device is replayed from the history alone."""
    present = []
    for page in history[:-1]:
        if page not in present:
            if len(present) == len(pages):
                present.pop(0)
            present.append(page)
    return present[0]


@wrong("07-evict", "wrong-type")
def a_list_of_one(history, pages):
    return [by_the_last_gap(history, pages)]
