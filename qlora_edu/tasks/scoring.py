"""Reading a tool call out of what a model wrote, and judging it."""

import re
from dataclasses import dataclass

from qlora_edu.tasks.data import Example

_LINE = re.compile(r"(?P<key>[a-z_]+):(?P<value>.+)")


@dataclass(frozen=True)
class Judgement:
    """Where an answer is right. A part can only be right if the parts before it are."""

    parses: bool  # it is a tool call at all
    tool_right: bool
    arguments_right: bool  # exactly the right arguments, each with exactly the right value

    @property
    def exact(self) -> bool:
        """Everything is right."""
        return self.arguments_right


def parse(text: str) -> tuple[str, dict[str, str]] | None:
    """Read `text` as (tool, arguments), or return None if it is not a tool call.

    The rules: one `key: value` on every line, keys of lower-case letters and underscores, `tool` first, no
    key twice, no empty value, no empty line in between. A key ends at the first colon, so a value such as
    "7:15 am" keeps its own. White space around the text, a line or a value is ignored; inside a value it
    counts.

    >>> parse("tool: set_alarm\\ntime: 7:15 am\\nlabel: gym")
    ('set_alarm', {'time': '7:15 am', 'label': 'gym'})
    >>> parse("Sure! tool: set_alarm") is None
    True
    """
    pairs: dict[str, str] = {}
    for line in text.strip().split("\n"):
        match = _LINE.fullmatch(line.strip())
        if match is None or match["key"] in pairs or not match["value"].strip():
            return None
        pairs[match["key"]] = match["value"].strip()
    if next(iter(pairs)) != "tool":
        return None
    tool = pairs.pop("tool")
    return tool, pairs


def judge(text: str, example: Example) -> Judgement:
    """Compare what a model wrote with the call that `example` stands for.

    Arguments carry names, so their order does not matter. A missing, an additional or a different one does.

    Raises TypeError for anything but a text and an example, in this order.
    """
    if not isinstance(text, str) or not isinstance(example, Example):
        kinds = type(text).__name__, type(example).__name__
        raise TypeError(f"expected the text of an answer and a tasks.Example, in this order; got {kinds}")
    call = parse(text)
    if call is None:
        return Judgement(parses=False, tool_right=False, arguments_right=False)
    tool, arguments = call
    tool_right = tool == example.tool
    return Judgement(True, tool_right, tool_right and arguments == example.arguments)


def is_exact(text: str, example: Example) -> bool:
    """True if `text` is the right call: it parses, the tool is right, and so is every argument."""
    return judge(text, example).exact
