"""From examples to the batches of each step.

A prompt and its answer become one row of tokens. Only the answer's tokens are scored: the label of every other
position is IGNORE.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from qlora_edu.tasks import SYSTEM_PROMPT, Example

IGNORE = -100  # torch's and transformers' label for "not scored"


@dataclass(frozen=True)
class Encoded:
    """One example in tokens: the prompt, and the answer with the token that ends it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Several rows, filled up on the right to the longest.

    Attributes:
        input_ids: int64 (rows, length).
        attention_mask: int64 (rows, length), 1 where there is a token.
        labels: int64 (rows, length), the token itself where it belongs to an answer, else IGNORE.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    @property
    def scored(self) -> int:
        """Tokens that are scored. The first of a row never is: nothing comes before it to predict it from."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    @classmethod
    def of(cls, rows: Sequence[Encoded], pad_id: int) -> "Batch":
        """Put rows together.

        Raises:
            TypeError: if a row is no `Encoded`. ValueError: if there is none.
        """
        check_encoded(rows)
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row.prompt + row.answer)
            attention_mask[i, : len(row)] = 1
            labels[i, len(row.prompt) : len(row)] = torch.tensor(row.answer)
        return cls(input_ids, attention_mask, labels)


def check_encoded(rows: Sequence[Encoded]) -> None:
    """TypeError unless all rows are `Encoded`, ValueError if there is none."""
    if isinstance(rows, Encoded):
        raise TypeError("rows: expected a list of encoded examples; got a single one. Write [row].")
    for row in rows:
        if not isinstance(row, Encoded):
            kind = type(row).__name__
            raise TypeError(
                f"rows: expected encoded examples; got {kind}. Use encode_all(examples, tokenizer)."
            )
    if not rows:
        raise ValueError("rows: expected at least one encoded example; got none")


def encode(example: Example, tokenizer, system: str = SYSTEM_PROMPT) -> Encoded:
    """Tokens of an example in the tokenizer's chat format. The end-of-sequence token belongs to the answer.

    Raises:
        TypeError: if `example` is no `Example`.
        ValueError: if the tokenizer has no chat template.
    """
    if not isinstance(example, Example):
        raise TypeError(f"example: expected a tasks.Example; got {type(example).__name__}")
    if tokenizer.chat_template is None:
        raise ValueError("tokenizer: has no chat template; use that of an instruction-tuned model")
    messages = example.messages(system)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    return Encoded(tuple(prompt), (*answer, tokenizer.eos_token_id))


def encode_all(examples: Sequence[Example], tokenizer, system: str = SYSTEM_PROMPT) -> list[Encoded]:
    """`encode` for many.

    Raises:
        TypeError: if `examples` is no sequence of `Example`.
    """
    if not isinstance(examples, Sequence):
        kind = type(examples).__name__
        raise TypeError(f"examples: expected a list of tasks.Example, such as data.train; got {kind}")
    return [encode(example, tokenizer, system) for example in examples]


def data_hash(rows: Sequence[Encoded]) -> str:
    """SHA-256 over all tokens, in order."""
    return sha256(repr([(row.prompt, row.answer) for row in rows]).encode()).hexdigest()


def steps(rows: Sequence[Encoded], batch_size: int, count: int, seed: int) -> list[list[Encoded]]:
    """Which rows each of `count` steps sees: a pure function of its arguments, so that a run can be resumed.

    The rows are drawn in random order, each once before any comes again.

    Raises:
        TypeError: if a row is no `Encoded`.
        ValueError: if there are no rows, or batch_size or count is less than 1.
    """
    check_encoded(rows)
    if batch_size < 1 or count < 1:
        raise ValueError(f"expected batch_size >= 1 and count >= 1; got {batch_size=}, {count=}")
    order = random.Random(seed)
    drawn: list[Encoded] = []
    while len(drawn) < batch_size * count:
        drawn += order.sample(list(rows), len(rows))
    return [drawn[i * batch_size : (i + 1) * batch_size] for i in range(count)]
