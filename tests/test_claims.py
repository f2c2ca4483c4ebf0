"""The ledger holds what is computed again, its verdicts follow from its figures, and the chapters say what it says."""

import json
import re
from pathlib import Path

import pytest

from qlora_edu import claims
from qlora_edu.claims import Claim, Figure, LedgerError
from qlora_edu.claims import ledger as module
from qlora_edu.claims.__main__ import main

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
WEIGHED = re.compile(r"claims\.weigh\((.*?)\)", re.DOTALL)
ID = re.compile(r'"([a-z0-9]+-[a-z0-9-]+)"')


@pytest.mark.parametrize("id", claims.entries())
def test_every_claim_stands_up_to_its_recomputation(id):
    assert claims.claim(id).faults() == []


def test_every_claim_says_who_and_where():
    for entry in claims.entries().values():
        for text in (entry.statement, entry.who, entry.source, entry.judgement):
            assert text.strip(), entry.id
        assert not re.search(r"FACTS|\[\d\]", entry.source), entry.id


def claims_section(notebook: dict) -> list[dict]:
    """The cells, and the parts of cells, from `## Claims` to the next `##`."""
    cells, inside = [], False
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "markdown":
            cells += [cell] if inside else []
            continue
        for part in re.split(r"^(?=## )", source, flags=re.MULTILINE):
            if part.startswith("## "):
                inside = part.startswith("## Claims")
            if inside:
                cells.append(cell | {"source": part})
    return cells


def foreign_numbers(notebook: dict) -> list[str]:
    """Numbers in the sources of a chapter's Claims section that the claims weighed there do not state."""
    sources = ["".join(cell["source"]) for cell in claims_section(notebook)]
    ids = [id for source in sources for call in WEIGHED.findall(source) for id in ID.findall(call)]
    stated = set()
    for entry in map(claims.claim, ids):
        stated |= set(NUMBER.findall(f"{entry.statement} {entry.source} {entry.judge()}"))
    prose = [ID.sub("", source) for source in sources]
    return [number for source in prose for number in NUMBER.findall(source) if number not in stated]


def with_a_claims_section() -> list[Path]:
    return [path for path in NOTEBOOKS if "claims.weigh(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", with_a_claims_section(), ids=lambda path: path.stem)
def test_a_chapters_claims_section_has_no_number_of_its_own(path):
    assert foreign_numbers(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", with_a_claims_section(), ids=lambda path: path.stem)
def test_a_changed_number_in_a_claims_section_is_noticed(path):
    """What it shows is held to the ledger by the next test."""
    text = path.read_text(encoding="utf-8")
    assert text.count("## Claims") == 1
    assert foreign_numbers(json.loads(text.replace("## Claims", "## Claims\\n\\nIt is 123.456 GB."))) == [
        "123.456"
    ]


@pytest.mark.parametrize("path", with_a_claims_section(), ids=lambda path: path.stem)
def test_the_saved_tables_are_those_of_the_ledger(path, monkeypatch):
    shown = []
    monkeypatch.setattr(claims, "display", lambda content: shown.append(content.data))
    for cell in claims_section(json.loads(path.read_text(encoding="utf-8"))):
        source = "".join(cell["source"])
        calls = WEIGHED.findall(source) if cell["cell_type"] == "code" else []
        shown.clear()
        for call in calls:
            claims.weigh(*ID.findall(call))
        saved = [
            "".join(output["data"]["text/markdown"])
            for output in cell.get("outputs", [])
            if "text/markdown" in output.get("data", {})
        ]
        assert saved == shown


def test_a_chapter_names_every_claim():
    """It weighs those that it needs, and says how to see the others."""
    text = "".join(path.read_text(encoding="utf-8") for path in NOTEBOOKS)
    for id in claims.entries():
        assert f'\\"{id}\\"' in text, f"{id} is named nowhere"


def test_every_claim_stands_in_the_appendix_as_saved_with_its_verdict():
    appendix = json.loads((NOTEBOOKS[0].parent / "claims.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in appendix["cells"] for output in cell.get("outputs", [])]
    tables = ["".join(output.get("data", {}).get("text/markdown", "")) for output in outputs]
    rows = "\n".join(tables).splitlines()
    for entry in claims.entries().values():
        (row,) = [row for row in rows if row.startswith(f"| **{claims._cell(entry.statement)}**")]
        assert row.endswith(f"| **{entry.verdict}** |"), entry.id


# The machinery, on a ledger of its own.


def entry(verdict="confirmed", judgement="It is {total:.1f} GB.", **figure) -> Claim:
    facts = {"found": 780.0, "tolerance": 1e-9, "claimed": 780, "within": 0.5, "unit": "GB"} | figure
    figures = {"total": Figure(**facts)}
    return Claim("staged-claim", "780 GB.", "somebody", "a paper", verdict, judgement, figures)


@pytest.fixture
def computed(monkeypatch):
    """Let the figures of the staged claim come out as told."""

    def tell(**values):
        monkeypatch.setattr(module, "_recomputed", lambda id: values)

    return tell


def test_a_claim_that_is_recomputed_as_stated_stands(computed):
    computed(total=780.0)
    assert entry().faults() == []
    assert entry().judge() == "It is 780.0 GB."


@pytest.mark.parametrize(
    ("changes", "value", "says"),
    [
        ({}, 790.0, "expected 780 GB"),
        ({}, float("nan"), "expected 780 GB"),
        ({"found": 790.0}, 790.0, "confirmed, but not recomputed as claimed: total"),
        ({"verdict": "corrected"}, 780.0, "corrected, but every figure is recomputed as claimed"),
        ({"claimed": None, "within": None}, 780.0, "confirmed, but .* it states no figure"),
    ],
)
def test_a_claim_that_does_not_stand_says_why(computed, changes, value, says):
    computed(total=value)
    assert re.search(says, "; ".join(entry(**changes).faults()))


def test_an_open_claim_only_has_to_be_found_again(computed):
    computed(total=790.0)
    assert entry(verdict="open", found=790.0).faults() == []
    assert entry(verdict="open").faults()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"verdict": "maybe"}, "expected one of confirmed, corrected, open; got 'maybe'"),
        ({"judgement": "It is {other:.1f}."}, "names other, which is no figure"),
        ({"within": None}, "needs `within`"),
        ({"tolerance": -1}, "must not be negative"),
    ],
)
def test_an_incomplete_entry_is_refused(changes, says):
    with pytest.raises(LedgerError, match=says):
        entry(**changes)


def test_a_function_must_give_the_figures_of_its_claim(monkeypatch):
    monkeypatch.setattr(module, "claim", lambda id: entry())
    monkeypatch.setattr(module.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(module, "_recomputations", {})
    with pytest.raises(LedgerError, match=r"no function in claims/staged\.py recomputes it"):
        module._recomputed.__wrapped__("staged-claim")
    claims.recomputes("staged-claim")(lambda: {"sum": 1.0})
    with pytest.raises(LedgerError, match=r"returns \['sum'\], the ledger has \['total'\]"):
        module._recomputed.__wrapped__("staged-claim")
    with pytest.raises(LedgerError, match="recomputed by two functions"):
        claims.recomputes("staged-claim")(lambda: {"total": 1.0})


def test_a_table_is_not_shown_where_an_entry_does_not_stand(computed, monkeypatch):
    computed(total=1.0)
    monkeypatch.setattr(claims, "claim", lambda id: entry())
    with pytest.raises(LedgerError, match="staged-claim: total: expected 780 GB"):
        claims.weigh("staged-claim")
    with pytest.raises(LedgerError, match="expected at least one"):
        claims.weigh()


def test_an_unknown_id_is_named():
    with pytest.raises(LedgerError, match="got 'memory-no-such'"):
        claims.claim("memory-no-such")


def test_the_command_prints_every_claim_and_fails_where_one_does_not_stand(computed, monkeypatch, capsys):
    monkeypatch.setattr(claims, "entries", lambda: {"staged-claim": entry()})
    monkeypatch.setattr(claims, "counts", lambda: {"weighed": 1, "confirmed": 1, "corrected": 0, "open": 0})
    computed(total=780.0)
    assert main() == 0
    assert "1 weighed, 1 confirmed, 0 corrected, 0 open" in capsys.readouterr().out
    computed(total=1.0)
    assert main() == 1
    assert "expected 780 GB" in capsys.readouterr().out
