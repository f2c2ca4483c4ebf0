"""What the model answers, against transformers' own generation and the definition of greedy decoding."""

import pytest
import torch

from qlora_edu import answers, models, qlora, tasks, training
from qlora_edu.training import Encoded


@pytest.fixture(scope="module")
def trained():
    """A tiny model that has learned four examples by heart, and those examples."""
    model, tokenizer = models.tiny()
    torch.manual_seed(0)
    qlora.add_qlora(model, r=16, alpha=32)
    examples = tasks.tool_calls(n_train=4, n_eval=1).train
    rows = training.encode_all(examples, tokenizer)
    config = training.TrainConfig(steps=100, batch_size=4, learning_rate=1e-2)
    training.train(model, rows, config, progress=False)
    return model, tokenizer, examples, rows


def test_an_answer_is_what_greedy_decoding_writes_one_by_one(trained):
    model, tokenizer, examples, _ = trained
    together = answers.generate(
        model, tokenizer, [e.messages() for e in examples], max_new_tokens=40, batch_size=3
    )
    for example, answer in zip(examples, together, strict=True):
        prompt = tokenizer.apply_chat_template(example.messages(), add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        written = []
        with torch.no_grad():
            for _ in range(40):
                token = model.eval()(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item()
                if token == tokenizer.eos_token_id:
                    break
                written.append(token)
        assert tokenizer.decode(written) == answer


def test_what_is_graded_exact_is_what_is_answered_exactly(trained):
    model, tokenizer, examples, rows = trained
    said = answers.generate(model, tokenizer, [e.messages() for e in examples], max_new_tokens=120)
    expected = [reply == example.answer for reply, example in zip(said, examples, strict=True)]
    assert answers.grade(model, rows, batch_size=3).exact == expected
    assert any(expected), "a model that knows nothing cannot tell a right verdict from a constant one"
    spoiled = [Encoded(row.prompt, (*row.answer[:-2], row.answer[-2] ^ 1, row.answer[-1])) for row in rows]
    assert answers.grade(model, spoiled).exact == [False] * 4


def test_the_held_out_loss_is_that_of_transformers(trained):
    model, _, _, rows = trained
    batch = training.Batch.of(rows, pad_id=0)
    with torch.no_grad():
        theirs = model.eval()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss.item()
    assert answers.grade(model, rows, batch_size=3).loss == pytest.approx(theirs, rel=1e-5)


def test_the_mode_of_the_model_stays_as_it_was(trained):
    model, tokenizer, examples, rows = trained
    for training_mode in (True, False):
        model.train(training_mode)
        answers.answer_requests(model, tokenizer, examples[:1])
        answers.grade(model, rows)
        assert model.training is training_mode


@pytest.mark.parametrize("chats", [["Hello"], [{"role": "user", "content": "Hello"}], [["Hello"]]])
def test_a_chat_is_a_list_of_messages(trained, chats):
    model, tokenizer, *_ = trained
    with pytest.raises(TypeError, match="chats: expected lists of messages"):
        answers.generate(model, tokenizer, chats)


def test_plain_text_is_no_example(trained):
    model, tokenizer, *_ = trained
    with pytest.raises(TypeError, match=r"generate\(\)"):
        answers.answer_requests(model, tokenizer, ["Turn the lights on"])
    with pytest.raises(TypeError, match=r"expected a tasks\.Example; got str"):
        training.encode("Turn the lights on", tokenizer)


def test_nothing_to_grade_and_swapped_arguments_are_named(trained):
    model, _, examples, _ = trained
    with pytest.raises(ValueError, match="rows: expected at least one"):
        answers.grade(model, [])
    with pytest.raises(TypeError, match="encode_all"):
        answers.grade(model, examples)
    with pytest.raises(TypeError, match="in this order"):
        tasks.is_exact(examples[0], "tool: set_alarm")
