"""linear_argmax with temperature and noise: samples, exact and the same wherever they are drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cllm_kernels
from cllm_kernels.gumbel_noise import reference as noise_reference
from cllm_kernels.linear_argmax import OP, native
from tests.kernels.backends import everywhere, running, slow_interpreter
from tests.kernels.test_linear_argmax import skip_what_the_interpreter_gets_wrong

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def whole_numbers(rows, vocabulary, width, dtype, device, high=3, seed=0):
    """Operands whose products fp32 sums without rounding in any order: all backends must agree."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-high, high + 1, (rows, width), generator=generator)
    weight = torch.randint(-high, high + 1, (vocabulary, width), generator=generator)
    bias = torch.randint(-16, 17, (vocabulary,), generator=generator) / 8
    return hidden.to(device, dtype), weight.to(device, dtype), bias.to(device)


def keys(rows, device, first=0):
    row = torch.arange(rows, device=device) * 17
    position = torch.arange(rows, device=device) * 2**31 + first  # both words of it
    return row, position


def definition(hidden, weight, bias, temperature, noise):
    """Scores in fp32, on the CPU: exact up to the scaling for whole numbers without a soft-cap."""
    scores = hidden.cpu().float() @ weight.cpu().float().T
    if bias is not None:
        scores = scores + bias.cpu()
    seed, row, position = noise
    g = noise_reference.gumbel_noise(
        torch.tensor([seed]), row.cpu(), position.cpu(), weight.shape[0]
    )
    return scores * (1.0 / temperature) + g


def check_bits(hidden, weight, bias, temperature, noise):
    index, value = cllm_kernels.linear_argmax(
        hidden, weight, bias=bias, temperature=temperature, noise=noise
    )
    assert index.dtype is torch.int64 and value.dtype is torch.float32
    scores = definition(hidden, weight, bias, temperature, noise)
    wanted = scores.argmax(dim=1)
    assert torch.equal(index.cpu(), wanted)
    assert torch.equal(value.cpu(), scores.gather(1, wanted[:, None])[:, 0])
    return index, value


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [(1, 1, 1), (7, 251, 100), (252, 251, 33), (1, 32000, 24), (2, 50257, 20), (3, 49152, 17)],
)
def test_the_winner_and_its_score_bit_for_bit(backend, device, rows, vocabulary, width, dtype):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    if slow_interpreter(backend, device):
        rows, vocabulary = min(rows, 17), min(vocabulary, 299)
    hidden, weight, bias = whole_numbers(rows, vocabulary, width, dtype, device)
    noise = (11, *keys(rows, device))
    with running(OP, backend, device):
        for extra, temperature in ((None, 1.0), (bias, 0.7), (None, 30.0)):
            check_bits(hidden, weight, extra, temperature, noise)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_depends_on_its_key_alone(backend, device, dtype):
    """Alone, in a batch, in another order, drawn again: same index and same bits."""
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    rows, vocabulary = (70, 5000) if not slow_interpreter(backend, device) else (20, 300)
    hidden, weight, _ = whole_numbers(rows, vocabulary, 40, dtype, device)
    row, position = keys(rows, device, first=5)

    def draw(chosen):
        noise = (2**63 + 5, row[chosen], position[chosen])
        return cllm_kernels.linear_argmax(hidden[chosen], weight, temperature=20.0, noise=noise)

    with running(OP, backend, device):
        index, value = draw(slice(None))
        assert index.unique().numel() > rows // 2
        flipped = torch.arange(rows - 1, -1, -1, device=device)
        for chosen in (slice(None), flipped, slice(3, 4), slice(0, 17), slice(1, None, 2)):
            again, score = draw(chosen)
            assert torch.equal(again, index[chosen]) and torch.equal(score, value[chosen])
        seed = torch.tensor(5 - 2**63, device=device)
        again, _ = cllm_kernels.linear_argmax(
            hidden, weight, temperature=20.0, noise=(seed, row, position)
        )
        assert torch.equal(again, index)
        other, _ = cllm_kernels.linear_argmax(
            hidden, weight, temperature=20.0, noise=(2**63 + 5, row, position + 2**32)
        )
        assert (other == index).sum() < rows // 4


def chi_squared_bound(freedom: int) -> float:
    """What chi-squared passes once in 10^4 (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


@everywhere(OP)
@pytest.mark.parametrize(("softcap", "temperature"), [(None, None), (None, 0.6), (2.0, 1.5)])
def test_samples_follow_the_softmax(backend, device, softcap, temperature):
    samples = 300 if slow_interpreter(backend, device) else 100_000
    vocabulary, width = 37, 8
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocabulary, width, generator=generator)
    bias = torch.randn(vocabulary, generator=generator) * 0.5
    hidden = torch.randn(1, width, generator=generator) * 0.5
    logits = hidden.double() @ weight.double().T + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.softmax(logits / (temperature or 1.0), dim=1)[0] * samples
    with running(OP, backend, device):
        index, value = cllm_kernels.linear_argmax(
            hidden.expand(samples, width).to(device),
            weight.to(device),
            bias=bias.to(device),
            softcap=softcap,
            temperature=temperature,
            noise=(2024, 3, torch.arange(samples, device=device)),
        )
    counts = torch.bincount(index.cpu(), minlength=vocabulary).double()
    common = expected >= 5  # the rare ones are counted together
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert statistic < chi_squared_bound(len(expected) - 1)
    # The winning score is Gumbel around the log-sum-exp: its mean lies 0.5772 above that.
    centre = torch.logsumexp(logits / (temperature or 1.0), dim=1).item() + 0.57721566
    assert abs(value.double().mean().item() - centre) < 5 * 1.2825 / math.sqrt(samples)


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_temperature_against_fp64(backend, device, dtype, softcap):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 70, generator=generator).to(dtype)
    weight = torch.randn(333, 70, generator=generator).to(dtype)
    row, position = keys(9, "cpu")
    scores = hidden.double() @ weight.double().T
    bound = (hidden.double().abs() @ weight.double().abs().T).max().item()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores / 0.8
    with running(OP, backend, device):
        for noise in (None, (1, row.to(device), position.to(device))):
            perturbed = scores
            if noise is not None:
                g = noise_reference.gumbel_noise(torch.tensor([1]), row, position, 333)
                perturbed = scores + g.double()
            index, value = cllm_kernels.linear_argmax(
                *(hidden.to(device), weight.to(device)),
                softcap=softcap,
                temperature=0.8,
                noise=noise,
            )
            chosen = perturbed.gather(1, index.cpu()[:, None])[:, 0]
            tolerance = 8 * torch.finfo(torch.float32).eps * (bound / 0.8 + 23)
            assert torch.all(perturbed.amax(dim=1) - chosen <= tolerance)
            assert torch.all((value.cpu().double() - chosen).abs() <= tolerance)


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend, device, dtype):
    """+-1e4 drown the noise: what it cannot overturn is chosen, and ties are settled by it."""
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    weight = torch.full((300, 16), -62.5)
    weight[[50, 200]] = 62.5  # logits -1e4, and two of 1e4
    hidden = torch.full((64, 16), 10.0)
    noise = (0, torch.arange(64, device=device), 1)
    with running(OP, backend, device):
        index, value = cllm_kernels.linear_argmax(
            hidden.to(device, dtype), weight.to(device, dtype), noise=noise
        )
        assert set(index.tolist()) == {50, 200}
        assert torch.all((value - 10000).abs() < 23)
        index, _ = cllm_kernels.linear_argmax(
            -hidden.to(device, dtype), weight.to(device, dtype), noise=noise
        )
        assert not {50, 200} & set(index.tolist()) and index.unique().numel() > 40


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_banned_tokens_and_no_rows(backend, device, softcap):
    hidden, weight, bias = whole_numbers(5, 300, 32, torch.float32, device)
    noise = (6, *keys(5, device))
    with running(OP, backend, device):
        bias[:] = -INF
        if softcap is None:  # with a soft-cap a banned token still has -softcap
            bias[[7, 250]] = 0.0
            index, _ = cllm_kernels.linear_argmax(hidden, weight, bias=bias, noise=noise)
            assert set(index.tolist()) <= {7, 250}
            banned = torch.full_like(bias, -INF)
            index, value = cllm_kernels.linear_argmax(hidden, weight, bias=banned, noise=noise)
            assert index.tolist() == [0] * 5 and value.tolist() == [-INF] * 5
        weight[[90, 200]] = NAN
        index, value = cllm_kernels.linear_argmax(hidden, weight, softcap=softcap, noise=noise)
        assert index.tolist() == [90] * 5 and torch.isnan(value).all()
        nothing = (6, *(x[:0] for x in noise[1:]))
        index, value = cllm_kernels.linear_argmax(hidden[:0], weight, noise=nothing)
        assert index.shape == value.shape == (0,)


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
def test_strided_operands_and_ids(backend, device):
    hidden, weight, bias = whole_numbers(12, 260, 48, torch.float32, device)
    row, position = keys(12, device)
    with running(OP, backend, device):
        check_bits(hidden[::2, 8:40], weight[:, 8:40], bias, 4.0, (1, row[::2], position[1::2]))
        bias = torch.stack([bias, bias], dim=1)[:, 0]
        check_bits(
            hidden.t().contiguous().t(), weight.t().contiguous().t(), bias, 4.0, (1, row, position)
        )


@everywhere(OP)
def test_a_weight_of_more_than_2_to_the_31_elements(backend, device):
    """Rows far apart: what lies between them is never touched, so hardly any memory is used."""
    stride, vocabulary, width = 2**23 - 64, 400, 32
    if device == "cpu":
        try:
            store = torch.from_numpy(np.empty(stride * vocabulary, dtype=np.float16))
        except MemoryError:
            pytest.skip("this system promises no memory that it does not have (overcommit)")
    else:
        store = torch.empty(stride * vocabulary, dtype=torch.float16, device=device)
    hidden, near, _ = whole_numbers(3, vocabulary, width, torch.float16, device)
    weight = store.as_strided((vocabulary, width), (stride, 1)).copy_(near)
    assert (vocabulary - 1) * stride > 2**31
    noise = (1, *keys(3, device))
    with running(OP, backend, device):
        for options in ({}, {"noise": noise, "temperature": 9.0}):
            index, value = cllm_kernels.linear_argmax(hidden, weight, **options)
            wanted, score = cllm_kernels.linear_argmax(hidden, near, **options)
            assert torch.equal(index, wanted) and torch.equal(value, score)


def rounding_once(hidden, weight, *, out):
    """What a matmul with 16-bit instructions gives: fp32 sums, rounded when they are stored."""
    return out.copy_(hidden.float() @ weight.float())


@pytest.mark.usefixtures("both_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_rounded_to_16_bits_are_looked_at_again(monkeypatch, dtype):
    """The way of CPUs with 16-bit matmul instructions, wherever this runs."""
    with running(OP, "cpp", "cpu"):
        monkeypatch.setattr(native, "fast_cpu_matmul", lambda dtype: True)
        monkeypatch.setattr(torch, "mm", rounding_once)
        for seed, high, temperature in ((0, 3, 3.0), (1, 12, 400.0), (2, 12, 0.5), (3, 2, 1.0)):
            hidden, weight, bias = whole_numbers(16, 17001, 48, dtype, "cpu", high, seed)
            noise = (seed, *keys(16, "cpu"))
            for extra in (None, bias, bias * 100):
                check_bits(hidden, weight, extra, temperature, noise)
        # Rounding at 1000 and at 8000 moves a score by as much as the noise does.
        for seed, base in ((6, (40, 25)), (7, (200, 40))):
            hidden, weight, bias = whole_numbers(40, 5001, 6, dtype, "cpu", 1, seed)
            hidden[:, 0], weight[:, 0] = base
            for extra in (None, bias):
                check_bits(hidden, weight, extra, 1.0, (seed, *keys(40, "cpu")))
        # Sums beyond 65504 are infinite in fp16, of either sign.
        hidden, weight, _ = whole_numbers(40, 3000, 48, dtype, "cpu", 12, 4)
        noise = (4, *keys(40, "cpu"))
        for sign in (1, -1):
            large = (weight.float().abs() * 64 * sign).to(dtype)
            check_bits((hidden.float().abs() * 8).to(dtype), large, None, 3000.0, noise)
        # A soft-cap flattens what lies above it; only the noise tells such scores apart.
        hidden, weight, bias = whole_numbers(40, 3000, 48, dtype, "cpu", 2, 5)
        noise = (8, *keys(40, "cpu"))
        found = cllm_kernels.linear_argmax(hidden, weight, bias=bias, softcap=9.0, noise=noise)
        with cllm_kernels.use_backend("reference"):
            wanted = cllm_kernels.linear_argmax(hidden, weight, bias=bias, softcap=9.0, noise=noise)
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)


@everywhere(OP)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"temperature": -1.0},
            ValueError,
            "temperature must be a positive finite number .* or None, not -1.0; .* pass no noise",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive finite number"),
        ({"temperature": INF}, ValueError, "temperature must be a positive finite number"),
        ({"temperature": NAN}, ValueError, "temperature must be a positive finite number"),
        ({"noise": 3}, ValueError, r"noise must be \(seed, row, position\) or None"),
        ({"noise": (1, 2)}, ValueError, r"noise must be \(seed, row, position\) or None"),
        ({"row": torch.arange(3)}, ValueError, r"noise: row must be \[2\].*not \[3\]"),
        ({"row": torch.zeros(2, 1).long()}, ValueError, r"row must be \[2\].*not \[2, 1\]"),
        ({"position": torch.zeros(2)}, TypeError, "noise: position must be int64, not float32"),
        ({"position": -4}, ValueError, "position must be at least 0 and fit 63 bits"),
        ({"row": torch.zeros(2, device="meta").long()}, ValueError, "noise: row is on meta"),
        ({"seed": torch.arange(2)}, ValueError, r"seed must be an int or a tensor .* not \[2\]"),
        ({"seed": 2**64}, ValueError, "seed must fit 64 bits"),
    ],
)
def test_bad_arguments_are_named(backend, device, change, error, message):
    def moved(x):
        return x.to(device) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x

    noise = tuple(moved(change.get(name, 0)) for name in ("seed", "row", "position"))
    options = {"noise": change.get("noise", noise)}
    if "temperature" in change:
        options["temperature"] = change["temperature"]
    hidden, weight = torch.zeros(2, 8, device=device), torch.zeros(5, 8, device=device)
    with running(OP, backend, device), pytest.raises(error, match=message):
        cllm_kernels.linear_argmax(hidden, weight, **options)


@everywhere(OP)
def test_a_row_id_beyond_32_bits(backend, device):
    if device == "cuda":
        pytest.skip("on a GPU the low 32 bits count, unchecked")
    with running(OP, backend, device), pytest.raises(ValueError, match="fit 32 bits, which -1"):
        noise = (0, torch.tensor([1, -1]), 0)
        cllm_kernels.linear_argmax(torch.zeros(2, 8), torch.zeros(5, 8), noise=noise)
