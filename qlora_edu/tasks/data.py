"""Requests in plain English and the tool calls that they stand for.

    request   Wake me up at 7:15 am for rowing.
    answer    tool: set_alarm
              time: 7:15 am
              label: rowing

Every argument is copied out of the request, letter by letter. Lines of `key: value` keep the space before a
value, and with it the value's tokens: ` rowing` is the same token in the request and in the answer, which
`"rowing` in JSON is not.

Nothing leaks by construction. Each phrasing and each value belongs to training or to evaluation, whatever the
seed (see `phrasings` and `values`); the seed only decides what is drawn. The four evaluation sets:

    ============== ========== ========
    set            phrasings  values
    ============== ========== ========
    val            seen       seen      (in combinations that training does not contain)
    new_values     seen       unseen
    new_phrasings  unseen     seen      (in combinations that training does not contain)
    new_both       unseen     unseen    (the headline)
    ============== ========== ========

Whole words count: "living room" may be seen although "dining room" is not, and "35%" although "5%" is not.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from qlora_edu.tasks.phrasings import TOOLS, Tool
from qlora_edu.tasks.values import SLOTS

SYSTEM_PROMPT = "Turn the request into a tool call."

FULL_SPECIFICATION = "\n".join(
    [
        "Turn the request into a call of exactly one of these tools (their arguments stand in brackets):",
        *(f"- {tool.name}: {tool.description} ({', '.join(tool.arguments)})" for tool in TOOLS.values()),
        'Answer with lines of "key: value" and nothing else. The first is "tool: " and the name of the tool.',
        "Then comes one line for each of its arguments, in that order, the value copied from the request.",
    ]
)

EVALUATION_SETS = {  # name: (phrasings, values)
    "val": ("seen", "seen"),
    "new_values": ("seen", "unseen"),
    "new_phrasings": ("unseen", "seen"),
    "new_both": ("unseen", "unseen"),
}

_TRIES = 1000  # draws for one example before it is clear that the tables hold no more


@dataclass(frozen=True)
class Example:
    """One request and the call that it stands for.

    `arguments` are in the tool's own order. `phrasing` names the way of asking, such as "set_alarm/seen-3".
    """

    request: str
    tool: str
    arguments: dict[str, str]
    phrasing: str

    @property
    def answer(self) -> str:
        """The target: a `key: value` line for the tool, one for each argument, and no newline at the end."""
        return "\n".join(f"{key}: {value}" for key, value in {"tool": self.tool, **self.arguments}.items())

    def messages(self, system: str = SYSTEM_PROMPT) -> list[dict[str, str]]:
        """The prompt as chat messages: the system prompt and the request, without the answer."""
        return [{"role": "system", "content": system}, {"role": "user", "content": self.request}]


@dataclass(frozen=True)
class Splits:
    """The training set and the four evaluation sets."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    new_values: tuple[Example, ...]
    new_phrasings: tuple[Example, ...]
    new_both: tuple[Example, ...]

    def evaluation_sets(self) -> dict[str, tuple[Example, ...]]:
        """The four evaluation sets by name, the headline last."""
        return {name: getattr(self, name) for name in EVALUATION_SETS}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over every request and answer of every set, in order: equal data, equal digest."""
        sets = {"train": self.train, **self.evaluation_sets()}
        rows = [[name, e.phrasing, e.request, e.answer] for name, examples in sets.items() for e in examples]
        return sha256(json.dumps(rows).encode()).hexdigest()


def tool_calls(n_train: int = 1500, n_eval: int = 200, seed: int = 0) -> Splits:
    """Draw the five sets: `n_train` examples to train on and `n_eval` for each evaluation set.

    Counted from the start of a set, every nine examples hold each of the nine tools once. The evaluation sets
    do not depend on `n_train`, and a larger `n_eval` only makes them longer. The same arguments give the same
    data on every machine.

    Raises TypeError for a number that is not an integer, and ValueError for a negative one or for more
    examples than the tables hold.
    """
    for name, number in (("n_train", n_train), ("n_eval", n_eval), ("seed", seed)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, but it is {number!r}.")
        if number < 0:
            raise ValueError(f"{name} must be 0 or more, but it is {number}.")
    sets = {
        name: _draw_set(f"{name}-{seed}", n_eval, phrasings, values, forbidden=set())
        for name, (phrasings, values) in EVALUATION_SETS.items()
    }
    evaluated = {_call(example) for examples in sets.values() for example in examples}
    return Splits(train=_draw_set(f"train-{seed}", n_train, "seen", "seen", forbidden=evaluated), **sets)


def few_shot_messages(
    example: Example, splits: Splits, n: int = len(TOOLS), system: str = SYSTEM_PROMPT
) -> list[dict[str, str]]:
    """The prompt for `example` with the first `n` training examples before it, solved, as turns of one chat.

    The first nine hold each tool once. `example` itself is never shown solved.

    Raises ValueError if `n` is negative or more than training has.
    """
    solved = [shown for shown in splits.train if shown.request != example.request]
    if not 0 <= n <= len(solved):
        raise ValueError(f"n must lie between 0 and {len(solved)} (the training examples), but it is {n}.")
    messages = [{"role": "system", "content": system}]
    for shown in solved[:n]:
        messages.append({"role": "user", "content": shown.request})
        messages.append({"role": "assistant", "content": shown.answer})
    return [*messages, {"role": "user", "content": example.request}]


def _call(example: Example) -> tuple[str, ...]:
    return (example.tool, *example.arguments.values())


def _draw_set(
    seed: str, n: int, phrasings: str, values: str, forbidden: set[tuple[str, ...]]
) -> tuple[Example, ...]:
    """Draw `n` examples, no request twice, no call that is forbidden."""
    rng = random.Random(seed)
    examples: dict[str, Example] = {}  # by request
    for tool in _tools_in_turn(rng, n):
        for _ in range(_TRIES):
            example = _draw(rng, tool, phrasings, values)
            if example.request not in examples and _call(example) not in forbidden:
                examples[example.request] = example
                break
        else:
            raise ValueError(
                f"After {len(examples)} of {n} examples ({phrasings} phrasings, {values} values) there is no"
                f" new one for {tool.name}. Ask for fewer: lower n_train or n_eval."
            )
    return tuple(examples.values())


def _tools_in_turn(rng: random.Random, n: int) -> Iterator[Tool]:
    """Yield `n` tools: all nine in random order, then all nine in another, and so on."""
    for start in range(0, n, len(TOOLS)):
        yield from rng.sample(list(TOOLS.values()), len(TOOLS))[: n - start]


def _draw(rng: random.Random, tool: Tool, phrasings: str, values: str) -> Example:
    """Draw a way of asking and a value for each argument; no value stands in two arguments."""
    number, phrasing = rng.choice(list(enumerate(getattr(tool, phrasings))))
    arguments: dict[str, str] = {}
    for name, slot in tool.arguments.items():
        free = [value for value in getattr(SLOTS[slot], values) if value not in arguments.values()]
        arguments[name] = rng.choice(free)
    return Example(phrasing.format(**arguments), tool.name, arguments, f"{tool.name}/{phrasings}-{number}")
