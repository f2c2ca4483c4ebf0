"""The frozen 4-bit layer: its gradients, what it keeps for backward, how it is copied, moved, saved and merged."""

import copy
import gc
import threading
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora_edu import models, reference
from qlora_edu.blockwise import FLOATS, quantize
from qlora_edu.kernels import scratch
from qlora_edu.lora import LoRALinear, adapter_parameters, add_lora, lora_layers
from qlora_edu.parity import differing, stored_weights
from qlora_edu.qlora import NF4Linear, QLoRALinear, add_qlora, merge_into_dense, quantize_model

IN, OUT = 128, 96


def linear(inputs=IN, outputs=OUT, start=0, dtype=torch.float32, bias=True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    layer.weight.data = stored_weights(outputs * inputs, start).view(outputs, inputs).to(dtype) / inputs**0.5
    if bias:
        layer.bias.data = stored_weights(outputs, start + 5).to(dtype)
    return layer


def batch(*leading, width=IN, start=70) -> torch.Tensor:
    return stored_weights(torch.Size(leading).numel() * width, start).view(*leading, width)


def forward_and_backward(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(stored_weights(y.numel(), 17).view_as(y).to(y.dtype))
    return y.detach(), x.grad


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert differing(a, b)[1] == 0


class TestLayer:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("leading", [(), (5,), (2, 3), (1, 0)])
    @pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
    def test_it_computes_with_the_decoded_weight(self, compute, leading, bias):
        dense = linear(bias=bias)
        layer, x = NF4Linear.of(dense, compute), batch(*leading)
        y, gradient = forward_and_backward(layer, x)
        w = quantize(dense.weight, double_quant=True).dequantize().double()
        g = stored_weights(y.numel(), 17).view_as(y).double()
        exact = x.double() @ w.T + (dense.bias.double() if bias else 0)
        tolerance = {"rtol": 0, "atol": {torch.float32: 1e-5, torch.bfloat16: 0.1}[compute]}
        torch.testing.assert_close(y.double(), exact, **tolerance)
        torch.testing.assert_close(gradient.double(), g @ w, **tolerance)
        assert y.dtype == x.dtype == gradient.dtype and gradient.shape == x.shape

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_the_output_has_the_dtype_of_the_input(self, dtype):
        layer, x = NF4Linear.of(linear(), torch.float32), batch(3).to(dtype)
        y, gradient = forward_and_backward(layer, x)
        assert y.dtype == gradient.dtype == dtype

    @pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("stored", FLOATS)
    def test_it_equals_bitsandbytes_while_eval_and_train_alternate(self, stored, compute):
        """bitsandbytes itself gets this wrong on some CPUs, unless `reference` keeps it from repacking."""
        dense = linear(dtype=stored)
        ours = NF4Linear.of(dense, compute)
        theirs = reference.linear4bit(dense, compute).requires_grad_(False)
        x, packed = batch(4), ours.weight.clone()
        first = None
        for training in (False, True, False, True, True, False):
            results = [forward_and_backward(layer.train(training), x) for layer in (ours, theirs)]
            assert_same(*results)
            first = first or results[0]
            assert_same(results[0], first)
            with torch.no_grad():
                assert_same([ours(x)], [first[0]])
        assert torch.equal(ours.weight, packed)

    def test_the_layer_it_was_made_of_is_left_as_it_was(self):
        dense = linear()
        before = copy.deepcopy(dense.state_dict())
        layer = NF4Linear.of(dense)
        forward_and_backward(layer, batch(2))
        layer.bias.data.zero_()
        assert all(torch.equal(dense.state_dict()[name], before[name]) for name in before)
        assert dense.weight.requires_grad and not any(p.requires_grad for p in layer.parameters())

    def test_without_grad_and_in_inference_mode(self):
        layer, x = NF4Linear.of(linear()), batch(3)
        expected = forward_and_backward(layer, x)
        with torch.no_grad():
            assert_same([layer(x)], expected[:1])
        with torch.inference_mode():
            assert_same([layer(x.clone())], expected[:1])
        assert_same(forward_and_backward(layer, x), expected)

    def test_a_layer_first_used_in_inference_mode_can_train(self):
        scratch.release()
        layer = NF4Linear.of(linear())
        with torch.inference_mode():
            layer(batch(3))
        fresh = NF4Linear.of(linear())
        assert_same(forward_and_backward(layer, batch(3)), forward_and_backward(fresh, batch(3)))

    @pytest.mark.parametrize("x", [batch(3).requires_grad_(), batch(3)])
    def test_only_an_input_that_wants_a_gradient_gets_one(self, x):
        assert NF4Linear.of(linear())(x).requires_grad == x.requires_grad

    def test_autocast(self):
        layer, x = NF4Linear.of(linear(), torch.float32), batch(4)
        y, gradient = forward_and_backward(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            y16, gradient16 = forward_and_backward(layer, x)
        assert y16.dtype == gradient16.dtype == torch.float32
        for exact, rounded in ((y, y16), (gradient, gradient16)):
            assert 0 < (rounded - exact).norm() < 0.01 * exact.norm()

    def test_a_second_derivative_is_right_or_refused(self):
        """Never silently wrong: the decoded weight lives in memory that the next layer overwrites."""
        layers = [NF4Linear.of(linear(64, 64, start=i * 100), torch.float32) for i in (1, 2)]
        quantized = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh())
        dense = nn.Sequential(layers[0].dequantized(), nn.Tanh(), layers[1].dequantized(), nn.Tanh())
        found = []
        for model in (dense, quantized):
            x = batch(3, width=64).requires_grad_()
            (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            try:
                found += torch.autograd.grad(first.square().sum(), x)
            except RuntimeError as error:
                assert model is quantized and "modified by an inplace operation" in str(error)
        assert found
        torch.testing.assert_close(found[-1], found[0])

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (
                batch(3, width=IN + 1),
                rf"x: expected a float tensor of shape \(\.\.\., {IN}\); got .*\(3, {IN + 1}\)",
            ),
            (torch.tensor(1.0), rf"shape \(\.\.\., {IN}\); got torch\.float32, \(\)"),
            (torch.ones(3, IN, dtype=torch.int64), r"x: expected a float tensor .*got torch\.int64"),
            (torch.ones(3, IN, device="meta"), r"x: expected a tensor on cpu, where the weight is; got meta"),
        ],
    )
    def test_an_input_that_does_not_fit_is_refused(self, x, message):
        with pytest.raises(ValueError, match=message):
            NF4Linear.of(linear())(x)

    def test_what_is_no_matrix_or_no_layer_is_refused(self):
        with pytest.raises(
            TypeError, match=r"quantized: expected a QuantizedTensor; got Tensor.*NF4Linear\.of"
        ):
            NF4Linear(torch.ones(4, 4))
        with pytest.raises(ValueError, match=r"quantized: expected a matrix \(out, in\); got shape \(64,\)"):
            NF4Linear(quantize(stored_weights(64)))
        with pytest.raises(ValueError, match=r"compute_dtype: expected float32.*got torch\.int8"):
            NF4Linear.of(linear(), torch.int8)
        with pytest.raises(TypeError, match=r"linear: expected nn\.Linear; got Embedding"):
            NF4Linear.of(nn.Embedding(4, 4))


class TestSharedScratch:
    """All layers decode into one memory. Whatever the order of calls, nobody may see another layer's weight."""

    def layers(self):
        return [NF4Linear.of(linear(64, 64, start=i * 1_000), torch.float32) for i in range(3)]

    def test_a_chain_of_layers(self):
        layers = self.layers()
        dense = [layer.dequantized() for layer in layers]
        assert_same(
            forward_and_backward(nn.Sequential(*layers), batch(4, width=64)),
            forward_and_backward(nn.Sequential(*dense), batch(4, width=64)),
        )

    def test_one_layer_twice_in_a_graph(self):
        layer = self.layers()[0]
        dense = layer.dequantized()
        x = batch(4, width=64)
        ours, theirs = (
            forward_and_backward(lambda x: layer(layer(x)), x),
            forward_and_backward(lambda x: dense(dense(x)), x),
        )
        assert_same(ours, theirs)

    def test_two_forwards_before_two_backwards_in_either_order(self):
        a, b, _ = self.layers()
        g = stored_weights(4 * 64, 17).view(4, 64)
        expected = [forward_and_backward(layer, batch(4, width=64))[1] for layer in (a, b)]
        for order in ((0, 1), (1, 0)):
            inputs = [batch(4, width=64).requires_grad_() for _ in range(2)]
            outputs = [layer(x) for layer, x in zip((a, b), inputs, strict=True)]
            for i in order:
                outputs[i].backward(g)
            assert_same([x.grad for x in inputs], expected)

    def test_layers_of_growing_and_shrinking_size(self):
        sizes = [64, 256, 32, 512, 96]
        layers = [NF4Linear.of(linear(i, o), torch.float32) for i, o in pairwise(sizes)]
        dense = [layer.dequantized() for layer in layers]
        scratch.release()
        assert_same(
            forward_and_backward(nn.Sequential(*layers), batch(4, width=64)),
            forward_and_backward(nn.Sequential(*dense), batch(4, width=64)),
        )

    def test_threads_do_not_see_each_others_weights(self):
        layers, x = self.layers(), batch(16, width=64)
        expected = [forward_and_backward(layer, x) for layer in layers]
        start, failures = threading.Barrier(len(layers)), []

        def work(i):
            start.wait()
            for _ in range(50):
                result = forward_and_backward(layers[i], x)
                if any(differing(a, b)[1] for a, b in zip(result, expected[i], strict=True)):
                    failures.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        layers = nn.Sequential(*self.layers())
        x = batch(4, width=64)
        assert_same(
            forward_and_backward(lambda x: checkpoint(layers, x, use_reentrant=reentrant), x),
            forward_and_backward(layers, x),
        )

    @pytest.mark.parametrize("threads", [1, 2])
    def test_any_number_of_threads(self, threads):
        layers = self.layers()
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            y, gradient = forward_and_backward(nn.Sequential(*layers), batch(4, width=64))
        finally:
            torch.set_num_threads(before)
        expected = forward_and_backward(
            nn.Sequential(*(layer.dequantized() for layer in layers)), batch(4, width=64)
        )
        torch.testing.assert_close((y, gradient), expected)


def test_the_update_is_rounded_before_it_is_added():
    """As in PEFT: a 4-bit layer rounds the update to the base's dtype, a dense one rounds the sum."""
    layer = QLoRALinear(NF4Linear.of(linear()), 4)
    layer.lora_b.data = stored_weights(OUT * 4, 60).view(OUT, 4)
    x = batch(50).bfloat16()
    update = F.linear(F.linear(x.float(), layer.lora_a), layer.lora_b) * layer.scaling
    rounded_first = layer.base(x) + update.bfloat16()
    rounded_last = (layer.base(x) + update).bfloat16()
    assert differing(layer(x), rounded_first) == (50 * OUT, 0)
    assert differing(rounded_last, rounded_first)[1] > 0


# What must not be kept for backward. A stack of layers is run forward; what is held afterwards is measured in two
# ways, since a tensor on ctx escapes autograd's own hooks. Beside the right layer stand two wrong ones, and each
# budget must be broken by the one that it is there to catch.
WIDTH, DEPTH = 256, 8
DENSE_BYTES = WIDTH * WIDTH * 2  # one decoded weight in bfloat16
ACTIVATION_BYTES = 4 * WIDTH * 2


class Naive(nn.Module):
    """Decodes and multiplies, as anybody would write it: autograd keeps the decoded weight."""

    def __init__(self, layer):
        super().__init__()
        self.quantized = layer.quantized

    def forward(self, x):
        return F.linear(x, self.quantized.dequantize(x.dtype))


class Sneaky(Naive):
    """Hides the decoded weight on ctx, where autograd's hooks do not look."""

    class Matmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, quantized):
            ctx.weight = quantized.dequantize(x.dtype)
            return F.linear(x, ctx.weight)

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y @ ctx.weight, None

    def forward(self, x):
        return self.Matmul.apply(x, self.quantized)


def stack(kind) -> nn.Sequential:
    layers = [NF4Linear.of(linear(WIDTH, WIDTH, i, torch.bfloat16, bias=False)) for i in range(DEPTH)]
    return nn.Sequential(*(layers if kind is NF4Linear else [kind(layer) for layer in layers]))


def storage_bytes(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, scratch memory aside."""
    scratch.release()
    gc.collect()
    plain = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
    return storage_bytes(item for item in plain if item.device.type == "cpu")


def bytes_saved_by_autograd(model) -> int:
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(batch(4, width=WIDTH).bfloat16().requires_grad_())
    return storage_bytes(saved)


def bytes_alive_after_forward(model) -> int:
    x = batch(4, width=WIDTH).bfloat16().requires_grad_()
    model(x)  # what is made once
    before = live_bytes()
    y = model(x)
    after = live_bytes()
    assert y.requires_grad
    return after - before


def test_nothing_is_saved_for_backward_but_the_codes_that_are_there_anyway():
    assert bytes_saved_by_autograd(stack(NF4Linear)) == 0
    assert bytes_saved_by_autograd(stack(Naive)) >= DEPTH * DENSE_BYTES  # the hooks would see it


def test_nothing_is_hidden_from_autograd_either():
    budget = DENSE_BYTES // 2 + DEPTH * ACTIVATION_BYTES  # for the whole stack: not even one decoded weight
    assert bytes_alive_after_forward(stack(NF4Linear)) <= budget
    assert bytes_saved_by_autograd(stack(Sneaky)) == 0  # escapes the hooks,
    assert bytes_alive_after_forward(stack(Sneaky)) >= DEPTH * DENSE_BYTES > budget  # but not this


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_low_rank_update_adds_activations_only(compute_dtype):
    layers = [QLoRALinear(layer, 4, compute_dtype=compute_dtype) for layer in stack(NF4Linear)]
    model = nn.Sequential(*layers)
    # x as float32, x A^T, A and B (16 KiB a layer); no decoded weight
    parameters = sum(p.nbytes for p in model.parameters())
    assert bytes_saved_by_autograd(model) <= parameters + DEPTH * 4 * ACTIVATION_BYTES < DEPTH * DENSE_BYTES
    assert bytes_alive_after_forward(model) <= DENSE_BYTES // 2 + DEPTH * 4 * ACTIVATION_BYTES


def test_scratch_memory_does_not_grow_with_the_number_of_layers():
    scratch.release()
    model = stack(NF4Linear)
    for _ in range(3):
        forward_and_backward(model, batch(4, width=WIDTH).bfloat16())
    buffers = scratch._local.__dict__["buffers"]
    assert storage_bytes(buffers.values()) == DENSE_BYTES


class TestModule:
    def test_a_deep_copy_is_independent_and_equal(self):
        layer = NF4Linear.of(linear())
        twin = copy.deepcopy(layer)
        assert_same(forward_and_backward(twin, batch(3)), forward_and_backward(layer, batch(3)))
        twin.weight.zero_()
        twin.bias.data.zero_()
        assert layer.weight.any() and layer.bias.any()

    @pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double", "eval", "cpu"])
    def test_codes_and_scales_survive_a_change_of_dtype(self, convert):
        layer = NF4Linear.of(linear(), torch.float32)
        before = copy.deepcopy(layer.quantized)
        moved = getattr(layer, convert)()
        assert moved is layer and layer.weight.dtype == torch.uint8
        assert_same([layer.quantized.packed, layer.quantized.scales()], [before.packed, before.scales()])
        assert layer(batch(3)).dtype == torch.float32

    def test_to_meta_drops_the_data_and_keeps_the_shape(self):
        layer = NF4Linear.of(linear()).to("meta")
        assert layer.weight.is_meta and layer.quantized.stored_scales.codes.is_meta
        y = layer(torch.ones(3, IN, device="meta"))
        assert y.is_meta and y.shape == (3, OUT)

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_state_dict_and_back(self, double_quant):
        layer = NF4Linear.of(linear(), double_quant=double_quant)
        other = NF4Linear.of(linear(start=999), double_quant=not double_quant)
        state = copy.deepcopy(layer.state_dict())
        names = list(state)
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
        assert list(state) == names  # the caller's dict is left as it was
        assert_same(forward_and_backward(other, batch(3)), forward_and_backward(layer, batch(3)))

    def test_a_state_dict_inside_a_model(self):
        first, second = (
            nn.ModuleDict({"a": NF4Linear.of(linear(start=i)), "b": nn.Linear(3, 3)}) for i in (0, 9)
        )
        assert "a.weight.absmax" in first.state_dict() and "b.weight" in first.state_dict()
        second.load_state_dict(first.state_dict())
        assert_same(forward_and_backward(second["a"], batch(3)), forward_and_backward(first["a"], batch(3)))

    def test_missing_codes_are_reported_as_torch_does(self):
        """Loading adapters alone, with strict=False, must work on a quantized model."""
        model = nn.ModuleDict({"a": NF4Linear.of(linear())})
        before = model["a"].weight.clone()
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: .*"a\.weight"'):
            model.load_state_dict({})
        result = model.load_state_dict({"a.bias": torch.zeros(OUT)}, strict=False)
        assert result.missing_keys == ["a.weight"] and not result.unexpected_keys
        assert torch.equal(model["a"].weight, before) and not model["a"].bias.any()

    def test_what_does_not_fit_is_reported_by_layer_and_changes_nothing(self):
        model = nn.ModuleDict({"a": NF4Linear.of(linear())})
        before = copy.deepcopy(model["a"].quantized)
        other = {"a." + name: tensor for name, tensor in NF4Linear.of(linear(64, OUT)).state_dict().items()}
        for state, message in (
            (other, rf"a\.weight: expected shape \({OUT}, {IN}\); got \({OUT}, 64\)"),
            (linear().state_dict(prefix="a."), r"a\.weight: stored: expected a packed weight"),
        ):
            with pytest.raises(RuntimeError, match=message):
                model.load_state_dict(state)
        assert torch.equal(model["a"].weight, before.packed)

    def test_it_prints_what_it_is(self):
        text = repr(NF4Linear.of(linear(), block_size=128))
        assert f"in_features={IN}, out_features={OUT}, nf4, blocks of 128, double_quant=True" in text


class TestModel:
    TOKENS = torch.arange(2 * 12).view(2, 12)

    def logits(self, model):
        with torch.no_grad():
            return model.eval()(input_ids=self.TOKENS).logits

    def test_every_linear_layer_but_the_head_is_quantized(self):
        model = models.tiny()[0]
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        assert quantize_model(model) == linears
        assert all(isinstance(model.get_submodule(name), NF4Linear) for name in linears)
        assert type(model.lm_head) is nn.Linear

    def test_training_moves_the_adapter_and_no_bit_of_the_base(self):
        model = models.tiny()[0]
        add_qlora(model, r=4, alpha=8)
        base = models.tiny()[0]
        quantize_model(base)
        assert differing(self.logits(model), self.logits(base))[1] == 0  # B starts at zero
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(input_ids=self.TOKENS, labels=self.TOKENS).loss.backward()
            optimizer.step()
            self.logits(model)
        changed = {name for name, tensor in model.state_dict().items() if differing(tensor, before[name])[1]}
        adapters = {name for name in before if name.endswith(("lora_a", "lora_b"))}
        assert changed == adapters
        assert differing(self.logits(model), self.logits(base))[1] > 0
        for layer in lora_layers(model).values():
            layer.enabled = False
        assert differing(self.logits(model), self.logits(base))[1] == 0

    def test_a_deep_copy_and_16_bit_copies_of_a_model_work(self):
        model = models.tiny()[0]
        add_qlora(model, r=4)
        expected = self.logits(model)
        assert differing(self.logits(copy.deepcopy(model)), expected)[1] == 0
        for dtype in (torch.float16, torch.bfloat16):
            found = self.logits(copy.deepcopy(model).to(dtype))
            assert found.dtype == dtype
            assert (found.float() - expected).norm() < 0.05 * expected.norm()

    def test_a_checkpoint_loads_into_another_model(self):
        first, second = models.tiny(seed=0)[0], models.tiny(seed=1)[0]
        for model in (first, second):
            add_qlora(model, r=4)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert differing(self.logits(second), self.logits(first))[1] == 0

    def test_transformers_gradient_checkpointing_changes_no_gradient(self):
        found = []
        for on in (False, True):
            torch.manual_seed(0)
            model = models.tiny()[0].train()
            add_qlora(model, r=4)
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(input_ids=self.TOKENS, labels=self.TOKENS).loss.backward()
            found.append([p.grad for p in adapter_parameters(model)])
        assert_same(*found)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"r": 0}, ValueError, "r: expected"),
            ({"alpha": None}, ValueError, "alpha: expected"),
            ({"dropout": -1}, ValueError, "dropout: expected"),
            ({"targets": ["nothing"]}, ValueError, "targets: no layer"),
            ({"targets": "q_proj"}, TypeError, "targets: expected a list"),
        ],
    )
    def test_add_qlora_refuses_before_it_quantizes(self, arguments, error, message):
        """A cell that was wrong can be mended and run again on the same model."""
        model = models.tiny()[0]
        with pytest.raises(error, match=message):
            add_qlora(model, **arguments)
        assert not any(isinstance(module, NF4Linear) for module in model.modules())
        assert add_qlora(model)

    def test_a_second_time_is_refused_for_the_right_reason(self):
        model = models.tiny()[0]
        add_qlora(model)
        with pytest.raises(ValueError, match="model: has LoRA layers already"):
            add_qlora(model)

    def test_a_layer_that_cannot_be_quantized_is_named_and_nothing_changes(self):
        model = models.tiny()[0]
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        model.get_submodule(layers[3]).weight.data[1, 2] = float("nan")
        with pytest.raises(ValueError, match=rf"{layers[3]}: cannot be quantized. weight: .* got nan"):
            quantize_model(model)
        assert not any(isinstance(module, NF4Linear) for module in model.modules())

    def test_the_wrong_order_and_a_wrong_skip_are_refused(self):
        model = models.tiny()[0]
        with pytest.raises(TypeError, match=r"skip: expected a list of names, such as \['lm_head'\]"):
            quantize_model(model, skip="lm_head")
        add_lora(model)
        with pytest.raises(ValueError, match="quantize a model before LoRA is added"):
            quantize_model(model)

    def test_a_model_without_linear_layers_is_refused(self):
        with pytest.raises(ValueError, match=r"model: has no nn\.Linear to quantize"):
            quantize_model(nn.Sequential(nn.LayerNorm(4)))


class TestMerge:
    RANK = 8

    def layer(self, share: float, size=512) -> QLoRALinear:
        """A layer whose update has `share` of the weight's norm."""
        dense = nn.Linear(size, size, bias=False)
        dense.weight.data = stored_weights(size * size).view(size, size)
        layer = QLoRALinear(NF4Linear.of(dense, torch.float32, double_quant=False), self.RANK, 2 * self.RANK)
        layer.lora_a.data = stored_weights(self.RANK * size, 100).view(self.RANK, size)
        layer.lora_b.data = stored_weights(self.RANK * size, 900).view(size, self.RANK)
        layer.lora_b.data *= share * dense.weight.norm() / layer.delta().norm()
        return layer

    @pytest.mark.parametrize(
        ("share", "least", "most"), [(0.01, 0.0, 0.10), (0.10, 0.70, 0.95), (0.30, 0.95, 1.05)]
    )
    def test_most_of_a_small_update_is_lost_in_4_bits(self, share, least, most):
        layer = self.layer(share)
        before, delta = layer.base.quantized.dequantize(), layer.delta()
        layer.merge()
        arrived = layer.base.quantized.dequantize() - before
        survived = (arrived * delta).sum() / delta.square().sum()
        assert least <= survived <= most
        assert layer.merged and layer.base.quantized.double_quant is False

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_nothing_is_lost_in_a_dense_layer_but_rounding(self, dtype):
        layer = self.layer(0.01)
        stored = quantize(layer.base.quantized.dequantize().bfloat16(), double_quant=True)
        layer.base.quantized = stored  # as in a model: 16-bit weights; rounding them once more would show
        exact = stored.dequantize(torch.float32).double() + layer.scaling * (
            layer.lora_b.double() @ layer.lora_a.double()
        )
        merged = layer.merged_linear(dtype)
        assert type(merged) is nn.Linear and merged.weight.dtype == dtype
        error = (merged.weight.double() - exact).abs()
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()

    def test_merging_nothing_changes_no_code(self):
        layer = self.layer(0.1)
        layer.lora_b.data.zero_()
        codes = layer.base.weight.clone()
        layer.merge()
        layer.unmerge()
        assert torch.equal(layer.base.weight, codes)

    def test_unmerging_does_not_bring_the_base_back(self):
        layer = self.layer(0.1)
        codes = layer.base.weight.clone()
        layer.merge()
        layer.unmerge()
        changed = (layer.base.weight != codes).float().mean()
        assert 0 < changed and not layer.merged

    def test_twice_is_refused(self):
        layer = self.layer(0.1)
        with pytest.raises(RuntimeError, match="unmerge: the update is not"):
            layer.unmerge()
        layer.merge()
        codes = layer.base.weight.clone()
        for again in (layer.merge, layer.merged_linear):
            with pytest.raises(RuntimeError, match="the update is in the base's weight already"):
                again()
        assert torch.equal(layer.base.weight, codes)

    def test_an_update_that_is_not_finite_is_refused_before_anything_changes(self):
        layer = self.layer(0.1)
        layer.lora_b.data[0, 0] = float("inf")
        codes = layer.base.weight.clone()
        with pytest.raises(ValueError, match="weight: expected finite values"):
            layer.merge()
        assert torch.equal(layer.base.weight, codes) and not layer.merged

    def test_a_model_becomes_dense_and_keeps_its_answers(self):
        model = models.tiny()[0]
        add_qlora(model, r=4)
        for i, layer in enumerate(lora_layers(model).values()):
            layer.base.compute_dtype = torch.float32
            layer.lora_b.data = stored_weights(layer.lora_b.numel(), i).view_as(layer.lora_b) / 50
        expected = TestModel().logits(model)
        assert merge_into_dense(model, torch.float32) is model
        assert not any(isinstance(module, (NF4Linear, QLoRALinear)) for module in model.modules())
        torch.testing.assert_close(TestModel().logits(model), expected, rtol=1e-3, atol=1e-3)

    def test_a_model_without_qlora_is_refused(self):
        model = models.tiny()[0]
        with pytest.raises(ValueError, match="model: expected QLoRA layers"):
            merge_into_dense(model)
        add_lora(model)
        with pytest.raises(ValueError, match=r"model: expected QLoRA layers; .*LoRALinear\.merge"):
            merge_into_dense(model)

    def test_a_merged_model_is_refused_whole(self):
        model = models.tiny()[0]
        add_qlora(model)
        list(lora_layers(model).values())[-1].merge()
        with pytest.raises(RuntimeError, match=r"merged_linear: .*call unmerge\(\) first"):
            merge_into_dense(model)
        assert lora_layers(model)


def test_what_is_in_four_bits_already_is_said():
    model, _ = models.tiny()
    quantize_model(model)
    with pytest.raises(ValueError, match=r"lora\.add_lora"):
        add_qlora(model)
    with pytest.raises(ValueError, match="compute_dtype: expected a floating-point dtype"):
        add_lora(model, compute_dtype=torch.int8)


class TestAnotherWeightBetweenForwardAndBackward:
    """The backward pass belongs to the weight that the forward pass used."""

    @pytest.mark.parametrize("compute", [None, torch.float32], ids=["plain", "fused"])
    def test_a_layer(self, compute):
        layer = QLoRALinear(NF4Linear.of(linear(), torch.float32), 4, compute_dtype=compute)
        dy = stored_weights(3 * OUT, 17).view(3, OUT)
        found = []
        for replace in (False, True):
            x = batch(3).requires_grad_()
            y = layer(x)
            if replace:
                layer.base.load_state_dict(NF4Linear.of(linear(start=5_000)).state_dict())
            y.backward(dy)
            found.append(x.grad)
        assert_same(found[:1], found[1:])

    def test_a_dense_base(self):
        layer = LoRALinear(linear(), 4, compute_dtype=torch.float32)
        found = []
        for replace in (False, True):
            x = batch(3).requires_grad_()
            y = layer(x)
            if replace:
                layer.base.weight.data = linear(start=5_000).weight.data
            y.sum().backward()
            found.append(x.grad)
        assert_same(found[:1], found[1:])


class TestRefused:
    @pytest.mark.parametrize("bias", [torch.ones(1), torch.ones(5), torch.ones(OUT, 1)])
    def test_a_bias_of_another_shape(self, bias):
        quantized = NF4Linear.of(linear()).quantized
        with pytest.raises(ValueError, match=rf"bias: expected shape \({OUT},\); got"):
            NF4Linear(quantized, bias)

    @pytest.mark.parametrize("bias", [torch.float32, True, [0.0] * OUT])
    def test_a_bias_that_is_no_tensor(self, bias):
        quantized = NF4Linear.of(linear()).quantized
        with pytest.raises(TypeError, match=r"bias: expected a tensor or None; got .*third argument"):
            NF4Linear(quantized, bias)

    @pytest.mark.parametrize("x", [None, "x", [0.0] * IN, batch(3).numpy()])
    def test_an_input_that_is_no_tensor(self, x):
        with pytest.raises(TypeError, match=r"x: expected a float tensor of shape .*; got \w+$"):
            NF4Linear.of(linear())(x)

    @pytest.mark.parametrize("answer", ["no", 1, None])
    def test_a_yes_or_no_that_is_neither(self, answer):
        with pytest.raises(ValueError, match="double_quant: expected True or False"):
            quantize(linear().weight, double_quant=answer)
        model = models.tiny()[0]
        with pytest.raises(ValueError, match="rank_stabilized: expected True or False"):
            add_qlora(model, rank_stabilized=answer)
        assert not any(isinstance(module, NF4Linear) for module in model.modules())

    @pytest.mark.parametrize("model", [None, "smollm2-135m", nn.Linear])
    @pytest.mark.parametrize("change", [quantize_model, add_qlora, add_lora, merge_into_dense])
    def test_what_is_no_model(self, change, model):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module; got"):
            change(model)

    def test_a_single_layer_is_no_model(self):
        with pytest.raises(TypeError, match=r"model: expected a model that contains .*NF4Linear\.of"):
            quantize_model(linear())

    @pytest.mark.parametrize("skip", [None, 3, [None]])
    def test_a_skip_that_is_no_list_of_names(self, skip):
        with pytest.raises(
            TypeError, match=r"skip: expected a list of names, such as \['lm_head'\], or \[\]; got"
        ):
            quantize_model(models.tiny()[0], skip=skip)

    def test_a_single_string_of_targets_is_answered_with_an_example(self):
        for change in (add_lora, add_qlora):
            with pytest.raises(
                TypeError, match=r"such as \['q_proj', 'v_proj'\] or lora\.LLAMA.*'all-linear'$"
            ):
                change(models.tiny()[0], targets="all-linear")

    @pytest.mark.parametrize("dtype", [torch.int8, "float32", torch.float64])
    def test_a_dtype_to_merge_into(self, dtype):
        model = models.tiny()[0]
        names = add_qlora(model)
        with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16; got"):
            merge_into_dense(model, dtype)
        assert list(lora_layers(model)) == names

    def test_a_layer_that_is_switched_off_is_not_merged(self):
        model = models.tiny()[0]
        names = add_qlora(model)
        lora_layers(model)[names[-1]].enabled = False
        with pytest.raises(RuntimeError, match="merged_linear: the update is switched off"):
            merge_into_dense(model)
        assert list(lora_layers(model)) == names


@pytest.mark.parametrize("dtype", FLOATS)
def test_merging_gives_the_weights_the_dtype_that_they_had(dtype):
    model = models.tiny()[0].to(dtype)
    add_qlora(model)
    merge_into_dense(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    TestModel().logits(model)  # no two dtypes meet
