"""AdamW with its states in 8 bits: blocks of 256 numbers, one float32 scale each (arXiv 2110.02861).

A step decodes the states, updates them and the parameter in float32, and encodes the states again. The running mean m
has a sign and takes the signed dynamic map; v has none and takes the unsigned one, with twice as many steps a decade.
The codes are those of bitsandbytes on a CPU, which looks them up in a table with 65,536 positions, as chapter 05 does.
"""

from functools import cache

import torch
from torch import Tensor

from qlora_edu.codebooks import dynamic_8bit
from qlora_edu.paging.checks import check_flag

BLOCK, POSITIONS = 256, 65_536
MIN_NUMEL = 4096  # bitsandbytes leaves smaller states in 32 bits


@cache
def unsigned_map() -> Tensor:
    """The unsigned 8-bit dynamic map, float32 (256,), ascending from 0 to 1.

    Decade i of seven spans 0.1 to 1 times 10**(i - 6) and is cut into 2**(i + 1) equal intervals, whose midpoints are
    levels; 0 and 1 are added.

    >>> levels = unsigned_map()
    >>> levels.numel(), levels[0].item(), levels[-1].item()
    (256, 0.0, 1.0)
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1) + 1, dtype=torch.float32)
        levels += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)


@cache
def _table(signed: bool) -> tuple[Tensor, Tensor]:
    """The levels, and the code (uint8) nearest to each of 65,536 positions in [-1, 1], spaced in float32."""
    levels = dynamic_8bit() if signed else unsigned_map()
    positions = torch.arange(POSITIONS).float() / (POSITIONS - 1) * 2 - 1
    return levels, torch.bucketize(positions, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def encode(state: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, uint8 (n,), and scales, float32 (ceil(n / 256),), of a float32 state (n,).

    Raises:
        ValueError: if it is no non-empty 1-D float32 tensor of finite numbers, or negative where there is no sign.
    """
    check_flag("signed", signed)
    if state.dtype != torch.float32 or state.dim() != 1 or not state.numel():
        raise ValueError(f"state: expected float32 (n,), n >= 1; got {state.dtype}, {tuple(state.shape)}")
    if not state.isfinite().all() or (not signed and (state < 0).any()):
        raise ValueError(f"state: expected finite numbers{'' if signed else ' of at least 0'}")
    _, nearest = _table(signed)
    rows = torch.nn.functional.pad(state, (0, -state.numel() % BLOCK)).view(-1, BLOCK)
    scales = rows.abs().amax(dim=1)
    normalised = (
        (rows * (1 / scales)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    )  # a row of zeros gets code 0
    position = (normalised + 1) * 0.5 * (POSITIONS - 1) + 0.5
    return nearest[position.to(torch.int32)].flatten()[: state.numel()], scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The state again, float32 (n,): level times scale."""
    check_flag("signed", signed)
    levels, _ = _table(signed)
    return levels[codes.int()] * scales.repeat_interleave(BLOCK)[: codes.numel()]


class AdamW8bit:
    """AdamW on one float32 parameter of at least 4,096 numbers, with 8-bit states: `step(gradient)`.

    Written as bitsandbytes writes it for a CPU, operation by operation, so that its bits come out.
    """

    def __init__(
        self, p: Tensor, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2
    ):
        if p.dtype != torch.float32 or p.numel() < MIN_NUMEL:
            raise ValueError(
                f"p: expected float32 with at least {MIN_NUMEL} numbers, since smaller ones keep states of 32 bits; "
                f"got {p.dtype}, {p.numel()}"
            )
        self.p, self.options, self.t = p, (lr, betas, eps, weight_decay), 0
        zeros = torch.zeros(p.numel(), dtype=torch.uint8), torch.zeros(-(-p.numel() // BLOCK))
        self.m, self.v = zeros, tuple(part.clone() for part in zeros)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One update of `p`, in place.

        Raises:
            ValueError: if the gradient is no float32 tensor of the shape of `p`, or it or its square is not finite.
            Nothing has changed then.
        """
        if gradient.dtype != torch.float32 or gradient.shape != self.p.shape:
            expected, found = tuple(self.p.shape), f"{gradient.dtype}, {tuple(gradient.shape)}"
            raise ValueError(f"gradient: expected float32 {expected}; got {found}")
        if not gradient.square().isfinite().all():
            most = gradient.abs().max().item()
            raise ValueError(
                f"gradient: expected finite numbers with finite squares in float32; got {most:g}"
            )
        lr, (beta1, beta2), eps, weight_decay = self.options
        g, p = gradient.flatten(), self.p.view(-1)
        self.t += 1
        m = decode(*self.m, signed=True).mul_(beta1).add_(g, alpha=1.0 - beta1)
        v = decode(*self.v, signed=False).mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = (v.sqrt() / (1.0 - beta2**self.t) ** 0.5).add_(eps)
        if weight_decay:
            p.mul_(1.0 - lr * weight_decay)
        p.addcdiv_(m, denominator, value=-lr / (1.0 - beta1**self.t))
        self.m, self.v = encode(m, signed=True), encode(v, signed=False)

    @property
    def nbytes(self) -> int:
        """Bytes of both states, scales included."""
        return sum(part.nbytes for part in (*self.m, *self.v))
