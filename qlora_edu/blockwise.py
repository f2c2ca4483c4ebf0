"""Block-wise 4-bit quantization, equal in all bits to bitsandbytes.

A tensor of n weights is cut, in row-major order, into blocks. A block is stored as one float32 scale (its largest
magnitude, "absmax") and one 4-bit code a weight: the codebook's level nearest to weight / scale. Two codes share a
byte, the first weight in the high nibble. The last block may be shorter.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_edu import codebooks
from qlora_edu.double_quantization import QuantizedScales, as_float32, quantize_scales, to_blocks
from qlora_edu.kernels import choice
from qlora_edu.kernels.scratch import fresh

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_SCALE = 1e-38  # keeps 1 / scale finite; bitsandbytes uses the same


def quantize(
    weight: Tensor, block_size: int = 64, codebook: str = "nf4", double_quant: bool = False
) -> "QuantizedTensor":
    """Quantize a float tensor to 4 bits a weight.

    Args:
        weight: any shape, at least one element; float32, bfloat16 or float16; every value finite.
        block_size: weights that share a scale; one of BLOCK_SIZES.
        codebook: "nf4", "fp4" or "int4".
        double_quant: store the scales in 8 bits as well.

    Returns:
        A QuantizedTensor; `weight` is left as it was.

    Raises:
        TypeError: if `weight` is not a tensor of those dtypes.
        ValueError: if it is empty, on the meta device, or holds NaN or Inf; or the block size or codebook is unknown,
            or double_quant neither True nor False.

    >>> q = quantize(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    >>> [hex(byte) for byte in q.packed.tolist()], q.scales().tolist()
    (['0xa2', '0x7f'], [2.0])
    """
    check_weight(weight)
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of the whole numbers {BLOCK_SIZES}; got {block_size!r}")
    if not isinstance(double_quant, bool):
        raise ValueError(f"double_quant: expected True or False; got {double_quant!r}")
    codebooks.table(codebook)  # an unknown name is refused before any work
    flat = weight.detach().reshape(-1)  # (n,)
    absmax = to_blocks(flat, block_size).abs().amax(dim=1).float()  # (blocks,)
    if not absmax.isfinite().all():
        check_finite(weight)

    whole = flat.numel() // block_size * block_size
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    inverse = 1.0 / absmax.clamp(min=_SMALLEST_SCALE)
    encode_into = choice.encoder(flat.device).encode_into
    encode_into(packed[: whole // 2], flat[:whole], inverse, codebook, block_size)
    if whole < flat.numel():  # a short last block is divided, not multiplied by the inverse
        absmax[-1].clamp_(min=_SMALLEST_SCALE)
        rest = torch.nn.functional.pad(flat[whole:].float() / absmax[-1], (0, flat.numel() % 2))
        packed[whole // 2 :] = pack(encode(rest, codebook))
    scales = quantize_scales(absmax) if double_quant else absmax
    return QuantizedTensor(packed, scales, codebook, block_size, tuple(weight.shape), weight.dtype)


def check_weight(weight: Tensor) -> None:
    """Raise unless `weight` is a tensor of FLOATS with values; errors as in `quantize`."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor; got {type(weight).__name__}")
    if weight.dtype not in FLOATS:
        raise TypeError(
            f"weight: expected float32, bfloat16 or float16; got {weight.dtype}. Convert it first."
        )
    if weight.is_meta:
        raise ValueError(
            "weight: expected a tensor with data; got one on the meta device. Load its values first."
        )
    if weight.numel() == 0:
        raise ValueError(f"weight: expected at least one element; got shape {tuple(weight.shape)}")


def check_finite(weight: Tensor) -> None:
    """Raise a ValueError that names the first NaN or Inf, if there is one."""
    flat = weight.detach().flatten()
    finite = flat.isfinite()
    if not finite.all():
        where = int((~finite).nonzero()[0])
        raise ValueError(
            f"weight: expected finite values; got {flat[where].item()} at flat index {where} of shape "
            f"{tuple(weight.shape)}. One such value would spoil all that share its scale."
        )


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, the first in the high nibble. codes: uint8 (n,), n even. Returns uint8 (n / 2,).

    Raises ValueError for an odd number of codes.

    >>> [hex(byte) for byte in pack(torch.tensor([1, 2, 15, 7], dtype=torch.uint8)).tolist()]
    ['0x12', '0xf7']
    """
    if codes.numel() % 2:
        raise ValueError(f"codes: expected an even number; got {codes.numel()}. Append one code first.")
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 (n / 2,) to uint8 (n,)."""
    return torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()


def encode(normalised: Tensor, codebook: str) -> Tensor:
    """The code of the level nearest to each number; a tie goes to the lower level.

    This is the definition; `kernels.encode` is the fast path.

    Args:
        normalised: float32 (n,), weight / scale, in [-1, 1].

    Returns:
        uint8 (n,).
    """
    _, thresholds, order = codebooks.table(codebook, normalised.device)
    return order[torch.bucketize(normalised, thresholds, out_int32=True)]


def decode(packed: Tensor, scales: Tensor, codebook: str, block_size: int, count: int) -> Tensor:
    """What packed codes mean, level * scale. This is the definition; `kernels.decode` is the fast path.

    Args:
        packed: uint8 (ceil(count / 2),).
        scales: float32 (ceil(count / block_size),).

    Returns:
        float32 (count,).
    """
    levels, _, _ = codebooks.table(codebook, packed.device)
    return levels[unpack(packed)[:count].int()] * scales.repeat_interleave(block_size)[:count]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor stored in 4 bits a weight.

    Attributes:
        packed: uint8 (ceil(n / 2),), two codes a byte.
        stored_scales: float32 (blocks,), or the same in 8 bits.
        codebook: which levels the codes stand for.
        block_size: weights that share a scale.
        shape, dtype: of the tensor that was quantized.
    """

    packed: Tensor
    stored_scales: Tensor | QuantizedScales
    codebook: str
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.packed.nbytes + self.stored_scales.nbytes

    @property
    def double_quant(self) -> bool:
        return isinstance(self.stored_scales, QuantizedScales)

    def scales(self) -> Tensor:
        """The scale of each block, float32 (blocks,)."""
        return as_float32(self.stored_scales)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The weights that the codes stand for.

        Args:
            dtype: of the result; by default that of the original tensor.
            out: a contiguous float tensor of this shape to write into, instead of a fresh one; it decides the dtype.

        Returns:
            Tensor of `shape`; each value is a float32 product, rounded once.

        Raises:
            ValueError: if `dtype` is none of FLOATS, or `out` does not fit.
        """
        if dtype not in (None, *FLOATS):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16; got {dtype}")
        if out is None:
            out = fresh(self.shape, dtype or self.dtype, self.packed.device)
        if tuple(out.shape) != self.shape or not out.is_contiguous() or out.dtype not in FLOATS:
            raise ValueError(
                f"out: expected a contiguous float tensor of shape {self.shape}; got {out.dtype}, "
                f"shape {tuple(out.shape)}, contiguous: {out.is_contiguous()}"
            )
        flat, packed, short = out.view(-1), self.packed, self.numel % self.block_size
        if short:  # the last block is decoded as defined
            whole = self.numel - short
            rest, last = packed[whole // 2 :], self.scales()[-1:]
            flat[whole:] = decode(rest, last, self.codebook, self.block_size, short)
            flat, packed = flat[:whole], packed[: whole // 2]
        decode_into = choice.decoder(flat.device).decode_into
        decode_into(flat, packed, self.stored_scales, self.codebook, self.block_size)
        return out

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on another device."""
        return replace(
            self, packed=self.packed.to(device=device), stored_scales=self.stored_scales.to(device=device)
        )
