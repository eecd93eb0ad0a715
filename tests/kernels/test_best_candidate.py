from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_kernels
from cllm_kernels.best_candidate import OP
from tests.kernels.backends import everywhere, running

ZEROS = torch.zeros(2, 2, 4, dtype=torch.int64)


def right(window, predictions):
    """Guesses of a window, from the first on, that are the predictions of their places."""
    pairs = zip(window[1:], predictions, strict=False)
    return next((place for place, (one, it) in enumerate(pairs) if one != it), len(window) - 1)


@everywhere(OP)
@settings(max_examples=80)
@given(data=st.data())
def test_the_longest_right_one_counts(backend, device, data):
    rows, count, n = (data.draw(st.integers(low, 5)) for low in (0, 1, 1))
    given_guesses = data.draw(st.booleans())
    drawn = st.lists(st.integers(0, 2), min_size=rows * count * n, max_size=rows * count * n)
    parts = [
        torch.tensor(data.draw(drawn), dtype=torch.int64).view(rows, count, n)
        for _ in range(3 if given_guesses else 2)
    ]
    with running(OP, backend, device):
        best, *kept = cllm_kernels.best_candidate(*(part.to(device) for part in parts))
    assert given_guesses or kept.pop() is None
    assert best.shape == (rows,) and all(one.is_contiguous() for one in kept)
    windows, predictions = parts[0].tolist(), parts[1].tolist()
    for row, candidate in enumerate(best.tolist()):
        lengths = [right(*pair) for pair in zip(windows[row], predictions[row], strict=True)]
        assert candidate == lengths.index(max(lengths))
        for one, part in zip(kept, parts, strict=True):
            assert one[row].tolist() == part[row, candidate].tolist()


@everywhere(OP)
def test_wide_windows(backend, device):
    torch.manual_seed(0)
    predictions = torch.randint(0, 9, (2, 3, 131))
    windows = predictions.roll(1, dims=2)
    wrong = torch.tensor([[130, 4, 129], [77, 131, 9]])  # the first guess that is; 131: none
    windows = torch.where(torch.arange(131) == wrong[:, :, None], 9, windows)
    with running(OP, backend, device):
        best = cllm_kernels.best_candidate(windows.to(device), predictions.to(device))
    assert best.candidate.tolist() == [0, 1]
    assert torch.equal(best.window.cpu(), torch.stack([windows[0, 0], windows[1, 1]]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"windows": ZEROS[0]}, ValueError, r"windows must be \[B, C, n\].*not \[2, 4\]"),
        ({"windows": ZEROS[:, :0]}, ValueError, "C >= 1 and n >= 1"),
        ({"predictions": ZEROS[:, :, :3]}, ValueError, r"predictions must be \[2, 2, 4\]"),
        ({"guesses": ZEROS[0]}, ValueError, r"guesses must be \[2, 2, 4\]"),
        ({"predictions": ZEROS.float()}, TypeError, "predictions must be int64"),
        ({"guesses": ZEROS[:1].expand(2, 2, 4)}, ValueError, "guesses must be contiguous"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cllm_kernels.best_candidate(**{"windows": ZEROS, "predictions": ZEROS, **change})


@pytest.mark.parametrize("given_guesses", [False, True])
def test_as_torch_sees_it(given_guesses):
    parts = [torch.randint(0, 2, (3, 2, 4)) for _ in range(3)]
    parts = [*parts[:2], parts[2] if given_guesses else None]
    torch.library.opcheck(torch.ops.cllm_kernels.best_candidate.default, tuple(parts))
    whole = torch.compile(cllm_kernels.best_candidate, fullgraph=True, backend="aot_eager")
    for one, other in zip(whole(*parts), cllm_kernels.best_candidate(*parts), strict=True):
        assert torch.equal(one, other) if other is not None else one is None
