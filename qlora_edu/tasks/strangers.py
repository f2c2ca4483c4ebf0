"""Requests that nobody tuned anything on.

The phrasings and values of `tool_calls` were chosen by people who watched a model's errors on them. These were not:
they were composed knowing only what the nine tools are for, in the manner of twelve kinds of people (a hurried
parent, a chef, a Scottish farmer, ...), each of whom asks once for every tool: imitations, not recordings. They
were scored only after they were finished, and none was changed since. Do not train on them, and do not choose
anything by them.
"""

import json
from pathlib import Path

from qlora_edu.tasks.data import Example

_FILE = Path(__file__).parent.parent / "data" / "strangers.jsonl"


def strangers() -> tuple[Example, ...]:
    """All 108, twelve for each tool. `phrasing` is "stranger/" and the kind of person."""
    rows = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]
    return tuple(
        Example(row["request"], row["tool"], row["arguments"], f"stranger/{row['person']}") for row in rows
    )
