"""QLoRA: LoRA on a base whose weights are stored in 4 bits (arXiv 2305.14314, equations 5 and 6).

    forward   y  = x  decode(packed)ᵀ         decoded to the compute dtype, used, forgotten
    backward  dx = dy decode(packed)          decoded once more

What autograd keeps of a layer decides whether 4 bits save anything: `NF4Linear` keeps the packed codes, which it has
anyway. A layer that writes `F.linear(x, decode(packed))` would keep the decoded weight, nearly four times the size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from qlora_edu.blockwise import FLOATS, QuantizedTensor, quantize
from qlora_edu.lora import LoRALinear
from qlora_edu.qlora.product import Frozen4BitProduct, decoded
from qlora_edu.storage import from_stored, to_stored


class NF4Linear(nn.Module):
    """A frozen linear layer stored in 4 bits a weight. Gradients pass through it, to its input only.

    Attributes:
        quantized: the weight (out, in); `weight` gives its packed codes.
        bias: (out,), frozen, or None.
        compute_dtype: the dtype of the product; the output has the dtype of the input.

    Raises:
        TypeError: if `quantized` is no QuantizedTensor, or `bias` no tensor.
        ValueError: if it is no matrix, the bias has another shape, or compute_dtype none of blockwise.FLOATS.
    """

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None = None, compute_dtype=torch.bfloat16):
        super().__init__()
        if not isinstance(quantized, QuantizedTensor):
            raise TypeError(
                f"quantized: expected a QuantizedTensor; got {type(quantized).__name__}. Try NF4Linear.of."
            )
        if len(quantized.shape) != 2:
            raise ValueError(f"quantized: expected a matrix (out, in); got shape {quantized.shape}")
        if compute_dtype not in FLOATS:
            raise ValueError(f"compute_dtype: expected float32, bfloat16 or float16; got {compute_dtype!r}")
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(
                f"bias: expected a tensor or None; got {bias!r:.80}. The third argument is compute_dtype."
            )
        if bias is not None and bias.shape != quantized.shape[:1]:
            raise ValueError(f"bias: expected shape ({quantized.shape[0]},); got {tuple(bias.shape)}")
        self.quantized = quantized
        self.out_features, self.in_features = quantized.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.compute_dtype = compute_dtype
        self.lora_layer = QLoRALinear

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        compute_dtype: torch.dtype = torch.bfloat16,
        block_size: int = 64,
        codebook: str = "nf4",
        double_quant: bool = True,
    ) -> "NF4Linear":
        """Quantize a linear layer, which is left as it was. Arguments as in `blockwise.quantize`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear; got {type(linear).__name__}")
        return cls(quantize(linear.weight, block_size, codebook, double_quant), linear.bias, compute_dtype)

    @property
    def weight(self) -> Tensor:
        """The packed codes, uint8 (ceil(out * in / 2),)."""
        return self.quantized.packed

    def weight_now(self) -> Callable[[torch.dtype], Tensor]:
        """A function that decodes the weight (out, in) that the layer has now to a dtype, also after the layer got
        another. What it returns is scratch memory, to be used before any layer decodes again."""
        return partial(decoded, self.quantized)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x: expected a float tensor of shape (..., {self.in_features}); got {type(x).__name__}"
            )
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(
                f"x: expected a float tensor of shape (..., {self.in_features}); got {x.dtype}, {tuple(x.shape)}"
            )
        if x.device != self.weight.device:
            raise ValueError(
                f"x: expected a tensor on {self.weight.device}, where the weight is; got {x.device}"
            )
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return Frozen4BitProduct.apply(x.to(self.compute_dtype), self.quantized, bias).to(x.dtype)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear layer that holds the weights that the codes stand for."""
        return _linear(self.quantized.dequantize(dtype), self.bias)

    def _apply(self, fn, recurse=True):
        # Codes have no float dtype: only a move to another device concerns them.
        packed = fn(self.quantized.packed)
        self.quantized = self.quantized.to(packed.device)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(
            {f"{prefix}weight{name}": tensor for name, tensor in to_stored(self.quantized).items()}
        )

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        start = prefix + "weight"
        stored = {
            name[len(start) :]: state_dict.pop(name) for name in list(state_dict) if name.startswith(start)
        }
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if not stored:
            missing.append(start)
            return
        try:
            quantized = from_stored(stored)
        except ValueError as error:
            errors.append(f"{start}: {error}")
            return
        if quantized.shape != self.quantized.shape:
            errors.append(f"{start}: expected shape {self.quantized.shape}; got {quantized.shape}")
            return
        self.quantized = quantized.to(self.weight.device)

    def extra_repr(self) -> str:
        q = self.quantized
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {q.codebook}, "
            f"blocks of {q.block_size}, double_quant={q.double_quant}, compute={self.compute_dtype}"
        )


class QLoRALinear(LoRALinear):
    """A low-rank update beside a 4-bit base."""

    def add(self, y: Tensor, update: Tensor) -> Tensor:
        """The update is rounded to the base's dtype before it is added: so does PEFT for 4-bit layers."""
        return y + update.to(y.dtype)

    def merged_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Decoded base plus update, added in float32, as an ordinary linear layer. Nothing of the update is lost
        but its rounding to `dtype`.

        Raises:
            ValueError: if `dtype` is none of blockwise.FLOATS.
            RuntimeError: if the update has been merged into the 4-bit weight already, or is switched off.
        """
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16; got {dtype!r}")
        if not self.enabled:
            raise RuntimeError("merged_linear: the update is switched off; set enabled = True first")
        if self.merged:
            raise RuntimeError(
                "merged_linear: the update is in the base's weight already; call unmerge() first"
            )
        quantized = self.base.quantized
        weight = quantized.dequantize(torch.float32) + self.delta()
        return _linear(weight.to(dtype or quantized.dtype), self.base.bias)

    def merge(self) -> None:
        """Decode, add the update, quantize again. Most of a small update is lost to rounding: see `merged_linear`."""
        if self.merged:
            raise RuntimeError("merge: the update is in the base's weight already")
        self._requantize(self.base.quantized.dequantize() + self.delta())
        self.merged = True

    def unmerge(self) -> None:
        """Decode, subtract the update, quantize again. The base does not come back as it was."""
        if not self.merged:
            raise RuntimeError("unmerge: the update is not in the base's weight")
        self._requantize(self.base.quantized.dequantize() - self.delta())
        self.merged = False

    def _requantize(self, weight: Tensor) -> None:
        q = self.base.quantized
        self.base.quantized = quantize(weight, q.block_size, q.codebook, q.double_quant)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer
