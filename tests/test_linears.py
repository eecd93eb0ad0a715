"""Linear layers through block_linear: which, how long, and with what term."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import cllm
from cllm import GatedAdapter
from cllm.adapter.gated import resolve_adapter
from cllm.linears import MOST_ROWS, add_term, block_linears, fusable
from cllm_kernels.block_linear import OP

from .decoding.tiny_models import prompts, tiny_model

needs_kernel = pytest.mark.skipif(
    OP.unavailable("cpp", torch.device("cpu")) is not None, reason="no C++ kernels"
)


@pytest.fixture
def calls(monkeypatch):
    """Rows of every call of block_linear, and whether it had a low-rank term."""
    import cllm_kernels

    seen, own = [], cllm_kernels.block_linear

    def counted(x, weight, bias=None, *, low_rank=None, gated_from=0):
        seen.append((x.numel() // x.shape[-1], low_rank is not None))
        return own(x, weight, bias, low_rank=low_rank, gated_from=gated_from)

    monkeypatch.setattr(cllm_kernels, "block_linear", counted)
    return seen


def replaced(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_layers_are_put_back_by_the_last_to_leave():
    model = copy.deepcopy(tiny_model("llama"))
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    with block_linears(model):
        assert replaced(model) == linears
        with block_linears(model):
            pass
        assert replaced(model) == linears
    assert not replaced(model)
    with pytest.raises(ZeroDivisionError), block_linears(model):
        _ = 1 / 0
    assert not replaced(model)


def test_which_layers_are_left_alone():
    class Quantised(torch.nn.Linear):
        pass

    own = torch.nn.Linear(3, 3)
    own.forward = lambda x: x
    parametrised = torch.nn.Linear(3, 3)
    torch.nn.utils.parametrizations.weight_norm(parametrised)
    for module in (
        Quantised(3, 3),
        own,
        parametrised,
        torch.nn.Linear(3, 3).double(),
        torch.nn.Linear(3, 3, device="meta"),
    ):
        assert not fusable(module)
    assert fusable(torch.nn.Linear(3, 3))


def test_few_rows_go_through_the_kernel_and_many_do_not(calls):
    layer = torch.nn.Linear(5, 4)
    holder = torch.nn.Sequential(layer)
    with torch.no_grad(), block_linears(holder):
        for rows in (1, MOST_ROWS, MOST_ROWS + 1):
            x = torch.randn(1, rows, 5)
            torch.testing.assert_close(
                holder(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
            )
    assert calls == [(1, False), (MOST_ROWS, False)]


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, MOST_ROWS), (torch.bfloat16, 16), (torch.float16, 16)]
)
def test_a_layer_that_lies_across(calls, dtype, most):
    torch.manual_seed(0)
    layer = Conv1D(40, 50).to(dtype)
    torch.nn.init.normal_(layer.bias)

    class Other(Conv1D):
        pass

    with torch.no_grad(), block_linears(torch.nn.Sequential(layer)):
        assert "forward" in layer.__dict__
        for rows in (1, most, most + 1):
            x = torch.randn(1, rows, 50).to(dtype)
            wanted = x.double() @ layer.weight.double() + layer.bias.double()
            torch.testing.assert_close(layer(x), wanted.to(dtype))
    assert calls == [(1, False), (most, False)]
    assert "forward" not in layer.__dict__
    other = Other(4, 5)
    with block_linears(torch.nn.Sequential(other)):
        assert "forward" not in other.__dict__


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_in_every_window(dtype):
    model = copy.deepcopy(tiny_model("qwen3", dtype))
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad(), block_linears(model):
        for layer in layers:
            x = torch.randn(1, 9, layer.in_features).to(dtype)
            whole = layer(x)
            for row in range(9):
                assert torch.equal(layer(x[:, row : row + 1]), whole[:, row : row + 1])


def test_autocast_and_other_dtypes_are_torchs(calls):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    with torch.no_grad(), block_linears(model):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.randn(2, 5)).dtype is torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            model(torch.randn(2, 5).double())
    assert not calls


def test_a_gradient_is_torchs():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    x = torch.randn(2, 5, requires_grad=True)
    with block_linears(model):
        model(x).sum().backward()
    torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_term_is_in_the_product_and_equals_the_hooks(calls, dtype, batch):
    model = copy.deepcopy(tiny_model("llama", dtype))
    adapter = GatedAdapter.random(model, 3, scale=0.3)
    ids = prompts([6] * batch)["input_ids"]
    with torch.no_grad(), adapter.applied(model) as gate:
        with gate.open(2, batch, 6):
            by_hooks = model(input_ids=ids, use_cache=False).logits
        with block_linears(model):
            plain = model(input_ids=ids, use_cache=False).logits
            calls.clear()
            with gate.open(2, batch, 6):
                fused = model(input_ids=ids, use_cache=False).logits
    assert sum(gated for _, gated in calls) == len(adapter.weights)
    assert torch.equal(fused[:, :2], plain[:, :2])
    assert not torch.equal(fused[:, 2:], plain[:, 2:])
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    )
    torch.testing.assert_close(fused, by_hooks, **tolerance)


def test_many_rows_leave_the_term_to_the_hook(calls):
    model = tiny_model("llama")
    adapter = GatedAdapter.random(model, 2, scale=0.3)
    ids = prompts([MOST_ROWS + 1])["input_ids"]
    with torch.no_grad(), adapter.applied(model) as gate, block_linears(model):
        plain = model(input_ids=ids, use_cache=False).logits
        with gate.open(60, 1, MOST_ROWS + 1):
            gated = model(input_ids=ids, use_cache=False).logits
    assert not calls
    torch.testing.assert_close(gated[:, :60], plain[:, :60])
    assert not torch.allclose(gated[:, 60:], plain[:, 60:], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_one_dimension_leave_the_other_rows_bits_alone(dtype):
    """As layers see them that flatten batch and window."""

    class Flat:
        low_rank = property(lambda self: pytest.fail("the rows are not told apart here"))

        def rows(self):
            return 2, 1, 6

        def add(self, x, output, rows):
            output[rows[0] :] += 1.0

    model = torch.nn.Sequential(torch.nn.Linear(64, 40)).to(dtype)
    x = torch.randn(6, 64).to(dtype)
    with torch.no_grad(), block_linears(model):
        plain = model(x)
        remove = add_term(model[0], Flat())
        gated = model(x)
        remove()
        assert torch.equal(model(x), plain)
    assert torch.equal(gated[:2], plain[:2])
    assert torch.equal(gated[2:], plain[2:] + 1.0)


def test_another_thread_does_not_get_the_term():
    model = tiny_model("llama")
    adapter = GatedAdapter.random(model, 2, scale=0.3)
    ids = prompts([6])["input_ids"]
    found = []

    def elsewhere():
        with torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits)

    with torch.no_grad(), adapter.applied(model) as gate, block_linears(model):
        elsewhere()
        with gate.open(0, 1, 6):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
    assert torch.equal(*found)


def test_weights_that_are_trained_on_are_cast_again():
    model = copy.deepcopy(tiny_model("llama"))
    adapter = GatedAdapter.random(model, 2, scale=0.3)
    ids = prompts([6])["input_ids"]

    def logits():
        with (
            torch.no_grad(),
            adapter.applied(model) as gate,
            block_linears(model),
            gate.open(0, 1, 6),
        ):
            return model(input_ids=ids, use_cache=False).logits

    before = logits()
    assert torch.equal(logits(), before)
    next(iter(adapter.weights.values())).b.mul_(-3.0)
    assert not torch.equal(logits(), before)


def test_a_folder_is_read_once_until_it_changes(tmp_path):
    model = tiny_model("llama")
    first = GatedAdapter.random(model, 2, scale=0.3)
    first.save(tmp_path)
    found = resolve_adapter(tmp_path)
    assert resolve_adapter(str(tmp_path)) is found
    GatedAdapter.random(model, 3, scale=0.3).save(tmp_path)
    again = resolve_adapter(tmp_path)
    assert again is not found and again.ranks == (3,)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_adapter_read_in_this_mode_works_in_it(tmp_path, mode):
    model = tiny_model("llama")
    GatedAdapter.random(model, 2, scale=0.3).save(tmp_path)
    inputs = prompts([7])
    plain = cllm.generate(model, **inputs, max_new_tokens=6)
    with mode():
        for _ in range(2):
            found = cllm.generate(model, **inputs, max_new_tokens=6, adapter=tmp_path)
            assert torch.equal(found, plain)
