"""How low is the rank of an update? Singular values, the part that a rank holds, updates of the real model.

Any matrix is a sum of rank-1 matrices, M = s1 u1 v1ᵀ + s2 u2 v2ᵀ + ..., with s1 >= s2 >= ... >= 0, the
*singular values*, and columns u and v of length 1 at right angles to each other. Keeping the first k terms is the
best approximation of rank k (Eckart and Young 1936), and it holds (s1² + ... + sk²) / (s1² + s2² + ...) of the
matrix's squared norm.

    python -m qlora_edu.spectra     computes data/spectra.safetensors again: what the chapter's widget shows
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_edu.rounded_weights import linear_layers as linears
from qlora_edu.training.batches import Batch, Encoded, steps
from qlora_edu.training.loss import answer_loss
from qlora_edu.training.schedule import cosine_with_warmup

FILE = Path(__file__).parent / "data" / "spectra.safetensors"
SOURCES = ("update", "gradient", "weight", "random")
MATRICES = ("q_proj", "v_proj", "up_proj", "down_proj")
LAYER, SIDE, RANKS = 15, 32, 64  # the stored pieces: which layer, side of the corner, ranks kept


def share(matrix: Tensor) -> Tensor:
    """Share of the squared norm that the best approximation of rank 1, 2, ... holds, float32 (min(out, in),).

    Raises:
        ValueError: if it is no matrix of finite numbers, or all zero.

    >>> share(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).tolist()
    [0.8999999761581421, 1.0]
    """
    _check(matrix)
    squares = torch.linalg.svdvals(matrix.detach().float()).double().square()
    return (squares.cumsum(0) / squares.sum()).float()


def truncate(matrix: Tensor, k: int) -> Tensor:
    """The best approximation of rank k, in the dtype of `matrix`.

    It comes from a random start and two rounds of subspace iteration (Halko, Martinsson and Tropp 2011), which
    is much faster than all singular vectors, and close to exact for small k.

    Raises:
        ValueError: if it is no matrix of finite numbers or all zero, or k is not from 1 to its smaller side.
    """
    _check(matrix)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= min(matrix.shape):
        raise ValueError(f"k: expected a whole number from 1 to {min(matrix.shape)}; got {k!r}")
    u, s, v = torch.svd_lowrank(matrix.detach().float(), q=min(k + 8, *matrix.shape), niter=2)
    return ((u[:, :k] * s[:k]) @ v[:, :k].T).to(matrix.dtype)


def _check(matrix: Tensor) -> None:
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"matrix: expected two dimensions, none of them 0; got shape {tuple(matrix.shape)}")
    if matrix.is_meta or not matrix.is_floating_point():
        raise ValueError(f"matrix: expected floating-point numbers; got {matrix.dtype} on {matrix.device}")
    if not torch.isfinite(matrix).all() or not matrix.any():
        raise ValueError("matrix: expected finite numbers, not all of them zero")


def gradients(model: nn.Module, rows: Sequence[Encoded], names: Sequence[str]) -> dict[str, Tensor]:
    """The gradient of the loss for some weights, float32 (out, in). All other weights are frozen."""
    model.requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in names}
    batch = Batch.of(rows, pad_id=0).to(next(iter(weights.values())).device)
    answer_loss(model, batch, batch.scored).backward()
    found = {name: weight.grad.float() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
    model.requires_grad_(False)
    return found


def full_update(
    model: nn.Module,
    rows: Sequence[Encoded],
    count: int = 8,
    batch_size: int = 4,
    learning_rate: float = 2e-4,
) -> tuple[dict[str, Tensor], list[float]]:
    """Fine-tune all weights of all linear layers, in place, and return what each gained and the losses.

    The model computes in its own dtype; AdamW works on float32 copies of the weights, since an update is some
    thousandths of a weight and would be rounded away in bfloat16.

    Returns:
        W_after - W_before by name, float32 (out, in); and the loss before each step, nats a scored token.
    """
    layers = linears(model)
    model.requires_grad_(False).train()
    copies = {name: layer.weight.requires_grad_().detach().float().clone() for name, layer in layers.items()}
    before = {name: copy.clone() for name, copy in copies.items()}
    device = next(iter(copies.values())).device
    optimizer = torch.optim.AdamW(copies.values(), lr=learning_rate, weight_decay=0.0, fused=True)
    losses = []
    for step, chosen in enumerate(steps(rows, batch_size, count, seed=0)):
        batch = Batch.of(chosen, pad_id=0).to(device)
        loss = answer_loss(model, batch, batch.scored)
        loss.backward()
        losses.append(loss.item())
        for name, layer in layers.items():
            copies[name].grad, layer.weight.grad = layer.weight.grad.float(), None
        nn.utils.clip_grad_norm_(copies.values(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate * cosine_with_warmup(step, count, warmup=1)
        optimizer.step()
        for name, layer in layers.items():
            layer.weight.data.copy_(copies[name])
    model.requires_grad_(False).eval()
    return {name: copies[name] - before[name] for name in layers}, losses


@dataclass(frozen=True)
class Piece:
    """What is kept of a matrix M = U diag(s) Vᵀ, enough for the corner of each approximation up to rank 64.

    Attributes:
        values: all singular values s, float32.
        corner: M[:32, :32], float32.
        left, right: the first 64 columns of U and of V, and of these the first 32 rows, float16 (32, 64).
    """

    values: Tensor
    corner: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Piece":
        u, s, vt = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
        return cls(s, matrix[:SIDE, :SIDE].float(), u[:SIDE, :RANKS], vt[:RANKS, :SIDE].T)

    def approximation(self, k: int) -> Tensor:
        """The corner of the best approximation of rank k, float32 (32, 32)."""
        return (self.left[:, :k].float() * self.values[:k]) @ self.right[:, :k].float().T

    def share(self, k: int) -> float:
        """Share of the whole matrix's squared norm that rank k holds."""
        return (self.values[:k].double().square().sum() / self.values.double().square().sum()).item()


def stored() -> dict[tuple[str, str], Piece]:
    """The stored pieces by (source, matrix), such as ("update", "q_proj")."""
    tensors = load_file(FILE)
    parts = ("values", "corner", "left", "right")
    return {(s, m): Piece(*(tensors[f"{s}.{m}.{part}"] for part in parts)) for s in SOURCES for m in MATRICES}


def main() -> None:
    """Fine-tune the real model for 8 steps, and write the pieces of four matrices of layer 15."""
    from qlora_edu import models, tasks, training

    model, tokenizer = models.load(dtype=torch.bfloat16)
    examples = [example for example in tasks.tool_calls().train if example.tool == "set_light"]
    rows = training.encode_all(examples, tokenizer)
    names = {name.split(".")[-1]: name for name in linears(model) if f"layers.{LAYER}." in name}
    names = {matrix: names[matrix] for matrix in MATRICES}
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names.values()}
    slopes = gradients(model, steps(rows, 4, 8, seed=0)[0], list(names.values()))
    updates, _ = full_update(model, rows)
    tensors = {}
    for i, (matrix, name) in enumerate(names.items()):
        w = weights[name]
        random = torch.randn(w.shape, generator=torch.Generator().manual_seed(i))
        for source, values in zip(SOURCES, (updates[name], slopes[name], w, random), strict=True):
            for part, tensor in vars(Piece.of(values)).items():
                kept = tensor if part in ("values", "corner") else tensor.half()
                tensors[f"{source}.{matrix}.{part}"] = kept.contiguous()
    save_file(tensors, FILE)


if __name__ == "__main__":
    main()
