"""How well a language model predicts text, and what rounding its weights does to that.

A model gives each token x_t a probability, given the tokens before it in the same passage. The negative log
likelihood (NLL) of the token is -ln p(x_t | x_1 ... x_{t-1}), in nats: 0 for a token that was certain, ln 50 = 3.9
for one that it held as likely as each of fifty. Perplexity is exp of the mean: the number of equally likely tokens
among which the model, on average, would have to guess.

The twelve passages were written for this course, so no model trained before it came out can have read them. They
are of twelve kinds, 199 to 219 words each, from a recipe to a page of a diary; Apache-2.0, like the rest of the
course.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_edu.rounded_weights import rounded_weights

__all__ = [
    "kinds",
    "paired_standard_error",
    "passages",
    "perplexity",
    "rounded_weights",
    "scored_lengths",
    "token_nll",
]

PASSAGES = Path(__file__).parent / "data" / "passages.txt"
ROWS = 64  # positions whose logits exist in float32 at one time; a row of SmolLM2's has 49,152


@cache
def _passages() -> dict[str, str]:
    """Each passage by its kind: in the file, a line `== kind ==` stands before it."""
    kinds, texts = [], []
    for line in PASSAGES.read_text(encoding="utf-8").splitlines():
        if line.startswith("== ") and line.endswith(" =="):
            kinds.append(line.removeprefix("== ").removesuffix(" =="))
            texts.append([])
        else:
            texts[-1].append(line)
    return {kind: "\n".join(lines) for kind, lines in zip(kinds, texts, strict=True)}


def passages() -> list[str]:
    """The course's twelve passages of original English prose (one explains a few lines of Python)."""
    return list(_passages().values())


def kinds() -> list[str]:
    """What each of the `passages()` is, such as "a recipe", in the same order."""
    return list(_passages())


def token_nll(model: nn.Module, tokenizer, passages: Sequence[str], max_tokens: int | None = None) -> Tensor:
    """-ln p of every scored token of the passages, one after the other.

    Each passage is read on its own. Its first token is not scored, since nothing stands before it: n tokens give
    n - 1 numbers. Nothing is added to a passage but what the tokenizer adds (SmolLM2's adds nothing).

    Args:
        model: a causal language model in eval mode, of any dtype; the logarithm is taken in float32.
        tokenizer: the model's own.
        passages: texts of at least two tokens each.
        max_tokens: use only so many tokens from the start of each passage; None for all.

    Returns:
        float64 (scored,) on the CPU, in nats.

    Raises:
        TypeError, ValueError: the passages, `max_tokens` or the model are not as said; or the logits are not finite.
    """
    device = _device(model)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf
    found = []
    for index, ids in enumerate(_token_ids(tokenizer, passages, max_tokens)):
        if len(ids) > limit:
            raise ValueError(
                f"passages[{index}]: expected at most the {limit} tokens that the model was made for; got {len(ids)}. "
                f"Set max_tokens, or cut the passage."
            )
        with torch.no_grad():
            logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0]  # (n, vocabulary)
            logits, targets = logits[:-1], ids[1:].to(device)  # position t predicts token t + 1
            parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
            nll = torch.cat([nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts])
        if not nll.isfinite().all():
            raise ValueError(f"model: expected finite logits; got NaN or Inf for passages[{index}].")
        found.append(nll.double().cpu())
    return torch.cat(found)


def scored_lengths(tokenizer, passages: Sequence[str], max_tokens: int | None = None) -> list[int]:
    """How many numbers of `token_nll` belong to each passage: `nll.split(lengths)` takes them apart."""
    return [len(ids) - 1 for ids in _token_ids(tokenizer, passages, max_tokens)]


def perplexity(nll: Tensor) -> float:
    """exp of the mean NLL per token.

    >>> round(perplexity(torch.tensor([2.0, 8.0, 4.0]).log()), 6)
    4.0
    """
    return _losses("nll", nll).mean().exp().item()


def paired_standard_error(nll_a: Tensor, nll_b: Tensor, lengths: Sequence[int] | None = None) -> float:
    """The standard error of mean(nll_b - nll_a), in nats per token, when both scored the same tokens.

    Two models find the same tokens hard, so their difference is known far better than either mean.

    With `lengths` (`scored_lengths`), the passage is what was drawn at random: all tokens of one share their kind
    of text, and the difference changes with it. This is the honest one for "on texts such as these". With G passages
    of n_g tokens, N in all, mean difference d and r_g the sum over passage g of (difference - d), it is the linearised
    error of a ratio (Cochran, Sampling Techniques, 1977, chapter 6):

        √(G / (G - 1) · Σ_g r_g²) / N

    With 12 passages take ± 2.2 of them for 95% (Student's t, 11 degrees of freedom), not ± 1.96.
    Without `lengths` each token counts as drawn on its own, which is the same formula with n_g = 1: it says how far
    the number holds for more tokens of these very passages, and is usually too small for other texts.

    >>> a = torch.tensor([1.0, 2.0, 1.0, 2.0])
    >>> b = a + torch.tensor([0.1, 0.1, 0.3, 0.3])
    >>> round(paired_standard_error(a, b), 4), round(paired_standard_error(a, b, [2, 2]), 4)
    (0.0577, 0.1)
    """
    a, b = _losses("nll_a", nll_a), _losses("nll_b", nll_b)
    if len(a) != len(b):
        raise ValueError(
            f"nll_b: expected {len(a)} tokens, as in nll_a; got {len(b)}. Score the same passages."
        )
    lengths = [1] * len(a) if lengths is None else list(lengths)
    if sum(lengths) != len(a) or min(lengths) < 1:
        raise ValueError(
            f"lengths: expected counts of 1 or more that add up to {len(a)} tokens; got {lengths}. "
            f"Take them from scored_lengths, with the same passages and max_tokens."
        )
    if len(lengths) < 2:
        raise ValueError("lengths: expected two passages or tokens at least; got one. One does not vary.")
    difference = b - a
    residuals = (difference - difference.mean()).split(lengths)
    squares = sum(part.sum().item() ** 2 for part in residuals)
    return math.sqrt(len(lengths) / (len(lengths) - 1) * squares) / len(a)


def _device(model: nn.Module) -> torch.device:
    if (parameter := next(model.parameters(), None)) is None:
        raise ValueError("model: expected a language model; got a module without parameters.")
    device = parameter.device
    if device.type == "meta":
        raise ValueError(
            "model: expected one with weights; got one on the meta device. Load it, such as with models.load."
        )
    if model.training:
        raise ValueError(
            "model: expected one in eval mode; got training mode, where dropout makes the loss random. "
            "Call model.eval() first."
        )
    return device


def _token_ids(tokenizer, passages: Sequence[str], max_tokens: int | None) -> list[Tensor]:
    """int64 (n,) of each passage, with n of 2 or more."""
    if not isinstance(passages, list | tuple) or not all(isinstance(passage, str) for passage in passages):
        raise TypeError(
            f"passages: expected a list of strings; got {passages!r:.60}. Put a single text in a list."
        )
    if not passages:
        raise ValueError(
            "passages: expected one or more; got none. The course's own are perplexity.passages()."
        )
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 2):
        raise ValueError(f"max_tokens: expected an integer of 2 or more, or None; got {max_tokens!r}.")
    found = []
    for index, passage in enumerate(passages):
        ids = torch.tensor(tokenizer(passage, verbose=False).input_ids[:max_tokens], dtype=torch.int64)
        if len(ids) < 2:
            raise ValueError(
                f"passages[{index}]: expected two tokens or more, since the first is not scored; got {len(ids)} "
                f"({passage!r:.40}). Leave it out."
            )
        found.append(ids)
    return found


def _losses(name: str, nll: Tensor) -> Tensor:
    if not isinstance(nll, Tensor) or not nll.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, as token_nll returns it; got {nll!r:.60}.")
    if nll.dim() != 1 or nll.numel() == 0 or not nll.isfinite().all():
        raise ValueError(f"{name}: expected shape (scored,), not empty, all finite; got {tuple(nll.shape)}.")
    return nll.double()
