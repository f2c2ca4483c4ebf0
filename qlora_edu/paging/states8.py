"""AdamW with its states in 8 bits: blocks of 256 numbers, one float32 scale each (arXiv 2110.02861).

A step decodes the states, updates them and the parameter in float32, and encodes the states again. The running mean m
has a sign and takes the signed dynamic map; v has none and takes the unsigned one, with twice as many steps a decade.
The codes are those of bitsandbytes on a CPU: `double_quantization.encode`.
"""

import torch
from torch import Tensor

from qlora_edu import double_quantization
from qlora_edu.double_quantization import BLOCK_SIZE
from qlora_edu.paging.checks import check_flag

MIN_NUMEL = 4096  # bitsandbytes leaves smaller states in 32 bits


def encode(state: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, uint8 (n,), and scales, float32 (ceil(n / 256),), of a float32 state (n,).

    Raises:
        ValueError: if it is no non-empty 1-D float32 tensor of finite numbers, or negative where there is no sign.

    >>> codes, scales = encode(torch.tensor([0.0, 0.5, 2.0]), signed=False)
    >>> codes.tolist(), scales.tolist()
    ([7, 148, 255], [2.0])
    """
    check_flag("signed", signed)
    if state.dtype != torch.float32 or state.dim() != 1 or not state.numel():
        raise ValueError(f"state: expected float32 (n,), n >= 1; got {state.dtype}, {tuple(state.shape)}")
    if not state.isfinite().all() or (not signed and (state < 0).any()):
        raise ValueError(f"state: expected finite numbers{'' if signed else ' of at least 0'}")
    return double_quantization.encode(state, signed)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The state again, float32 (n,): level times scale."""
    check_flag("signed", signed)
    return double_quantization.decode(codes, scales, signed)


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
        zeros = torch.zeros(p.numel(), dtype=torch.uint8), torch.zeros(-(-p.numel() // BLOCK_SIZE))
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
