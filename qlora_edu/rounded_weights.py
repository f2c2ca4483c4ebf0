"""A model whose linear layers hold other weights for a while: what would it be with these rounded?"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def rounded_weights(model: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[nn.Module]:
    """Within the block, each linear layer of the model has the weights function(weight); afterwards its own again.

    Every `nn.Linear` but the output layer, which shares its weight with the embedding: 210 in SmolLM2. The result is
    cast to the weight's dtype. Biases stay. The weights come back bit for bit, however the block ends.

    Args:
        function: (out, in) -> (out, in), such as quantizing and dequantizing. It gets a copy that it may overwrite.

    Raises:
        TypeError, ValueError: a result is no tensor, of another shape, or not finite; or a layer's weight is not
            a floating tensor (already quantized). The model is as it was.
    """
    originals: dict[nn.Parameter, Tensor] = {}
    try:
        for name, weight in ((name, layer.weight) for name, layer in linear_layers(model).items()):
            if weight in originals:  # shared by two layers
                continue
            result = _rounded(name, weight, function)
            originals[weight] = weight.data
            weight.data = result
        yield model
    finally:
        for weight, original in originals.items():
            weight.data = original


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of a model but the output layer, by name.

    Raises:
        ValueError: if there is none.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output}
    if not found:
        raise ValueError("model: expected one with nn.Linear layers; got none besides the output layer.")
    return found


def _rounded(name: str, weight: nn.Parameter, function: Callable[[Tensor], Tensor]) -> Tensor:
    if not weight.is_floating_point():
        raise TypeError(
            f"model: expected floating weights; got {weight.dtype} in {name}. Load it unquantized."
        )
    with torch.no_grad():
        result = function(weight.data.clone())
    if not isinstance(result, Tensor):
        raise TypeError(f"function: expected it to return a tensor; got {type(result).__name__} for {name}.")
    if result.shape != weight.shape:
        raise ValueError(
            f"function: expected the shape {tuple(weight.shape)} of {name}; got {tuple(result.shape)}. "
            f"Reshape what it returns."
        )
    result = result.detach().to(weight.device, weight.dtype)
    if not result.isfinite().all():
        raise ValueError(f"function: expected finite weights; got NaN or Inf in {name}.")
    return result
