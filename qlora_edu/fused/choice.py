"""Which module passes through memory: compiled loops where they run, else plain torch. Both give the same bits."""

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from qlora_edu.fused import plain
from qlora_edu.kernels import choice


def passes(*tensors: Tensor) -> ModuleType:
    """`loops` if all tensors are bfloat16 on a CPU where Numba's kernels are chosen, else `plain`."""
    bfloat16 = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    return _loops() if bfloat16 and choice.chosen(tensors[0].device)[0] == "numba" else plain


@cache
def _loops() -> ModuleType:
    """The compiled loops, after they were compared with plain torch once."""
    try:
        from qlora_edu.fused import loops

        with torch.device("cpu"):
            _compare(loops)
        return loops
    except Exception as error:  # whatever went wrong, plain torch gives the same bits
        warnings.warn(
            f"Numba's loops for norms and rotary embeddings cannot run here ({error}), so plain torch does their work: "
            "the same bits, more slowly.",
            stacklevel=3,
        )
        return plain


def _compare(loops: ModuleType) -> None:
    x = torch.linspace(-3, 3, 2 * 3 * 4 * 8).bfloat16().view(2, 3, 4, 8)
    weight, r, angle = (
        x[0, 0, 0],
        1 / plain.wide(x).norm(dim=-1, keepdim=True),
        x[:, :, 0, :4].repeat(1, 1, 2),
    )
    for name, *arguments in (
        ("normalise", x, weight, r),
        ("normalise_backward", x, weight, r, x.flip(0)),
        ("rotate", x, angle, -angle),
        ("rotate_back", x.transpose(1, 2), angle, -angle),
    ):
        if not torch.equal(getattr(loops, name)(*arguments), getattr(plain, name)(*arguments)):
            raise RuntimeError(f"{name}, compiled for this CPU, computes something else than torch")
