"""Weights that were never rounded, to stand beside SmolLM2's, which have been through 4 bits once.

all-MiniLM-L6-v2 turns sentences into vectors: a BERT of 6 layers, width 384, published in float32. The course runs
no sentence through it. It only looks at the weights of its linear layers, 10.6 million numbers as training left them.
"""

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_edu.models.cache import fetch
from qlora_edu.models.convert import WEIGHTS
from qlora_edu.models.source import MINILM, ModelError


def load_minilm(progress: bool = True) -> dict[str, Tensor]:
    """The linear weights of all-MiniLM-L6-v2 by name, fetched once (84 MB) and cached as SmolLM2 is.

    Four of attention, (384, 384), and two of the feed-forward part, (1536, 384) and (384, 1536), in each of 6 layers;
    no embeddings, biases, norms, nor the pooler. The tensors are yours to write to: the cache is left alone.

    Returns:
        36 float32 tensors (out, in), sorted by name, such as "encoder.layer.0.attention.self.query.weight".

    Raises:
        ModelError: it could not be had; why, and what to do.
    """
    folder = fetch(MINILM, progress=progress)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{str(folder / WEIGHTS)!r} cannot be read: {error}") from error
    return dict(sorted(weights.items()))
