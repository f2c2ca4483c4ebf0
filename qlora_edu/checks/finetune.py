"""Checks of chapter 08, the training: what is scored, the loss, the schedule, the loop."""

import math
from itertools import chain

import torch
from torch import Tensor, nn

from qlora_edu.checks import expect
from qlora_edu.checks.draw import Draw
from qlora_edu.checks.exercise import Answer, exercise

IGNORE = -100
FAR = torch.tensor(1e9)  # what no answer comes near
LARGEST = 3.4e38  # nearly float32's


def numbers(got, what: str, count: int) -> Tensor:
    """The answer as that many float64 numbers."""
    values = got.tolist() if isinstance(got, Tensor) else got
    values = list(values) if isinstance(values, tuple | list) else [values]
    values = [v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for v in values]
    fine = all(isinstance(v, int | float) and not isinstance(v, bool) and not abs(v) > 1e300 for v in values)
    expect.true(fine and len(values) == count, f"{what}: numbers", "wrong-type", f"{count} of them", got)
    return torch.tensor(values, dtype=torch.float64)


def _filled(lines: list[list[int]], fill: int, starts: list[int]) -> Tensor:
    """Lines of different lengths as one tensor, each from its own position."""
    out = torch.full((len(lines), max(s + len(line) for s, line in zip(starts, lines, strict=True))), fill)
    for row, start, line in zip(out, starts, lines, strict=True):
        row[start : start + len(line)] = torch.tensor(line)
    return out


@exercise("08-labels")
def labels(answer: Answer, draw: Draw) -> None:
    """`f(rows, eos_id, pad_id)`: (input_ids, attention_mask, labels), int64 (rows, longest)."""
    for sizes, eos, pad in (
        (((3, 2), (1, 4), (2, 0)), 2, 2),
        (((2, 3), (6, 1), (4, 2)), 7, 0),
        (((1, 1),), 2, 2),
        (((draw.whole(60, 130), draw.whole(60, 130)), (2, 1), (1, 0)), 2, 0),
        (((7, 6), (1, 0), *((draw.whole(1, 6), draw.whole(0, 5)) for _ in range(4))), 5, 5),
    ):
        rows, large = [], 2 * draw.whole(20_000, 24_575) + 1
        for before, after in sizes:
            # The token that ends answers also ends the turns of a chat, and the pad token may stand in an answer.
            prompt = [large, eos, *draw.integers(before, low=0, high=9).tolist()][:before]
            written = [large if t == eos else t for t in draw.integers(after, low=0, high=9).tolist()]
            rows.append((prompt, [pad if pad != eos else 8, *written[1:]] if after else []))
        lines, zero = [[*p, *w, eos] for p, w in rows], [0] * len(rows)
        ones = [[1] * len(line) for line in lines]
        ids, mask = _filled(lines, pad, zero), _filled(ones, 0, zero)
        at_right = [ids.shape[1] - len(line) for line in lines]

        def scored(first: int = 0, last: int = 0, rows=rows, ids=ids) -> Tensor:
            """Labels where each answer is scored from `first` positions later, to `last` positions later."""
            out = torch.full_like(ids, IGNORE)
            for i, (prompt, written) in enumerate(rows):
                part = slice(len(prompt) + first, len(prompt) + len(written) + 1 + last)
                out[i, part] = ids[i, part]
            return out

        right = scored()
        got = expect.parts(answer(rows, eos, pad), "the result", 3)
        case = f"for {len(rows)} row{'s' * (len(rows) > 1)}, eos_id = {eos}, pad_id = {pad}"
        looks = {
            "ids-rounded": [ids.to(kind).long() for kind in (torch.int16, torch.bfloat16, torch.float16)],
            "end-missing": _filled([line[:-1] for line in lines], pad, zero),
            "padded-left": _filled(lines, pad, at_right),
        }
        if isinstance(got[0], Tensor) and got[0].dim() == 2 and got[0].shape[1] > 8:
            looks["cut-off"] = ids[:, : got[0].shape[1]]
        expect.equal(got[0], ids, f"input_ids, {case}", looks, torch.int64)
        looks = {
            "mask-by-value": (ids != pad).long(),
            "padding-attended": torch.ones_like(ids),
            "padded-left": _filled(ones, 0, at_right),
            "end-masked": _filled([[*line[:-1], 0] for line in ones], 0, zero),
        }
        expect.equal(got[1], mask, f"attention_mask, {case}", looks, torch.int64)
        ends = (ids == eos).long()
        looks = {
            "shifted": right.roll(-1, 1),  # the first label of a row is never one
            "end-masked": [scored(0, -1), right.masked_fill(ids == eos, IGNORE)],
            "value-masked": [right.masked_fill(ids == token, IGNORE) for token in (pad, 0)],
            "empty-answer": torch.stack(
                [line if w else 0 * line + IGNORE for line, (_, w) in zip(right, rows, strict=True)]
            ),
            "prompt-scored": [
                torch.where(ends * mask == 1, ids, right),
                ids.masked_fill(mask == 0, IGNORE),
                ids.masked_fill(ids == pad, IGNORE),
                torch.where((mask == 1) & (ends.cumsum(1) > ends), ids, IGNORE),  # from the first eos on
            ],
            "padding-scored": [torch.where((right != IGNORE) | (mask == 0), ids, IGNORE), ids],
            "boundary": [scored(-1), scored(1)],
            "not-ignored": [right.masked_fill(right == IGNORE, fill) for fill in (0, pad, -1)],
        }
        expect.equal(got[2], right, f"labels, {case}", looks, torch.int64)


def _terms(logits: Tensor, labels: Tensor, shift: int = 1) -> list[list[Tensor]]:
    """For each row, -log p of every label that is scored: position t predicts label t + shift."""
    logp = logits.double().log_softmax(-1)
    places = range(max(0, -shift), labels.shape[1] - max(0, shift))
    rows = enumerate(labels.tolist())
    return [[-logp[i, t, row[t + shift]] for t in places if row[t + shift] != IGNORE] for i, row in rows]


def _all(rows: list[list[Tensor]]) -> list[Tensor]:
    return list(chain.from_iterable(rows))


def _loss_of(student, logits, labels):
    """The student's loss, whether gradients flow through it, and what reaches the logits."""
    leaf = logits.clone().requires_grad_()
    loss = student(leaf, labels)
    kept = torch.equal(leaf.detach(), logits)
    trains = isinstance(loss, Tensor) and loss.requires_grad
    if trains and loss.dim() == 0:
        loss.backward()
    return {"loss": loss, "trains": trains, "gradient": leaf.grad, "kept": kept}


@exercise("08-loss", probe=_loss_of)
def loss(answer: Answer, draw: Draw) -> None:
    """`f(logits, labels)`: the mean of -log p over the scored tokens of a batch; float32, no dimensions."""
    for rows, length, vocabulary, dtype, scale, special in (  # special: the mistake that a case is there for
        (3, 7, 11, torch.float32, 1, None),
        (1, 2, 5, torch.float32, 1, None),
        (4, 9, 6, torch.float32, 300, "overflow"),
        (2, 12, 23, torch.bfloat16, 6, "half-precision"),
        (1, 2, 9, torch.bfloat16, 6, "half-precision"),
        (2, 5, 7, torch.float32, 1, "nothing-scored"),
        (2, 4, 6, torch.float32, 300, "nothing-scored"),
        (2, 4, 6, torch.float32, LARGEST, "nothing-scored"),
        (2, 6, 9, torch.float32, 10**6, "cut-off"),
    ):
        logits = (draw.normal(rows, length, vocabulary) * scale).to(dtype)
        if scale == LARGEST:  # any two of them add up to infinity
            logits = draw.uniform(rows, length, vocabulary, low=0.9) * scale
        labels = draw.integers(rows, length, low=0, high=vocabulary - 1)
        labels = labels.masked_fill(draw.uniform(rows, length) < 0.5, IGNORE)
        if special == "nothing-scored":
            labels[:] = IGNORE
        else:  # token 0 is a token; one row has fewer scored ones than the others
            labels[:, -3:], labels[0] = 0, IGNORE
            labels[0, -1] = vocabulary - 1
        labels[:, 0] = vocabulary - 1  # predicted by nothing, so it never counts
        terms = _terms(logits, labels)
        flat = _all(terms)
        right = sum(flat, torch.tensor(0.0, dtype=torch.float64)) / max(1, len(flat))
        case = f"for {str(dtype)[6:]} logits {(rows, length, vocabulary)} with {len(flat)} scored tokens"
        facts = answer(logits, labels)
        got = expect.tensor(facts["loss"], f"the loss, {case}", ())
        expect.true(facts["kept"], f"the logits stay as they are, {case}", "changed-input")
        expect.true(facts["trains"], f"gradients flow through the loss, {case}", "no-gradient")
        # Each -log p is off by some roundings of its logits, and a sum of n numbers by n more. Nothing is exactly 0.
        size = logits.double().abs().max().item() + math.log(vocabulary) if flat else 0
        within = (8 + len(flat)) * expect.EPSILON * size
        if special == "half-precision" and not abs(got.double() - right) <= within:
            # The same numbers in float32: where they give the same loss, it is something else that is wrong.
            alike = answer(logits.float(), labels)["loss"]
            special = (
                None if expect.tensor(alike, f"the loss, {case}", ()).double() == got.double() else special
            )

        def mean(terms: list[Tensor]) -> Tensor:
            return sum(terms) / len(terms) if terms else FAR

        looks = {
            "no-shift": mean(_all(_terms(logits, labels, 0))),
            "shifted-back": mean(_all(_terms(logits, labels, -1))),
            "mean-of-rows": mean([mean(row) for row in terms if row]),
            "padding-counted": [right * len(flat) / (rows * n) for n in (length - 1, length)],
            "first-counted": right * len(flat) / (len(flat) + rows),
            "not-divided": right * len(flat),
            "zero-ignored": mean(_all(_terms(logits, labels.masked_fill(labels == 0, IGNORE)))),
            "sign": -right if len(flat) else FAR,
            special: got if special else FAR,
        }
        if special == "cut-off":  # so large that other mistakes look alike; smaller logits have shown those
            looks = {special: got}
        expect.close(got, right, f"the loss, {case}", within, looks, torch.float32)
        expect.true(
            facts["gradient"] is not None,
            f"the gradient of the logits, {case}",
            "no-gradient",
            "a tensor",
            "None",
        )
        if dtype == torch.float32:  # (p - 1 at the label) / n where a label is scored, else zero
            gradient = torch.zeros(rows, length, vocabulary, dtype=torch.float64)
            scored = labels[:, 1:] != IGNORE
            one = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), vocabulary)
            gradient[:, :-1] = (
                (logits[:, :-1].double().softmax(-1) - one) * scored[..., None] / max(1, len(flat))
            )
            # A probability is off by the rounding of its logits.
            near = (8 + 4 * size) * expect.EPSILON if flat else 0
            wrong = {"no-gradient": 0 * gradient, "sign": -gradient} if flat else {special: facts["gradient"]}
            expect.close(facts["gradient"], gradient, f"the gradient of the logits, {case}", near, wrong)


@exercise("08-schedule")
def schedule(answer: Answer, draw: Draw) -> None:
    """`f(step, total, warmup)`: the share of the peak rate in a step, counted from 0."""
    long = draw.whole(150, 300), draw.whole(3, 7)  # the last shares are small
    for total, warmup in (
        (10, 2),
        (draw.whole(15, 30), draw.whole(3, 7)),
        (7, 1),
        (9, 0),
        (5, 5),
        (1, 0),
        (0, 0),
        long,
    ):
        case = f"total = {total}, warmup = {warmup}"
        crash = "divides-by-zero" if warmup in (0, total) else None
        got = [answer(step, total, warmup, crash=crash) for step in range(total + 3)]
        got = numbers(got, f"the shares, {case}", total + 3)
        s, rises = torch.arange(total, dtype=torch.float64), torch.arange(total) < warmup
        rest = max(1, total - warmup)
        up, since = (s + 1) / max(1, warmup), s - warmup
        down = (1 + torch.cos(math.pi * since / rest)) / 2
        falls = {
            "over-all-steps": (1 + torch.cos(math.pi * s / total)) / 2,
            "ends-early": (1 + torch.cos(math.pi * since / max(1, rest - 1))) / 2,
            "straight": 1 - since / rest,
        }
        looks = {name: torch.where(rises, up, fall) for name, fall in falls.items()}
        looks["not-halved"] = [torch.where(rises, up, 2 * down - less) for less in (0, 1)]
        looks["starts-at-zero"] = torch.where(rises, up - 1 / max(1, warmup), down)
        looks["late"] = torch.where(rises, (s + 1) / (warmup + 1), down)
        # float32 is off by some 1e-7 here.
        right, place = torch.where(rises, up, down), lambda i: f"first in step {i[0]}"
        looks["floor"] = right.clamp(min=min(0.1, *got[:total].tolist())) if total else right
        expect.close(got[:total], right, f"the shares, {case}", 1e-6, looks, place=place)
        after, what = got[total:].abs().max().item(), f"the share from step {total} on, {case}"
        expect.true(after <= 1e-6, what, "after-the-end", 0.0, after)
        for step in draw.permutation(total + 3).tolist():
            again = numbers(
                answer(step, total, warmup, crash="state"), f"the share of step {step}, {case}", 1
            )[0]
            what = f"the share of step {step}, {case}, when steps are asked in another order"
            expect.number(again.item(), got[step].item(), what, 1e-6, {"state": again.item()})


class _Dropout(nn.Module):
    """In training, multiplies by fixed factors, in the place of dropout's random ones."""

    def __init__(self, factors: Tensor):
        super().__init__()
        self.factors = factors

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factors if self.training else hidden


class _Bigram(nn.Module):
    """Token ids (rows, length) to logits, with dropout in a module and of its own.

    frozen: whether the embedding takes no gradient. seen: the ids of each call; learned: the calls, by number, through
    which a backward pass went.
    """

    def __init__(self, embedding: Tensor, head: Tensor, inner: Tensor, own: Tensor, frozen: bool):
        super().__init__()
        self.embedding, self.head = nn.Parameter(embedding.clone()), nn.Parameter(head.clone())
        self.embedding.requires_grad_(not frozen)
        self.dropout, self.own = nn.Sequential(_Dropout(inner)), own
        self.seen, self.learned = [], []

    def forward(self, ids: Tensor) -> Tensor:
        hidden, call = self.dropout(self.embedding[ids]), len(self.seen)
        logits = (hidden * self.own if self.training else hidden) @ self.head.T
        if logits.requires_grad:
            logits.register_hook(lambda _: self.learned.append(call))
        self.seen.append(ids.clone())
        return logits


def _fit(student, parts, frozen, steps, held_out, rate):
    """Lets the student train and evaluate a model, and returns what came of it, and what went through the model."""
    model = _Bigram(*parts, frozen).train()
    result = student(model, steps, held_out, rate)
    return {
        "result": result,
        "parameters": torch.cat([model.embedding.detach().flatten(), model.head.detach().flatten()]),
        "training": all(module.training for module in model.modules()),
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "seen": model.seen,
        "learned": model.learned,
    }


def _fitted(parts, frozen, steps, held_out, rate, share="tokens", kept=False, dropout=(True, True)) -> dict:
    """The same in float64, or what a known mistake makes of it.

    share: how micro-batches are put together. dropout: whether the module's is on in training, and the model's own.
    """
    e, h = (p.double().requires_grad_() for p in parts[:2])
    inner, own = (p.double() for p in parts[2:])
    factors = (inner if dropout[0] else 1.0) * (own if dropout[1] else 1.0)
    old = [torch.zeros_like(e), torch.zeros_like(h)]

    def means(batches, factor) -> dict:
        """The mean over the batches' tokens, and what else has been taken for it."""
        sums, counts = [], []
        for ids, labels in batches:
            tokens = torch.arange(len(e))
            read, wanted = ((t[..., None] == tokens).double() for t in (ids, labels[:, 1:]))  # one-hot
            logp = ((read @ e * factor) @ h.T).log_softmax(-1)
            sums.append(-(logp[:, :-1] * wanted).sum())  # no token has the label IGNORE
            counts.append(int(wanted.sum()))
        total, count, each = sum(sums), sum(counts), [s / n for s, n in zip(sums, counts, strict=True)]
        return {
            "tokens": total / count,
            "means": sum(each) / len(each),
            "sums": sum(each),
            "last": sums[-1] / count,
            "first": total / (count + sum(len(ids) for ids, _ in batches)),
        }

    seen = []
    for batches in steps:
        seen.append(means(batches, factors))
        new = torch.autograd.grad(seen[-1][share], (e, h))
        old = [g + k if kept else g for g, k in zip(new, old, strict=True)]
        e, h = ((p - rate * g).detach().requires_grad_() for p, g in zip((e, h), old, strict=True))
        e = parts[0].double().requires_grad_() if frozen else e
    held, dropped = means(held_out, 1.0), [means(held_out, on) for on in (inner * own, inner, own)]
    return {
        "parameters": torch.cat([e.flatten(), h.flatten()]).detach(),
        "losses": {s: torch.tensor([m[s].item() for m in seen], dtype=torch.float64) for s in held},
        "held": {s: m.detach() for s, m in held.items()},
        "dropped": [m.detach() for each in dropped for m in each.values()],
    }


def _wrongly_fitted(parts, frozen, steps, held_out, rate) -> dict[str, list[Tensor]]:
    """The parameters after training with each known mistake, also where other bugs are left."""
    ways = {
        "mean-of-means": [{"share": "means"}, {"share": "means", "kept": True}],
        "not-divided": [{"share": "sums"}, {"share": "sums", "kept": True}],
        "gradients-kept": [{"kept": True}],
        "cleared-too-often": [{"share": "last"}],
        "first-counted": [{"share": "first"}],
        "no-dropout": [{"dropout": on} for on in ((False, False), (False, True), (True, False))],
        "stepped-too-often": [{"steps": [[batch] for step in steps for batch in step]}],
        "not-trained": [{"rate": 0.0}],
        "frozen-moved": [{"frozen": False}],
    }
    given = {"frozen": frozen, "steps": steps, "held_out": held_out, "rate": rate}
    return {
        m: [_fitted(parts, **given | options)["parameters"] for options in each] for m, each in ways.items()
    }


def _rounded(losses: Tensor) -> list[Tensor]:
    return [losses.round(decimals=digits) for digits in range(5)]


@exercise("08-loop", probe=_fit, seconds=30)
def loop(answer: Answer, draw: Draw) -> None:
    """`f(model, steps, held_out, rate)`: (losses, held-out loss), the model trained with SGD."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))]).zero_grad()  # imports much when it is first used
    for vocabulary, width, layout, frozen, scale in (
        (7, 4, ((2, 1), (1, 3)), False, 1),
        (11, 5, ((1, 2, 2), (3,), (2, 1)), True, 1),
        (7, 4, (), False, 1),
        (7, 5, ((2, 2), (1, 1, 1)), False, 100),  # long gradients; micro-batches of one shape
    ):

        def batch(rows: int, size=vocabulary) -> tuple[Tensor, Tensor]:
            ids = draw.integers(rows, 2 + 2 * rows, low=0, high=size - 1)
            labels = ids.masked_fill(torch.arange(ids.shape[1]) <= draw.whole(0, rows), IGNORE)
            labels[:, 0] = ids[:, 0]  # predicted by nothing, so it never counts
            return ids, labels

        inner = torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0])[:width]  # dropout with probability 1/2
        own = torch.tensor([0.5, 2.0, 1.0, 0.5, 2.0])[:width]
        embedding, head = draw.normal(vocabulary, width) * scale, draw.normal(vocabulary, width) / scale
        parts = (embedding, head, inner, own)
        steps = [[batch(rows) for rows in step] for step in layout]
        held_out, rate = [batch(1), batch(2)], draw.number(0.4, 0.8) / scale**2
        case = f"steps of {', '.join(str(len(s)) for s in steps)} micro-batches" if steps else "no step"
        case = f"a model with a frozen part, {case}" if frozen else case
        case = f"large gradients, {case}" if scale > 1 else case
        try:
            crash = "frozen-moved" if frozen else None if steps else "no-steps"
            facts = answer(parts, frozen, steps, held_out, rate, crash=crash)
        except expect.Wrong as wrong:  # what it says of the inputs is that of the probe
            changed = " changed a list or a tensor" * (wrong.mistake == "changed-input")
            expect.fail(f"the call with {case}{changed}", wrong.expected, wrong.got, wrong.mistake)
        right, looks = _fitted(parts, frozen, steps, held_out, rate), {}
        what = f"the trained parameters, {case}"
        within = 100 * expect.EPSILON  # a few steps of sums of some dozen products of order 1, in float32
        sizes = within * torch.cat([torch.ones(embedding.numel()) * scale, torch.ones(head.numel()) / scale])
        off = (facts["parameters"] - right["parameters"]).abs()
        if steps and not (off <= sizes).all():  # the mistakes are computed only where there is one
            looks = _wrongly_fitted(parts, frozen, steps, held_out, rate)
            looks |= (
                {"clipped": [facts["parameters"]]} if scale > 1 else {}
            )  # for all else was right with others
        near = sizes if scale > 1 else within
        expect.close(facts["parameters"], right["parameters"], what, near, looks)
        losses, held = expect.parts(facts["result"], "the result", 2)
        tensors = any(
            isinstance(v, Tensor) for v in (losses, held, *(losses if isinstance(losses, list) else ()))
        )
        expect.true(not tensors, f"a list of floats and a float, {case}", "tensors", "", [losses, held])
        looks = {
            "loss-of-means": [right["losses"][share] for share in ("means", "sums", "last")],
            "rounded": _rounded(right["losses"]["tokens"]),
        }
        losses = numbers(losses, f"the losses, {case}", len(steps))
        expect.close(losses, right["losses"]["tokens"], f"the losses, {case}", within, looks)
        looks = {
            "dropout-on": right["dropped"],
            "loss-of-means": list(right["held"].values()),
            "rounded": _rounded(right["held"]["tokens"]),
        }
        held, what = numbers(held, f"the held-out loss, {case}", 1)[0], f"the held-out loss, {case}"
        expect.close(held, right["held"]["tokens"], what, within, looks)
        # The last token of a row predicts nothing, so it may be left out.
        wanted = [ids for step in [*steps, held_out] for ids, _ in step]
        seen, what = facts["seen"], f"each micro-batch goes through the model once, in order, {case}"
        calls, others = f"{len(wanted)} calls of the model", f"{len(seen)}"
        expect.true(len(seen) == len(wanted), what, "passes", calls, others)
        each = zip(seen, wanted, strict=True)
        alike = [torch.equal(got, ids) or torch.equal(got, ids[:, :-1]) for got, ids in each]
        expect.true(all(alike), what, "passes", calls, f"{others}, with other tokens or in another order")
        expect.true(
            facts["training"], "the model, and each module in it, is in training mode", "left-in-eval"
        )
        learned, what = (
            [call for call in facts["learned"] if call >= sum(map(len, steps))],
            "the held-out micro-batches",
        )
        expect.true(not learned, f"no backward pass goes through {what}, {case}", "held-out-learned")
        flags, what = (
            [not frozen, True],
            f"requires_grad of the embedding and of the head, afterwards, {case}",
        )
        expect.true(facts["trainable"] == flags, what, "flags-changed", flags, facts["trainable"])
