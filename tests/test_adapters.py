"""Adapter files against PEFT in both directions; what does not fit is refused and changes nothing."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_edu import adapters, models
from qlora_edu.adapters import CONFIG, UNSUPPORTED, WEIGHTS, load_adapter, read_config, save_adapter
from qlora_edu.lora import LoRALinear, add_lora, lora_layers
from qlora_edu.parity import differing, stored_weights
from qlora_edu.qlora import QLoRALinear, add_qlora

R, ALPHA = 3, 7
TOKENS = torch.arange(24).view(2, 12)


def adapted(add=add_lora, seed=0, **options):
    model, _ = models.tiny(seed)
    torch.manual_seed(seed)
    add(model, **{"r": R, "alpha": ALPHA} | options)
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_b.data = stored_weights(layer.lora_b.numel(), i).view_as(layer.lora_b) / 50
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(differing(after[name], before[name])[1] == 0 for name in before)


@pytest.fixture
def folder(tmp_path):
    return save_adapter(adapted(), tmp_path / "my adapter, ünïcode", base_name="the base")


@pytest.mark.parametrize("add", [add_lora, add_qlora])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_saved_and_loaded_it_gives_the_same_logits(tmp_path, add, rank_stabilized):
    model = adapted(add, rank_stabilized=rank_stabilized, dropout=0.1)
    save_adapter(model, tmp_path / "one" / "two")
    fresh, _ = models.tiny()
    if add is add_qlora:  # the base must be quantized first: the file does not know
        add_qlora(fresh, r=R, alpha=ALPHA, rank_stabilized=rank_stabilized)
    loaded = load_adapter(fresh, str(tmp_path / "one" / "two"))
    assert loaded is fresh
    assert differing(logits(loaded.eval()), logits(model))[1] == 0
    layers = lora_layers(loaded).values()
    assert all(type(layer) is (QLoRALinear if add is add_qlora else LoRALinear) for layer in layers)
    if add is add_lora:
        assert {(layer.r, layer.alpha, layer.dropout.p) for layer in layers} == {(R, ALPHA, 0.1)}


def test_peft_loads_what_is_saved_here(folder):
    ours = adapted()
    theirs = PeftModel.from_pretrained(models.tiny()[0], folder).eval()
    assert differing(logits(ours), logits(theirs))[1] == 0
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (R, ALPHA, "the base")


def test_what_peft_saves_is_loaded_here(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(models.tiny()[0], config).eval()
    for i, (name, parameter) in enumerate(theirs.named_parameters()):
        if "lora_B" in name:
            parameter.data = stored_weights(parameter.numel(), i).view_as(parameter) / 50
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(models.tiny()[0], tmp_path).eval()
    assert differing(logits(ours), logits(theirs))[1] == 0
    assert {name.split(".")[-1] for name in lora_layers(ours)} == {"q_proj", "down_proj"}


def test_the_file_holds_a_and_b_under_pefts_names_and_nothing_else(folder):
    model = adapted()
    tensors = load_file(folder / WEIGHTS)
    assert len(tensors) == 2 * len(lora_layers(model))
    for name, layer in lora_layers(model).items():
        assert differing(tensors[f"base_model.model.{name}.lora_A.weight"], layer.lora_a)[1] == 0
        assert differing(tensors[f"base_model.model.{name}.lora_B.weight"], layer.lora_b)[1] == 0
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]  # no temporary file stays
    read = read_config(folder)
    assert (read["r"], read["lora_alpha"], read["target_modules"][0]) == (R, ALPHA, "down_proj")


def test_16_bit_adapters_are_loaded_into_float32(folder):
    path = folder / WEIGHTS
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    model = load_adapter(models.tiny()[0], folder)
    layer = next(iter(lora_layers(model).values()))
    assert layer.lora_b.dtype == torch.float32
    original = next(iter(lora_layers(adapted()).values())).lora_b
    assert torch.equal(layer.lora_b, original.bfloat16().float())


def test_saving_again_replaces_the_files_whole(folder):
    other = adapted(r=5, alpha=2)
    save_adapter(other, folder)
    assert differing(logits(load_adapter(models.tiny()[0], folder).eval()), logits(other))[1] == 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    adapters.write_whole(path, b"old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(adapters.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        adapters.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_model_without_lora_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model: has no LoRA layer; call add_lora first"):
        save_adapter(models.tiny()[0], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_layers_that_differ_are_not_saved(tmp_path):
    model = adapted()
    name, layer = next(iter(lora_layers(model).items()))
    model.set_submodule(name, LoRALinear(layer.base, R + 1, ALPHA))
    with pytest.raises(ValueError, match="model: expected one rank, alpha, scaling and dropout"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename(folder, old, new):
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def replace(folder, name, tensor):
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"
    save_file(load_file(folder / WEIGHTS) | {name: tensor}, folder / WEIGHTS)


def drop(folder, part):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if part not in name}, folder / WEIGHTS)


DAMAGED = {
    "weights cut short": (lambda f: truncate(f / WEIGHTS), r"adapter_model\.safetensors: cannot be read"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), r"adapter_model\.safetensors: cannot be read"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), r"safetensors: cannot be read"),
    "weights are a pickle": (lambda f: torch.save({}, f / WEIGHTS), r"safetensors: cannot be read"),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), r"safetensors: expected names base_model\.model"),
    "config cut short": (lambda f: truncate(f / CONFIG), r"adapter_config\.json: cannot be read as JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[1]"), r"expected peft_type LORA; got \[1\]"),
    "no LoRA": (lambda f: edit(f, peft_type="IA3"), r"expected peft_type LORA; got .*IA3"),
    "no rank": (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}'), r"expected r and lora_alpha"),
    "rank of another file": (
        lambda f: edit(f, r=R + 1),
        r"lora_A of shape \(4, \d+\); got shape \(3,|has \(r, alpha.*\(4, 7, False\); the model has \(3",
    ),
    "rank 0": (lambda f: edit(f, r=0), r"r: expected a whole number of at least 1; got 0"),
    "alpha NaN": (lambda f: edit(f, lora_alpha=float("nan")), r"alpha: expected a finite number; got nan"),
    "alpha text": (lambda f: edit(f, lora_alpha="16"), r"alpha: expected a finite number; got '16'"),
    "dropout 2": (lambda f: edit(f, lora_dropout=2), r"dropout: expected a probability"),
    "another model's layers": (
        lambda f: rename(f, "layers.0", "layers.9"),
        r"adapter: its layers are not those of the model; for example \['model\.layers\.0",
    ),
    "another prefix": (
        lambda f: rename(f, "base_model.model.", ""),
        r"expected names base_model\.model\.<layer>",
    ),
    "an embedding": (
        lambda f: rename(f, "self_attn.q_proj.lora_A.weight", "embed_tokens.lora_embedding_A"),
        r"expected names .*embedding_A",
    ),
    "no B": (lambda f: drop(f, "lora_B"), r"lora_B of shape .*; got nothing"),
    "a layer too few": (
        lambda f: drop(f, "layers.0.self_attn.q_proj"),
        r"not those of the model.*layers\.0.*q_proj",
    ),
    "A transposed": (
        lambda f: replace(f, "lora_A", torch.ones(64, R)),
        r"expected model\.layers\.0\.self_attn\.q_proj\.lora_A of shape \(3, \d+\); got shape \(64, 3\)",
    ),
    "B of another width": (
        lambda f: replace(f, "lora_B", torch.ones(5, R)),
        r"lora_B of shape .*; got shape \(5, 3\)",
    ),
    "not linear": (
        lambda f: rename(f, "self_attn.q_proj", "self_attn"),
        r"self_attn is a LlamaAttention in the model, no linear layer|not those of the model",
    ),
}


@pytest.mark.parametrize("into", ["a plain model", "an adapted model"])
@pytest.mark.parametrize("what", DAMAGED)
def test_what_does_not_fit_is_refused_and_changes_nothing(folder, what, into):
    damage, message = DAMAGED[what]
    damage(folder)
    model = models.tiny()[0] if into == "a plain model" else adapted(seed=1)
    before, trained = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_options_that_would_change_the_result_are_refused(folder, key):
    edit(folder, **{key: "all" if key == "bias" else {"q_proj": 4}})
    with pytest.raises(ValueError, match=rf"{key}=.* is not supported here; load this adapter with PEFT"):
        read_config(folder)


def test_pefts_own_defaults_are_all_supported(tmp_path):
    get_peft_model(models.tiny()[0], LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert set(UNSUPPORTED) <= set(read_config(tmp_path))  # the names are PEFT's


@pytest.mark.parametrize("name", ["nothing here", "a file"])
def test_a_folder_without_an_adapter_is_refused(tmp_path, name):
    (tmp_path / "a file").write_text("")
    with pytest.raises(FileNotFoundError, match=rf"folder: .*{name}' holds no adapter_config\.json"):
        load_adapter(models.tiny()[0], tmp_path / name)


@pytest.mark.parametrize("options", [{"r": R + 1}, {"alpha": ALPHA + 1}, {"rank_stabilized": True}])
def test_an_adapter_for_other_settings_is_refused(folder, options):
    model = adapted(**options)
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter: has \(r, alpha, rank-stabilized\) = \(3, 7, False\)"):
        load_adapter(model, folder)
    assert_unchanged(model, before)


def test_a_merged_model_takes_no_other_adapter(folder):
    """Unmerging would subtract the new update from a weight that holds the old one."""
    model = adapted(seed=1)
    for layer in lora_layers(model).values():
        layer.merge()
    before = state(model)
    with pytest.raises(ValueError, match=r"is merged into its base; call unmerge\(\) first"):
        load_adapter(model, folder)
    assert_unchanged(model, before)


def test_a_moved_folder_still_loads(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    load_adapter(models.tiny()[0], tmp_path / "moved")
