"""The course's task: a request in plain English becomes a tool call. Scored by exact match."""

from qlora_edu.tasks.data import (
    EVALUATION_SETS,
    FULL_SPECIFICATION,
    SYSTEM_PROMPT,
    Example,
    Splits,
    few_shot_messages,
    tool_calls,
)
from qlora_edu.tasks.phrasings import TOOLS, Tool
from qlora_edu.tasks.scoring import Judgement, is_exact, judge, parse
from qlora_edu.tasks.strangers import strangers
from qlora_edu.tasks.values import SLOTS, Slot

__all__ = [
    "EVALUATION_SETS",
    "FULL_SPECIFICATION",
    "SLOTS",
    "SYSTEM_PROMPT",
    "TOOLS",
    "Example",
    "Judgement",
    "Slot",
    "Splits",
    "Tool",
    "few_shot_messages",
    "is_exact",
    "judge",
    "parse",
    "strangers",
    "tool_calls",
]
