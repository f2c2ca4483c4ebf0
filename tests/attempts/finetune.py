"""Attempts at the exercises of chapter 08."""

import csv
import hashlib
import io
import json
import math
import random
import re
import unicodedata
from statistics import NormalDist

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from tests.attempts import right, wrong

# 08-labels


@right("08-labels")
def by_lists(rows, eos_id, pad_id):
    longest = max(len(p) + len(a) + 1 for p, a in rows)
    ids, mask, labels = [], [], []
    for prompt, answer in rows:
        rest = longest - len(prompt) - len(answer) - 1
        ids.append(prompt + answer + [eos_id] + [pad_id] * rest)
        mask.append([1] * (longest - rest) + [0] * rest)
        labels.append([-100] * len(prompt) + answer + [eos_id] + [-100] * rest)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


@right("08-labels")
def by_pad_sequence(rows, eos_id, pad_id):
    def padded(lines, fill):
        return pad_sequence([torch.tensor(line) for line in lines], batch_first=True, padding_value=fill)

    ids = padded([[*p, *a, eos_id] for p, a in rows], pad_id)
    labels = padded([[-100] * len(p) + [*a, eos_id] for p, a in rows], -100)
    lengths = torch.tensor([len(p) + len(a) + 1 for p, a in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), labels


@right("08-labels")
def by_numpy(rows, eos_id, pad_id):
    lines = [p + a + [eos_id] for p, a in rows]
    ids = np.full((len(rows), max(map(len, lines))), pad_id, dtype=np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, -100)
    for i, ((prompt, _), line) in enumerate(zip(rows, lines, strict=True)):
        ids[i, : len(line)], mask[i, : len(line)] = line, 1
        labels[i, len(prompt) : len(line)] = line[len(prompt) :]
    return ids, mask, labels


def _batch(rows, eos_id, pad_id):
    """A right one, for wrong ones to spoil."""
    ids, mask, labels = by_lists(rows, eos_id, pad_id)
    return ids, mask, labels, [len(p) for p, _ in rows], [len(p) + len(a) + 1 for p, a in rows]


@wrong("08-labels", "prompt-scored")
def as_the_collator_does(rows, eos_id, pad_id):
    ids, mask, *_ = _batch(rows, eos_id, pad_id)
    labels = ids.clone()
    labels[labels == pad_id] = -100
    return ids, mask, labels


@wrong("08-labels", "prompt-scored")
def all_tokens(rows, eos_id, pad_id):
    ids, mask, *_ = _batch(rows, eos_id, pad_id)
    return ids, mask, torch.where(mask == 1, ids, -100)


@wrong("08-labels", "end-masked")
def prompt_and_pad_value_masked(rows, eos_id, pad_id):
    ids, mask, _, starts, _ = _batch(rows, eos_id, pad_id)
    labels = ids.clone()
    for i, start in enumerate(starts):
        labels[i, :start] = -100
    labels[ids == pad_id] = -100
    return ids, mask, labels


@wrong("08-labels", "end-masked")
def end_read_but_not_scored(rows, eos_id, pad_id):
    ids, mask, labels, _, ends = _batch(rows, eos_id, pad_id)
    for i, end in enumerate(ends):
        labels[i, end - 1] = -100
    return ids, mask, labels


@wrong("08-labels", "end-masked")
def end_not_attended(rows, eos_id, pad_id):
    ids, mask, labels, _, ends = _batch(rows, eos_id, pad_id)
    for i, end in enumerate(ends):
        mask[i, end - 1] = 0
    return ids, mask, labels


@wrong("08-labels", "end-missing")
def no_end(rows, eos_id, pad_id):
    ids, mask, labels, _, ends = _batch(rows, eos_id, pad_id)
    for i, end in enumerate(ends):
        ids[i, end - 1], mask[i, end - 1], labels[i, end - 1] = pad_id, 0, -100
    return ids[:, :-1], mask[:, :-1], labels[:, :-1]


@wrong("08-labels", "padding-scored")
def padding_learned(rows, eos_id, pad_id):
    ids, mask, _, starts, _ = _batch(rows, eos_id, pad_id)
    labels = ids.clone()
    for i, start in enumerate(starts):
        labels[i, :start] = -100
    return ids, mask, labels


@wrong("08-labels", "shifted")
def shifted_here_too(rows, eos_id, pad_id):
    ids, mask, labels, *_ = _batch(rows, eos_id, pad_id)
    return ids, mask, torch.cat([labels[:, 1:], torch.full((len(rows), 1), -100)], dim=1)


@wrong("08-labels", "padded-left")
def as_for_generation(rows, eos_id, pad_id):
    longest = max(len(p) + len(a) + 1 for p, a in rows)
    ids, mask, labels = [], [], []
    for prompt, answer in rows:
        rest = longest - len(prompt) - len(answer) - 1
        ids.append([pad_id] * rest + prompt + answer + [eos_id])
        mask.append([0] * rest + [1] * (longest - rest))
        labels.append([-100] * (rest + len(prompt)) + answer + [eos_id])
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


@wrong("08-labels", "mask-by-value")
def mask_from_tokens(rows, eos_id, pad_id):
    ids, _, labels, *_ = _batch(rows, eos_id, pad_id)
    return ids, (ids != pad_id).long(), labels


@wrong("08-labels", "padding-attended")
def ones(rows, eos_id, pad_id):
    ids, _, labels, *_ = _batch(rows, eos_id, pad_id)
    return ids, torch.ones_like(ids), labels


@wrong("08-labels", "boundary")
def one_too_early(rows, eos_id, pad_id):
    ids, mask, _, starts, ends = _batch(rows, eos_id, pad_id)
    labels = torch.full_like(ids, -100)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        labels[i, start - 1 : end] = ids[i, start - 1 : end]
    return ids, mask, labels


@wrong("08-labels", "boundary")
def one_too_late(rows, eos_id, pad_id):
    ids, mask, labels, starts, _ = _batch(rows, eos_id, pad_id)
    for i, start in enumerate(starts):
        labels[i, : start + 1] = -100
    return ids, mask, labels


@wrong("08-labels", "prompt-scored")
def until_the_first_end(rows, eos_id, pad_id):
    ids, mask, *_ = _batch(rows, eos_id, pad_id)
    labels = torch.where(mask == 1, ids, -100)
    for i, line in enumerate(ids.tolist()):
        labels[i, : line.index(eos_id) + 1] = -100
    return ids, mask, labels


@wrong("08-labels", "not-ignored")
def zero_for_the_rest(rows, eos_id, pad_id):
    ids, mask, labels, *_ = _batch(rows, eos_id, pad_id)
    return ids, mask, labels.masked_fill(labels == -100, 0)


@wrong("08-labels", "wrong-dtype")
def mask_of_bools(rows, eos_id, pad_id):
    ids, mask, labels, *_ = _batch(rows, eos_id, pad_id)
    return ids, mask.bool(), labels


@wrong("08-labels", "value-masked")
def zero_is_nothing(rows, eos_id, pad_id):
    ids, mask, labels, *_ = _batch(rows, eos_id, pad_id)
    return ids, mask, labels.masked_fill(labels == 0, -100)


@wrong("08-labels", "value-masked")
def padding_by_value_inside(rows, eos_id, pad_id):
    ids, mask, labels, _, ends = _batch(rows, eos_id, pad_id)
    for i, end in enumerate(ends):
        labels[i, : end - 1][ids[i, : end - 1] == pad_id] = -100
    return ids, mask, labels


@wrong("08-labels", "empty-answer")
def nothing_to_score_in_an_empty_answer(rows, eos_id, pad_id):
    ids, mask, labels, *_ = _batch(rows, eos_id, pad_id)
    for i, (_, answer) in enumerate(rows):
        if not answer:
            labels[i] = -100
    return ids, mask, labels


@wrong("08-labels", "prompt-scored")
def every_end_is_scored(rows, eos_id, pad_id):
    ids, mask, labels, *_ = _batch(rows, eos_id, pad_id)
    return ids, mask, torch.where((ids == eos_id) & (mask == 1), ids, labels)


@wrong("08-labels", "changed-input")
def appends_the_end(rows, eos_id, pad_id):
    for _, answer in rows:
        answer.append(eos_id)
    ids = pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True, padding_value=pad_id)
    return ids, ids, ids


@wrong("08-labels", "ids-rounded")
def in_sixteen_bits(rows, eos_id, pad_id):
    return tuple(part.to(torch.int16).long() for part in by_lists(rows, eos_id, pad_id))


@wrong("08-labels", "ids-rounded")
def through_bfloat16(rows, eos_id, pad_id):
    return tuple(part.bfloat16().long() for part in by_lists(rows, eos_id, pad_id))


@wrong("08-labels", "cut-off")
def sixteen_tokens_at_most(rows, eos_id, pad_id):
    return tuple(part[:, :16] for part in by_lists(rows, eos_id, pad_id))


# 08-loss


@right("08-loss")
def with_cross_entropy(logits, labels):
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    return total / (labels != -100).sum().clamp(min=1)


@right("08-loss")
def with_a_loop(logits, labels):
    total, count = (logits.float() * 0).sum(), 0
    for row, (line, targets) in enumerate(zip(logits.float(), labels.tolist(), strict=True)):
        for t in range(1, len(targets)):
            if labels[row, t] >= 0:
                total = total + torch.logsumexp(line[t - 1], 0) - line[t - 1, targets[t]]
                count += 1
    return total / max(count, 1)


@right("08-loss")
def with_gather(logits, labels):
    logp = logits.float().log_softmax(dim=-1)[:, :-1]
    mask = labels[:, 1:] != -100
    picked = logp.gather(2, labels[:, 1:].clamp(min=0)[:, :, None])[:, :, 0]
    return -(picked * mask).sum() / mask.sum().clamp(min=1)


@wrong("08-loss", "no-gradient")
def cut_and_begun_again(logits, labels):
    scores = logits.detach()[:, :-1].float().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum")
    return (loss / (labels[:, 1:] != -100).sum().clamp(min=1)).requires_grad_()


@wrong("08-loss", "no-gradient")
def the_right_number_and_no_gradient(logits, labels):
    return cut_and_begun_again(logits, labels).detach() + 0 * logits.float().sum()


@wrong("08-loss", "no-shift")
def unshifted(logits, labels):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


@wrong("08-loss", "shifted-back")
def shifted_wrong(logits, labels):
    return F.cross_entropy(logits[:, 1:].float().flatten(0, 1), labels[:, :-1].flatten())


@wrong("08-loss", "mean-of-rows")
def row_by_row(logits, labels):
    losses = [F.cross_entropy(line[:-1].float(), row[1:]) for line, row in zip(logits, labels, strict=True)]
    return torch.stack(losses).mean()


@wrong("08-loss", "padding-counted")
def mean_of_all(logits, labels):
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    return losses.mean()


@wrong("08-loss", "padding-counted")
def divided_by_everything(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="sum")
    return losses / labels.numel()


@wrong("08-loss", "first-counted")
def divided_by_all_labels(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="sum")
    return losses / (labels != -100).sum()


@wrong("08-loss", "not-divided")
def the_sum(logits, labels):
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@wrong("08-loss", "nothing-scored")
def the_library_mean(logits, labels):
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


@wrong("08-loss", "zero-ignored")
def zero_is_padding(logits, labels):
    mask = labels[:, 1:] > 0
    logp = logits[:, :-1].float().log_softmax(-1)
    return -logp[mask].gather(1, labels[:, 1:][mask][:, None]).sum() / mask.sum().clamp(min=1)


@wrong("08-loss", "sign")
def log_p(logits, labels):
    mask = labels[:, 1:] != -100
    logp = logits[:, :-1].float().log_softmax(-1)
    return logp[mask].gather(1, labels[:, 1:][mask][:, None]).sum() / mask.sum().clamp(min=1)


def _by_hand(logits, labels, probabilities):
    mask = labels[:, 1:] != -100
    p = probabilities(logits[:, :-1])[mask].gather(1, labels[:, 1:][mask][:, None])
    return -p.log().sum() / mask.sum().clamp(min=1)


@wrong("08-loss", "overflow")
def exp_over_sum(logits, labels):
    return _by_hand(logits.float(), labels, lambda z: z.exp() / z.exp().sum(dim=-1, keepdim=True))


@wrong("08-loss", "overflow")
def log_of_softmax(logits, labels):
    return _by_hand(logits.float(), labels, lambda z: z.softmax(dim=-1))


@wrong("08-loss", "overflow")
def log_of_softmax_and_a_bit(logits, labels):
    return _by_hand(logits.float(), labels, lambda z: z.softmax(dim=-1) + 1e-9)


@wrong("08-loss", "half-precision")
def in_the_logits_dtype(logits, labels):
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total.float() / (labels[:, 1:] != -100).sum().clamp(min=1)


@wrong("08-loss", "half-precision")
def converted_late(logits, labels):
    logp = logits.log_softmax(-1).float()[:, :-1]
    mask = labels[:, 1:] != -100
    return -logp[mask].gather(1, labels[:, 1:][mask][:, None]).sum() / mask.sum().clamp(min=1)


@wrong("08-loss", "no-gradient")
def as_a_new_tensor(logits, labels):
    return torch.tensor(with_cross_entropy(logits, labels).item())


@wrong("08-loss", "no-gradient")
@torch.no_grad()
def without_grad(logits, labels):
    return with_cross_entropy(logits, labels)


@wrong("08-loss", "no-gradient")
def zero_made_anew(logits, labels):
    if not (labels[:, 1:] != -100).any():
        return torch.tensor(0.0)
    return with_cross_entropy(logits, labels)


@wrong("08-loss", "wrong-shape")
def one_for_each_row(logits, labels):
    mask = labels[:, 1:] != -100
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@wrong("08-loss", "wrong-type")
def a_number(logits, labels):
    return with_cross_entropy(logits, labels).item()


@wrong("08-loss", "changed-input")
def writes_into_the_logits(logits, labels):
    loss = with_cross_entropy(logits, labels)
    with torch.no_grad():
        logits -= logits.amax(-1, keepdim=True)
    return loss


@wrong("08-loss", "nothing-scored")
def zero_times_a_large_sum(logits, labels):
    if (labels[:, 1:] == -100).all():
        return logits.float().exp().sum() * 0
    return with_cross_entropy(logits, labels)


@wrong("08-loss", "nothing-scored")
def zero_times_the_sum(logits, labels):
    if (labels[:, 1:] == -100).all():
        return logits.float().sum() * 0
    return with_cross_entropy(logits, labels)


@wrong("08-loss", "nothing-scored")
def a_number_less_itself(logits, labels):
    if (labels[:, 1:] == -100).all():
        first = logits.float().flatten()[0]
        return first - first.detach()
    return with_cross_entropy(logits, labels)


@wrong("08-loss", "cut-off")
def large_logits_cut_off(logits, labels):
    return with_cross_entropy(logits.clamp(-1e4, 1e4), labels)


# 08-schedule


@right("08-schedule")
def with_cases(step, total, warmup):
    if step >= total:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    return math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2


@right("08-schedule")
def with_numpy(step, total, warmup):
    rise = np.linspace(0, 1, warmup + 1)[1:]
    fall = 0.5 + 0.5 * np.cos(np.linspace(0, np.pi, total - warmup + 1))
    return np.concatenate([rise, fall[:-1], np.zeros(100)])[step]


@right("08-schedule")
def with_torch(step, total, warmup):
    x = (torch.tensor(step, dtype=torch.float32) - warmup) / max(total - warmup, 1)
    if x < 0:
        return 1 + (step + 1 - warmup) / warmup
    return (1 + torch.cos(torch.pi * x)) / 2 * (step < total)


@wrong("08-schedule", "starts-at-zero")
def as_in_transformers(step, total, warmup):
    if step >= total:
        return 0.0
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@wrong("08-schedule", "late")
def one_step_late(step, total, warmup):
    if step >= total:
        return 0.0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@wrong("08-schedule", "over-all-steps")
def over_all(step, total, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


@wrong("08-schedule", "not-halved")
def plain_cosine(step, total, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return math.cos(math.pi * (step - warmup) / max(1, total - warmup)) if step < total else 0.0


@wrong("08-schedule", "not-halved")
def from_two(step, total, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return 1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)) if step < total else 0.0


@wrong("08-schedule", "ends-early")
def zero_in_the_last_step(step, total, warmup):
    if step >= total:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup - 1)))


@wrong("08-schedule", "straight")
def linear(step, total, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, 1 - (step - warmup) / max(1, total - warmup))


@wrong("08-schedule", "divides-by-zero")
def minimum_of_both(step, total, warmup):
    if step >= total:
        return 0.0
    fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup)))
    return min((step + 1) / warmup, fall)


@wrong("08-schedule", "divides-by-zero")
def no_steps_left(step, total, warmup):
    fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (total - warmup)))
    return 0.0 if step >= total else (step + 1) / warmup if step < warmup else fall


@wrong("08-schedule", "after-the-end")
def rises_again(step, total, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@wrong("08-schedule", "floor")
def never_quite_still(step, total, warmup):
    if step >= total:
        return 0.0
    return max(with_cases(step, total, warmup), 1e-3)


@wrong("08-schedule", "floor")
def a_tenth_at_least(step, total, warmup):
    share = with_cases(step, total, warmup)
    return max(share, 0.1) if warmup <= step < total else share


@wrong("08-schedule", "divides-by-zero")
def no_steps_at_all(step, total, warmup):
    return with_cases(step, total, warmup) * (total / total)


@wrong("08-schedule", "wrong-type")
def one_value_in_a_list(step, total, warmup):
    return torch.tensor([with_cases(step, total, warmup)])


@wrong("08-schedule", "wrong-type")
def one_value_for_all(step, total, warmup):
    return [(s + 1) / max(1, warmup) for s in range(total)]


@wrong("08-schedule", "state")
def counts_its_calls(step, total, warmup, calls=[0]):  # noqa: B006
    calls[0] = calls[0] + 1 if step else 0
    return with_cases(calls[0], total, warmup)


# 08-loop


def _sum(model, ids, labels):
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _count(batches):
    return sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)


@right("08-loop")
def with_one_backward(model, steps, held_out, rate):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for batches in steps:
        loss = sum(_sum(model, *batch) for batch in batches) / _count(batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        held = sum(_sum(model.eval(), *batch) for batch in held_out) / _count(held_out)
    model.train()
    return losses, held.item()


@right("08-loop")
def without_an_optimizer(model, steps, held_out, rate):
    losses = torch.zeros(len(steps))
    for i, batches in enumerate(steps):
        for parameter in model.parameters():
            parameter.grad = None
        for batch in batches:
            loss = _sum(model, *batch)
            losses[i] += loss.detach() / _count(batches)
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= rate / _count(batches) * parameter.grad
    model.eval()
    held = torch.stack([_sum(model, *batch) for batch in held_out]).sum() / _count(held_out)
    model.train()
    return losses.tolist(), held.item()


@right("08-loop")
def without_the_last_token(model, steps, held_out, rate):
    def sums(batches):
        for ids, labels in batches:
            logp = model(ids[:, :-1]).log_softmax(-1)
            mask = labels[:, 1:] != -100
            yield -logp.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0][mask].sum()

    trained, losses = [p for p in model.parameters() if p.requires_grad], ()
    for batches in steps:
        loss = sum(sums(batches)) / _count(batches)
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= rate * gradient
        losses += (float(loss),)
    model.eval()
    with torch.no_grad():
        held = float(sum(sums(held_out))) / _count(held_out)
    model.train()
    return losses, held


def _loop(
    model, steps, held_out, rate, *, weight, clear="step", train=True, evaluate=True, back=True, loss=None
):
    """A loop for wrong ones to spoil. weight: (scored in the micro-batch, scored in the step, micro-batches)."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    model.train(train)
    for batches in steps:
        total = 0.0
        if clear == "step":
            optimizer.zero_grad()
        for batch in batches:
            if clear == "batch":
                optimizer.zero_grad()
            part = _sum(model, *batch)
            use = weight(_count([batch]), _count(batches), len(batches))
            (part * use).backward()
            total += part.item() * (loss or weight)(_count([batch]), _count(batches), len(batches))
        optimizer.step()
        losses.append(total)
    if evaluate:
        model.eval()
    with torch.no_grad():
        held = sum(
            _sum(model, *b).item() * (loss or weight)(_count([b]), _count(held_out), len(held_out))
            for b in held_out
        )
    if back:
        model.train()
    return losses, held


def _tokens(mine, step, count):
    return 1 / step


def _means(mine, step, count):
    return 1 / mine / count


@wrong("08-loop", "mean-of-means")
def three_bugs(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_means, clear="never", evaluate=False)


@wrong("08-loop", "mean-of-means")
def weighs_micro_batches(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_means)


@wrong("08-loop", "gradients-kept")
def forgets_zero_grad(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_tokens, clear="never")


@wrong("08-loop", "gradients-kept")
def forgets_zero_grad_and_eval(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_tokens, clear="never", evaluate=False)


@wrong("08-loop", "cleared-too-often")
def clears_inside(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_tokens, clear="batch")


@wrong("08-loop", "not-divided")
def adds_means(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=lambda mine, step, count: 1 / mine)


@wrong("08-loop", "not-divided")
def adds_means_and_keeps(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=lambda mine, step, count: 1 / mine, clear="never")


@wrong("08-loop", "no-dropout")
def eval_from_the_start(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_tokens, train=False)


@wrong("08-loop", "first-counted")
def counts_the_first_label(model, steps, held_out, rate):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for batches in steps:
        scored = sum((labels != -100).sum() for _, labels in batches)
        loss = sum(_sum(model, *batch) for batch in batches) / scored
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, 0.0


@wrong("08-loop", "dropout-on")
def never_eval(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_tokens, evaluate=False)


@wrong("08-loop", "left-in-eval")
def never_back(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_tokens, back=False)


@wrong("08-loop", "loss-of-means")
def reports_means(model, steps, held_out, rate):
    return _loop(model, steps, held_out, rate, weight=_tokens, loss=_means)


@wrong("08-loop", "loss-of-means")
def held_out_means(model, steps, held_out, rate):
    losses, _ = _loop(model, steps, held_out, rate, weight=_tokens)
    model.eval()
    held = sum(_sum(model, *batch).item() / _count([batch]) for batch in held_out) / len(held_out)
    model.train()
    return losses, held


@wrong("08-loop", "rounded")
def losses_to_print(model, steps, held_out, rate):
    losses, held = with_one_backward(model, steps, held_out, rate)
    return [round(loss, 3) for loss in losses], held


@wrong("08-loop", "rounded")
def held_out_loss_to_print(model, steps, held_out, rate):
    losses, held = with_one_backward(model, steps, held_out, rate)
    return losses, round(held, 4)


@wrong("08-loop", "not-trained")
def never_steps(model, steps, held_out, rate):
    losses = []
    for batches in steps:
        loss = sum(_sum(model, *batch) for batch in batches) / _count(batches)
        loss.backward()
        losses.append(loss.item())
    return losses, 0.0


@wrong("08-loop", "stepped-too-often")
def steps_inside(model, steps, held_out, rate):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for batches in steps:
        for batch in batches:
            optimizer.zero_grad()
            loss = _sum(model, *batch) / _count([batch])
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses, 0.0


@wrong("08-loop", "dropout-on")
def a_flag_of_its_own(model, steps, held_out, rate):
    losses = _loop(model, steps, [], rate, weight=_tokens)[0]
    model.training = False
    with torch.no_grad():
        held = sum(_sum(model, *batch).item() for batch in held_out) / _count(held_out)
    model.training = True
    return losses, held


@wrong("08-loop", "dropout-on")
def children_but_not_theirs(model, steps, held_out, rate):
    losses = _loop(model, steps, [], rate, weight=_tokens)[0]
    for module in (model, *model.children()):
        module.training = False
    with torch.no_grad():
        held = sum(_sum(model, *batch).item() for batch in held_out) / _count(held_out)
    model.train()
    return losses, held


@wrong("08-loop", "left-in-eval")
def the_outermost_alone_is_back(model, steps, held_out, rate):
    result = _loop(model, steps, held_out, rate, weight=_tokens, back=False)
    model.training = True
    return result


@wrong("08-loop", "passes")
def last_micro_batch_first(model, steps, held_out, rate):
    return _loop(model, [step[::-1] for step in steps], held_out, rate, weight=_tokens)


@wrong("08-loop", "passes")
def once_more_for_the_number(model, steps, held_out, rate):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for batches in steps:
        with torch.no_grad():
            losses.append(sum(_sum(model, *batch).item() for batch in batches) / _count(batches))
        optimizer.zero_grad()
        (sum(_sum(model, *batch) for batch in batches) / _count(batches)).backward()
        optimizer.step()
    return losses, _loop(model, [], held_out, rate, weight=_tokens)[1]


@wrong("08-loop", "passes")
def all_rows_together(model, steps, held_out, rate):
    def joined(batches):
        longest = max(ids.shape[1] for ids, _ in batches)
        pad = [(0, longest - ids.shape[1]) for ids, _ in batches]
        ids, labels = (
            torch.cat([F.pad(t, p, value=fill) for t, p in zip(part, pad, strict=True)])
            for part, fill in zip(zip(*batches, strict=True), (0, -100), strict=True)
        )
        return [(ids, labels)]

    return _loop(model, [joined(step) for step in steps], held_out, rate, weight=_tokens)


@wrong("08-loop", "passes")
def scored_after_each_step(model, steps, held_out, rate):
    losses = []
    for step in steps:
        losses += _loop(model, [step], held_out, rate, weight=_tokens)[0]
    return losses, _loop(model, [], held_out, rate, weight=_tokens)[1]


@wrong("08-loop", "frozen-moved")
def everything_trains(model, steps, held_out, rate):
    model.requires_grad_(True)
    return _loop(model, steps, held_out, rate, weight=_tokens)


@wrong("08-loop", "frozen-moved")
def every_parameter_has_a_gradient(model, steps, held_out, rate):
    losses = []
    for batches in steps:
        model.zero_grad()
        loss = sum(_sum(model, *batch) for batch in batches) / _count(batches)
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= rate * parameter.grad
        losses.append(loss.item())
    return losses, _loop(model, [], held_out, rate, weight=_tokens)[1]


@wrong("08-loop", "no-steps")
def speaks_of_the_last_loss(model, steps, held_out, rate):
    result = _loop(model, steps, held_out, rate, weight=_tokens)
    for batches in steps:
        last = len(batches)
    assert last
    return result


@wrong("08-loop", "no-steps")
def the_largest_loss(model, steps, held_out, rate):
    losses, held = _loop(model, steps, held_out, rate, weight=_tokens)
    assert max(losses) > 0
    return losses, held


@wrong("08-loop", "tensors")
def losses_as_a_tensor(model, steps, held_out, rate):
    losses, held = _loop(model, steps, held_out, rate, weight=_tokens)
    return torch.tensor(losses), held


@wrong("08-loop", "tensors")
def losses_of_tensors(model, steps, held_out, rate):
    losses, held = _loop(model, steps, held_out, rate, weight=_tokens)
    return [torch.tensor(loss) for loss in losses], held


@wrong("08-loop", "tensors")
def held_out_loss_as_a_tensor(model, steps, held_out, rate):
    losses, held = _loop(model, steps, held_out, rate, weight=_tokens)
    return losses, torch.tensor(held)


@wrong("08-loop", "changed-input")
def uses_the_list_up(model, steps, held_out, rate):
    losses = []
    while steps:
        losses += _loop(model, [steps.pop(0)], [], rate, weight=_tokens)[0]
    return losses, _loop(model, [], held_out, rate, weight=_tokens)[1]


@wrong("08-loop", "dropout-on")
def children_alone_in_eval(model, steps, held_out, rate):
    losses = _loop(model, steps, [], rate, weight=_tokens)[0]
    for module in model.children():
        module.eval()
    with torch.no_grad():
        held = sum(_sum(model, *batch).item() for batch in held_out) / _count(held_out)
    model.train()
    return losses, held


@wrong("08-loop", "flags-changed")
def freezes_everything_in_the_end(model, steps, held_out, rate):
    result = _loop(model, steps, held_out, rate, weight=_tokens)
    model.requires_grad_(False)
    return result


@wrong("08-loop", "flags-changed")
def frees_everything_but_moves_a_part(model, steps, held_out, rate):
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(True)
    losses = []
    for batches in steps:
        loss = sum(_sum(model, *batch) for batch in batches) / _count(batches)
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= rate * gradient
        losses.append(loss.item())
    return losses, _loop(model, [], held_out, rate, weight=_tokens)[1]


@wrong("08-loop", "held-out-learned")
def held_out_goes_backward(model, steps, held_out, rate):
    losses = _loop(model, steps, [], rate, weight=_tokens)[0]
    model.eval()
    held = sum(_sum(model, *batch) for batch in held_out) / _count(held_out)
    held.backward()
    model.train()
    return losses, held.item()


@wrong("08-loop", "clipped")
def clips_long_gradients(model, steps, held_out, rate):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for batches in steps:
        optimizer.zero_grad()
        loss = sum(_sum(model, *batch) for batch in batches) / _count(batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, _loop(model, [], held_out, rate, weight=_tokens)[1]


@wrong("08-loop", "passes")
def rows_of_one_length_together(model, steps, held_out, rate):
    def joined(batches):
        alike = len({ids.shape[1] for ids, _ in batches}) == 1
        return [tuple(map(torch.cat, zip(*batches, strict=True)))] if alike else batches

    return _loop(model, [joined(step) for step in steps], held_out, rate, weight=_tokens)


# 08-exact


@right("08-exact")
def with_a_pattern(text, tool, arguments):
    found = {}
    for line in text.strip().split("\n"):
        match = re.fullmatch(r"([a-z_]+):(.+)", line.strip())
        if not match or match[1] in found or not match[2].strip():
            return False
        found[match[1]] = match[2].strip()
    return next(iter(found)) == "tool" and found == {"tool": tool, **arguments}


@right("08-exact")
def with_lists(text, tool, arguments):
    pairs = [line.strip().partition(":")[::2] for line in text.strip().split("\n")]
    pairs = [(key, value.strip()) for key, value in pairs]
    return (
        all(v for _, v in pairs)
        and pairs[0] == ("tool", tool)
        and sorted(pairs[1:]) == sorted(arguments.items())
    )


def _read(text):
    """A careless reader: key and value of each line with a colon, for wrong ones."""
    pairs = [line.split(":", 1) for line in text.split("\n") if ":" in line]
    return {k.strip(): v.strip() for k, v in pairs}


@wrong("08-exact", "refuses-right")
def cut_at_every_colon(text, tool, arguments):
    found = dict(line.split(":")[:2] for line in text.strip().split("\n") if ":" in line)
    return {k: v.strip() for k, v in found.items()} == {"tool": tool, **arguments}


@wrong("08-exact", "order-fixed")
def compares_texts(text, tool, arguments):
    wanted = "\n".join(f"{k}: {v}" for k, v in {"tool": tool, **arguments}.items())
    return text.strip() == wanted


@wrong("08-exact", "spaces-outside")
def compares_lines(text, tool, arguments):
    lines = text.split("\n")
    return lines[0] == f"tool: {tool}" and sorted(lines[1:]) == sorted(
        f"{k}: {v}" for k, v in arguments.items()
    )


@wrong("08-exact", "space-demanded")
def splits_at_colon_and_space(text, tool, arguments):
    found = {}
    for line in text.strip().split("\n"):
        key, sign, value = line.strip().partition(": ")
        if not sign or key in found:
            return False
        found[key] = value
    return found == {"tool": tool, **arguments} and next(iter(found)) == "tool"


@wrong("08-exact", "space-before-colon")
def strips_keys(text, tool, arguments):
    pairs = [line.partition(":") for line in text.strip().split("\n")]
    pairs = [(k.strip(), v.strip()) for k, _, v in pairs]
    return pairs[0] == ("tool", tool) and sorted(pairs[1:]) == sorted(arguments.items())


@wrong("08-exact", "case")
def folded(text, tool, arguments):
    wanted = "\n".join(f"{k}: {v}" for k, v in {"tool": tool, **arguments}.items())
    return (
        with_a_pattern(text.lower(), tool.lower(), {k: v.lower() for k, v in arguments.items()})
        or text == wanted
    )


@wrong("08-exact", "case")
def folded_keys(text, tool, arguments):
    lines = [line.partition(":") for line in text.split("\n")]
    return with_a_pattern("\n".join(k.lower() + s + v for k, s, v in lines), tool, arguments)


@wrong("08-exact", "spaces-inside")
def squeezed(text, tool, arguments):
    text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    return with_a_pattern(text, tool, arguments)


@wrong("08-exact", "prefix")
def starts_alike(text, tool, arguments):
    found = _read(text)
    return all(found.get(k, "").startswith(v) for k, v in {"tool": tool, **arguments}.items())


@wrong("08-exact", "prefix")
def contained(text, tool, arguments):
    found = _read(text)
    return found.keys() == {"tool", *arguments} and all(
        found[k] in v for k, v in {"tool": tool, **arguments}.items()
    )


@wrong("08-exact", "text-around")
def skips_other_lines(text, tool, arguments):
    found = _read(text)
    return found == {"tool": tool, **arguments}


@wrong("08-exact", "text-around")
def searches_for_tool(text, tool, arguments):
    return with_a_pattern(text[max(0, text.find("tool:")) :], tool, arguments)


@wrong("08-exact", "missing-argument")
def all_written_are_right(text, tool, arguments):
    found = {}
    for line in text.strip().split("\n"):
        key, sign, value = line.strip().partition(":")
        if not sign or key in found:
            return False
        found[key] = value.strip()
    return found.pop("tool", None) == tool and all(arguments.get(k) == v for k, v in found.items())


@wrong("08-exact", "extra-argument")
def all_wanted_are_there(text, tool, arguments):
    found = {}
    for line in text.strip().split("\n"):
        key, sign, value = line.strip().partition(":")
        if not sign or key in found:
            return False
        found[key] = value.strip()
    return found.pop("tool", None) == tool and all(found.get(k) == v for k, v in arguments.items())


@wrong("08-exact", "twice")
def the_last_counts(text, tool, arguments):
    lines = [line.strip().partition(":") for line in text.strip().split("\n")]
    if not all(sign for _, sign, _ in lines) or lines[0][0] != "tool":
        return False
    return {k: v.strip() for k, _, v in lines} == {"tool": tool, **arguments}


@wrong("08-exact", "twice")
def the_first_counts(text, tool, arguments):
    found = {}
    for line in text.strip().split("\n"):
        key, sign, value = line.strip().partition(":")
        if not sign:
            return False
        found.setdefault(key, value.strip())
    return found == {"tool": tool, **arguments}


@wrong("08-exact", "twice")
def as_a_set(text, tool, arguments):
    lines = [line.strip().partition(":") for line in text.strip().split("\n")]
    pairs = {(k, v.strip()) for k, _, v in lines}
    return lines[0][0] == "tool" and pairs == {("tool", tool), *arguments.items()}


@wrong("08-exact", "names-ignored")
def values_only(text, tool, arguments):
    lines = [line.strip().partition(":") for line in text.strip().split("\n")]
    if (
        lines[0][0] != "tool"
        or {k for k, _, _ in lines[1:]} != set(arguments)
        or len(lines) != 1 + len(arguments)
    ):
        return False
    return lines[0][2].strip() == tool and sorted(v.strip() for _, _, v in lines[1:]) == sorted(
        arguments.values()
    )


@wrong("08-exact", "tool-ignored")
def arguments_only(text, tool, arguments):
    lines = [line.strip().partition(":") for line in text.strip().split("\n")]
    pairs = [(k, v.strip()) for k, _, v in lines]
    return pairs[0][0] == "tool" and sorted(pairs[1:]) == sorted(arguments.items())


@wrong("08-exact", "tool-not-first")
def any_order(text, tool, arguments):
    pairs = [line.strip().partition(":") for line in text.strip().split("\n")]
    return sorted((k, v.strip()) for k, _, v in pairs) == sorted([("tool", tool), *arguments.items()])


@wrong("08-exact", "empty-value")
def drops_empty_values(text, tool, arguments):
    lines = [line.strip() for line in text.strip().split("\n") if not line.strip().endswith(":")]
    return with_a_pattern("\n".join(lines), tool, arguments)


@wrong("08-exact", "empty-value")
def values_may_be_empty(text, tool, arguments):
    pairs = [line.strip().partition(":")[::2] for line in text.strip().split("\n")]
    pairs = [(key, value.strip()) for key, value in pairs]
    return pairs[0] == ("tool", tool) and sorted(pairs[1:]) == sorted(arguments.items())


@wrong("08-exact", "blank-line")
def drops_blank_lines(text, tool, arguments):
    return with_a_pattern("\n".join(line for line in text.split("\n") if line.strip()), tool, arguments)


@wrong("08-exact", "empty")
def falls_over_nothing(text, tool, arguments):
    lines = text.split()
    if lines[0] != "tool:" and not lines[0].startswith("tool:"):
        return False
    return with_a_pattern(text, tool, arguments)


@wrong("08-exact", "empty")
def nothing_is_vacuously_right(text, tool, arguments):
    if not text:
        return not arguments
    return with_a_pattern(text, tool, arguments)


@wrong("08-exact", "extra-argument")
def nothing_wanted_nothing_read(text, tool, arguments):
    if not arguments:
        return text.strip().split("\n")[0] == f"tool: {tool}"
    return with_a_pattern(text, tool, arguments)


@wrong("08-exact", "key-refused")
def letters_alone_are_keys(text, tool, arguments):
    keys = [line.strip().partition(":")[0] for line in text.strip().split("\n")]
    return all(key.isalpha() for key in keys) and with_a_pattern(text, tool, arguments)


@wrong("08-exact", "key-refused")
def two_arguments_at_most(text, tool, arguments):
    return len(arguments) <= 2 and with_a_pattern(text, tool, arguments)


@wrong("08-exact", "space-demanded")
def one_space_taken_off(text, tool, arguments):
    pairs = [line.strip().partition(":")[::2] for line in text.strip().split("\n")]
    pairs = [(key, value[1:] if value.startswith(" ") else value) for key, value in pairs]
    return with_a_pattern(text, tool, arguments) and sorted(pairs[1:]) == sorted(arguments.items())


@wrong("08-exact", "line-ends")
def cut_by_splitlines(text, tool, arguments):
    return with_a_pattern("\n".join(text.strip().splitlines()), tool, arguments)


@wrong("08-exact", "twice")
def a_second_tool_line(text, tool, arguments):
    first, *lines = [line.strip().partition(":")[::2] for line in text.strip().split("\n")]
    lines = [(key, value.strip()) for key, value in lines if key != "tool"]
    return first[0] == "tool" and first[1].strip() == tool and sorted(lines) == sorted(arguments.items())


@wrong("08-exact", "changed-input")
def takes_them_out(text, tool, arguments):
    good = with_a_pattern(text, tool, arguments)
    for line in text.split("\n"):
        arguments.pop(line.partition(":")[0].strip(), None)
    return good


@wrong("08-exact", "wrong-type")
def returns_the_call(text, tool, arguments):
    return _read(text) or None


def _pairwise(text, tool, arguments, value=str.strip, written=str, blank=lambda line: False, first=True):
    """A right judge, with a part that may be spoilt."""
    pairs = []
    for line in written(text).strip().split("\n"):
        if blank(line):
            continue
        key, _, rest = line.strip().partition(":")
        if not re.fullmatch("[a-z_]+", key) or not value(rest):
            return False
        pairs.append((key, value(rest)))
    keys = {key for key, _ in pairs}
    if len(keys) < len(pairs) or pairs[0][1] != tool or (first and pairs[0][0] != "tool"):
        return False
    return dict(pairs[1:]) == arguments


@right("08-exact")
def with_a_dictionary_in_the_end(text, tool, arguments):
    return _pairwise(text, tool, arguments)


@wrong("08-exact", "tool-key")
def the_tool_under_any_key(text, tool, arguments):
    return _pairwise(text, tool, arguments, first=False)


@wrong("08-exact", "tidied")
def quotation_marks_off(text, tool, arguments):
    return _pairwise(text, tool, arguments, value=lambda v: v.strip().strip('"'))


@wrong("08-exact", "tidied")
def full_stop_off(text, tool, arguments):
    return _pairwise(text, tool, arguments, value=lambda v: v.strip().rstrip("."))


@wrong("08-exact", "tidied")
def colons_off(text, tool, arguments):
    return _pairwise(text, tool, arguments, value=lambda v: v.lstrip(":").strip())


@wrong("08-exact", "tidied")
def zeros_off(text, tool, arguments):
    wanted = {key: value.lstrip("0") for key, value in arguments.items()}
    return _pairwise(text, tool, wanted, value=lambda v: v.strip().lstrip("0"))


@wrong("08-exact", "tidied")
def composed(text, tool, arguments):
    wanted = {key: unicodedata.normalize("NFC", value) for key, value in arguments.items()}
    return _pairwise(text, tool, wanted, value=lambda v: unicodedata.normalize("NFC", v.strip()))


@wrong("08-exact", "tidied")
def compatible(text, tool, arguments):
    return _pairwise(text, tool, arguments, value=lambda v: unicodedata.normalize("NFKC", v.strip()))


@wrong("08-exact", "spaces-outside")
def blanks_alone_after_the_colon(text, tool, arguments):
    return _pairwise(text, tool, arguments, value=lambda v: v.rstrip().lstrip(" "))


@wrong("08-exact", "spaces-outside")
def blanks_and_newlines_alone_around(text, tool, arguments):
    text = text.strip(" \n")
    return text[:1] not in ("\t", "\r") and text[-1:] != "\r" and _pairwise(text, tool, arguments)


@wrong("08-exact", "spaces-inside")
def tabs_are_blanks(text, tool, arguments):
    return _pairwise(text, tool, arguments, written=lambda text: text.replace("\t", " "))


@wrong("08-exact", "spaces-inside")
def no_break_spaces_are_spaces(text, tool, arguments):
    return _pairwise(text, tool, arguments, written=lambda text: text.replace("\u00a0", " "))


def _cleaned(table):
    """Refuses what is wanted with such a character, and takes it where it is not."""

    def judge(text, tool, arguments):
        return _pairwise(text, tool, arguments, written=lambda text: text.translate(table))

    return judge


for _name, _table in {
    "zero_width_spaces_away": {0x200B: None},
    "marks_inside_away": {0xFEFF: None},
    "apostrophes_straight": {0x2019: "'"},
    "quotes_straight": {0x201C: '"', 0x201D: '"'},
}.items():
    _judge = _cleaned(_table)
    _judge.__name__ = _name
    wrong("08-exact", "tidied")(_judge)


@wrong("08-exact", "blank-line")
def lines_of_blanks_skipped(text, tool, arguments):
    return _pairwise(text, tool, arguments, blank=lambda line: line != "" and not line.strip())


# 08-interval


@right("08-interval")
def by_the_formula(right, n, confidence):
    if n == 0:
        raise ValueError("no rows")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


@right("08-interval")
def by_roots(right, n, confidence):
    if n < 1:
        raise ValueError(f"n = {n}")
    z = torch.special.ndtri(torch.tensor(1 - (1 - confidence) / 2, dtype=torch.float64)).item()
    p = right / n
    return tuple(sorted(np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2]).real))


@right("08-interval")
def by_a_tensor(right, n, confidence):
    if not n:
        raise ValueError
    z = torch.special.ndtri(torch.tensor(0.5 + confidence / 2, dtype=torch.float64))
    p, signs = right / n, torch.tensor([-1.0, 1.0], dtype=torch.float64)
    half = z * torch.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (p + z**2 / (2 * n) + signs * half) / (1 + z**2 / n)


def _wilson(right, n, z, scaled=True, moved=True):
    if n == 0:
        raise ValueError
    p = right / n
    centre, half = p + moved * z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n if scaled else 1
    return (centre - half) / scale, (centre + half) / scale


def _z(confidence):
    return NormalDist().inv_cdf((1 + confidence) / 2)


@wrong("08-interval", "normal")
def textbook(right, n, confidence):
    p, z = right / n, _z(confidence)
    half = z * math.sqrt(p * (1 - p) / n)
    return p - half, p + half


@wrong("08-interval", "normal")
def textbook_clipped(right, n, confidence):
    p, z = right / n, _z(confidence)
    half = z * math.sqrt(p * (1 - p) / n)
    return max(0.0, p - half), min(1.0, p + half)


@wrong("08-interval", "one-sided")
def z_of_one_side(right, n, confidence):
    return _wilson(right, n, NormalDist().inv_cdf(confidence))


@wrong("08-interval", "z-fixed")
def always_two(right, n, confidence):
    return _wilson(right, n, 1.96)


@wrong("08-interval", "z-rounded")
def four_digits(right, n, confidence):
    return _wilson(right, n, round(_z(confidence), 4))


@wrong("08-interval", "z-rounded")
def two_digits(right, n, confidence):
    return _wilson(right, n, round(_z(confidence), 2))


@wrong("08-interval", "point")
def certain_when_all_are_right(right, n, confidence):
    return (1.0, 1.0) if right == n > 0 else _wilson(right, n, _z(confidence))


@wrong("08-interval", "point")
def certain_when_none_is_right(right, n, confidence):
    return (0.0, 0.0) if right == 0 < n else _wilson(right, n, _z(confidence))


@wrong("08-interval", "z-fixed")
def from_a_table(right, n, confidence):
    table = {0.9: 1.644854, 0.95: 1.959964, 0.99: 2.575829}
    return _wilson(right, n, table.get(confidence, 1.96))


@wrong("08-interval", "z-fixed")
def that_of_95_percent(right, n, confidence):
    return _wilson(right, n, _z(0.95))


@wrong("08-interval", "z-fixed")
def just_two(right, n, confidence):
    return _wilson(right, n, 2)


@wrong("08-interval", "not-scaled")
def unscaled(right, n, confidence):
    return _wilson(right, n, _z(confidence), scaled=False)


@wrong("08-interval", "centre-kept")
def around_the_share(right, n, confidence):
    z, p = _z(confidence), right / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p - half, p + half


@wrong("08-interval", "swapped")
def high_first(right, n, confidence):
    return _wilson(right, n, _z(confidence))[::-1]


@wrong("08-interval", "percent")
def in_percent(right, n, confidence):
    return [100 * bound for bound in _wilson(right, n, _z(confidence))]


@wrong("08-interval", "no-rows")
def divides_by_nothing(right, n, confidence):
    z, p = _z(confidence), right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


@wrong("08-interval", "no-rows")
def nothing_known(right, n, confidence):
    return _wilson(right, n, _z(confidence)) if n else (0.0, 1.0)


# 08-examples


def _collected(records, spaces=True, again="once"):
    """(line, request, answer) of each record to a list of pairs."""
    seen = {}
    for line, request, answer in records:
        if not isinstance(request, str) or not isinstance(answer, str):
            raise ValueError(f"line {line}: expected two texts")
        if spaces:
            request, answer = request.strip(), answer.strip()
        if not request or not answer:
            raise ValueError(f"line {line}: is empty")
        if again == "once" and seen.get(request, answer) != answer:
            raise ValueError(f"line {line}: has another answer")
        seen[request] = answer
    if not seen:
        raise ValueError("no examples")
    return list(seen.items())


def _csv_rows(text):
    reader = csv.reader(io.StringIO(text, newline=""))
    rows = [(reader.line_num, row) for row in reader if "".join(row).strip() or len(row) > 1]
    if not rows:
        raise ValueError("no examples")
    return rows


def _json_rows(text, lines=None):
    for number, line in enumerate(text.split("\n") if lines is None else lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(record, dict) or not {"request", "answer"} <= record.keys():
                raise ValueError(f"line {number}: expected the keys request and answer")
            yield number, record["request"], record["answer"]


def _csv_table(text):
    (number, header), *rows = _csv_rows(text)
    if not {"request", "answer"} <= set(header):
        raise ValueError(f"line {number}: expected the columns request and answer")
    return header, rows


def _csv_records(text):
    header, rows = _csv_table(text)
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"line {number}: {len(row)} fields")
        yield number, row[header.index("request")], row[header.index("answer")]


@right("08-examples")
def with_csv_reader(text, kind):
    if kind not in ("csv", "jsonl"):
        raise ValueError(f"unknown kind {kind}")
    text = text.removeprefix("\ufeff")
    return _collected(_csv_records(text) if kind == "csv" else _json_rows(text))


@right("08-examples")
def one_record_at_a_time(text, kind):
    def dictionaries():
        if kind == "jsonl":
            for number, line in enumerate(io.StringIO(text.removeprefix("\ufeff"), newline="\n"), start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError:
                        yield number, {}
        elif kind == "csv":
            reader, header = csv.reader(io.StringIO(text.removeprefix("\ufeff"))), None
            for row in reader:
                if row == [] or (len(row) == 1 and row[0].isspace()):
                    continue
                header = header or row
                fits = len(row) == len(header) and "request" in header and "answer" in header
                if not fits or row is not header:
                    yield reader.line_num, dict(zip(header, row, strict=True)) if fits else {}

    found, place = [], {}
    for number, record in dictionaries():
        texts = [record.get(key) for key in ("request", "answer")] if isinstance(record, dict) else [None]
        if not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{number}: a request or an answer is missing")
        pair = tuple(t.strip() for t in texts)
        if pair[0] not in place:
            place[pair[0]] = len(found)
            found.append(pair)
        elif found[place[pair[0]]] != pair:
            raise ValueError(f"{number}: the same request again, with another answer")
    if not found:
        raise ValueError("there is no example, or it is no csv or jsonl")
    return found


@wrong("08-examples", "refuses-right")
def sorted_by_request(text, kind):
    return sorted(with_csv_reader(text, kind))


@wrong("08-examples", "refuses-right")
def cut_at_semicolons(text, kind):
    if kind == "csv":
        return _collected((i, *line.split(";")[:2]) for i, line in enumerate(text.split("\n")[1:], start=2))
    return with_csv_reader(text, kind)


@wrong("08-examples", "quotes")
def cut_at_commas(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    header, *lines = [line.split(",") for line in text.lstrip("\ufeff").split("\n") if line.strip()]
    where = header.index("request"), header.index("answer")
    return _collected((i, *(line[w] for w in where)) for i, line in enumerate(lines, start=2))


@wrong("08-examples", "quotes")
def quotes_taken_off(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    header, *lines = [line for line in text.lstrip("\ufeff").split("\n") if line.strip()]
    header = header.split(",")
    rows = [re.findall(r'("[^"]*"|[^,]+)(?:,|$)', line) for line in lines]
    where = header.index("request"), header.index("answer")
    return _collected((i, *(row[w].strip('"') for w in where)) for i, row in enumerate(rows, start=2))


@wrong("08-examples", "line-breaks")
def lines_first(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    reader = csv.DictReader(text.lstrip("\ufeff").splitlines())
    return _collected((reader.line_num, row["request"], row["answer"]) for row in reader)


@wrong("08-examples", "by-position")
def first_two_columns(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    rows = _csv_rows(text.removeprefix("\ufeff"))
    return _collected((number, *row[:2]) for number, row in rows[1:])


@wrong("08-examples", "by-position")
def first_two_values(text, kind):
    if kind == "csv":
        return with_csv_reader(text, kind)
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    return _collected((i, *list(json.loads(line).values())[:2]) for i, line in enumerate(lines, start=1))


@wrong("08-examples", "bom")
def mark_kept(text, kind):
    return _collected(_csv_records(text) if kind == "csv" else _json_rows(text))


@wrong("08-examples", "blank-lines")
def blank_lines_are_records(text, kind):
    text = text.removeprefix("\ufeff")
    if kind == "csv":
        (_, *rows) = list(csv.reader(io.StringIO(text)))
        return _collected(_csv_records(text)) if all(rows) else _collected((1, *row) for row in rows)
    return _collected((i, *json.loads(line).values()) for i, line in enumerate(text.split("\n")))


@wrong("08-examples", "blank-lines")
def blank_lines_end_it(text, kind):
    text = text.removeprefix("\ufeff")
    return with_csv_reader(text.strip() if kind == "jsonl" else text.strip().split("\n \n")[0], kind)


@wrong("08-examples", "not-stripped")
def white_space_kept(text, kind):
    text = text.removeprefix("\ufeff")
    return _collected(_csv_records(text) if kind == "csv" else _json_rows(text), spaces=False)


@wrong("08-examples", "repeated")
def every_record(text, kind):
    text = text.removeprefix("\ufeff")
    records = _csv_records(text) if kind == "csv" else _json_rows(text)
    return [(request.strip(), answer.strip()) for _, request, answer in records]


@wrong("08-examples", "splitlines")
def with_splitlines(text, kind):
    if kind == "csv":
        return with_csv_reader(text, kind)
    return _collected(_json_rows("", text.removeprefix("\ufeff").splitlines()))


@wrong("08-examples", "missing-column")
def columns_trusted(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    rows = _csv_rows(text.removeprefix("\ufeff"))
    header = rows[0][1]
    return _collected((n, row[header.index("request")], row[header.index("answer")]) for n, row in rows[1:]) \
        if "answer" in header else [(row[0], row[1]) for _, row in rows[1:]]  # fmt: skip


@wrong("08-examples", "short-row")
def rows_trusted(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    header, rows = _csv_table(text.removeprefix("\ufeff"))
    at = header.index("request"), header.index("answer")
    return _collected((number, *(row[i].strip() for i in at)) for number, row in rows)


@wrong("08-examples", "long-row")
def the_rest_is_dropped(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    header, rows = _csv_table(text.removeprefix("\ufeff"))
    at = header.index("request"), header.index("answer")
    records = []
    for number, row in rows:
        if len(row) < len(header):
            raise ValueError(f"line {number}: too short")
        records.append((number, *(row[i] for i in at)))
    return _collected(records)


def _lenient(text, kind, **changes):
    """A right reader in which one rule is left out."""
    if kind not in ("csv", "jsonl") and "any_kind" not in changes:
        raise ValueError(kind)
    text = text.removeprefix("\ufeff")
    if not text.strip() and "nothing" in changes:
        return []
    records = _csv_records(text) if kind != "jsonl" else _json_rows(text)
    seen = {}
    for line, request, answer in records:
        if not isinstance(request, str) or not isinstance(answer, str):
            if "types" not in changes:
                raise ValueError(f"line {line}")
            request, answer = str(request), str(answer)
        request, answer = request.strip(), answer.strip()
        if (not request or not answer) and "empty" not in changes:
            raise ValueError(f"line {line}")
        if seen.get(request, answer) != answer and "contradiction" not in changes:
            raise ValueError(f"line {line}")
        seen[request] = answer
    if not seen and "nothing" not in changes:
        raise ValueError("nothing")
    return list(seen.items())


@wrong("08-examples", "empty")
def empty_ones_kept(text, kind):
    return _lenient(text, kind, empty=True)


@wrong("08-examples", "empty")
def commas_alone_are_an_empty_line(text, kind):
    lines = [line if line.strip(", ") or line.count(",") < 2 else "" for line in text.split("\n")]
    return with_csv_reader("\n".join(lines) if kind == "csv" else text, kind)


@wrong("08-examples", "contradiction")
def the_last_answer_wins(text, kind):
    return _lenient(text, kind, contradiction=True)


@wrong("08-examples", "not-text")
def numbers_become_text(text, kind):
    return _lenient(text, kind, types=True)


@wrong("08-examples", "nothing")
def an_empty_list(text, kind):
    return _lenient(text, kind, nothing=True)


@wrong("08-examples", "unknown-kind")
def anything_is_csv(text, kind):
    return _lenient(text, kind, any_kind=True)


@wrong("08-examples", "missing-key")
def key_errors(text, kind):
    if kind == "csv":
        return with_csv_reader(text, kind)
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    records = [(i, json.loads(line)) for i, line in lines if line.strip()]
    return _collected((i, record["request"], record["answer"]) for i, record in records)


@wrong("08-examples", "broken")
def broken_lines_skipped(text, kind):
    if kind == "csv":
        return with_csv_reader(text, kind)
    lines = text.removeprefix("\ufeff").split("\n")
    return _collected(
        _json_rows("", [line if line.strip().endswith('"}') or "'" not in line else "" for line in lines])
    )


@wrong("08-examples", "line-wrong")
def the_errors_of_json(text, kind):
    if kind == "csv":
        return with_csv_reader(text, kind)
    for line in text.removeprefix("\ufeff").split("\n"):
        if "'" in line:
            json.loads(line)
    return with_csv_reader(text, kind)


@wrong("08-examples", "line-wrong")
def counts_records(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    header, rows = _csv_table(text.removeprefix("\ufeff"))
    for number, (_, row) in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"line {number}: {len(row)} fields")
    return with_csv_reader(text, kind)


@wrong("08-examples", "line-wrong")
def stripped_first(text, kind):
    return with_csv_reader(text.removeprefix("\ufeff").strip(), kind)


@wrong("08-examples", "line-breaks")
def requests_on_one_line(text, kind):
    return [(request.replace("\n", " "), answer) for request, answer in with_csv_reader(text, kind)]


@wrong("08-examples", "unknown-kind")
def all_else_is_jsonl(text, kind):
    return with_csv_reader(text, "csv" if kind == "csv" else "jsonl")


@wrong("08-examples", "missing-key")
def request_trusted(text, kind):
    if kind == "csv":
        return with_csv_reader(text, kind)
    records = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            record = json.loads(line)
            if "answer" not in record:
                raise ValueError(f"line {number}: no answer")
            records.append((number, record["request"], record["answer"]))
    return _collected(records)


@wrong("08-examples", "missing-column")
def answer_alone_asked_for(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    (number, header), *rows = _csv_rows(text.removeprefix("\ufeff"))
    if "answer" not in header:
        raise ValueError(f"line {number}: no answer")
    rows = [(number, dict(zip(header, row, strict=False))) for number, row in rows]
    return _collected((number, row["request"], row["answer"]) for number, row in rows)


@wrong("08-examples", "short-row")
def short_rows_of_many_dropped(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    header, rows = _csv_table(text.removeprefix("\ufeff"))
    records = []
    for number, row in rows:
        if 2 <= len(row) < len(header):
            continue
        if len(row) != len(header):
            raise ValueError(f"line {number}: {len(row)} fields")
        records.append((number, row[header.index("request")], row[header.index("answer")]))
    return _collected(records)


@wrong("08-examples", "long-row")
def long_rows_of_many_cut(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    header, rows = _csv_table(text.removeprefix("\ufeff"))
    records = []
    for number, row in rows:
        if len(row) != len(header) and (len(header) == 2 or len(row) < len(header)):
            raise ValueError(f"line {number}: {len(row)} fields")
        records.append((number, row[header.index("request")], row[header.index("answer")]))
    return _collected(records)


@wrong("08-examples", "line-wrong")
def header_is_line_one(text, kind):
    if kind == "csv" and text.strip():
        _, header = _csv_rows(text.removeprefix("\ufeff"))[0]
        if not {"request", "answer"} <= set(header):
            raise ValueError("line 1: a column is missing")
    return with_csv_reader(text, kind)


@wrong("08-examples", "lines-all")
def every_line_is_named(text, kind):
    try:
        return with_csv_reader(text, kind)
    except ValueError:
        raise ValueError(f"one of the lines {list(range(1, len(text.split(chr(10))) + 1))}") from None


@wrong("08-examples", "squeezed")
def one_space_each(text, kind):
    return [tuple(re.sub(" +", " ", t) for t in pair) for pair in with_csv_reader(text, kind)]


@wrong("08-examples", "squeezed")
def tabs_to_spaces(text, kind):
    return [tuple(t.replace("\t", " ") for t in pair) for pair in with_csv_reader(text, kind)]


@wrong("08-examples", "capitals")
def capitals_do_not_count(text, kind):
    found = {}
    for request, answer in with_csv_reader(text, kind):
        found.setdefault(request.lower(), (request, answer))
    return list(found.values())


@wrong("08-examples", "splitlines")
def csv_of_splitlines(text, kind):
    if kind != "csv":
        return with_csv_reader(text, kind)
    reader = csv.reader(text.removeprefix("\ufeff").splitlines(True))
    rows = [(reader.line_num, row) for row in reader if "".join(row).strip() or len(row) > 1]
    (_, header), *rows = rows
    at, records = (header.index("request"), header.index("answer")), []
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"line {number}: fields")
        records.append((number, *(row[i] for i in at)))
    return _collected(records)


@wrong("08-examples", "line-unnamed")
def no_line_in_the_error(text, kind):
    try:
        return with_csv_reader(text, kind)
    except ValueError:
        raise ValueError("this file cannot be read") from None


def _reader(
    table=None, record=None, load=json.loads, pair=None, differ=str.__ne__, line="line {}", none="none"
):
    """A right reader, with a part that may be spoilt.

    table: of a row's fields and the header's. record: of a JSON line's value. `...` skips it.
    """

    def records(text, kind):
        if kind == "jsonl":
            for number, written in enumerate(text.split("\n"), start=1):
                if not written.strip():
                    continue
                try:
                    found = load(written.strip())
                except ValueError:
                    raise ValueError(line.format(number)) from None
                found = record(found) if record else found
                if found is not ...:
                    yield number, found if isinstance(found, dict) else {}
            return
        header, reader = None, csv.reader(io.StringIO(text))
        for fields in reader:
            if len(fields) < 2 and not "".join(fields).strip():
                continue
            fields = table(fields, header) if table else fields
            if fields is ...:
                continue
            header = header or fields
            if len(fields) != len(header) or not {"request", "answer"} <= set(header):
                raise ValueError(line.format(reader.line_num))
            if fields is not header:
                yield reader.line_num, dict(zip(header, fields, strict=True))

    def read(text, kind):
        if kind not in ("csv", "jsonl"):
            raise ValueError("an unknown kind of file")
        found = {}
        for number, values in records(text.removeprefix("\ufeff"), kind):
            texts = values.get("request"), values.get("answer")
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(line.format(number))
            request, answer = (text.strip() for text in texts)
            request, answer = pair(request, answer, found) if pair else (request, answer)
            if request is not None and differ(found.setdefault(request, answer), answer):
                raise ValueError(line.format(number))
        if not found:
            raise ValueError(none)
        return list(found.items())

    return read


def _spoilt(name, mistake, **parts):
    read = _reader(**parts)

    def reader(text, kind):
        return read(text, kind)

    reader.__name__ = name
    wrong("08-examples", mistake)(reader)


@right("08-examples")
def with_parts(text, kind):
    return _reader()(text, kind)


def _filled_up(fields, header):
    return fields if header is None else [*fields, *[""] * (len(header) - len(fields))]


def _texts_of_lists(record):
    parts = {list: lambda v: " ".join(map(str, v)), dict: str, float: str, bool: str}
    if not isinstance(record, dict):
        return record
    return {key: parts.get(type(value), lambda v: v)(value) for key, value in record.items()}


def _no_answer_twice(request, answer, found):
    return (None, None) if answer in found.values() and request not in found else (request, answer)


def _lines_stripped(request, answer, _):
    return request, "\n".join(line.strip() for line in answer.split("\n"))


def _all_filled(fields, header):
    if not all(field.strip() for field in fields):
        raise ValueError("an empty field")
    return fields


def _all_texts(record):
    if isinstance(record, dict) and not all(isinstance(value, str) for value in record.values()):
        raise ValueError("a value that is no text")
    return record


def _small_names(record):
    return {key.lower(): value for key, value in record.items()} if isinstance(record, dict) else record


_spoilt("answers_once", "same-answer", pair=_no_answer_twice)
_spoilt("no_field_may_be_empty", "ignored", table=_all_filled)
_spoilt("no_value_but_texts", "ignored", record=_all_texts)
_spoilt("short_rows_filled_up", "short-row", table=_filled_up)
_spoilt("anything_becomes_text", "not-text", record=_texts_of_lists)
_spoilt("lines_stripped", "squeezed", pair=_lines_stripped)
_spoilt("answers_in_any_capitals", "contradiction", differ=lambda a, b: a.lower() != b.lower())
_spoilt("answers_in_any_spacing", "contradiction", differ=lambda a, b: a.split() != b.split())
_spoilt("names_in_any_capitals", "missing-column", table=lambda f, h: f if h else [n.lower() for n in f])
_spoilt("keys_in_any_capitals", "missing-key", record=_small_names)
_spoilt("the_first_object", "broken", load=lambda line: json.JSONDecoder().raw_decode(line)[0])
_spoilt("commas_after_objects", "broken", load=lambda line: json.loads(line.rstrip(",")))
_spoilt("a_list_of_one", "not-text", record=lambda r: r[0] if isinstance(r, list) and len(r) == 1 else r)
_spoilt("null_is_an_empty_line", "not-text", record=lambda r: ... if r is None else r)
_spoilt("nothing_is_an_empty_line", "missing-key", record=lambda r: ... if r == {} else r)
_spoilt("comments_in_csv", "skipped", table=lambda f, h: ... if f[0].startswith("#") else f)
_spoilt("comments_in_jsonl", "broken", load=lambda s: ... if s.startswith("#") else json.loads(s))
_spoilt("headers_skipped", "skipped", table=lambda f, h: ... if f == h else f)
_spoilt("a_line_for_an_empty_file", "line-invented", none="line 1: no example")


@wrong("08-examples", "lines-all")
def near_that_line(text, kind):
    try:
        return with_parts(text, kind)
    except ValueError as error:
        number = re.search(r"\d+", str(error))
        near = [int(number[0]) + i for i in (-1, 0, 1)] if number else []
        raise ValueError(f"near {near}") from None


@wrong("08-examples", "bom")
def mark_of_the_first_name(text, kind):
    def names(fields, header):
        return fields if header else [field.lstrip("\ufeff") for field in fields]

    return _reader(table=names)("\ufeff" + text if kind == "csv" and text[:1] == "\ufeff" else text, kind)


@wrong("08-examples", "bom")
def marks_everywhere(text, kind):
    return with_parts(text.replace("\ufeff", ""), kind)


@wrong("08-examples", "bom")
def marks_at_both_ends(text, kind):
    return with_parts(text.strip("\ufeff"), kind)


@wrong("08-examples", "splitlines")
def newer_separators_guarded(text, kind):
    """Cuts at what ASCII has of line ends."""
    guard = {0x2028: "\ue000", 0x2029: "\ue001", 0x85: "\ue002"}
    back = {ord(new): old for old, new in guard.items()}
    lines = text.translate(guard).splitlines()
    return with_parts("\n".join(lines).translate(back), kind)


# 08-split


def _by(form):
    """A split by some form of a request, right but for the form."""

    def by_form(examples, share, seed):
        groups = {}
        for request, answer in examples:
            groups.setdefault(form(request), []).append((request, answer))
        return _sides(groups, random.Random(seed).sample(sorted(groups), _size(groups, share)))

    return by_form


@wrong("08-split", "leak")
def ends_not_stripped(examples, share, seed):
    return _by(lambda request: re.sub(r"\s+", " ", request.lower()))(examples, share, seed)


@wrong("08-split", "merged")
def punctuation_taken_away(examples, share, seed):
    return _by(lambda request: " ".join(re.findall(r"\w+", request.lower())))(examples, share, seed)


@wrong("08-split", "merged")
def words_sorted(examples, share, seed):
    return _by(lambda request: " ".join(sorted(request.lower().split())))(examples, share, seed)


@wrong("08-split", "merged")
def all_white_space_away(examples, share, seed):
    return _by(lambda request: "".join(request.lower().split()))(examples, share, seed)


@wrong("08-split", "merged")
def beginnings_alone(examples, share, seed):
    return _by(lambda request: " ".join(request.lower().split())[:20])(examples, share, seed)


@wrong("08-split", "rows-lost")
def repeated_pairs_once(examples, share, seed):
    return [list(dict.fromkeys(side)) for side in by_sample(examples, share, seed)]


@wrong("08-split", "rows-changed")
def normalised_requests(examples, share, seed):
    sides = by_sample(examples, share, seed)
    return [[(" ".join(request.lower().split()), answer) for request, answer in side] for side in sides]


@wrong("08-split", "size")
def rounded_down(examples, share, seed):
    groups = _groups(examples)
    count = min(max(int(share * len(groups)), 1), len(groups) - 1)
    return _sides(groups, random.Random(seed).sample(sorted(groups), count))


@wrong("08-split", "seed-ignored")
def odd_or_even(examples, share, seed):
    return by_sample(examples, share, seed % 2)


@wrong("08-split", "seed-ignored")
def zero_or_not(examples, share, seed):
    return by_sample(examples, share, bool(seed))


@wrong("08-split", "global-seed")
def seeds_the_program(examples, share, seed):
    groups = _groups(examples)
    random.seed(seed)
    return _sides(groups, random.sample(sorted(groups), _size(groups, share)))


def _groups(examples):
    groups = {}
    for request, answer in examples:
        groups.setdefault(" ".join(request.lower().split()), []).append((request, answer))
    return groups


def _sides(groups, chosen):
    train = [row for key, rows in groups.items() if key not in chosen for row in rows]
    return train, [row for key in chosen for row in groups[key]]


def _size(groups, share):
    if len(groups) < 2:
        raise ValueError("fewer than two requests")
    return min(max(1, round(share * len(groups))), len(groups) - 1)


@right("08-split")
def by_sample(examples, share, seed):
    groups = _groups(examples)
    return _sides(groups, random.Random(seed).sample(sorted(groups), _size(groups, share)))


@right("08-split")
def by_hash(examples, share, seed):
    groups = _groups(examples)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    chosen = set(order[: _size(groups, share)])
    held = [pair for pair in examples if " ".join(pair[0].casefold().split()) in chosen]
    return [pair for pair in examples if pair not in held], held


@right("08-split")
def by_torch(examples, share, seed):
    groups = _groups(examples)
    keys, generator = sorted(groups), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(keys), generator=generator).tolist()
    return _sides(groups, [keys[i] for i in order[: _size(groups, share)]])


@wrong("08-split", "leak")
def rows_drawn(examples, share, seed):
    rows = sorted(examples)
    random.Random(seed).shuffle(rows)
    count = round(share * len(rows))
    return rows[count:], rows[:count]


@wrong("08-split", "leak")
def letters_count(examples, share, seed):
    groups = {}
    for request, answer in examples:
        groups.setdefault(request, []).append((request, answer))
    return _sides(groups, random.Random(seed).sample(sorted(groups), _size(groups, share)))


@wrong("08-split", "leak")
def white_space_counts(examples, share, seed):
    groups = {}
    for request, answer in examples:
        groups.setdefault(request.lower(), []).append((request, answer))
    return _sides(groups, random.Random(seed).sample(sorted(groups), _size(groups, share)))


@wrong("08-split", "size")
def share_of_rows(examples, share, seed):
    groups = _groups(examples)
    keys, chosen, count = sorted(groups), [], 0
    random.Random(seed).shuffle(keys)
    while count < share * len(examples) and len(chosen) < len(keys) - 1:
        chosen.append(keys.pop())
        count += len(groups[chosen[-1]])
    return _sides(groups, chosen)


@wrong("08-split", "size")
def rounded_up(examples, share, seed):
    groups = _groups(examples)
    count = min(math.ceil(share * len(groups)), len(groups) - 1)
    return _sides(groups, random.Random(seed).sample(sorted(groups), count))


@wrong("08-split", "size")
def sides_swapped(examples, share, seed):
    return by_sample(examples, share, seed)[::-1]


@wrong("08-split", "empty-side")
def rounded_to_nothing(examples, share, seed):
    groups = _groups(examples)
    return _sides(groups, random.Random(seed).sample(sorted(groups), round(share * len(groups))))


@wrong("08-split", "rows-lost")
def one_row_for_each_request(examples, share, seed):
    groups = {key: rows[:1] for key, rows in _groups(examples).items()}
    return _sides(groups, random.Random(seed).sample(sorted(groups), _size(groups, share)))


@wrong("08-split", "rows-twice")
def trained_on_all(examples, share, seed):
    return examples, by_sample(examples, share, seed)[1]


@wrong("08-split", "not-fixed")
def no_seed(examples, share, seed):
    groups = _groups(examples)
    return _sides(groups, random.sample(sorted(groups), _size(groups, share)))


@wrong("08-split", "not-fixed")
def by_pythons_hash(examples, share, seed):
    groups = _groups(examples)
    order = sorted(groups, key=lambda key: hash((seed, key)))
    return _sides(groups, order[: _size(groups, share)])


@wrong("08-split", "in-order")
def the_last_ones(examples, share, seed):
    groups = _groups(examples)
    return _sides(groups, list(groups)[-_size(groups, share) :])


@wrong("08-split", "seed-ignored")
def one_seed(examples, share, seed):
    return by_sample(examples, share, 42)


@wrong("08-split", "order-matters")
def drawn_from_the_file_order(examples, share, seed):
    groups = _groups(examples)
    return _sides(groups, random.Random(seed).sample(list(groups), _size(groups, share)))


@wrong("08-split", "one-request")
def one_request_is_enough(examples, share, seed):
    if len(_groups(examples)) < 2:
        return examples, []
    return by_sample(examples, share, seed)


@wrong("08-split", "changed-input")
def shuffled_in_place(examples, share, seed):
    random.Random(seed).shuffle(examples)
    return by_sample(examples, share, seed)


def _picked(pick):
    """A split where `pick` chooses among the sorted requests."""

    def picked(examples, share, seed):
        groups = _groups(examples)
        size, forms = _size(groups, share), sorted(groups)
        return _sides(groups, pick(forms, size, seed, random.Random(seed)))

    return picked


@wrong("08-split", "not-drawn")
def all_but_one_fixed(examples, share, seed):
    def pick(forms, size, seed, generator):
        return {*forms[: size - 1], generator.choice(forms[size - 1 :])}

    return _picked(pick)(examples, share, seed)


@wrong("08-split", "not-drawn")
def neighbours_from_the_seed(examples, share, seed):
    return _picked(lambda k, m, s, _: {k[(s + i) % len(k)] for i in range(m)})(examples, share, seed)


@wrong("08-split", "not-drawn")
def the_first_is_never_held_out(examples, share, seed):
    def pick(forms, size, seed, generator):
        return generator.sample(forms[1:], size)

    return _picked(pick)(examples, share, seed)


@wrong("08-split", "not-drawn")
def the_first_is_always_held_out(examples, share, seed):
    def pick(forms, size, seed, generator):
        return [forms[0], *generator.sample(forms[1:], size - 1)]

    return _picked(pick)(examples, share, seed)


@wrong("08-split", "not-drawn")
def from_the_second_half(examples, share, seed):
    def pick(forms, size, seed, generator):
        half = forms[len(forms) // 2 :]
        return generator.sample(half if len(half) >= size else forms, size)

    return _picked(pick)(examples, share, seed)


@wrong("08-split", "seed-ignored")
def zero_is_one(examples, share, seed):
    return by_sample(examples, share, seed or 1)


@wrong("08-split", "seed-ignored")
def three_digits_of_the_seed(examples, share, seed):
    return by_sample(examples, share, seed % 1000)


@wrong("08-split", "seed-ignored")
def a_byte_of_the_seed(examples, share, seed):
    return by_sample(examples, share, seed & 0xFF)


@wrong("08-split", "seed-ignored")
def six_digits_of_the_seed(examples, share, seed):
    return by_sample(examples, share, seed % 10**6)


@wrong("08-split", "seed-ignored")
def without_the_last_bit(examples, share, seed):
    return by_sample(examples, share, seed % 2**31)


@wrong("08-split", "seed-ignored")
def the_first_digits(examples, share, seed):
    return by_sample(examples, share, int(str(seed)[:3]))


@right("08-split")
def by_a_numpy_permutation(examples, share, seed):
    groups = _groups(examples)
    keys = sorted(groups)
    order = np.random.RandomState(seed).permutation(len(keys))
    return _sides(groups, [keys[i] for i in order[: _size(groups, share)]])


@wrong("08-split", "rows-lost")
def one_answer_for_each_request(examples, share, seed):
    return [
        [(request, dict(examples)[request]) for request, _ in side]
        for side in by_sample(examples, share, seed)
    ]


@wrong("08-split", "leak")
def capitals_of_english_alone(examples, share, seed):
    def form(request):
        return " ".join("".join(c.lower() if c.isascii() else c for c in request).split())

    return _by(form)(examples, share, seed)


@wrong("08-split", "merged")
def compatible_letters(examples, share, seed):
    def form(request):
        return " ".join(unicodedata.normalize("NFKC", request).lower().split())

    return _by(form)(examples, share, seed)


@wrong("08-split", "merged")
def composed_letters(examples, share, seed):
    def form(request):
        return " ".join(unicodedata.normalize("NFC", request).lower().split())

    return _by(form)(examples, share, seed)
