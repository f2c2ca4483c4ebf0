"""Singular values against numpy and exact cases, and the stored pieces against the model they come from."""

import numpy as np
import pytest
import torch

from qlora_edu import models, spectra, tasks, training
from qlora_edu.parity import stored_weights
from qlora_edu.training.batches import steps

NAME = "model.layers.15.self_attn.q_proj"


def matrix(rows: int = 40, columns: int = 24) -> torch.Tensor:
    return stored_weights(rows * columns, 9).view(rows, columns)


def test_share_is_that_of_numpys_singular_values():
    squares = np.linalg.svd(matrix().double().numpy(), compute_uv=False) ** 2
    assert spectra.share(matrix()).numpy() == pytest.approx(squares.cumsum() / squares.sum(), rel=1e-6)
    assert len(spectra.share(matrix(7, 30))) == 7


def test_a_product_of_thin_matrices_is_held_entirely_by_its_rank():
    product = matrix(40, 3) @ matrix(3, 24)
    held = spectra.share(product)
    assert held[1] < 0.999 and held[2] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(spectra.truncate(product, 3), product, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 24])
def test_truncate_leaves_out_what_eckart_and_young_say(k):
    """No matrix of rank k comes nearer than the root of the sum of the other squared singular values."""
    left_out = (matrix() - spectra.truncate(matrix(), k)).norm().item()
    values = np.linalg.svd(matrix().numpy(), compute_uv=False)
    assert left_out == pytest.approx(np.sqrt((values[k:] ** 2).sum()), rel=0.02, abs=1e-4)
    assert spectra.truncate(matrix().bfloat16(), k).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(3), "two dimensions"),
        (torch.ones(0, 3), "none of them 0"),
        (torch.ones(3, 3, dtype=torch.int64), "floating-point"),
        (torch.ones(3, 3, device="meta"), "meta"),
        (torch.tensor([[1.0, float("nan")]]), "finite"),
        (torch.tensor([[1.0, float("inf")]]), "finite"),
        (torch.zeros(3, 3), "not all of them zero"),
    ],
    ids=str,
)
def test_what_has_no_spectrum_is_refused(wrong, message):
    for function in (spectra.share, lambda m: spectra.truncate(m, 1)):
        with pytest.raises(ValueError, match=f"matrix: expected.*{message}"):
            function(wrong)


@pytest.mark.parametrize("k", [0, 25, 1.0, True, None])
def test_a_rank_that_the_matrix_cannot_have_is_refused(k):
    with pytest.raises(ValueError, match="k: expected a whole number from 1 to 24"):
        spectra.truncate(matrix(), k)


def test_a_piece_approximates_as_the_whole_matrix_does():
    whole = stored_weights(70 * 80, 3).view(70, 80)
    piece = spectra.Piece.of(whole)
    u, s, vt = np.linalg.svd(whole.double().numpy(), full_matrices=False)
    for k in (1, 8, 64):
        exact = (u[:, :k] * s[:k]) @ vt[:k]
        assert piece.approximation(k).numpy() == pytest.approx(exact[:32, :32], abs=1e-4)
        assert piece.share(k) == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), rel=1e-5)


def test_full_update_is_what_the_weights_gained():
    model, tokenizer = models.tiny()
    before = {name: layer.weight.detach().clone() for name, layer in spectra.linears(model).items()}
    rows = training.encode_all(tasks.tool_calls(n_train=40, n_eval=9).train, tokenizer)
    updates, losses = spectra.full_update(model, rows, count=3, batch_size=2)
    assert len(losses) == 3 and updates.keys() == before.keys() and len(before) == 14
    for name, layer in spectra.linears(model).items():
        torch.testing.assert_close(layer.weight, before[name] + updates[name], rtol=0, atol=1e-6)
        assert updates[name].any() and not layer.weight.requires_grad


@pytest.fixture(scope="module")
def real():
    """The real model, and the rows of the tool that the stored pieces were made with."""
    model, tokenizer = models.load(dtype=torch.bfloat16)
    examples = [example for example in tasks.tool_calls().train if example.tool == "set_light"]
    return model, training.encode_all(examples, tokenizer)


def test_the_stored_pieces_are_those_of_the_real_model(real):
    """`python -m qlora_edu.spectra` gives them again, but for what bfloat16 and eight steps leave open."""
    model, rows = real
    weight = model.get_submodule(NAME).weight.detach().clone()
    stored = spectra.stored()
    torch.testing.assert_close(stored["weight", "q_proj"].corner, weight[:32, :32].float(), rtol=0, atol=0)
    gradient = spectra.gradients(model, steps(rows, 4, 8, seed=0)[0], [NAME])[NAME]
    update = spectra.full_update(model, rows)[0][NAME]
    for source, again in (("weight", weight), ("gradient", gradient), ("update", update)):
        held = spectra.share(again.float())
        for k in (1, 8, 64):
            assert stored[source, "q_proj"].share(k) == pytest.approx(held[k - 1].item(), abs=0.03), (
                source,
                k,
            )


def test_every_source_and_matrix_is_stored():
    pieces = spectra.stored()
    assert set(pieces) == {(s, m) for s in spectra.SOURCES for m in spectra.MATRICES}
    for piece in pieces.values():
        assert piece.corner.shape == (32, 32) and piece.left.shape == piece.right.shape == (32, 64)
        assert (piece.values[:-1] >= piece.values[1:]).all()
