"""A checkpoint quantized shard by shard: the same as one quantized at once, whatever interrupts it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qlora_edu import checkpoints, models, qlora, shards


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model in several shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    model, tokenizer = models.tiny(dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: t.clone() for file in files for name, t in load_file(file).items()}  # no view of the file


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_tensors_are_those_of_a_model_quantized_at_once(source, tmp_path, double_quant):
    shards.quantize_checkpoint(source, tmp_path / "sharded", double_quant=double_quant, progress=False)
    model, _ = models.load(source, dtype=torch.bfloat16)
    qlora.quantize_model(model, double_quant=double_quant)
    whole = checkpoints.save_quantized(model, tmp_path / "whole")
    assert same(tensors(tmp_path / "sharded"), tensors(whole))
    shards.verify(tmp_path / "sharded")


def test_it_loads_here_and_in_transformers(source, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shards.quantize_checkpoint(source, tmp_path / "q", progress=False)
    here = checkpoints.load_quantized(folder)
    there = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(here.eval()(ids).logits, there.eval()(ids).logits, atol=0.02, rtol=0.02)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    index = json.loads((folder / shards.INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors(folder))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())


def test_killed_half_way_it_goes_on_with_what_is_finished(source, tmp_path):
    target = tmp_path / "q"
    code = f"""
import os
from qlora_edu import shards
real, calls = shards._quantized, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return real(*arguments)
shards._quantized = killed
shards.quantize_checkpoint({str(source)!r}, {str(target)!r}, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    with pytest.raises(ValueError, match="is not finished"):
        shards.verify(target)
    assert not (target / "config.json").exists()  # nobody takes it for a model
    finished = {f.name: f.stat().st_mtime_ns for f in target.glob("*.safetensors")}
    assert len(finished) == 2
    shards.quantize_checkpoint(source, target, progress=False)
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    shards.verify(target)
    whole = shards.quantize_checkpoint(source, tmp_path / "whole", progress=False)
    assert same(tensors(target), tensors(whole))


def test_killed_before_the_first_shard_is_listed(source, tmp_path, monkeypatch):
    """A shard that was written and not yet listed is no stranger: it is made again."""
    real = shards.sha256

    def killed(path):
        if path.parent == tmp_path / "q":
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(shards, "sha256", killed)
    with pytest.raises(KeyboardInterrupt):
        shards.quantize_checkpoint(source, tmp_path / "q", progress=False)
    assert len(list((tmp_path / "q").glob("*.safetensors"))) == 1
    monkeypatch.undo()
    shards.verify(shards.quantize_checkpoint(source, tmp_path / "q", progress=False))


def test_a_source_without_a_layer_is_refused(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    largest = max(copy.glob("*.safetensors"), key=lambda file: len(load_file(file)))
    largest.unlink()
    with pytest.raises(
        ValueError, match=r"source: .* lacks model\.layers\.\d+\..*weight, which its config\.json"
    ):
        shards.quantize_checkpoint(copy, tmp_path / "q", progress=False)
    assert not (tmp_path / "q" / "config.json").exists()


def test_a_damaged_shard_is_found_and_made_again(source, tmp_path):
    target = shards.quantize_checkpoint(source, tmp_path / "q", progress=False)
    before = tensors(target)
    victim = sorted(target.glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"{victim.name} is missing or not as it was written"):
        shards.verify(target)
    shards.quantize_checkpoint(source, target, progress=False)
    shards.verify(target)
    assert same(tensors(target), before)


def test_a_source_that_changed_is_noticed(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    target = shards.quantize_checkpoint(copy, tmp_path / "q", progress=False)
    changed = sorted(copy.glob("*.safetensors"))[0]
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    first = (target / changed.name).read_bytes()
    shards.quantize_checkpoint(copy, target, progress=False)
    shards.verify(target)
    assert len(first) == len((target / changed.name).read_bytes())
    with pytest.raises(
        ValueError, match="was begun with another codebook, double_quant; take an empty folder"
    ):
        shards.quantize_checkpoint(copy, target, codebook="fp4", double_quant=False, progress=False)


def test_what_is_refused(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source: expected a folder with config\.json"):
        shards.quantize_checkpoint(tmp_path, tmp_path / "q")
    with pytest.raises(ValueError, match="target: expected another folder than the source"):
        shards.quantize_checkpoint(source, os.path.join(source, "."))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="which this function did not write"):
        shards.quantize_checkpoint(source, tmp_path)
    with pytest.raises(FileNotFoundError, match="so it was not made here"):
        shards.verify(source)
    with pytest.raises(ValueError, match="bitsandbytes stores nf4 and fp4 only"):
        shards.quantize_checkpoint(source, tmp_path / "int4", codebook="int4", progress=False)
