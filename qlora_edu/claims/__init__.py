"""The claims that everyone repeats, computed again and judged.

    claims.weigh("memory-780gb", "memory-4bit-75")    shows what is said, what comes out, and the verdict
    claims.table()                                    shows the whole ledger
    claims.claim("memory-780gb").recompute()          gives the numbers

Read `ledger` first; every other module recomputes the claims of one chapter.
"""

from IPython.display import Markdown, display

from qlora_edu.claims.ledger import Claim, Figure, LedgerError, claim, entries, recomputes

__all__ = ["Claim", "Figure", "LedgerError", "claim", "counts", "entries", "recomputes", "table", "weigh"]


def weigh(*ids: str) -> None:
    """Recompute claims and show them as a table: what is said and by whom, what comes out, the verdict.

    Raises:
        LedgerError: if an id is unknown, no id is given, or an entry does not stand up to its recomputation.
    """
    if not ids:
        raise LedgerError(f"ids: expected at least one of {', '.join(entries())}")
    weighed = [claim(id) for id in ids]
    for entry in weighed:
        if faults := entry.faults():
            raise LedgerError(f"{entry.id}: {'; '.join(faults)}")
    rows = [
        f"| **{_cell(entry.statement)}**<br>{_cell(entry.who)} ({_cell(entry.source)}) "
        f"| {_cell(entry.judge())} | **{entry.verdict}** |"
        for entry in weighed
    ]
    display(Markdown("\n".join(["| what is said | what comes out | verdict |", "|:--|:--|:--|", *rows])))


def table() -> None:
    """Recompute and show every claim, topic by topic, and the count of each verdict."""
    for topic in dict.fromkeys(entry.topic for entry in entries().values()):
        display(Markdown(f"### {topic}"))
        weigh(*[id for id, entry in entries().items() if entry.topic == topic])
    print(", ".join(f"{count} {name}" for name, count in counts().items()))


def counts() -> dict[str, int]:
    """{"weighed": ..., "confirmed": ..., "corrected": ..., "open": ...}."""
    verdicts = [entry.verdict for entry in entries().values()]
    return {"weighed": len(verdicts)} | {
        name: verdicts.count(name) for name in ("confirmed", "corrected", "open")
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()
