"""The loss: the mean of -log p over the tokens of the answers.

The library way computes the logits of every position, 49,152 numbers each in float32, and ignores most of them.
`answer_loss` gives the output layer only the positions that are scored, a few rows at a time, and computes the gradient
of those logits at once, so that they need not be kept.
"""

import torch
from torch import Tensor, nn

from qlora_edu.training.batches import IGNORE, Batch

ROWS = 128  # positions whose logits exist at one time
IN_CACHE = 16  # those of them that are made a probability at one time, in float32


def library_loss(model: nn.Module, batch: Batch, scored: int) -> Tensor:
    """The sum of -log p over the scored tokens of a batch, divided by `scored`, as transformers computes it."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        num_items_in_batch=scored,
        use_cache=False,
    ).loss


def answer_loss(model: nn.Module, batch: Batch, scored: int) -> Tensor:
    """The same number for less work. The output layer must be frozen, and have no bias.

    Args:
        model: a transformers causal language model.
        scored: scored tokens of the whole step, which may consist of several batches.

    Raises:
        ValueError: if the output layer is trained, or has a bias.
    """
    output = model.get_output_embeddings()
    if output.weight.requires_grad or getattr(output, "bias", None) is not None:
        raise ValueError(
            "model: the output layer must be frozen and have no bias; call qlora.add_qlora or lora.add_lora first, "
            "or train with loss=library_loss"
        )
    hidden = last_hidden(model, batch)[:, :-1]  # position t predicts token t + 1
    targets = batch.labels[:, 1:]
    chosen = targets != IGNORE
    return _CrossEntropy.apply(hidden[chosen], output.weight, targets[chosen], scored)


def last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """What the output layer would be given, (rows, length, hidden)."""
    inner = model.get_decoder()
    return inner(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state


class _CrossEntropy(torch.autograd.Function):
    """sum over rows of log(sum(exp(h Wᵀ))) - (h Wᵀ)[target], divided by `count`.

    hidden (n, d), weight (vocabulary, d), targets int64 (n,). The gradient with respect to hidden,
    (softmax(h Wᵀ) - onehot(target)) W / count, is computed in the forward pass.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), ROWS):
            part = slice(start, start + ROWS)
            slope = None if grad is None else grad[part]
            total += _some_rows(hidden[part], weight, targets[part, None], count, slope)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total / count

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None


def _some_rows(hidden: Tensor, weight: Tensor, targets: Tensor, count: int, grad: Tensor | None) -> Tensor:
    """The sum of -log p[target] over these rows; their gradient is written to `grad`, if it is wanted."""
    logits = hidden @ weight.T  # (rows, vocabulary)
    total = sum(
        _loss_and_slope(some, target, count, wanted=grad is not None)
        for some, target in zip(logits.split(IN_CACHE), targets.split(IN_CACHE), strict=True)
    )
    if grad is not None:
        grad.copy_(logits @ weight)
    return total


def _loss_and_slope(logits: Tensor, target: Tensor, count: int, wanted: bool) -> Tensor:
    """The sum of -log p[target] over rows of logits, which become (p - onehot(target)) / count, if that is wanted.

    target (rows, 1). What the logits hold where it is not wanted is undefined.
    """
    p = logits.float()
    right = p.gather(1, target)
    largest = p.amax(dim=1, keepdim=True)
    p = p.sub_(largest).exp_()  # once: the same exponentials serve the loss and the slope
    normaliser = p.sum(dim=1, keepdim=True)
    if wanted:
        p.div_(normaliser * count).scatter_add_(1, target, torch.full_like(right, -1 / count))
        logits.copy_(p)
    return (normaliser.log() + largest - right).sum()
