"""Attempts at the exercises of chapter 02."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.attempts import remembers, right, wrong

# 02-forward


@right("02-forward")
def with_einsum(x, weight, a, b, alpha, r):
    update = torch.einsum("or,ri,...i->...o", b, a, x)
    return torch.einsum("oi,...i->...o", weight, x) + update * alpha / r


@right("02-forward")
def one_matrix(x, weight, a, b, alpha, r):
    return F.linear(x, weight + (alpha / r) * b @ a)


@right("02-forward")
def in_numpy(x, weight, a, b, alpha, r):
    x, weight, a, b = (t.numpy() for t in (x, weight, a, b))
    return x @ weight.T + np.float32(alpha / r) * ((x @ a.T) @ b.T)


@wrong("02-forward", "scale-missing")
def unscaled(x, weight, a, b, alpha, r):
    return x @ weight.T + x @ a.T @ b.T


@wrong("02-forward", "alpha-not-divided")
def times_alpha(x, weight, a, b, alpha, r):
    return F.linear(x, weight) + alpha * F.linear(F.linear(x, a), b)


@wrong("02-forward", "root-of-r")
def rank_stabilized(x, weight, a, b, alpha, r):
    return F.linear(x, weight) + alpha / r**0.5 * F.linear(F.linear(x, a), b)


@wrong("02-forward", "base-missing")
def update_only(x, weight, a, b, alpha, r):
    return alpha / r * F.linear(F.linear(x, a), b)


@wrong("02-forward", "update-missing")
def base_only(x, weight, a, b, alpha, r):
    return F.linear(x, weight)


@wrong("02-forward", "base-scaled")
def all_scaled(x, weight, a, b, alpha, r):
    return (F.linear(x, weight) + F.linear(F.linear(x, a), b)) * alpha / r


@wrong("02-forward", "two-dimensions-only")
def rows_only(x, weight, a, b, alpha, r):
    return torch.mm(x, weight.T) + alpha / r * torch.mm(torch.mm(x, a.T), b.T)


@wrong("02-forward", "changed-input")
def in_place(x, weight, a, b, alpha, r):
    weight += alpha / r * b @ a
    return F.linear(x, weight)


@wrong("02-forward", "scale-inverted")
def r_over_alpha(x, weight, a, b, alpha, r):
    return F.linear(x, weight) + r / alpha * F.linear(F.linear(x, a), b)


@wrong("02-forward", "alpha-cut")
def whole_alpha(x, weight, a, b, alpha, r):
    return F.linear(x, weight) + int(alpha) / r * F.linear(F.linear(x, a), b)


@wrong("02-forward", "wrong-dtype")
def in_double(x, weight, a, b, alpha, r):
    x, weight, a, b = x.double(), weight.double(), a.double(), b.double()
    return F.linear(x, weight) + alpha / r * F.linear(F.linear(x, a), b)


@wrong("02-forward", "side-guessed")
def a_as_it_fits(x, weight, a, b, alpha, r):
    a = a if a.shape[0] == x.shape[-1] else a.T
    return x @ weight.T + alpha / r * (x @ a @ b.T)


@wrong("02-forward", "side-guessed")
def b_as_it_fits(x, weight, a, b, alpha, r):
    return x @ weight.T + alpha / r * (x @ a.T @ (b if b.shape[0] == r else b.T))


@wrong("02-forward", "alpha-cut")
def at_least_one(x, weight, a, b, alpha, r):
    return F.linear(x, weight) + max(1, alpha / r) * F.linear(F.linear(x, a), b)


@wrong("02-forward", "alpha-cut")
def without_sign(x, weight, a, b, alpha, r):
    return F.linear(x, weight) + abs(alpha) / r * F.linear(F.linear(x, a), b)


@wrong("02-forward", "not-contiguous")
def rows_by_view(x, weight, a, b, alpha, r):
    rows = x.view(-1, x.shape[-1])
    y = rows @ weight.T + alpha / r * rows @ a.T @ b.T
    return y.view(*x.shape[:-1], -1)


# 02-init


@right("02-init")
def kaiming(n_in, n_out, r):
    a = torch.empty(r, n_in)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, torch.zeros(n_out, r)


@right("02-init")
def from_a_linear(n_in, n_out, r):
    return nn.Linear(n_in, r, bias=False).weight, nn.Parameter(torch.zeros(n_out, r))


@wrong("02-init", "b-random")
def both_random(n_in, n_out, r):
    bound = n_in**-0.5
    return torch.empty(r, n_in).uniform_(-bound, bound), torch.randn(n_out, r) * 0.01


@wrong("02-init", "a-zero")
def both_zero(n_in, n_out, r):
    return torch.zeros(r, n_in), torch.zeros(n_out, r)


@wrong("02-init", "shapes-swapped")
def transposed(n_in, n_out, r):
    bound = n_in**-0.5
    return torch.empty(n_in, r).uniform_(-bound, bound), torch.zeros(r, n_out)


@wrong("02-init", "wrong-fan")
def fan_is_the_rank(n_in, n_out, r):
    bound = r**-0.5
    return torch.empty(r, n_in).uniform_(-bound, bound), torch.zeros(n_out, r)


@wrong("02-init", "wrong-fan")
def kaiming_with_a_zero(n_in, n_out, r):  # nn.init's default: sqrt(6 / in)
    return nn.init.kaiming_uniform_(torch.empty(r, n_in)), torch.zeros(n_out, r)


@wrong("02-init", "a-normal")
def normal(n_in, n_out, r):
    return torch.randn(r, n_in) / math.sqrt(n_in), torch.zeros(n_out, r)


@wrong("02-init", "a-normal")
def normal_of_the_same_spread(n_in, n_out, r):
    return torch.randn(r, n_in) / math.sqrt(3 * n_in), torch.zeros(n_out, r)


@wrong("02-init", "one-sided")
def from_rand(n_in, n_out, r):
    return torch.rand(r, n_in) / math.sqrt(n_in), torch.zeros(n_out, r)


@wrong("02-init", "seed-fixed")
def seeded(n_in, n_out, r):
    generator = torch.Generator().manual_seed(0)
    bound = n_in**-0.5
    return torch.empty(r, n_in).uniform_(-bound, bound, generator=generator), torch.zeros(n_out, r)


@wrong("02-init", "seed-ignored")
def seeded_by_the_clock(n_in, n_out, r):
    torch.seed()
    bound = n_in**-0.5
    return torch.empty(r, n_in).uniform_(-bound, bound), torch.zeros(n_out, r)


@wrong("02-init", "seed-ignored")
def from_numpy(n_in, n_out, r):
    a = np.random.default_rng().uniform(-(n_in**-0.5), n_in**-0.5, (r, n_in))
    return torch.tensor(a, dtype=torch.float32), torch.zeros(n_out, r)


@wrong("02-init", "uneven")
def clamped_normal(n_in, n_out, r):
    bound = n_in**-0.5
    return (torch.randn(r, n_in) / math.sqrt(3 * n_in)).clamp(-bound, bound), torch.zeros(n_out, r)


@wrong("02-init", "uneven")
def sum_of_two(n_in, n_out, r):
    a = (torch.rand(r, n_in) + torch.rand(r, n_in) - 1) * 0.999 / math.sqrt(n_in)
    a[0, 0] = n_in**-0.5
    return a, torch.zeros(n_out, r)


@wrong("02-init", "repeated")
def one_row_often(n_in, n_out, r):
    bound = n_in**-0.5
    rows = torch.empty(max(1, r // 2), n_in).uniform_(-bound, bound)
    return torch.cat([rows, rows, rows])[:r], torch.zeros(n_out, r)


@wrong("02-init", "repeated")
def mirrored(n_in, n_out, r):
    bound = n_in**-0.5
    half = torch.empty(r // 2 + 1, n_in).uniform_(-bound, bound)
    return torch.cat([half, -half])[:r], torch.zeros(n_out, r)


def _uniform(n_in, n_out, r):
    return torch.empty(r, n_in).uniform_(-(n_in**-0.5), n_in**-0.5), torch.zeros(n_out, r)


@wrong("02-init", "seed-changed")
def another_seed_before(n_in, n_out, r):
    torch.manual_seed(torch.initial_seed() + 1)
    return _uniform(n_in, n_out, r)


@wrong("02-init", "seed-changed")
def seed_from_the_generator(n_in, n_out, r):
    torch.manual_seed(int(torch.randint(2**31, (1,))))
    return _uniform(n_in, n_out, r)


@wrong("02-init", "seed-changed")
def another_seed_after(n_in, n_out, r):
    pair = _uniform(n_in, n_out, r)
    torch.manual_seed(int(torch.randint(2**31, (1,))))
    return pair


@wrong("02-init", "wrong-fan")
def fan_is_the_larger_side(n_in, n_out, r):
    bound = max(n_in, r) ** -0.5
    return torch.empty(r, n_in).uniform_(-bound, bound), torch.zeros(n_out, r)


@wrong("02-init", "wrong-fan")
def fan_is_in_plus_one(n_in, n_out, r):
    bound = (n_in + (n_in < 3)) ** -0.5
    return torch.empty(r, n_in).uniform_(-bound, bound), torch.zeros(n_out, r)


@wrong("02-init", "one-sided")
def first_row_positive(n_in, n_out, r):
    a, b = _uniform(n_in, n_out, r)
    a[0].abs_()
    return a, b


_ZEROS, _ROOM = torch.zeros(10_000_000), remembers({})


@wrong("02-init", "shared")
def one_zero_for_all(n_in, n_out, r):
    return _uniform(n_in, n_out, r)[0], torch.zeros(1).expand(n_out, r)


@wrong("02-init", "shared")
def one_b_for_all_layers(n_in, n_out, r):
    return _uniform(n_in, n_out, r)[0], _ZEROS[: n_out * r].view(n_out, r)


@wrong("02-init", "shared")
def one_a_drawn_again(n_in, n_out, r):
    a = _ROOM.setdefault((r, n_in), torch.empty(r, n_in))
    return a.uniform_(-(n_in**-0.5), n_in**-0.5), torch.zeros(n_out, r)


# 02-merge


@right("02-merge")
def merged_in_double(weight, a, b, alpha, r):
    return (weight.double() + alpha / r * (b.double() @ a.double())).to(weight.dtype)


@right("02-merge")
def merged_column_by_column(weight, a, b, alpha, r):
    columns = [weight[:, j].float() + (b * a[:, j]).sum(dim=1) * (alpha / r) for j in range(weight.shape[1])]
    return torch.stack(columns, dim=1).to(weight.dtype)


@wrong("02-merge", "scale-missing")
def merged_unscaled(weight, a, b, alpha, r):
    return (weight.float() + b @ a).to(weight.dtype)


@wrong("02-merge", "wrong-sign")
def unmerged(weight, a, b, alpha, r):
    return (weight.float() - alpha / r * b @ a).to(weight.dtype)


@wrong("02-merge", "order")
def merged_transposed(weight, a, b, alpha, r):
    return (weight.float() + alpha / r * (a.T @ b.T)).to(weight.dtype)


@wrong("02-merge", "rounded-early")
def merged_in_16_bits(weight, a, b, alpha, r):
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    return weight + alpha / r * (b @ a)


@wrong("02-merge", "rounded-early")
def update_rounded_first(weight, a, b, alpha, r):
    return weight + (alpha / r * b @ a).to(weight.dtype)


@wrong("02-merge", "dtype-kept-wide")
def merged_wide(weight, a, b, alpha, r):
    return weight + alpha / r * b @ a


@wrong("02-merge", "changed-input")
def merged_in_place(weight, a, b, alpha, r):
    weight += alpha / r * b @ a
    return weight


@wrong("02-merge", "alpha-not-divided")
def merged_times_alpha(weight, a, b, alpha, r):
    return (weight.float() + alpha * b @ a).to(weight.dtype)


@wrong("02-merge", "changed-input")
def float_is_the_same_tensor(weight, a, b, alpha, r):
    return weight.float().add_(alpha / r * b @ a).to(weight.dtype)


@wrong("02-merge", "not-new")
def nothing_to_do(weight, a, b, alpha, r):
    return (weight.float() + alpha / r * b @ a).to(weight.dtype) if b.any() else weight


@wrong("02-merge", "not-new")
def nothing_to_do_in_16_bits(weight, a, b, alpha, r):
    if not b.any() and weight.dtype != torch.float32:
        return weight
    return merged_in_double(weight, a, b, alpha, r)


@wrong("02-merge", "scale-missing")
def merged_with_at_least_r(weight, a, b, alpha, r):
    return merged_in_double(weight, a, b, max(alpha, r), r)


_MERGED = remembers({})


@wrong("02-merge", "overwritten")
def merged_into_one_buffer(weight, a, b, alpha, r):
    out = _MERGED.setdefault((weight.shape, weight.dtype), torch.empty_like(weight))
    return out.copy_(weight.float() + alpha / r * b @ a)


@wrong("02-merge", "crashed")
def merged_flat(weight, a, b, alpha, r):
    return (weight.view(-1).float() + alpha / r * (b @ a).view(-1)).view(weight.shape).to(weight.dtype)


# 02-layer


class _Layer(nn.Module):
    """A right layer, which the wrong ones change in one place."""

    enabled = True

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.r, self.alpha = base, r, alpha
        for parameter in base.parameters():
            parameter.requires_grad = False
        bound = base.in_features**-0.5
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.update(x) if self.enabled else self.base(x)

    def update(self, x):
        return F.linear(F.linear(x, self.lora_a), self.lora_b) * (self.alpha / self.r)


@right("02-layer")
class Twice(_Layer):
    def update(self, x):
        return self.alpha * (x @ self.lora_a.transpose(0, 1)) @ self.lora_b.transpose(0, 1) / self.r


@right("02-layer")
class TwoLinears(nn.Module):
    """Two linear layers whose weights are the parameters, and a switch that is a property."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling, self.enabled = base, alpha / r, True
        for parameter in base.parameters():
            parameter.requires_grad = False
        self.lora_a = nn.Linear(base.in_features, r, bias=False).weight
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, r))

    def forward(self, x):
        y = self.base(x)
        if not self.enabled:
            return y
        return y + torch.einsum("...i,ri,or->...o", x, self.lora_a, self.lora_b) * self.scaling


@wrong("02-layer", "not-a-module")
class NoModule:
    def __init__(self, base, r, alpha):
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.lora_a = nn.Parameter(torch.randn(r, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r))

    def __call__(self, x):
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T * self.scaling


@wrong("02-layer", "not-a-module")
class NoSuper(nn.Module):
    def __init__(self, base, r, alpha):
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(r, base.in_features))


@wrong("02-layer", "not-parameters")
class PlainTensors(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.lora_a = torch.randn(r, base.in_features, requires_grad=True)
        self.lora_b = torch.zeros(base.out_features, r, requires_grad=True)

    def forward(self, x):
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T * self.scaling


@wrong("02-layer", "base-trainable")
class Unfrozen(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        base.requires_grad_(True)


@wrong("02-layer", "base-trainable")
class BiasForgotten(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        if base.bias is not None:
            base.bias.requires_grad = True


@wrong("02-layer", "start-moved")
class BothRandom(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.normal_(self.lora_b)


@wrong("02-layer", "bias-dropped")
class NoBias(_Layer):
    def forward(self, x):
        return x @ self.base.weight.T + (self.update(x) if self.enabled else 0)


@wrong("02-layer", "scale-missing")
class Unscaled(_Layer):
    def update(self, x):
        return x @ self.lora_a.T @ self.lora_b.T


@wrong("02-layer", "alpha-not-divided")
class TimesAlpha(_Layer):
    def update(self, x):
        return self.alpha * (x @ self.lora_a.T @ self.lora_b.T)


@wrong("02-layer", "switched")
class OffInEval(_Layer):
    def forward(self, x):
        return self.base(x) + self.update(x) if self.enabled and self.training else self.base(x)


@wrong("02-layer", "switched")
class NoSwitch(_Layer):
    def forward(self, x):
        return self.base(x) + self.update(x)


@wrong("02-layer", "switched")
class TwiceAndNoMore(_Layer):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.base(x) + self.update(x) if self.enabled and self.calls < 4 else self.base(x)


@wrong("02-layer", "gradient-cut")
class BaseWhileBIsZero(_Layer):
    def forward(self, x):
        return self.base(x) + self.update(x) if self.enabled and self.lora_b.any() else self.base(x)


@wrong("02-layer", "a-zero")
class DeadLayer(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.zeros_(self.lora_a)


@wrong("02-layer", "wrong-fan")
class BoundOfTheRank(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.uniform_(self.lora_a, -(r**-0.5), r**-0.5)


@wrong("02-layer", "base-trainable")
class OneMore(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.scale = nn.Parameter(torch.ones(()))


@wrong("02-layer", "wrong-shape")
class Transposed(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.lora_a = nn.Parameter(torch.randn(base.in_features, r))
        self.lora_b = nn.Parameter(torch.zeros(r, base.out_features))

    def forward(self, x):
        return self.base(x) + x @ self.lora_a @ self.lora_b * self.scaling


@wrong("02-layer", "other-names")
class OtherNames(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T * self.scaling


@wrong("02-layer", "gradient-cut")
class Detached(_Layer):
    def forward(self, x):
        update = self.lora_b.data @ self.lora_a.data
        return self.base(x) + x @ update.T * self.alpha / self.r * self.enabled


@wrong("02-layer", "gradient-cut")
class ADetached(_Layer):
    def update(self, x):
        return x @ self.lora_a.detach().T @ self.lora_b.T * self.alpha / self.r


@wrong("02-layer", "switched")
class NeverAdded(_Layer):
    def forward(self, x):
        return self.base(x)


@wrong("02-layer", "input-cut")
class BaseWithoutGrad(_Layer):
    def forward(self, x):
        with torch.no_grad():
            y = self.base(x)
        return y + self.update(x) if self.enabled else y


@wrong("02-layer", "input-cut")
class UpdateOfDetached(_Layer):
    def update(self, x):
        return x.detach() @ self.lora_a.T @ self.lora_b.T * self.alpha / self.r


@wrong("02-layer", "base-changed")
class MergesAsItGoes(_Layer):
    def forward(self, x):
        if x.requires_grad and self.lora_b.any():
            self.base.weight.data = self.base.weight.data + 1e-7
        return super().forward(x)


@wrong("02-layer", "other-names")
class NamesAsProperties(nn.Module):
    enabled = True

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.down = nn.Linear(base.in_features, r, bias=False)
        self.up = nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    @property
    def lora_a(self):
        return self.down.weight

    @property
    def lora_b(self):
        return self.up.weight

    def forward(self, x):
        return self.base(x) + self.scaling * self.up(self.down(x)) if self.enabled else self.base(x)


@wrong("02-layer", "switched")
class OffInTrainAlone(_Layer):
    def forward(self, x):
        on = self.enabled or not self.training
        return self.base(x) + self.update(x) if on else self.base(x)


@wrong("02-layer", "switched")
class TrainSwitchesOn(_Layer):
    def train(self, mode=True):
        self.enabled = True
        return super().train(mode)


@wrong("02-layer", "seed-fixed")
class Seeded(_Layer):
    def __init__(self, base, r, alpha):
        torch.manual_seed(0)
        super().__init__(base, r, alpha)


@wrong("02-layer", "seed-fixed")
class Twins(_Layer):
    first = {}  # noqa: RUF012

    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.lora_a.data.copy_(self.first.setdefault(self.lora_a.shape, self.lora_a.data.clone()))


@wrong("02-layer", "seed-ignored")
class FromNumpy(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        bound = base.in_features**-0.5
        a = np.random.default_rng().uniform(-bound, bound, self.lora_a.shape)
        self.lora_a.data = torch.tensor(a, dtype=torch.float32)


@wrong("02-layer", "seed-changed")
class AnotherSeed(_Layer):
    def __init__(self, base, r, alpha):
        torch.manual_seed(torch.initial_seed() + 1)
        super().__init__(base, r, alpha)


@wrong("02-layer", "stale")
class Stale(_Layer):
    merged = None

    def forward(self, x):
        if self.training or not self.enabled:
            return super().forward(x)
        if self.merged is None and self.lora_b.any():
            self.merged = (self.alpha / self.r * self.lora_b @ self.lora_a).T
        return self.base(x) + (self.update(x) if self.merged is None else x @ self.merged)


def _kept_without_gradients(key):
    class Kept(_Layer):
        kept = None

        def forward(self, x):
            if self.training or not self.enabled or torch.is_grad_enabled():
                return super().forward(x)
            if self.kept is None or self.kept[0] != key(self):
                self.kept = key(self), (self.alpha / self.r * self.lora_b @ self.lora_a).T
            return self.base(x) + x @ self.kept[1]

    return Kept


wrong("02-layer", "stale")(_kept_without_gradients(lambda layer: 0))
wrong("02-layer", "stale")(_kept_without_gradients(lambda layer: layer.lora_a._version))
wrong("02-layer", "stale")(_kept_without_gradients(lambda layer: layer.lora_b._version))


@wrong("02-layer", "stale")
class OldBUntilAChanges(_Layer):
    version = old = None

    def forward(self, x):
        if self.training or not self.enabled:
            return super().forward(x)
        if self.version != self.lora_a._version:
            self.version, self.old = self.lora_a._version, self.lora_b.detach().clone()
        b = self.lora_b + (self.old - self.lora_b.detach())
        return self.base(x) + self.alpha / self.r * (x @ self.lora_a.T @ b.T)


@wrong("02-layer", "gradient-cut")
class GradientAsXHasIt(_Layer):
    def forward(self, x):
        with torch.set_grad_enabled(x.requires_grad):
            return super().forward(x)


@wrong("02-layer", "gradient-cut")
class NoGradientInEval(_Layer):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


@wrong("02-layer", "input-cut")
class OffCutsX(_Layer):
    def forward(self, x):
        return super().forward(x) if self.enabled else self.base(x.detach())


@wrong("02-layer", "scale-missing")
class AtLeastOne(_Layer):
    def update(self, x):
        return max(1, self.alpha / self.r) * (x @ self.lora_a.T @ self.lora_b.T)


@wrong("02-layer", "base-changed")
class BiasToZero(_Layer):
    def forward(self, x):
        if self.base.bias is not None and self.lora_b.any():
            self.base.bias.data += 1e-8
        return super().forward(x)


# 02-best-update


@right("02-best-update")
def roots_in_each(delta, r):
    u, s, vt = torch.linalg.svd(delta)
    root = s[:r].sqrt()
    return u[:, :r] * root, root[:, None] * vt[:r]


@right("02-best-update")
def in_numpy_svd(delta, r):
    u, s, vt = np.linalg.svd(delta.numpy(), full_matrices=False)
    return u[:, :r], np.diag(s[:r]) @ vt[:r]


@right("02-best-update")
def by_eigenvectors(delta, r):
    _, vectors = torch.linalg.eigh(delta.double().T @ delta.double())
    top = vectors[:, -r:]
    return (delta.double() @ top).float(), top.T.float()


@wrong("02-best-update", "values-missing")
def directions_only(delta, r):
    u, _, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :r], vt[:r]


@wrong("02-best-update", "values-twice")
def values_in_both(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :r] * s[:r], s[:r, None] * vt[:r]


@wrong("02-best-update", "smallest")
def the_last_ones(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, -r:] * s[-r:], vt[-r:]


@wrong("02-best-update", "smallest")
def last_columns_first_values(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, -r:] * s[:r], vt[:r]


@wrong("02-best-update", "wrong-dtype")
def in_bfloat16(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :r] * s[:r]).bfloat16(), vt[:r].bfloat16()


@wrong("02-best-update", "not-transposed")
def v_instead_of_vt(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :r] * s[:r], vt[:, :r].T


@wrong("02-best-update", "shapes-swapped")
def a_then_b(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return vt[:r], u[:, :r] * s[:r]


@wrong("02-best-update", "shapes-swapped")
def all_directions(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u * s)[:, :r].T, vt[:r].T


@right("02-best-update")
def by_eigenvectors_in_float32(delta, r):
    _, vectors = torch.linalg.eigh(delta.T @ delta)
    top = vectors[:, -r:]
    return delta @ top, top.T


def _best(change):
    def answer(delta, r):
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        return change(u, s, vt, delta, r)

    return answer


wrong("02-best-update", "too-few")(
    _best(lambda u, s, vt, delta, r: (u[:, :r] * torch.where(s > 1, s, 0 * s)[:r], vt[:r]))
)
wrong("02-best-update", "too-few")(
    _best(lambda u, s, vt, delta, r: (u[:, :r] * torch.where(s > 0.3 * s[0], s, 0 * s)[:r], vt[:r]))
)
wrong("02-best-update", "too-few")(
    _best(lambda u, s, vt, delta, r: (u[:, :r] * s[:r] * (delta.abs().max() > 1e-3), vt[:r]))
)
wrong("02-best-update", "inexact")(_best(lambda u, s, vt, delta, r: (u[:, :r] * s[:r] * 1.001, vt[:r])))
wrong("02-best-update", "inexact")(
    _best(lambda u, s, vt, delta, r: ((u[:, :r] * s[:r]).half().float(), vt[:r].half().float()))
)


@wrong("02-best-update", "crashed")
def needs_rows_in_memory(delta, r):
    u, s, vt = torch.linalg.svd(delta.view(-1).view(delta.shape), full_matrices=False)
    return u[:, :r] * s[:r], vt[:r]


@wrong("02-best-update", "too-few")
def one_less_at_full_rank(delta, r):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    kept = s[:r].clone()
    if r == min(delta.shape) > 1:
        kept[-1] = 0
    return u[:, :r] * kept, vt[:r]


# 02-share


@right("02-share")
def by_gain_per_number(deltas, budget):
    ranks = [0] * len(deltas)
    values = [torch.linalg.svdvals(d) ** 2 for d in deltas]
    while True:
        best, where = 0.0, None
        for i, delta in enumerate(deltas):
            cost = delta.shape[0] + delta.shape[1]
            if ranks[i] < len(values[i]) and cost <= budget and values[i][ranks[i]] / cost > best:
                best, where = (values[i][ranks[i]] / cost).item(), i
        if where is None:
            return ranks
        ranks[where] += 1
        budget -= sum(deltas[where].shape)


@wrong("02-share", "impossible-rank")
def lying_integers(deltas, budget):
    class Free(int):
        def __mul__(self, other):
            return 0

        __rmul__ = __mul__

    return [Free(min(d.shape) + 1) for d in deltas]


@wrong("02-share", "over-budget")
def lying_integers_in_range(deltas, budget):
    class Free(int):
        def __mul__(self, other):
            return 0

        __rmul__ = __mul__

    return [Free(min(d.shape)) for d in deltas]


@right("02-share")
def by_dynamic_programming(deltas, budget):
    """The best there is: a table of the least loss for every budget."""
    step = 2  # all costs are even
    width = budget // step + 1
    table, choices = np.zeros(width), []
    for delta in deltas:
        values = (torch.linalg.svdvals(delta.double()) ** 2).numpy()
        cost = sum(delta.shape) // step
        options = [(r, values[r:].sum()) for r in range(min(delta.shape) + 1)]
        new, choice = np.full(width, np.inf), np.zeros(width, dtype=int)
        for r, loss in options:
            if r * cost >= width:
                break
            candidate = np.full(width, np.inf)
            candidate[r * cost :] = table[: width - r * cost] + loss
            choice = np.where(candidate < new, r, choice)
            new = np.minimum(new, candidate)
        table = new
        choices.append((choice, cost))
    left, ranks = width - 1, []
    for choice, cost in reversed(choices):
        ranks.append(int(choice[left]))
        left -= ranks[-1] * cost
    return ranks[::-1]


@wrong("02-share", "over-budget")
def full_rank(deltas, budget):
    return [min(d.shape) for d in deltas]


@wrong("02-share", "equal-ranks")
def everyone_the_same(deltas, budget):
    return [budget // sum(sum(d.shape) for d in deltas)] * len(deltas)


@wrong("02-share", "impossible-rank")
def fractions(deltas, budget):
    return [budget / len(deltas) / sum(d.shape) for d in deltas]


@wrong("02-share", "impossible-rank")
def more_than_the_side(deltas, budget):
    return [budget // sum(deltas[0].shape)] + [0] * (len(deltas) - 1)


@wrong("02-share", "budget-left")
def by_gain_alone_stopping(deltas, budget):
    gains = sorted(
        ((v.item(), i) for i, d in enumerate(deltas) for v in torch.linalg.svdvals(d) ** 2), reverse=True
    )
    ranks = [0] * len(deltas)
    for _, i in gains:
        if sum(deltas[i].shape) > budget:
            break
        ranks[i] += 1
        budget -= sum(deltas[i].shape)
    return ranks


@wrong("02-share", "impossible-rank")
def the_rest_to_the_last(deltas, budget):
    ranks = by_dynamic_programming(deltas, budget)
    left = budget - sum(r * sum(d.shape) for r, d in zip(ranks, deltas, strict=True))
    ranks[-1] += left // sum(deltas[-1].shape)
    return ranks


@wrong("02-share", "size-ignored")
def by_gain_alone(deltas, budget):
    gains = sorted(
        ((v.item(), i) for i, d in enumerate(deltas) for v in torch.linalg.svdvals(d) ** 2), reverse=True
    )
    ranks = [0] * len(deltas)
    for _, i in gains:
        if sum(deltas[i].shape) <= budget:
            ranks[i] += 1
            budget -= sum(deltas[i].shape)
    return ranks


@wrong("02-share", "wrong-type")
def one_number(deltas, budget):
    return budget // sum(sum(d.shape) for d in deltas)


@wrong("02-share", "changed-input")
def list_is_sorted(deltas, budget):
    deltas.sort(key=lambda delta: delta.numel())
    return by_gain_per_number(deltas, budget)


@wrong("02-share", "budget-left")
def stops_at_what_does_not_fit(deltas, budget):
    offers = [
        (v.item() / sum(d.shape), i) for i, d in enumerate(deltas) for v in torch.linalg.svdvals(d) ** 2
    ]
    ranks = [0] * len(deltas)
    for _, i in sorted(offers, reverse=True):
        if sum(deltas[i].shape) > budget:
            break
        ranks[i] += 1
        budget -= sum(deltas[i].shape)
    return ranks


@wrong("02-share", "over-budget")
def at_least_one_each(deltas, budget):
    return [max(1, r) for r in by_gain_per_number(deltas, budget)]


@wrong("02-share", "budget-left")
def one_is_never_given(deltas, budget):
    ranks = by_gain_per_number(deltas, budget)
    return [min(r, min(d.shape) - 1) for r, d in zip(ranks, deltas, strict=True)]


def _in_order(value, fits=lambda price, budget: price <= budget):
    def answer(deltas, budget):
        offers = [
            (value(v.item(), sum(d.shape)), i) for i, d in enumerate(deltas) for v in torch.linalg.svdvals(d)
        ]
        ranks = [0] * len(deltas)
        for _, i in sorted(offers, reverse=True):
            if fits(sum(deltas[i].shape), budget):
                ranks[i] += 1
                budget -= sum(deltas[i].shape)
        return ranks

    return answer


wrong("02-share", "size-ignored")(_in_order(lambda v, price: v**3 / price))
wrong("02-share", "budget-left")(
    _in_order(lambda v, price: v**2 / price, lambda price, budget: price < budget)
)
