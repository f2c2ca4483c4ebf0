"""AdamW, and AdamW whose states are paged.

The update of a number p with gradient g at step t, learning rate η and decay λ (arXiv 1711.05101, algorithm 2, with
the schedule multiplier η_t left to `lr`):

    p ← (1 - η λ) p
    m ← β1 m + (1 - β1) g              m: running mean of the gradient
    v ← β2 v + (1 - β2) g²             v: running mean of its square
    p ← p - η m / (1 - β1^t) / (√v / √(1 - β2^t) + ε)

Each number is updated on its own, so the states can be cut into pages anywhere, and the bits stay the same.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_edu.paging.checks import check_flag, check_gradient, check_group, check_number, check_parameter
from qlora_edu.paging.managed import ManagedMemory
from qlora_edu.paging.memory import Block, UnifiedMemory

STATES = ("exp_avg", "exp_avg_sq")  # torch's names for m and v
OPTIONS = ("lr", "betas", "eps", "weight_decay")


def adamw_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr, betas, eps, weight_decay) -> None:
    """One step, in place, on tensors of one shape and dtype: the operations of torch.optim.AdamW, in its order.

    >>> p, g = torch.tensor([1.0]), torch.tensor([0.5])
    >>> adamw_(p, g, torch.zeros(1), torch.zeros(1), 1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    >>> round(p.item(), 6)  # the first step is lr, whatever g is, as long as it is large beside eps
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

    On a GPU, with its states in a `ManagedMemory`: those of AdamW(foreach=False), which torch does not use by default.

    Args:
        params: contiguous float parameters, or groups of them, as for any optimizer of torch; on the CPU for
            `UnifiedMemory`, which simulates a device there, on the memory's own device for `ManagedMemory`.
        memory: where the states live.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        min_numel: states of at least so many numbers are paged, smaller ones resident, as bitsandbytes does with 1e5.
            `math.inf` makes all resident: that is AdamW without paging, under the same budget.
        prefetch: move a parameter's states to the device before its update, as bitsandbytes does, as far as they fit.

    Its `state_dict` is that of torch.optim.AdamW: each can load the other's.
    """

    def __init__(
        self,
        params,
        memory: UnifiedMemory | ManagedMemory,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_numel: float = 100_000,
        prefetch: bool = False,
    ):
        if not isinstance(memory, UnifiedMemory | ManagedMemory):
            raise TypeError(f"memory: expected a UnifiedMemory or ManagedMemory; got {type(memory).__name__}")
        if min_numel != math.inf:
            check_number("min_numel", min_numel)
        check_flag("prefetch", prefetch)
        self.memory, self.min_numel, self.prefetch = memory, min_numel, prefetch
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict) -> None:
        """As in torch, which calls this for every group; one that cannot be trained is refused."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.memory.device)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update every parameter that has a gradient, page by page.

        Raises:
            ValueError: if a parameter has changed its size or dtype since its states were made, or its gradient has
            others than it. Nothing is updated then.
            OutOfMemory: if the states, or the pages that one update needs together, do not fit. Each parameter is
            then either updated as a whole or not at all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in due:
            check_parameter(p, self.memory.device)
            self._check_unchanged(p)
            check_gradient(p)
        for p, group in due:
            self._update(p, self.state.get(p) or self._make(p), group)
        return loss

    def _update(self, p: Tensor, state: dict, group: dict) -> None:
        m, v = (state[name] for name in STATES)
        if self.prefetch:
            self.memory.prefetch(*((block, i) for i in range(m.pages) for block in (m, v)))
        numbers = self.memory.page // p.element_size()  # of a page
        parts = zip(p.detach().view(-1).split(numbers), p.grad.reshape(-1).split(numbers), strict=True)
        options = [group[name] for name in OPTIONS]
        for index, (p_part, g_part) in enumerate(parts):
            views = self.memory.touch((m, index), (v, index))
            m_part, v_part = (view.view(p.dtype)[: len(p_part)] for view in views)
            adamw_(p_part, g_part, m_part, v_part, state["step"] + 1, *options)
        state["step"] += 1

    def _make(self, p: Tensor) -> dict:
        """States of zeros for a parameter: both, or neither if the second does not fit."""
        blocks: list[Block] = []
        resident = p.numel() < self.min_numel
        try:
            for name in STATES:
                blocks.append(self.memory.allocate(p.nbytes, name, resident))
        except RuntimeError:
            for block in blocks:
                self.memory.free(block)
            raise
        self.state[p] = {"step": 0, "of": (p.numel(), p.dtype), **dict(zip(STATES, blocks, strict=True))}
        return self.state[p]

    def _check_unchanged(self, p: Tensor) -> None:
        """The bytes of its states mean nothing for a parameter of another dtype or size."""
        of = self.state[p]["of"] if self.state.get(p) else (p.numel(), p.dtype)
        if of != (p.numel(), p.dtype):
            raise ValueError(
                "params: a parameter changed size or dtype since its states were made: "
                f"{of[0]:,} {of[1]} then, {p.numel():,} {p.dtype} now. Make a new optimizer."
            )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def tensors(self, p: Tensor) -> dict[str, Tensor]:
        """Copies of a parameter's states, in torch.optim.AdamW's form; empty before its first step."""
        state = self.state.get(p)
        if not state:
            return {}
        self._check_unchanged(p)
        copies = {name: self.memory.read(state[name]).view(p.dtype).view(p.shape) for name in STATES}
        return {"step": torch.tensor(float(state["step"])), **copies}

    def __getstate__(self):
        raise TypeError("PagedAdamW: a copy would lack its memory. Save state_dict() instead")

    def state_dict(self) -> dict:
        """As that of torch.optim.AdamW. Reading the states moves no page."""
        own = self.state  # blocks; torch's own method, which does the rest, has to find tensors
        tensors = {p: self.tensors(p) for p in self._parameters() if own.get(p)}
        try:
            self.state = tensors
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the states of a PagedAdamW or torch.optim.AdamW. Where it fails, the old states stay.

        Resident states need room for the old and the new ones at once: load them into a new optimizer otherwise.
        """
        own, groups = self.state, self.param_groups
        made: list[Block] = []
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                if missing := [name for name in OPTIONS if name not in group]:
                    raise ValueError(f"state_dict: expected one of AdamW; a group lacks {', '.join(missing)}")
                check_group(group, self.memory.device)
            loaded, self.state = self.state, defaultdict(dict)  # torch has put tensors there; blocks follow
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
