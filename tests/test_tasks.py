import doctest
import os
import re
import subprocess
import sys
from dataclasses import replace
from string import Formatter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from qlora_edu import models
from qlora_edu.tasks import (
    EVALUATION_SETS,
    FULL_SPECIFICATION,
    SLOTS,
    SYSTEM_PROMPT,
    TOOLS,
    Example,
    Judgement,
    few_shot_messages,
    is_exact,
    judge,
    parse,
    scoring,
    tool_calls,
)

settings.register_profile("tasks", deadline=None)
settings.load_profile("tasks")

# The data of the course. A change of it changes the numbers in the notebooks: execute them again.
SHA256 = "6d250a10718fe86d4c76296f6e19ae06e7ebbe825e8bc7e6d8685362cdeda157"

SPLITS = tool_calls()
SETS = {"train": SPLITS.train, **SPLITS.evaluation_sets()}
EVERYTHING = [example for examples in SETS.values() for example in examples]

every_set = pytest.mark.parametrize("name", SETS)
every_tool = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


def holds(text, value):
    """Whether `value` occurs in `text` as whole words, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


# What can be asked


@every_tool
def test_a_tool_has_phrasings_that_name_each_argument_once(tool):
    assert (len(tool.seen), len(tool.unseen)) == (14, 4)
    for phrasing in (*tool.seen, *tool.unseen):
        names = [name for _, name, *_ in Formatter().parse(phrasing) if name is not None]
        assert sorted(names) == sorted(tool.arguments)


@every_tool
def test_phrasings_leave_the_tokens_of_a_value_alone(tool):
    for phrasing in (*tool.seen, *tool.unseen):
        assert re.search(r"(?<! )\{", phrasing) is None, (
            "a value follows a space, never the start or a quotation mark"
        )
        assert re.search(r"\ban? \{", phrasing, re.IGNORECASE) is None, "'a' or 'an' depends on the value"
        assert re.search(r"\{brightness\}[^ ]", phrasing) is None, "'%' and punctuation make one token"


def test_no_two_phrasings_are_the_same_around_their_slots():
    phrasings = [p for tool in TOOLS.values() for p in (*tool.seen, *tool.unseen)]
    assert len({re.sub(r"\{\w+\}", "", phrasing).lower() for phrasing in phrasings}) == len(phrasings)


@pytest.mark.parametrize("slot", SLOTS.values(), ids=SLOTS)
def test_a_slot_has_plenty_of_values_and_a_share_that_is_held_out(slot):
    values = [*slot.seen, *slot.unseen]
    assert len(values) == len(set(values)) >= 40
    assert 0.1 <= len(slot.unseen) / len(values) <= 0.35
    assert all(value == " ".join(value.split()) and value for value in values)


def test_a_slot_is_used_by_a_tool():
    assert {slot for tool in TOOLS.values() for slot in tool.arguments.values()} == set(SLOTS)


# No leakage


def test_no_held_out_value_lies_inside_a_seen_value_or_phrasing():
    """Checked on the tables, so it holds for every seed and every size."""
    seen = [value for slot in SLOTS.values() for value in slot.seen]
    seen += [p for tool in TOOLS.values() for p in tool.seen]
    training = "\n".join(seen)
    held_out = [value for slot in SLOTS.values() for value in slot.unseen]
    assert [value for value in held_out if holds(training, value)] == []


def test_no_held_out_value_occurs_in_a_training_request():
    training = "\n".join(example.request for example in SPLITS.train)
    for slot in SLOTS.values():
        assert [value for value in slot.unseen if holds(training, value)] == []


@every_tool
def test_no_training_request_can_be_read_as_a_held_out_phrasing(tool):
    """Whatever its slots might hold."""
    for phrasing in tool.unseen:
        parts = [re.escape(text) + (".+" if name else "") for text, name, *_ in Formatter().parse(phrasing)]
        pattern = re.compile("".join(parts), re.IGNORECASE)
        assert [example.request for example in SPLITS.train if pattern.fullmatch(example.request)] == []
        assert any(pattern.fullmatch(e.request) for e in SPLITS.new_phrasings), "else the pattern is wrong"


@every_set
def test_phrasings_and_values_come_from_the_side_that_the_set_promises(name):
    phrasings, values = EVALUATION_SETS.get(name, ("seen", "seen"))
    for example in SETS[name]:
        tool = TOOLS[example.tool]
        allowed = {phrasing.format(**example.arguments) for phrasing in getattr(tool, phrasings)}
        assert example.request in allowed
        for argument, value in example.arguments.items():
            assert value in getattr(SLOTS[tool.arguments[argument]], values)


def test_no_request_occurs_twice_in_any_two_sets():
    assert len({example.request for example in EVERYTHING}) == len(EVERYTHING)


def test_no_evaluated_call_is_in_training_however_it_is_phrased():
    trained = {example.answer for example in SPLITS.train}
    assert not trained & {
        example.answer for examples in SPLITS.evaluation_sets().values() for example in examples
    }


# The examples


@every_set
def test_sizes_and_a_balance_of_tools(name):
    examples = SETS[name]
    assert len(examples) == (1500 if name == "train" else 200)
    for start in range(0, len(examples) - 8, 9):
        assert {example.tool for example in examples[start : start + 9]} == set(TOOLS)


def test_training_uses_every_seen_phrasing():
    used = {example.phrasing for example in SPLITS.train}
    assert used == {f"{tool.name}/seen-{i}" for tool in TOOLS.values() for i in range(14)}


@every_set
def test_arguments_are_in_order_and_copied_verbatim(name):
    for example in SETS[name]:
        assert list(example.arguments) == list(TOOLS[example.tool].arguments)
        assert len(set(example.arguments.values())) == len(example.arguments)
        assert all(holds(example.request, value) for value in example.arguments.values())


@every_set
def test_an_answer_is_read_back_as_the_call(name):
    for example in SETS[name]:
        assert parse(example.answer) == (example.tool, example.arguments)
        assert is_exact(example.answer, example)


def test_messages():
    example = SPLITS.train[0]
    assert example.messages() == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": example.request},
    ]
    assert example.messages(FULL_SPECIFICATION)[0]["content"] == FULL_SPECIFICATION


def test_the_full_specification_names_every_tool_and_its_arguments_in_order():
    for tool in TOOLS.values():
        assert (
            f"- {tool.name}: {tool.description} ({', '.join(tool.arguments)})"
            in FULL_SPECIFICATION.splitlines()
        )


def test_few_shot_messages_show_each_tool_solved_and_then_ask():
    example = SPLITS.new_both[0]
    system, *turns, question = few_shot_messages(example, SPLITS, 9)
    assert system == {"role": "system", "content": SYSTEM_PROMPT}
    assert question == {"role": "user", "content": example.request}
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 9
    assert {parse(turn["content"])[0] for turn in turns[1::2]} == set(TOOLS)
    answers = {shown.request: shown.answer for shown in SPLITS.train}
    for request, answer in zip(turns[::2], turns[1::2], strict=True):
        assert answers[request["content"]] == answer["content"]


def test_few_shot_messages_never_show_the_answer_to_the_question():
    for example in SPLITS.train[:3]:
        shown = few_shot_messages(example, SPLITS, 9)[:-1]
        assert example.answer not in [message["content"] for message in shown]
    assert few_shot_messages(example, SPLITS, 0) == example.messages()


@pytest.mark.parametrize("n", [-1, 31])
def test_few_shot_messages_refuse_a_number_that_training_does_not_have(n):
    splits = tool_calls(30, 9)
    with pytest.raises(ValueError, match="n must lie between 0 and 30"):
        few_shot_messages(splits.val[0], splits, n)


# The same data everywhere


def test_the_data_is_the_pinned_data():
    assert SPLITS.sha256 == SHA256


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_another_process_draws_the_same_data_whatever_its_hash_seed(hash_seed):
    code = "from qlora_edu.tasks import tool_calls; print(tool_calls().sha256)"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == SHA256


def test_another_seed_draws_other_data():
    other = tool_calls(seed=1)
    assert other.sha256 != SPLITS.sha256
    for name, examples in SETS.items():
        common = {e.request for e in examples} & {e.request for e in getattr(other, name)}
        assert len(common) < len(examples) / 4


def test_the_digest_sees_every_set_and_the_order():
    assert replace(SPLITS, train=SPLITS.train[1:]).sha256 != SHA256
    assert replace(SPLITS, train=SPLITS.train[::-1]).sha256 != SHA256
    assert replace(SPLITS, new_both=SPLITS.val, val=SPLITS.new_both).sha256 != SHA256
    assert tool_calls().sha256 == SHA256


def test_sizes_do_not_touch_what_is_evaluated():
    small, large = tool_calls(n_train=20, n_eval=40), tool_calls(n_train=300, n_eval=90)
    for name in EVALUATION_SETS:
        assert getattr(large, name)[:40] == getattr(small, name) == getattr(SPLITS, name)[:40]
    empty = tool_calls(0, 0)
    assert (empty.train, empty.new_both) == ((), ())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_train": -1}, ValueError, "n_train must be 0 or more"),
        ({"n_eval": -5}, ValueError, "n_eval must be 0 or more"),
        ({"seed": -1}, ValueError, "seed must be 0 or more"),
        ({"n_train": 10.0}, TypeError, "n_train must be an integer"),
        ({"seed": "0"}, TypeError, "seed must be an integer"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"n_eval": 50_000}, ValueError, "Ask for fewer: lower n_train or n_eval"),
    ],
)
def test_a_bad_size_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tool_calls(**arguments)


# Tokens. A chat puts markers around the request and around the answer: each is cut into tokens on its own.


def tokens_of(value, text, encode):
    """The tokens of " value" in `text`, or None where one of them crosses its border.

    `encode(text)` returns (token, (begin, end)) pairs.
    """
    begin = text.index(f" {value}")
    end = begin + 1 + len(value)
    inside = [(token, span) for token, span in encode(text) if span[1] > begin and span[0] < end]
    whole = inside[0][1][0] == begin and inside[-1][1][1] == end
    return [token for token, _ in inside] if whole else None


def not_copied(encode):
    """Every (value, request) where the value's tokens in the answer are not those in the request."""
    return [
        (value, example.request)
        for example in EVERYTHING
        for name, value in example.arguments.items()
        if (asked := tokens_of(value, example.request, encode)) is None
        or asked != tokens_of(value, f"{name}: {value}\n", encode)
    ]


def words_of(text):
    """How the model's tokenizer cuts a text into words, before it cuts each word into tokens."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, byte_level]).pre_tokenize_str(text)


def test_every_value_is_cut_into_the_same_words_in_request_and_answer():
    """Equal words have equal tokens, so this needs no model."""
    assert not_copied(words_of) == []


@pytest.mark.skipif(
    models.status().state != "ready", reason="the model is not here: python -m qlora_edu.models fetch"
)
def test_every_value_has_the_same_tokens_in_request_and_answer():
    tokenizer = AutoTokenizer.from_pretrained(models.fetch())

    def encode(text):
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))

    assert not_copied(encode) == []
    assert len(tokenizer(SYSTEM_PROMPT)["input_ids"]) <= 15


def test_the_token_tests_see_what_breaks_a_copy():
    """Else they could not fail: "%." is one word."""
    answered = tokens_of("35%", "brightness: 35%\n", words_of)
    assert answered == ["Ġ", "3", "5", "%"]
    assert tokens_of("35%", "Set it to 35% please", words_of) == answered
    assert tokens_of("35%", "Set it to 35%.", words_of) is None


# Reading and judging an answer

EXAMPLE = Example(
    request="Set an alarm for 7:15 am called gym.",
    tool="set_alarm",
    arguments={"time": "7:15 am", "label": "gym"},
    phrasing="set_alarm/seen-0",
)
RIGHT = "tool: set_alarm\ntime: 7:15 am\nlabel: gym"


def test_the_examples_in_the_documentation():
    assert doctest.testmod(scoring) == doctest.TestResults(failed=0, attempted=2)


keys = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
values = (
    st.text(st.characters(exclude_characters="\n", codec="utf-8"), min_size=1).map(str.strip).filter(bool)
)


def test_an_answer_is_lines_of_key_and_value():
    assert EXAMPLE.answer == RIGHT
    assert parse(RIGHT) == ("set_alarm", {"time": "7:15 am", "label": "gym"})


@given(st.text())
def test_any_text_is_read_or_refused_and_never_raises(text):
    call = parse(text)
    assert call is None or "tool" not in call[1]
    assert judge(text, EXAMPLE).parses is (call is not None)


@given(
    st.lists(st.one_of(st.text(max_size=12), st.sampled_from([*RIGHT.split("\n"), "tool:", ":", "tool : x"])))
)
def test_any_lines_are_read_or_refused_and_never_raise(lines):
    call = parse("\n".join(lines))
    if call is not None:
        assert call[0] and all(key and value for key, value in call[1].items())


@given(values, st.dictionaries(keys.filter(lambda key: key != "tool"), values, max_size=6))
def test_every_call_survives_the_round_trip(tool, arguments):
    example = Example("", tool, arguments, "")
    assert parse(example.answer) == (tool, arguments)
    assert is_exact(example.answer, example)


@pytest.mark.parametrize(
    "text",
    [
        f"  \n{RIGHT}\n\n ",
        RIGHT.replace("\n", "\r\n"),
        RIGHT.replace("\n", " \n  "),
        RIGHT.replace(": ", ":   "),
        RIGHT.replace(": ", ":"),
        "tool: set_alarm\nlabel: gym\ntime: 7:15 am",
    ],
    ids=["around", "windows", "around a line", "wide", "narrow", "order"],
)
def test_white_space_outside_of_values_and_the_order_of_arguments_do_not_matter(text):
    assert judge(text, EXAMPLE) == Judgement(parses=True, tool_right=True, arguments_right=True)
    assert is_exact(text, EXAMPLE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "gym",
        "time: 7:15 am\nlabel: gym",
        "time: 7:15 am\ntool: set_alarm\nlabel: gym",
        RIGHT + "\nlabel: gym",
        "tool: set_alarm\n" + RIGHT,
        RIGHT + "\nI hope that helps!",
        "Sure! " + RIGHT,
        RIGHT.replace("\nlabel", "\n\nlabel"),
        RIGHT.replace("gym", ""),
        RIGHT.replace("label:", "label"),
        RIGHT.replace("label:", "label :"),
        RIGHT.replace("label", "Label"),
        RIGHT.replace("label", "the label"),
        '{"tool": "set_alarm", "time": "7:15 am", "label": "gym"}',
    ],
)
def test_what_is_not_a_call_does_not_parse(text):
    assert parse(text) is None
    assert judge(text, EXAMPLE) == Judgement(parses=False, tool_right=False, arguments_right=False)
    assert not is_exact(text, EXAMPLE)


@pytest.mark.parametrize(
    ("text", "tool_right"),
    [
        (RIGHT.replace("set_alarm", "start_timer"), False),
        (RIGHT.replace("set_alarm", "set alarm"), False),
        (RIGHT.replace("set_alarm", "Set_alarm"), False),
        (RIGHT.replace("7:15 am", "7:15"), True),
        (RIGHT.replace("7:15 am", "7:15  am"), True),
        (RIGHT.replace("gym", "Gym"), True),
        (RIGHT.replace("gym", '"gym"'), True),
        (RIGHT.replace("label", "name"), True),
        (RIGHT + "\nday: Monday", True),
        ("tool: set_alarm\ntime: 7:15 am", True),
        ("tool: set_alarm", True),
    ],
)
def test_a_call_that_is_not_the_right_one_is_judged_part_by_part(text, tool_right):
    assert judge(text, EXAMPLE) == Judgement(parses=True, tool_right=tool_right, arguments_right=False)
    assert not judge(text, EXAMPLE).exact
    assert not is_exact(text, EXAMPLE)
