"""LoRA: a frozen linear layer plus a trainable update of low rank (arXiv 2106.09685), equal in all bits to PEFT.

    y = W x + (alpha / r) B A x        W (out, in) frozen, A (r, in), B (out, r)

A starts random and B at zero, so that training starts from the pretrained model. Adapters are written and read in
PEFT's file format.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_edu.kernels.low_rank import linear_with_update

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update.

    Attributes:
        base: the frozen layer; `nn.Linear` or any layer with `in_features` and `out_features`.
        lora_a: (r, in), float32. Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(in).
        lora_b: (out, r), float32, zeros.
        scaling: alpha / r, or alpha / sqrt(r) if rank-stabilized (arXiv 2312.03732).
        enabled: set it to False to see the base alone.
        merged: whether the update now sits in the base's weight.

    Args:
        r: rank of the update, at least 1.
        alpha: numerator of the scaling.
        dropout: probability with which an entry of the update's input is dropped in training.
        rank_stabilized: divide by sqrt(r) instead of r.
        compute_dtype: None computes the update in float32, as PEFT does. A dtype keeps the parameters in float32 but
            computes in that dtype, in one fused step (`kernels.low_rank`), where the input has it and there is no
            dropout.

    Raises:
        TypeError: if `base` is no linear layer.
        ValueError: if r is no whole number of at least 1, alpha not finite, dropout not in [0, 1), or
            rank_stabilized neither True nor False.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_linear("base", base)
        check_options(r, alpha, dropout, compute_dtype, rank_stabilized)
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rank_stabilized = r, alpha, rank_stabilized
        self.scaling = alpha / math.sqrt(r) if rank_stabilized else alpha / r
        self.dropout = nn.Dropout(dropout)
        self.compute_dtype = compute_dtype
        self.enabled, self.merged = True, False

        a, b = _draw(base.in_features, base.out_features, r)
        through = getattr(
            base, "compute_dtype", base.weight.dtype
        )  # as in PEFT, the draw is rounded to this dtype
        self.lora_a = nn.Parameter(a.to(through).float().to(base.weight.device))
        self.lora_b = nn.Parameter(b.to(base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out), in the dtype of the base's output.

        Raises:
            RuntimeError: if the layer is switched off while the update sits in the base's weight.
        """
        if self.merged and not self.enabled:
            raise RuntimeError(
                "forward: the update is merged, so it cannot be switched off; call unmerge() first"
            )
        if self.merged or not self.enabled:
            return self.base(x)
        if self.compute_dtype is not None and x.dtype == self.compute_dtype and not self.dropout.p:
            return linear_with_update(x, self.base, self.lora_a, self.lora_b, self.scaling)
        y = self.base(x)
        h = F.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a)  # (..., r)
        update = F.linear(h, self.lora_b) * self.scaling  # (..., out)
        return self.add(y, update)

    def add(self, y: Tensor, update: Tensor) -> Tensor:
        """Base output plus update: added in the wider of both dtypes, then rounded to the base's."""
        return (y + update).to(y.dtype)

    def delta(self) -> Tensor:
        """The update as a full matrix, (alpha / r) B A, float32 (out, in)."""
        return (self.lora_b @ self.lora_a).detach() * self.scaling

    def merge(self) -> None:
        """Add the update to the base's weight, in place. Afterwards the layer costs no more than its base.

        Raises:
            RuntimeError: if it is merged already.
        """
        if self.merged:
            raise RuntimeError("merge: the update is in the base's weight already")
        self.base.weight.data += self.delta()
        self.merged = True

    def unmerge(self) -> None:
        """Take the update out again. In 16 bits this need not give back the last bit of the base's weight.

        Raises:
            RuntimeError: if it is not merged.
        """
        if not self.merged:
            raise RuntimeError("unmerge: the update is not in the base's weight")
        self.base.weight.data -= self.delta().to(self.base.weight.dtype)
        self.merged = False

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, scaling={self.scaling:.4g}"


def _draw(in_features: int, out_features: int, r: int) -> tuple[Tensor, Tensor]:
    """Initial A (r, in) and B (out, r), by the same draws from torch's generator as PEFT.

    PEFT makes two `nn.Linear`, which fill themselves with random numbers, and then draws A once more.
    """
    a = nn.Linear(in_features, r, bias=False)
    nn.Linear(r, out_features, bias=False)
    nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    return a.weight.detach(), torch.zeros(out_features, r, dtype=torch.float32)


def check_linear(name: str, layer: nn.Module) -> None:
    """Raise a TypeError unless `layer` has in_features and out_features."""
    if not hasattr(layer, "in_features") or not hasattr(layer, "out_features"):
        raise TypeError(
            f"{name}: expected a linear layer with in_features and out_features; got {type(layer).__name__}"
        )


def check_options(
    r: int,
    alpha: float,
    dropout: float,
    compute_dtype: torch.dtype | None = None,
    rank_stabilized: bool = False,
) -> None:
    """Raise unless these are a rank, a scaling, a probability, a dtype or None, and a yes or no, as in `LoRALinear`."""
    if compute_dtype is not None and not isinstance(compute_dtype, torch.dtype):
        raise TypeError(f"compute_dtype: expected a torch.dtype or None; got {compute_dtype!r}")
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype: expected a floating-point dtype or None; got {compute_dtype}")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r: expected a whole number of at least 1; got {r!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number; got {alpha!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1); got {dropout!r}")
    if not isinstance(rank_stabilized, bool):
        raise ValueError(f"rank_stabilized: expected True or False; got {rank_stabilized!r}")


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = LLAMA_LINEARS,
    rank_stabilized: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Freeze a model and put a `LoRALinear` around each layer whose name ends in one of `targets`, in place.

    Layers are visited in the model's own order, so that one seed draws the same adapters here and in PEFT.

    Returns:
        The names of the wrapped layers.

    Raises:
        TypeError, ValueError: as `find_targets` and `LoRALinear` do. Nothing is changed then.
    """
    bases = find_targets(model, targets)
    layers = {
        name: layer_for(base)(base, r, alpha, dropout, rank_stabilized, compute_dtype)
        for name, base in bases.items()
    }
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers whose name ends in one of `targets`, by name.

    Raises:
        TypeError: if `targets` is no list of names, or one of these layers is not linear.
        ValueError: if one of the names fits no layer, or the model has LoRA layers already.
    """
    check_targets(targets)
    if lora_layers(model):
        raise ValueError("model: has LoRA layers already; load a fresh one, or remove them first")
    found = {name: module for name, module in model.named_modules() if name.split(".")[-1] in set(targets)}
    if missing := set(targets) - {name.split(".")[-1] for name in found}:
        raise ValueError(f"targets: no layer's name ends in {' or '.join(map(repr, sorted(missing)))}")
    for name, module in found.items():
        check_linear(name, module)
    return found


def check_targets(targets: Sequence[str]) -> None:
    """Raise unless this is a sequence of names, one at least."""
    if (
        isinstance(targets, str)
        or not isinstance(targets, Sequence | set | frozenset)
        or not all(isinstance(t, str) for t in targets)
    ):
        raise TypeError(
            f"targets: expected a list of names, such as ['q_proj', 'v_proj'] or lora.LLAMA_LINEARS; got {targets!r}"
        )
    if not targets:
        raise ValueError("targets: expected at least one name; got none")


def layer_for(base: nn.Module) -> type[LoRALinear]:
    """The LoRA layer that fits a base: a base may name its own as `lora_layer`."""
    return getattr(base, "lora_layer", LoRALinear)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model, by the name of the layer that each wraps. TypeError if it is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {model!r:.80}. Give a model that is built.")
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All A and B of a model, in a fixed order: what the optimizer trains."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_a, layer.lora_b)]
