from __future__ import annotations

import math

import pytest
import torch

import cllm_kernels
from cllm_kernels.gumbel_noise import OP, reference
from tests.kernels.backends import everywhere, running, slow_interpreter

EULER = 0.57721566490153286
# Rows and positions on both sides of every word's edge.
ROWS = [0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1]
POSITIONS = [0, 7, 2**31, 2**32 - 1, 2**32 + 7, 2**62]
SEEDS = [0, 1, -1, 2**64 - 1, 2**63, 0x0123456789ABCDEF]


def bits(noise: torch.Tensor) -> torch.Tensor:
    return noise.cpu().view(torch.int32)


def ids(values: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, device=device)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    # Known answers published with Random123, for philox4x32 with 10 rounds.
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    found = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, found)) == words


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The generator in Python integers, as the paper writes it."""
    for _ in range(10):
        a, c = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (c >> 32) ^ counter[1] ^ key[0],
            c & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@everywhere(OP)
def test_every_entry_takes_the_word_that_the_definition_gives_it(backend, device):
    seed, row, position, vocabulary = 0xFEDCBA9876543210, 2**32 - 3, 2**40 + 9, 200
    with running(OP, backend, device):
        noise = cllm_kernels.gumbel_noise(seed, ids([row], device), position, vocabulary)[0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for v in range(vocabulary):
        b, j, lane = v // 64, v // 16 % 4, v % 16
        counter = [16 * b + lane, row, position & 0xFFFFFFFF, position >> 32]
        word = scalar_philox(counter, key)[j]
        w = (word + 0.5) / 2**32
        assert noise[v].item() == pytest.approx(-math.log(-math.log1p(-w)), rel=1e-6, abs=1e-6)


@everywhere(OP)
@pytest.mark.parametrize("vocabulary", [1, 15, 64, 65, 251, 1025, 5000])
def test_the_same_bits_everywhere(backend, device, vocabulary):
    row, position = ids(ROWS), ids(POSITIONS)
    if slow_interpreter(backend, device):
        vocabulary = min(vocabulary, 1100)
    with running(OP, backend, device):
        for seed in SEEDS[:2] if slow_interpreter(backend, device) else SEEDS:
            noise = cllm_kernels.gumbel_noise(seed, row.to(device), position.to(device), vocabulary)
            assert noise.shape == (6, vocabulary) and noise.dtype is torch.float32
            signed = torch.tensor([(seed + 2**63) % 2**64 - 2**63])
            wanted = reference.gumbel_noise(signed, row, position, vocabulary)
            assert torch.equal(bits(noise), bits(wanted))


@everywhere(OP)
def test_an_entry_depends_on_its_key_alone(backend, device):
    row, position = ids(ROWS, device), ids(POSITIONS, device)
    with running(OP, backend, device):
        whole = bits(cllm_kernels.gumbel_noise(3, row, position, 1500))
        assert torch.equal(whole, bits(cllm_kernels.gumbel_noise(3, row, position, 1500)))
        assert torch.equal(whole[:, :77], bits(cllm_kernels.gumbel_noise(3, row, position, 77)))
        flipped = bits(cllm_kernels.gumbel_noise(3, row.flip(0), position.flip(0), 1500))
        assert torch.equal(whole, flipped.flip(0))
        for i in range(6):
            alone = cllm_kernels.gumbel_noise(3, row[i : i + 1], position[i : i + 1], 1500)
            assert torch.equal(whole[i], bits(alone)[0])
        # Any word of the key that changes, changes every block.
        for seed, r, p in ((4, 5, 7), (3 + 2**32, 5, 7), (3, 6, 7), (3, 5, 8), (3, 5, 7 + 2**32)):
            base = cllm_kernels.gumbel_noise(3, ids([5], device), 7, 640)
            other = cllm_kernels.gumbel_noise(seed, ids([r], device), p, 640)
            assert (bits(base) == bits(other)).sum() <= 2


def test_each_word_is_accurate_to_fp32():
    """Against fp64, at both ends of the range of words, around the middle, and in between."""
    edge = 1 << 16
    words = torch.cat(
        [
            *(torch.arange(0, edge), torch.arange(2**31 - edge, 2**31 + edge)),
            *(torch.arange(2**32 - edge, 2**32), torch.randint(0, 2**32, (1 << 20,))),
        ]
    )
    w = (words.double() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-w))
    error = (reference.gumbel(words).double() - exact).abs()
    assert torch.all(error <= 1e-6 * exact.abs().clamp(min=1.0))
    # The tail goes on where a 24-bit uniform ends: the least word gives 33 log 2.
    assert reference.gumbel(torch.tensor([0])).item() == pytest.approx(33 * math.log(2), rel=1e-6)
    assert torch.isfinite(reference.gumbel(words)).all()


@everywhere(OP)
def test_moments_and_distribution(backend, device):
    count = 1 << (14 if slow_interpreter(backend, device) else 20)
    with running(OP, backend, device):
        noise = cllm_kernels.gumbel_noise(7, ids([0, 1, 2, 3], device), 5, count // 4)
    x = noise.cpu().double().flatten().sort().values
    variance = math.pi**2 / 6
    # Within 5 standard errors; the fourth central moment of a Gumbel is 5.4 variances squared.
    assert abs(x.mean().item() - EULER) < 5 * math.sqrt(variance / count)
    assert abs(x.var().item() - variance) < 5 * variance * math.sqrt(4.4 / count)
    # Kolmogorov-Smirnov: the distance passes 1.95 / sqrt(n) once in a thousand.
    cumulative = torch.exp(-torch.exp(-x))
    steps = torch.arange(count + 1).double() / count
    distance = torch.maximum(steps[1:] - cumulative, cumulative - steps[:-1]).max().item()
    assert distance < 1.95 / math.sqrt(count)


def test_neighbours_are_uncorrelated():
    noise = cllm_kernels.gumbel_noise(1, torch.arange(256), torch.arange(256), 4096).double()
    noise = (noise - noise.mean()) / noise.std()
    for shift in (1, 16, 48, 64):
        correlation = (noise[:, shift:] * noise[:, :-shift]).mean().item()
        assert abs(correlation) < 5 / math.sqrt(256 * 4096)
    assert abs((noise[1:] * noise[:-1]).mean().item()) < 5 / math.sqrt(256 * 4096)


@everywhere(OP)
def test_seed_and_ids_as_tensors_or_numbers(backend, device):
    with running(OP, backend, device):
        row = ids([4, 4, 4], device)
        wanted = bits(cllm_kernels.gumbel_noise(9, row, ids([2, 2, 2], device), 70))
        for seed in (ids([9], device), torch.tensor(9, device=device)):
            assert torch.equal(wanted, bits(cllm_kernels.gumbel_noise(seed, row, 2, 70)))
        found = cllm_kernels.gumbel_noise(9, 4, ids([2, 0, 2, 0, 2, 0], device)[::2], 70)
        assert torch.equal(wanted, bits(found))
        assert cllm_kernels.gumbel_noise(9, row[:0], 2, 70).shape == (0, 70)


def test_bad_arguments_are_named():
    row, noise = torch.arange(3), cllm_kernels.gumbel_noise
    with pytest.raises(ValueError, match="one of row and position must be a tensor"):
        noise(0, 1, 2, 8)
    with pytest.raises(ValueError, match="vocabulary must be at least 1, not 0"):
        noise(0, row, 2, 0)
    with pytest.raises(ValueError, match="seed must fit 64 bits, which 18446744073709551616"):
        noise(2**64, row, 2, 8)
    with pytest.raises(ValueError, match=r"seed must be an int or a tensor \[\] or \[1\], not \[3"):
        noise(row, row, 2, 8)
    with pytest.raises(TypeError, match="seed must be int64, not float32"):
        noise(torch.zeros(1), row, 2, 8)
    with pytest.raises(TypeError, match="seed must be an int or an int64 tensor, not float"):
        noise(0.5, row, 2, 8)
    with pytest.raises(ValueError, match=r"position must be \[3\], one entry per row.*not \[4\]"):
        noise(0, row, torch.arange(4), 8)
    with pytest.raises(ValueError, match=r"row must be \[0\].*not \[2, 3\]"):
        noise(0, torch.zeros(2, 3).long(), 1, 8)
    with pytest.raises(TypeError, match="row must be int64, not int32"):
        noise(0, row.int(), 2, 8)
    with pytest.raises(TypeError, match="position must be an int or an int64 tensor, not float"):
        noise(0, row, 2.0, 8)
    with pytest.raises(ValueError, match="position is on meta but must be on cpu"):
        noise(0, row, row.to("meta"), 8)
    with pytest.raises(
        ValueError, match="row must be at least 0 and fit 32 bits, which 4294967296"
    ):
        noise(0, 2**32, row, 8)
    with pytest.raises(ValueError, match="position must be at least 0 and fit 63 bits, which -1"):
        noise(0, row, -1, 8)


@everywhere(OP)
@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_a_row_id_beyond_32_bits(backend, device, wrong):
    if device == "cuda":
        pytest.skip("on a GPU the low 32 bits count, unchecked")
    with running(OP, backend, device), pytest.raises(ValueError, match=f"32 bits, which {wrong} "):
        cllm_kernels.gumbel_noise(0, torch.tensor([1, wrong]), 2, 8)
