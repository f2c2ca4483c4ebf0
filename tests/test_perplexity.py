"""Perplexity against a plain loop and transformers' own loss; weights that come back bit for bit; the passages."""

import doctest
import hashlib
import math
import statistics

import pytest
import torch
from torch import nn

from qlora_edu import models, perplexity

SHORT = [
    "A cat sat.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n\n    if x: y()",
    "ab",
]


@pytest.fixture(scope="module")
def tiny():
    return models.tiny()


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request):
    return models.tiny(dtype=request.param)[0]


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(perplexity) == doctest.TestResults(failed=0, attempted=4)


# -------------------- the passages


def test_the_passages_are_the_pinned_ones():
    text = perplexity.PASSAGES.read_text(encoding="utf-8")
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "a2cad3b32de0c2621e677bb0fda0d8f8172c4c91a13e7e381630a7c93ed245c8"
    )
    passages, kinds = perplexity.passages(), perplexity.kinds()
    assert len(passages) == len(kinds) == len(set(passages)) == len(set(kinds)) == 12
    assert kinds[0] == "a recipe" and kinds[-1] == "a botanical description"
    assert passages[0].startswith("Leek and Barley Pie") and passages[-1].endswith("Cattle avoid it.")
    assert (
        "    def count_words(text):\n        counts = {}\n"
        in passages[kinds.index("an explanation of Python")]
    )
    for passage in passages:
        assert 180 <= len(passage.split()) <= 220
        assert passage == passage.strip() and "==" not in passage
    assert "\n".join(f"== {k} ==\n{p}" for k, p in zip(kinds, passages, strict=True)) + "\n" == text


def test_the_python_in_the_passages_does_what_it_says(capsys):
    passage = perplexity.passages()[perplexity.kinds().index("an explanation of Python")]
    code = [line[4:] for line in passage.splitlines() if line.startswith("    ") or not line]
    exec("\n".join(code), {})
    assert capsys.readouterr().out.strip() == code[[line[:1] for line in code].index("#")].removeprefix("# ")


def test_the_list_of_passages_is_the_callers_own():
    perplexity.passages().clear()
    assert len(perplexity.passages()) == 12


# -------------------- the loss


def by_hand(model, tokenizer, text, max_tokens=None) -> list[float]:
    """One token at a time, from a forward pass over what stands before it; in float64 from the logits on."""
    ids = tokenizer(text).input_ids[:max_tokens]
    found = []
    for t in range(1, len(ids)):
        logits = model(torch.tensor([ids[:t]])).logits[0, -1].tolist()
        top = max(logits)
        found.append(top + math.log(math.fsum(math.exp(z - top) for z in logits)) - logits[ids[t]])
    return found


def test_a_plain_loop_over_prefixes_gives_the_same(tiny):
    model, tokenizer = tiny
    nll = perplexity.token_nll(model, tokenizer, SHORT)
    expected = [value for text in SHORT for value in by_hand(model, tokenizer, text)]
    assert nll.dtype == torch.float64 and nll.shape == (len(expected),) and not nll.requires_grad
    # Float32 has 24 bits, and sums of a few hundred products differ in their last few: 1e-5 of a loss of 6.
    assert nll.tolist() == pytest.approx(expected, rel=1e-5)


def test_torchs_and_transformers_losses_are_its_means(model, tiny):
    _, tokenizer = tiny
    for passage in perplexity.passages()[6:8]:  # more tokens than logits are in float32 at one time
        ids = torch.tensor([tokenizer(passage).input_ids])
        assert ids.shape[1] > 2 * perplexity.ROWS
        nll = perplexity.token_nll(model, tokenizer, [passage])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].float()
            theirs = model(input_ids=ids, labels=ids).loss
        plain = nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        assert torch.allclose(nll, plain.double(), rtol=1e-6, atol=1e-6)
        assert nll.mean().item() == pytest.approx(theirs.item(), rel=1e-6)


def test_each_passage_is_read_on_its_own(tiny):
    model, tokenizer = tiny
    lengths = perplexity.scored_lengths(tokenizer, SHORT)
    assert lengths == [len(tokenizer(text).input_ids) - 1 for text in SHORT]
    together = perplexity.token_nll(model, tokenizer, SHORT).split(lengths)
    for text, part in zip(SHORT, together, strict=True):
        assert torch.equal(part, perplexity.token_nll(model, tokenizer, [text]))


def test_max_tokens_cuts_the_end_of_each_passage(tiny):
    model, tokenizer = tiny
    assert perplexity.scored_lengths(tokenizer, SHORT, max_tokens=5) == [4, 4, 1]
    whole = perplexity.token_nll(model, tokenizer, SHORT)
    cut = perplexity.token_nll(model, tokenizer, SHORT, max_tokens=5)
    starts = [0, *torch.tensor(perplexity.scored_lengths(tokenizer, SHORT)).cumsum(0).tolist()]
    expected = torch.cat([whole[start : start + n] for start, n in zip(starts, [4, 4, 1])])  # noqa: B905
    assert torch.allclose(cut, expected, rtol=1e-5)


def test_the_model_stays_as_it_was(model, tiny):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    perplexity.token_nll(model, tiny[1], SHORT)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("passages", ["one text", [b"bytes"], [1], None, iter(["x y"]), ["good text", None]])
def test_passages_that_are_no_list_of_texts(tiny, passages):
    with pytest.raises(TypeError, match="passages: expected a list of strings"):
        perplexity.token_nll(*tiny, passages)


@pytest.mark.parametrize(
    ("passages", "words"),
    [([], "one or more; got none"), (["good text", ""], r"passages\[1\]"), (["a"], "got 1 \\('a'\\)")],
)
def test_nothing_to_score(tiny, passages, words):
    with pytest.raises(ValueError, match=words):
        perplexity.token_nll(*tiny, passages)


@pytest.mark.parametrize("max_tokens", [0, 1, -3, 2.5, True, "8"])
def test_wrong_max_tokens(tiny, max_tokens):
    with pytest.raises(ValueError, match="max_tokens: expected an integer of 2 or more"):
        perplexity.token_nll(*tiny, SHORT, max_tokens)


def test_a_passage_that_is_too_long(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match=r"passages\[1\]: expected at most the 8192 tokens .* got 9000"):
        perplexity.token_nll(model, tokenizer, ["ab", "x" * 9000])


def test_models_that_cannot_be_scored(tiny):
    model, tokenizer = models.tiny()
    with pytest.raises(ValueError, match=r"expected one in eval mode.*model\.eval\(\)"):
        perplexity.token_nll(model.train(), tokenizer, SHORT)
    with pytest.raises(ValueError, match="meta device"):
        perplexity.token_nll(models.tiny()[0].to("meta"), tokenizer, SHORT)
    with pytest.raises(ValueError, match="a module without parameters"):
        perplexity.token_nll(torch.nn.ReLU().eval(), tokenizer, SHORT)
    model.eval().model.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match=r"NaN or Inf for passages\[0\]"):
        perplexity.token_nll(model, tokenizer, SHORT)


# -------------------- perplexity and the error of a difference


def test_perplexity_of_equal_chances_is_their_number():
    assert perplexity.perplexity(torch.full((7,), math.log(50), dtype=torch.float64)) == pytest.approx(50)
    assert perplexity.perplexity(torch.zeros(3)) == 1.0


@pytest.mark.parametrize(
    ("nll", "error"),
    [
        ([1.0], TypeError),
        (torch.tensor([1, 2]), TypeError),
        (torch.tensor([]), ValueError),
        (torch.ones(2, 2), ValueError),
        (torch.tensor(1.0), ValueError),
        (torch.tensor([1.0, math.nan]), ValueError),
        (torch.tensor([math.inf]), ValueError),
    ],
)
def test_what_is_no_list_of_losses(nll, error):
    with pytest.raises(error, match="nll: expected"):
        perplexity.perplexity(nll)
    with pytest.raises(error, match="nll_b: expected"):
        perplexity.paired_standard_error(torch.ones(2), nll)


def test_the_error_by_tokens_is_that_of_a_mean():
    a = torch.tensor([3.0, 0.5, 2.25, 7.0, 1.5], dtype=torch.float64)
    b = torch.tensor([3.5, 0.25, 4.25, 7.125, 1.5], dtype=torch.float64)
    expected = statistics.stdev((b - a).tolist()) / math.sqrt(5)
    assert perplexity.paired_standard_error(a, b) == pytest.approx(expected, rel=1e-12)
    assert perplexity.paired_standard_error(a, b) == perplexity.paired_standard_error(b, a)
    assert perplexity.paired_standard_error(a, a + 2) == 0


def test_the_error_by_passages_of_one_length_is_that_of_their_means():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 60, generator=generator, dtype=torch.float64)
    means = (b - a).view(12, 5).mean(dim=1).tolist()
    expected = statistics.stdev(means) / math.sqrt(12)
    assert perplexity.paired_standard_error(a, b, [5] * 12) == pytest.approx(expected, rel=1e-12)


def test_the_error_by_passages_is_how_far_means_of_passages_really_scatter():
    """Drawn again and again, with an effect that each passage has of its own. By tokens the error is far too small."""
    generator = torch.Generator().manual_seed(0)
    lengths, found, by_passage, by_token = [40, 60, 80, 100] * 10, [], [], []
    for _ in range(400):
        own = [torch.randn((), generator=generator).expand(n) for n in lengths]
        a = torch.zeros(sum(lengths))
        b = torch.cat(own) + torch.randn(sum(lengths), generator=generator)
        found.append((b - a).mean().item())
        by_passage.append(perplexity.paired_standard_error(a, b, lengths))
        by_token.append(perplexity.paired_standard_error(a, b))
    scatter = statistics.stdev(found)
    # 400 draws know a standard deviation to 1/√800 = 3.5%; four of those.
    assert statistics.mean(by_passage) == pytest.approx(scatter, rel=0.14)
    assert statistics.mean(by_token) < 0.25 * scatter


def test_errors_of_the_error():
    a, b = torch.rand(6), torch.rand(6)
    with pytest.raises(ValueError, match="nll_b: expected 6 tokens, as in nll_a; got 5"):
        perplexity.paired_standard_error(a, b[:5])
    for lengths in ([3, 2], [], [7, -1], [6, 0]):
        with pytest.raises(ValueError, match="lengths: expected counts of 1 or more that add up to 6"):
            perplexity.paired_standard_error(a, b, lengths)
    for short in ((a, b, [6]), (a[:1], b[:1])):
        with pytest.raises(ValueError, match="One does not vary"):
            perplexity.paired_standard_error(*short)


# -------------------- rounded weights


def bits(model) -> dict[str, torch.Tensor]:
    """The bits of every tensor of the model, as integers: NaN and -0 count as they are."""
    return {name: t.detach().clone().contiguous().view(torch.uint8) for name, t in model.state_dict().items()}


def same(model, before) -> bool:
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def coarse(weight):
    return (weight.double() * 16).round() / 16  # another dtype than the weight's


def test_within_the_block_the_linear_weights_are_rounded_and_nothing_else_is(model):
    before, kept, seen = bits(model), {n: p.detach().clone() for n, p in model.named_parameters()}, []
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with perplexity.rounded_weights(
        model, lambda weight: seen.append(weight.shape) or coarse(weight)
    ) as same_model:
        assert same_model is model
        for name, weight in model.named_parameters():
            linear = name.endswith("_proj.weight")
            expected = coarse(kept[name]).to(weight.dtype) if linear else kept[name]
            assert torch.equal(weight, expected) and weight.dtype == kept[name].dtype, name
            assert linear == (not torch.equal(weight, kept[name])), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(seen) == 14  # 7 in each of 2 layers
    assert same(model, before)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert all(p.requires_grad for p in model.parameters())


def test_the_loss_within_the_block_is_that_of_a_model_with_such_weights(tiny):
    model, tokenizer = tiny
    other = models.tiny()[0]
    for name, weight in other.named_parameters():
        if name.endswith("_proj.weight"):
            weight.data = coarse(weight.data).float()
    plain = perplexity.token_nll(model, tokenizer, SHORT)
    with perplexity.rounded_weights(model, coarse):
        rounded = perplexity.token_nll(model, tokenizer, SHORT)
    assert torch.equal(rounded, perplexity.token_nll(other, tokenizer, SHORT))
    assert not torch.equal(rounded, plain)
    assert torch.equal(plain, perplexity.token_nll(model, tokenizer, SHORT))


def test_weights_come_back_after_an_error_within_the_block(model):
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), perplexity.rounded_weights(model, coarse):
        raise KeyboardInterrupt
    assert same(model, before)


def test_weights_come_back_where_the_function_fails_half_way(model):
    before, calls = bits(model), []

    def fails(weight):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the fifth layer")
        return coarse(weight)

    with pytest.raises(RuntimeError, match="the fifth layer"), perplexity.rounded_weights(model, fails):
        raise AssertionError("the block must not be entered")
    assert same(model, before)


def test_weights_come_back_after_writing_to_them_and_from_functions_that_write(model):
    before = bits(model)
    with perplexity.rounded_weights(model, lambda weight: weight.zero_()):
        assert not any(p.any() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    assert same(model, before)
    with perplexity.rounded_weights(model, lambda weight: weight), torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.add_(1)
    assert same(model, before)


def test_blocks_within_blocks(model):
    before = bits(model)
    with perplexity.rounded_weights(model, coarse):
        inner = bits(model)
        with perplexity.rounded_weights(model, torch.neg):
            assert not same(model, inner)
        assert same(model, inner)
    assert same(model, before)


def test_a_weight_that_two_layers_share_is_rounded_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model, original = nn.Sequential(first, second), first.weight.detach().clone()
    with perplexity.rounded_weights(model, lambda weight: weight + 1):
        assert torch.equal(second.weight, original + 1)
    assert torch.equal(second.weight, original)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (
            lambda w: None,
            TypeError,
            "function: expected it to return a tensor; got NoneType for model.layers.0",
        ),
        (lambda w: w.flatten(), ValueError, r"function: expected the shape \(128, 128\) .* got \(16384,\)"),
        (lambda w: w / 0, ValueError, "function: expected finite weights; got NaN or Inf"),
        (lambda w: w.double() + 1e300, ValueError, "NaN or Inf"),  # finite until it is cast
    ],
)
def test_functions_that_return_no_weights(model, function, error, words):
    before = bits(model)
    with pytest.raises(error, match=words), perplexity.rounded_weights(model, function):
        raise AssertionError("the block must not be entered")
    assert same(model, before)


def test_models_without_weights_to_round(tiny):
    with (
        pytest.raises(ValueError, match=r"nn\.Linear layers; got none"),
        perplexity.rounded_weights(nn.ReLU(), coarse),
    ):
        pass
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with (
        pytest.raises(TypeError, match=r"got torch\.uint8 in 0"),
        perplexity.rounded_weights(nn.Sequential(packed), coarse),
    ):
        pass


# -------------------- the real model


@pytest.fixture(scope="module")
def real():
    return models.load(dtype=torch.bfloat16)


def test_smollm2_has_210_weights_to_round_and_its_perplexity_is_what_it_was(real):
    model, tokenizer = real
    calls = []
    with perplexity.rounded_weights(model, lambda weight: calls.append(weight.numel()) or weight):
        pass
    assert len(calls) == 210 and sum(calls) == 106_168_320
    lengths = perplexity.scored_lengths(tokenizer, perplexity.passages())
    assert sum(lengths) == 3404
    assert len(tokenizer("A cat").input_ids) == 2  # nothing is added
    nll = perplexity.token_nll(model, tokenizer, perplexity.passages()[6:8], max_tokens=128)
    # 21.703 in float32. In bf16, 21.690 with AVX512-BF16 and 21.735 with AVX2: five times that distance.
    assert perplexity.perplexity(nll) == pytest.approx(21.703, rel=0.0075)
