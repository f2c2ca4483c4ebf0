"""AdamW, and AdamW whose states are paged.

The update of a number p with gradient g at step t, learning rate η and decay λ (arXiv 1711.05101, algorithm 2, with
the schedule multiplier η_t left to `lr`):

    p ← (1 - η λ) p
    m ← β1 m + (1 - β1) g              m: running mean of the gradient
    v ← β2 v + (1 - β2) g²             v: running mean of its square
    p ← p - η m / (1 - β1^t) / (√v / √(1 - β2^t) + ε)

Each number is updated on its own, so the states can be cut into pages anywhere, and the bits stay the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_edu.paging.memory import Block, UnifiedMemory

STATES = ("exp_avg", "exp_avg_sq")  # torch's names for m and v


def adamw_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr, betas, eps, weight_decay) -> None:
    """One step, in place, on tensors of one shape and dtype: the operations of torch.optim.AdamW, in its order.

    >>> p, g = torch.tensor([1.0]), torch.tensor([0.5])
    >>> adamw_(p, g, torch.zeros(1), torch.zeros(1), 1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    >>> round(p.item(), 6)  # the first step is lr, whatever the size of the gradient
    0.9
    """
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (v.sqrt() / (1 - betas[1] ** t) ** 0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-(lr / (1 - betas[0] ** t)))


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with its states in a `UnifiedMemory`: bit for bit the numbers of torch.optim.AdamW, whatever the budget.

    Args:
        params: contiguous float parameters on the CPU, or groups of them, as for any optimizer of torch.
        memory: where the states live.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        min_numel: states of at least so many numbers are paged, smaller ones pinned, as bitsandbytes does with 1e5.
            `math.inf` pins all: that is AdamW without paging, under the same budget.
        prefetch: move a parameter's states to the device before its update, as bitsandbytes does.

    Its `state_dict` is that of torch.optim.AdamW: each can load the other's.
    """

    def __init__(
        self,
        params,
        memory: UnifiedMemory,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_numel: float = 100_000,
        prefetch: bool = False,
    ):
        if not isinstance(memory, UnifiedMemory):
            raise TypeError(f"memory: expected a UnifiedMemory; got {type(memory).__name__}")
        for name, value in (
            ("lr", lr),
            ("eps", eps),
            ("weight_decay", weight_decay),
            ("min_numel", min_numel),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name}: expected a number of at least 0; got {value!r}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1); got {betas!r}")
        self.memory, self.min_numel, self.prefetch = memory, min_numel, prefetch
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for p in self._parameters():
            if not p.is_floating_point() or p.device.type != "cpu" or not p.is_contiguous() or not p.numel():
                raise ValueError(
                    "params: expected contiguous float tensors on the CPU with at least one number; got "
                    f"{p.dtype} on {p.device}, shape {tuple(p.shape)}, contiguous: {p.is_contiguous()}"
                )

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update every parameter that has a gradient, page by page.

        Raises:
            OutOfMemory: if the states, or the pages that one update needs together, do not fit. Each parameter is
            then either updated as a whole or not at all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("PagedAdamW does not support sparse gradients")
                state = self.state[p] or self._make(p)
                self._update(p, state, group)
        return loss

    def _update(self, p: Tensor, state: dict, group: dict) -> None:
        m, v = (state[name] for name in STATES)
        if self.prefetch:
            self.memory.prefetch(*((block, i) for block in (m, v) for i in range(block.pages)))
        numbers = self.memory.page // p.element_size()  # of a page
        parts = zip(p.detach().view(-1).split(numbers), p.grad.reshape(-1).split(numbers), strict=True)
        options = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
        for index, (p_part, g_part) in enumerate(parts):
            views = self.memory.touch((m, index), (v, index))
            m_part, v_part = (view.view(p.dtype)[: len(p_part)] for view in views)
            adamw_(p_part, g_part, m_part, v_part, state["step"] + 1, *options)
        state["step"] += 1

    def _make(self, p: Tensor) -> dict:
        """States of zeros for a parameter: both, or neither if the second does not fit."""
        blocks: list[Block] = []
        pinned = p.numel() < self.min_numel
        try:
            for name in STATES:
                blocks.append(self.memory.allocate(p.nbytes, name, pinned))
        except RuntimeError:
            for block in blocks:
                self.memory.free(block)
            raise
        self.state[p] = {"step": 0, **dict(zip(STATES, blocks, strict=True))}
        return self.state[p]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def tensors(self, p: Tensor) -> dict[str, Tensor]:
        """Copies of a parameter's states, in torch.optim.AdamW's form; empty before its first step."""
        state = self.state.get(p)
        if not state:
            return {}
        copies = {name: self.memory.read(state[name]).view(p.dtype).view(p.shape) for name in STATES}
        return {"step": torch.tensor(float(state["step"])), **copies}

    def state_dict(self) -> dict:
        """As that of torch.optim.AdamW. Reading the states moves no page."""
        own = self.state
        self.state = {p: self.tensors(p) for p in self._parameters() if own.get(p)}
        try:
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the states of a PagedAdamW or torch.optim.AdamW. Where it fails, the old states stay."""
        own, groups = self.state, self.param_groups
        made: list[Block] = []
        try:
            super().load_state_dict(state_dict)
            if any(group.get("amsgrad") or group.get("maximize") for group in self.param_groups):
                raise ValueError(
                    "state_dict: amsgrad and maximize are not supported; got a run that used them"
                )
            loaded, self.state = self.state, type(own)(dict)
            for p, tensors in loaded.items():
                if any(name not in tensors or tensors[name].shape != p.shape for name in STATES):
                    raise ValueError(f"state_dict: expected exp_avg and exp_avg_sq of shape {tuple(p.shape)}")
                made += [block for name, block in self._make(p).items() if name in STATES]
                self.state[p]["step"] = int(tensors["step"])
                for name in STATES:
                    data = tensors[name].to(p.dtype).contiguous().view(-1).view(torch.uint8)
                    self.memory.write(self.state[p][name], data)
        except Exception:
            for block in made:
                self.memory.free(block)
            self.state, self.param_groups = own, groups
            raise
        for state in filter(None, own.values()):
            for name in STATES:
                self.memory.free(state[name])
