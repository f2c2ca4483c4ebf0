"""What the memory and the optimizer refuse before they change anything: each function raises a ValueError."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from qlora_edu.paging.pages import Block

POLICIES = ("lru", "mru")


def check_bytes(name: str, value: int) -> None:
    """Raise a ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number of bytes, at least 1; got {value!r}")


def check_device(budget: int, page: int, policy: str) -> None:
    """Raise a ValueError unless the page is a power of two, the budget has room for one, and the policy exists."""
    check_bytes("budget", budget)
    check_page(page)
    if budget < page:
        raise ValueError(
            f"budget: expected at least one page of {page:,} bytes; got {budget}. It is in bytes."
        )
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; got {policy!r}")


def check_page(page: int) -> None:
    """Raise a ValueError unless `page` is a power of two of at least 64."""
    check_bytes("page", page)
    if page < 64 or page & (page - 1):
        raise ValueError(f"page: expected a power of two of at least 64 bytes; got {page}")


def check_data(block: Block, data: Tensor) -> None:
    """Raise a ValueError unless `data` is as many bytes as the block has."""
    if data.dtype != torch.uint8 or tuple(data.shape) != (block.nbytes,):
        raise ValueError(f"data: expected uint8 ({block.nbytes},); got {data.dtype}, {tuple(data.shape)}")


def check_flag(name: str, value: bool) -> None:
    """Raise a ValueError unless `value` is True or False: "no" would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False; got {value!r}")


def check_pairs(pages: Iterable, check: Callable[[Block, int], None]) -> None:
    """Raise a ValueError unless each of `pages` is a tuple (block, index), which `check` may refuse in turn."""
    for pair in pages:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"pages: expected (block, index) pairs; got {pair!r}. Write touch((block, 0)).")
        check(*pair)


def check_number(name: str, value: float, most: float = math.inf) -> None:
    """Raise a ValueError unless `value` is a number from 0 to below `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < most:
        below = "" if most == math.inf else f" and below {most}"
        raise ValueError(f"{name}: expected a number of at least 0{below}; got {value!r}")


def check_group(group: dict, device: torch.device) -> None:
    """Raise a ValueError unless `PagedAdamW` can train this group of parameters with its options."""
    for name in ("lr", "eps", "weight_decay"):
        check_number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers in [0, 1); got {betas!r}")
    for beta in betas:
        check_number("betas", beta, 1)
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name}: expected False, since it is not supported; got {group[name]!r}")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("decoupled_weight_decay: expected True, which is AdamW; got False, which is Adam")
    for p in group["params"]:
        check_parameter(p, device)


def check_parameter(p: Tensor, device: torch.device) -> None:
    """Raise a ValueError unless `p` is a contiguous float tensor on `device` that has numbers."""
    if not p.is_floating_point() or p.device != device or not p.is_contiguous() or not p.numel():
        where = "the CPU" if device.type == "cpu" else str(device)
        raise ValueError(
            f"params: expected contiguous float tensors on {where} with at least one number; got "
            f"{p.dtype} on {p.device}, shape {tuple(p.shape)}, contiguous: {p.is_contiguous()}"
        )


def check_gradient(p: Tensor) -> None:
    """Raise an error unless the gradient of `p` is dense and of its shape and dtype."""
    if p.grad.is_sparse:
        raise RuntimeError("PagedAdamW does not support sparse gradients")
    if (p.grad.shape, p.grad.dtype) != (p.shape, p.dtype):
        expected, found = f"{p.dtype} {tuple(p.shape)}", f"{p.grad.dtype} {tuple(p.grad.shape)}"
        raise ValueError(f"gradient: expected {expected}, as its parameter; got {found}")
