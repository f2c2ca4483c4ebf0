"""What a model answers, and whether it is right.

`generate` lets the model write its answer token by token, as a user would see it. `would_answer_exactly` needs one
forward pass: greedy decoding writes the right answer exactly when, fed with the right answer, the model would
choose each of its tokens.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qlora_edu.tasks import SYSTEM_PROMPT, Example
from qlora_edu.training.batches import IGNORE, Batch, Encoded
from qlora_edu.training.loss import answer_loss, last_hidden


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer,
    chats: Sequence[Sequence[dict[str, str]]],
    max_new_tokens: int = 48,
    batch_size: int = 50,
) -> list[str]:
    """Greedy answers to chats, without special tokens.

    Args:
        chats: each a list of {"role", "content"} messages that ends with the user's.
        max_new_tokens: an answer that is not finished by then is cut off.

    Returns:
        One string for each chat, in their order.
    """
    training = model.training
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(list(c), add_generation_prompt=True, tokenize=False) for c in chats
    ]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        part = by_length[start : start + batch_size]
        inputs = tokenizer(
            [prompts[i] for i in part],
            return_tensors="pt",
            padding=True,
            padding_side="left",  # the answer must follow the prompt directly
            add_special_tokens=False,
        ).to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text
    model.train(training)
    return answers


def answer_requests(
    model: nn.Module, tokenizer, examples: Sequence[Example], system: str = SYSTEM_PROMPT
) -> list[str]:
    """`generate` for the requests of examples."""
    return generate(model, tokenizer, [example.messages(system) for example in examples])


@torch.no_grad()
def would_answer_exactly(
    model: nn.Module, rows: Sequence[Encoded], pad_id: int = 0, batch_size: int = 25
) -> list[bool]:
    """For each row, whether each token of its answer is the one that the model finds most likely."""
    training = model.training
    model.eval()
    right = []
    for start in range(0, len(rows), batch_size):
        batch = Batch.of(rows[start : start + batch_size], pad_id).to(model.device)
        chosen = batch.labels[:, 1:] != IGNORE
        hidden = last_hidden(model, batch)[:, :-1]
        guess = torch.full_like(batch.labels[:, 1:], IGNORE)
        guess[chosen] = (hidden[chosen] @ model.get_output_embeddings().weight.T).argmax(dim=1)
        right += (guess == batch.labels[:, 1:]).all(dim=1).tolist()
    model.train(training)
    return right


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequence[Encoded], pad_id: int = 0, batch_size: int = 25) -> float:
    """The mean of -log p over all answer tokens of rows, in nats."""
    training = model.training
    model.eval()
    batches = [
        Batch.of(rows[i : i + batch_size], pad_id).to(model.device) for i in range(0, len(rows), batch_size)
    ]
    scored = sum(batch.scored for batch in batches)
    loss = sum(answer_loss(model, batch, scored).item() for batch in batches)
    model.train(training)
    return loss
