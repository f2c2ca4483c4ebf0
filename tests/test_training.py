"""The training loop: what is scored, what a step is, and what survives a kill."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from training_run import config, ingredients
from transformers import get_cosine_schedule_with_warmup

from qlora_edu import lora, models, tasks, training
from qlora_edu.adapters import adapter_tensors
from qlora_edu.training import Batch, Encoded, TrainConfig, cosine_with_warmup, steps, train
from qlora_edu.training.batches import IGNORE, data_hash
from qlora_edu.training.loss import answer_loss, library_loss


def adapters(model):
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- batches -----------------------------------------------------------------------------------------------------


def test_a_row_is_the_chat_with_its_answer():
    _, tokenizer = models.tiny()
    example = tasks.tool_calls(n_train=1, n_eval=1).train[0]
    row = training.encode(example, tokenizer)
    messages = [*example.messages(), {"role": "assistant", "content": example.answer}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row.prompt + row.answer) + "\n" == whole
    assert row.answer[-1] == tokenizer.eos_token_id


def test_the_real_tokenizer_splits_prompt_and_answer_as_it_splits_the_whole():
    _, tokenizer = models.load()
    for example in tasks.tool_calls(n_train=50, n_eval=1).train:
        row = training.encode(example, tokenizer)
        messages = [*example.messages(), {"role": "assistant", "content": example.answer}]
        whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
        assert list(row.prompt + row.answer) == whole["input_ids"][: len(row)]


def test_only_answers_are_scored():
    batch = Batch.of([Encoded((1, 2, 3), (4, 5)), Encoded((6,), (7, 8, 9))], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORE] * 3 + [4, 5], [IGNORE, 7, 8, 9, IGNORE]]
    assert (batch.tokens, batch.scored) == (9, 5)


rows_of_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60).map(
    lambda lengths: [Encoded((i,) * n, (i,)) for i, n in enumerate(lengths)]
)


@settings(deadline=None)
@given(rows=rows_of_lengths, batch_size=st.integers(1, 9), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_each_row_comes_once_before_any_comes_again(rows, batch_size, count, seed):
    plan = steps(rows, batch_size, count, seed)
    assert [len(step) for step in plan] == [batch_size] * count
    seen = [row.answer[0] for step in plan for row in step]
    counts = [seen.count(row.answer[0]) for row in rows]
    assert max(counts) - min(counts) <= 1
    assert plan == steps(rows, batch_size, count, seed)


def test_another_seed_gives_another_order():
    rows = [Encoded((i,), (i,)) for i in range(50)]
    assert steps(rows, 5, 10, 0) != steps(rows, 5, 10, 1)


@pytest.mark.parametrize(
    ("rows", "size", "count", "says"),
    [
        ([], 1, 1, "rows: expected at least one"),
        ([Encoded((1,), (1,))], 0, 1, "batch_size=0"),
        ([Encoded((1,), (1,))], 1, 0, "count=0"),
    ],
)
def test_steps_need_something_to_do(rows, size, count, says):
    with pytest.raises(ValueError, match=says):
        steps(rows, size, count, 0)


def test_the_data_hash_sees_one_token():
    rows = [Encoded((1, 2), (3,)), Encoded((4,), (5,))]
    assert data_hash(rows) == data_hash(list(rows))
    assert data_hash(rows) != data_hash([Encoded((1,), (2, 3)), rows[1]])
    assert data_hash(rows) != data_hash(rows[::-1])


# --- loss --------------------------------------------------------------------------------------------------------


def some_batch(tokenizer, count=3, start=0):
    examples = tasks.tool_calls(n_train=start + count, n_eval=1).train[start:]
    return Batch.of(training.encode_all(examples, tokenizer), tokenizer.pad_token_id)


@pytest.mark.parametrize("rows", [1, 3, 9])  # 9 rows are more than one piece of 128 positions
def test_the_loss_is_that_of_transformers(rows):
    model, tokenizer = models.tiny()
    lora.add_lora(model, r=4)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    batch = some_batch(tokenizer, rows)
    gradients = []
    for loss in (answer_loss, library_loss):
        model.zero_grad()
        value = loss(model, batch, batch.scored)
        value.backward()
        gradients.append(
            (value.item(), torch.cat([p.grad.flatten() for p in lora.adapter_parameters(model)]))
        )
    (mine, my_gradient), (theirs, their_gradient) = gradients
    assert mine == pytest.approx(theirs, rel=1e-6)  # float32: sums of a few hundred terms in another order
    assert (my_gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()


def test_the_loss_by_definition():
    model, tokenizer = models.tiny()
    model.requires_grad_(False)
    batch = some_batch(tokenizer, 2)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
        expected = total = 0
        for i, row in enumerate(batch.labels):
            for t in range(1, len(row)):
                if row[t] != IGNORE:
                    expected -= F.log_softmax(logits[i, t - 1], dim=0)[row[t]].item()
                    total += 1
        assert total == batch.scored
        assert answer_loss(model, batch, batch.scored).item() == pytest.approx(expected / total, rel=1e-6)


def test_padding_changes_nothing():
    model, tokenizer = models.tiny()
    model.requires_grad_(False)
    batch = some_batch(tokenizer, 2)
    longer = Batch(
        F.pad(batch.input_ids, (0, 7), value=5),
        F.pad(batch.attention_mask, (0, 7)),
        F.pad(batch.labels, (0, 7), value=IGNORE),
    )
    with torch.no_grad():
        losses = [answer_loss(model, b, batch.scored).item() for b in (batch, longer)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_micro_batches_give_the_same_step():
    """The mean over a step is over its tokens, not over the means of its micro-batches."""
    runs = []
    for size in (None, 1, 3):
        model, rows = ingredients()
        model = model.float()
        run = train(model, rows, config(steps=3, micro_batch_size=size), progress=False)
        runs.append((run.losses, torch.cat([p.detach().flatten() for p in lora.adapter_parameters(model)])))
    for losses, parameters in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-3)  # bfloat16 compute, other shapes
        assert (parameters - runs[0][1]).norm() <= 0.05 * runs[0][1].norm()


# --- schedule and config -----------------------------------------------------------------------------------------


@given(total=st.integers(2, 300), data=st.data())
def test_the_schedule_is_that_of_transformers_one_step_ahead_in_the_warmup(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]
    for step in range(total):
        expected = (step + 1) / warmup if step < warmup else theirs(step)  # theirs starts at a step of size 0
        assert cosine_with_warmup(step, total, warmup) == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": 0}, {"micro_batch_size": 0}, {"micro_batch_size": 9}, {"learning_rate": 0.0},
     {"learning_rate": math.nan}, {"warmup": 1.5}, {"max_grad_norm": 0}, {"checkpoint_every": 0}],
)  # fmt: skip
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


# --- the loop ----------------------------------------------------------------------------------------------------


def test_one_step_is_adamw_on_the_clipped_gradient():
    model, rows = ingredients()
    oracle, _ = ingredients()
    setting = config(steps=1, warmup=0.0, max_grad_norm=0.1)
    train(model, rows, setting, progress=False)
    batch = Batch.of(steps(rows, 4, 1, 0)[0], 0)
    answer_loss(oracle.train(), batch, batch.scored).backward()
    parameters = lora.adapter_parameters(oracle)
    length = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in parameters))
    assert length > setting.max_grad_norm  # else the clipping would not be tested
    for p in parameters:
        g = p.grad * (setting.max_grad_norm / length)
        first = g / (g.abs() + 1e-8)  # Adam's first step: m / sqrt(v) after bias correction
        p.data -= setting.learning_rate * first
    for ours, theirs in zip(lora.adapter_parameters(model), parameters, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-3, atol=1e-5)


def test_training_learns_and_touches_the_adapter_alone():
    model, rows = ingredients()
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    run = train(model, rows[:4], config(steps=40, learning_rate=1e-2), progress=False)
    assert run.losses[-1] < run.losses[0] - 1
    after = model.state_dict()
    assert before.keys() == {n for n in after if "lora_" not in n}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_two_runs_with_one_seed_are_equal_in_all_bits():
    runs = []
    for _ in range(2):
        model, rows = ingredients(dropout=0.1)
        runs.append((train(model, rows, config(), progress=False).losses, adapters(model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    model, rows = ingredients(dropout=0.1)
    assert train(model, rows, config(seed=1), progress=False).losses != runs[0][0]


def test_gradient_checkpointing_computes_the_same():
    losses = []
    for checkpointing in (False, True):
        model, rows = ingredients()
        losses.append(train(model, rows, config(gradient_checkpointing=checkpointing), progress=False).losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, fate):
    model, rows = ingredients(dropout=0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = train(model, rows, config(), folder=tmp_path / "whole", progress=False)

    moment = random.randint(1, 11)
    program = Path(__file__).with_name("training_run.py")
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "killed"), str(moment)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if int(line) == moment:
            process.send_signal(fate)
            break
    process.communicate()
    assert process.returncode != 0, f"not killed in step {moment}"

    again, rows = ingredients(dropout=0.1)
    resumed = train(again, rows, config(), folder=tmp_path / "killed", progress=False)
    torch.set_num_threads(threads)
    if fate == signal.SIGKILL:
        assert resumed.resumed_from in ((moment - 1) // 3 * 3, moment // 3 * 3)  # the last whole checkpoint
    else:
        assert resumed.resumed_from in (moment, moment + 1)  # an interrupt loses no step
    assert resumed.losses == whole.losses, f"killed in step {moment}"
    assert same(adapters(again), adapters(model)), f"killed in step {moment}"
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_an_unfinished_checkpoint_is_not_believed(tmp_path):
    model, rows = ingredients()
    (tmp_path / ".unfinished-abc").mkdir()
    (tmp_path / ".unfinished-abc" / "run.json").write_text("{")
    run = train(model, rows, config(steps=3), folder=tmp_path, progress=False)
    assert run.resumed_from == 0
    assert not (tmp_path / ".unfinished-abc").exists()


def test_a_failed_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    model, rows = ingredients()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("qlora_edu.training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(model, rows, config(), folder=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [6, 4])  # 4 is no multiple of checkpoint_every
def test_a_finished_run_is_not_run_again(tmp_path, count):
    model, rows = ingredients()
    first = train(model, rows, config(steps=count), folder=tmp_path, progress=False)
    again, rows = ingredients()
    second = train(again, rows, config(steps=count), folder=tmp_path, progress=False)
    assert second.resumed_from == count
    assert second.losses == first.losses
    assert same(adapters(model), adapters(again))


def test_a_trained_output_layer_is_refused_because_its_gradient_would_be_missing():
    model, tokenizer = models.tiny()
    rows = training.encode_all(tasks.tool_calls(n_train=4, n_eval=1).train, tokenizer)
    with pytest.raises(ValueError, match="output layer must be frozen"):
        train(model, rows, config(steps=1), progress=False)
    before = model.model.embed_tokens.weight.clone()
    train(model, rows, config(steps=1), loss=library_loss, progress=False)
    assert not torch.equal(before, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "options", [{"r": 3}, {"alpha": 64}, {"dropout": 0.2}, {"compute_dtype": torch.bfloat16}]
)
def test_another_adapter_is_not_continued(tmp_path, options):
    for changes in ({}, options):
        model, tokenizer = models.tiny(dtype=torch.bfloat16)
        rows = training.encode_all(tasks.tool_calls(n_train=8, n_eval=1).train, tokenizer)
        lora.add_lora(model, **{"r": 4, "alpha": 8, **changes})
        if changes:
            with pytest.raises(training.CheckpointError, match="another adapter"):
                train(model, rows, config(steps=3), folder=tmp_path, progress=False)
        else:
            train(model, rows, config(steps=3), folder=tmp_path, progress=False)


@pytest.mark.parametrize("change", ["config", "data", "base"])
def test_another_run_is_not_continued(tmp_path, change):
    model, rows = ingredients()
    train(model, rows, config(steps=3), folder=tmp_path, progress=False)
    model, rows = ingredients()
    setting = config(steps=3)
    if change == "config":
        setting = config(steps=3, learning_rate=1e-4)
    elif change == "data":
        rows = rows[1:]
    else:
        model.model.norm.weight.data[0] += 1
    before = adapters(model)
    with pytest.raises(training.CheckpointError, match=f"another {change}"):
        train(model, rows, setting, folder=tmp_path, progress=False)
    assert same(before, adapters(model))


def test_a_damaged_checkpoint_is_named(tmp_path):
    model, rows = ingredients()
    train(model, rows, config(steps=3), folder=tmp_path, progress=False)
    (tmp_path / "step-000003" / "run.safetensors").write_bytes(b"short")
    with pytest.raises(training.CheckpointError, match="step-000003 cannot be read"):
        train(model, rows, config(steps=3), folder=tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, rows = ingredients()

    def broken(model, batch, scored):
        return answer_loss(model, batch, scored) * math.nan

    before = adapters(model)
    with pytest.raises(FloatingPointError, match="loss is nan in step 1"):
        train(model, rows, config(), folder=tmp_path, loss=broken, progress=False)
    assert same(before, adapters(model))


def test_nothing_to_train_is_an_error():
    model, _ = models.tiny()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train(model, [Encoded((1,), (2,))], progress=False)


def test_the_run_card_says_what_was_done(tmp_path):
    model, rows = ingredients()
    run = train(model, rows, config(), folder=tmp_path, progress=False, notes={"exact match": 0.5})
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert card == run.card
    assert card["config"]["learning_rate"] == 3e-3
    assert card["data"] == data_hash(rows)
    assert len(card["base"]) == 64
    assert card["trained_parameters"] == sum(p.numel() for p in lora.adapter_parameters(model))
    assert card["last_loss"] == run.losses[-1]
    assert card["versions"]["torch"] == torch.__version__
    assert card["exact match"] == 0.5
    assert str(tmp_path) not in json.dumps(card)
    assert os.environ["HOME"] not in json.dumps(card)


def test_a_peft_model_trains_in_the_same_loop(tmp_path):
    """One loop, two implementations of LoRA, float32: the same losses and the same adapter, in all bits."""
    from peft import LoraConfig, get_peft_model

    base, tokenizer = models.tiny()
    rows = training.encode_all(tasks.tool_calls(n_train=40, n_eval=1).train, tokenizer)
    torch.manual_seed(1)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(lora.LLAMA_LINEARS)))
    their_run = train(
        theirs, rows, config(steps=5), folder=tmp_path / "theirs", loss=library_loss, progress=False
    )
    mine, _ = models.tiny()
    torch.manual_seed(1)
    lora.add_lora(mine, r=4, alpha=8)
    my_run = train(mine, rows, config(steps=5), folder=tmp_path / "mine", loss=library_loss, progress=False)
    assert my_run.losses == their_run.losses
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("mine", "theirs")]
    from safetensors.torch import load_file

    assert same(load_file(files[0]), load_file(files[1]))


def test_raw_examples_are_refused_with_what_to_do():
    model, _ = models.tiny()
    lora.add_lora(model, r=4, alpha=8)
    with pytest.raises(TypeError, match=r"encode_all\(examples, tokenizer\)"):
        training.train(model, tasks.tool_calls().train[:4], training.TrainConfig(steps=1, batch_size=2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": "60"}, "steps: expected an integer"),
        ({"steps": 2.5}, "steps: expected an integer"),
        ({"batch_size": 4.0}, "batch_size: expected an integer"),
        ({"learning_rate": "3e-3"}, "learning_rate: expected a number"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**settings)


def test_what_is_no_config_or_no_list_of_examples_is_named():
    model, rows = ingredients()
    with pytest.raises(TypeError, match="config: expected a TrainConfig"):
        train(model, rows, 12)
    with pytest.raises(TypeError, match="examples: expected a list"):
        training.encode_all(tasks.tool_calls(n_train=4, n_eval=1), None)
    with pytest.raises(TypeError, match=r"Write \[row\]"):
        Batch.of(rows[0], 0)
    with pytest.raises(ValueError, match="rows: expected at least one"):
        Batch.of([], 0)


def test_another_number_of_threads_is_said(tmp_path, monkeypatch):
    model, rows = ingredients()
    train(model, rows, config(steps=3), folder=tmp_path, progress=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    again, rows = ingredients()
    with pytest.warns(UserWarning, match="goes on with 99"):
        train(again, rows, config(steps=3), folder=tmp_path, progress=False)
