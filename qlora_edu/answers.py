"""What a model answers, and whether it is right.

`generate` lets the model write its answer token by token, as a user would see it. `grade` needs one forward pass:
greedy decoding writes the right answer exactly when, fed with the right answer, the model would choose each of its
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from qlora_edu.tasks import SYSTEM_PROMPT, Example
from qlora_edu.training.batches import IGNORE, Batch, Encoded, check_encoded
from qlora_edu.training.loss import last_hidden


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

    Raises:
        TypeError: if a chat is no list of messages.
    """
    for chat in chats:
        if isinstance(chat, (str, dict)) or not all(
            isinstance(message, dict) and message.keys() >= {"role", "content"} for message in chat
        ):
            raise TypeError(
                f'chats: expected lists of messages such as [{{"role": "user", "content": "Hello"}}]; got {chat!r:.60}'
            )
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
    """`generate` for the requests of examples.

    Raises:
        TypeError: if one is no `Example`; for text of your own, use `generate`.
    """
    for example in examples:
        if not isinstance(example, Example):
            kind = type(example).__name__
            raise TypeError(
                f"examples: expected tasks.Example; got {kind}. For text of your own, use generate()."
            )
    return generate(model, tokenizer, [example.messages(system) for example in examples])


@dataclass(frozen=True)
class Grades:
    """How a model does on rows of tokens, without writing an answer.

    Attributes:
        exact: for each row, whether each token of its answer is the one that the model finds most likely.
        loss: the mean of -log p over all answer tokens, in nats.
    """

    exact: list[bool]
    loss: float


@torch.no_grad()
def grade(model: nn.Module, rows: Sequence[Encoded], pad_id: int = 0, batch_size: int = 20) -> Grades:
    """Feed the model requests with their right answers, and look at what it expected in the place of each token.

    Raises:
        TypeError: if a row is not encoded. ValueError: if there is none.
    """
    check_encoded(rows)
    training = model.training
    model.eval()
    output = model.get_output_embeddings().weight
    exact, loss, scored = [], 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = Batch.of(rows[start : start + batch_size], pad_id).to(model.device)
        targets = batch.labels[:, 1:]
        chosen = targets != IGNORE
        logits = (last_hidden(model, batch)[:, :-1][chosen] @ output.T).float()  # (scored, vocabulary)
        loss += F.cross_entropy(logits, targets[chosen], reduction="sum").item()
        scored += len(logits)
        right = torch.ones_like(chosen)
        right[chosen] = logits.argmax(dim=1) == targets[chosen]
        exact += right.all(dim=1).tolist()
    model.train(training)
    return Grades(exact, loss / scored)
