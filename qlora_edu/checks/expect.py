"""What a check says of an answer: nothing where it is right, else `Wrong`, with the first place where it is not.

A tolerance is never guessed: `within` is what float32 arithmetic may lose, in any legitimate order of operations.
`dot_error` bounds it for sums of products.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from qlora_edu.checks.attempt import Other

EPSILON = torch.finfo(torch.float32).eps


class Wrong(Exception):
    """An answer that is not right.

    Attributes:
        what: the property that failed. expected, got: as text, where there is one place to name.
        mistake: the id of the mistake that it looks like, if it looks like one; the exercise holds the hint.
    """

    def __init__(self, what: str, expected: str = "", got: str = "", mistake: str | None = None):
        super().__init__(what)
        self.what, self.expected, self.got, self.mistake = what, expected, got, mistake


def fail(what: str, expected="", got="", mistake: str | None = None) -> NoReturn:
    """Refuse the answer."""
    raise Wrong(what, show(expected) if expected != "" else "", show(got) if got != "" else "", mistake)


def true(condition: bool, what: str, mistake: str | None = None, expected="", got="") -> None:
    """Refuse the answer unless the condition holds."""
    if not condition:
        fail(what, expected, got, mistake)


def tensor(
    got,
    what: str,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    mistake: str | None = None,
    shape_mistakes: Mapping[tuple[int, ...], str] | None = None,
) -> Tensor:
    """`got` if it is a tensor of this shape and dtype; None stands for any.

    Args:
        what: what the tensor is, as in "the codes".
        mistake: what a wrong shape or dtype looks like. shape_mistakes: the same, for certain shapes.
    """
    if not isinstance(got, Tensor):
        fail(
            f"{what}: expected a tensor",
            "a tensor",
            with_kind(got),
            mistake or "wrong-type",
        )
    if shape is not None and tuple(got.shape) != tuple(shape):
        named = (shape_mistakes or {}).get(tuple(got.shape), mistake)
        fail(f"{what}: the shape", tuple(shape), tuple(got.shape), named or "wrong-shape")
    if dtype is not None and got.dtype != dtype:
        fail(f"{what}: the dtype", str(dtype), str(got.dtype), mistake or "wrong-dtype")
    return got


def parts(got, what: str, count: int) -> tuple:
    """`got` as a tuple if it has that many parts."""
    if not isinstance(got, tuple | list) or len(got) != count:
        came = f"{len(got)} of them" if isinstance(got, tuple | list) else type(got).__name__
        fail(f"{what}: expected {count} values, as in `return a, b`", count, came, "wrong-type")
    return tuple(got)


def equal(got, right: Tensor, what: str, looks_like: Mapping[str, Tensor] | None = None, dtype=None) -> None:
    """Refuse unless `got` is a tensor with exactly the numbers of `right`; any dtype unless one is asked.

    looks_like: what known mistakes would have given, by name; each a tensor.
    """
    close(got, right, what, 0.0, looks_like, dtype)


def close(
    got,
    right: Tensor,
    what: str,
    within: float | Tensor,
    looks_like: Mapping[str, Tensor | Sequence[Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    place: Callable[[tuple[int, ...]], str] | None = None,
) -> None:
    """Refuse unless every number is that close to the right one.

    Args:
        within: the largest difference that is allowed, one number or one for each place.
        looks_like: what known mistakes would have given, by name, one tensor or several; the first that fits names it.
        place: how to name the first place, from its index; by default "first at [i, j]".
    """
    got = tensor(got, what)
    other = isinstance(within, Tensor) and got.shape != right.shape  # a mistake may have another shape
    near = within.max() if other and within.numel() else within

    def fitting(wrong: Tensor) -> float | Tensor:
        """As large a share of what a mistake gives as of what is right: a larger number is rounded as it is."""
        if wrong.shape != right.shape:
            return near
        ratio = wrong.double().abs() / right.double().abs()
        return near * ratio.nan_to_num(1.0, posinf=1.0).clamp(min=1.0)

    fits = [
        name
        for name, tensors in (looks_like or {}).items()
        for wrong in ([tensors] if isinstance(tensors, Tensor) else tensors)
        if wrong.shape == got.shape
        and not _differs(got, wrong, fitting(wrong)).any()
        and (wrong.shape != right.shape or _differs(wrong, right, 0.0).any())
    ]
    named = fits[0] if fits else None
    if got.shape != right.shape:
        fail(f"{what}: the shape", tuple(right.shape), tuple(got.shape), named or "wrong-shape")
    differs = _differs(got, right, within)
    if dtype is not None and got.dtype != dtype:
        other = named if differs.any() else None  # where the numbers are right, the dtype is the only mistake
        fail(f"{what}: the dtype", str(dtype), str(got.dtype), other or "wrong-dtype")
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        where = place(index) if place else f"first at {list(index)}" if index else "it"
        count = int(differs.sum())
        fail(
            f"{what}: {count:,} of {differs.numel():,} numbers differ, {where}",
            right[index].item(),
            got[index].item(),
            named,
        )


def number(
    got,
    right: float,
    what: str,
    within: float = 0.0,
    looks_like: Mapping[str, float | Sequence[float]] | None = None,
) -> None:
    """Refuse unless `got` is a number that close to the right one. looks_like: by mistake, one number or several."""
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, int) and abs(got) >= 2**1023:
        got = math.inf if got > 0 else -math.inf
    if isinstance(got, bool) or not isinstance(got, int | float):
        fail(f"{what}: expected a number", right, with_kind(got), "wrong-type")
    if not abs(got - right) <= within:  # NaN is never close
        fits = [
            name
            for name, numbers in (looks_like or {}).items()
            for wrong in (numbers if isinstance(numbers, Sequence) else [numbers])
            if abs(got - wrong) <= within
        ]
        fail(what, right, got, fits[0] if fits else None)


def same(got, right, what: str, looks_like: Mapping[str, object] | None = None) -> None:
    """Refuse unless two plain values (texts, whole numbers, lists, dicts of them) are equal."""
    if got != right or isinstance(got, bool) != isinstance(right, bool):
        fits = [name for name, wrong in (looks_like or {}).items() if got == wrong]
        mistake = fits[0] if fits else "wrong-type" if type(got) is not type(right) else None
        if isinstance(got, list) and isinstance(right, list) and got != right:
            pairs = zip(got, right, strict=False)
            first = next((i for i, (g, r) in enumerate(pairs) if g != r), min(len(got), len(right)))
            if first < min(len(got), len(right)):
                fail(f"{what}: first at position {first}", right[first], got[first], mistake)
            fail(f"{what}: the number of entries", len(right), len(got), mistake)
        fail(what, right, got, mistake)


def dot_error(*factors: Tensor) -> Tensor:
    """What a chain of float32 matrix products may be off by: n eps |A| |B| ..., n the number of additions on the way.

    factors: the matrices in the order in which they are multiplied. Returns float64, of the product's shape.
    """
    size = factors[0].double().abs()
    terms = 4.0  # the roundings of the entries, and of a factor such as alpha / r
    for factor in factors[1:]:
        terms += factor.shape[-2]
        size = size @ factor.double().abs()
    return 2 * terms * EPSILON * size + 1e-30


def with_kind(value) -> str:
    """A value with its kind, for where another kind was expected."""
    return (
        show(value) if value is None or isinstance(value, Other) else f"{type(value).__name__}: {show(value)}"
    )


def show(value) -> str:
    """A value in few characters."""
    if isinstance(value, str):
        value = value if value.isprintable() else repr(value)
        return value if len(value) <= 100 else value[:97] + "..."
    if isinstance(value, list | tuple) and len(value) <= 20:
        text = "[" + ", ".join(map(show, value)) + "]"
        return text if len(text) <= 100 else text[:97] + "..."
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to print some
        return "a huge number"
    if isinstance(value, Tensor):
        text = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return f"{text} {value.tolist()}" if 0 < value.numel() <= 8 else text
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def _differs(got: Tensor, right: Tensor, within: float | Tensor) -> Tensor:
    """Where two tensors of one shape are further apart than that; NaN equals NaN alone."""
    if torch.is_complex(got):
        return torch.ones(got.shape, dtype=torch.bool)
    exact = not isinstance(within, Tensor) and within == 0
    if exact and not got.is_floating_point() and not right.is_floating_point():
        return got.to(torch.int64) != right.to(torch.int64)
    got, right = got.double(), right.double()
    nan = got.isnan() | right.isnan()
    near = torch.where(got == right, 0.0, (got - right).abs()) <= within
    return torch.where(nan, got.isnan() != right.isnan(), ~near)
