from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_kernels
from cllm_kernels.guess_pool_add import OP
from tests.kernels.backends import everywhere, running

V = 5


def added(device, latest, stamps, *tokens):
    """Runs the op on copies: what it makes of latest and stamps, on the CPU."""
    latest, stamps = latest.clone().to(device), stamps.clone().to(device)
    assert cllm_kernels.guess_pool_add(latest, stamps, *(t.to(device) for t in tokens)) is None
    return latest.cpu(), stamps.cpu()


@everywhere(OP)
@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(0, 3), n=st.integers(1, 9), calls=st.integers(1, 3))
def test_the_latest_behind_each_token_stays(backend, device, data, rows, n, calls):
    """Against a dictionary a row, with tokens that stand in a window twice, and such as have no
    place in the table."""
    token = st.integers(-1, V)
    block = st.lists(st.lists(token, min_size=n, max_size=n), min_size=rows, max_size=rows)
    first = data.draw(st.lists(st.integers(0, 2**40), min_size=rows, max_size=rows))
    latest, stamps = torch.full((rows, V), -1), torch.tensor(first, dtype=torch.int64)
    known = [{} for _ in range(rows)]
    with running(OP, backend, device):
        for call in range(calls):
            window, predictions = data.draw(block), data.draw(block)
            tensors = [
                torch.tensor(block, dtype=torch.int64).view(rows, n)
                for block in (window, predictions)
            ]
            latest, stamps = added(device, latest, stamps, *tensors)
            for row in range(rows):
                for i, (own, predicted) in enumerate(
                    zip(window[row], predictions[row], strict=True)
                ):
                    if 0 <= own < V and 0 <= predicted < V:
                        known[row][own] = (first[row] + call * n + i) * V + predicted
    assert latest.tolist() == [[pairs.get(token, -1) for token in range(V)] for pairs in known]
    assert stamps.tolist() == [stamp + calls * n for stamp in first]


@everywhere(OP)
def test_wide_windows(backend, device):
    """More tokens than a warp has lanes, all of them the same."""
    n = 700
    window, predictions = torch.full((2, n), 3), torch.arange(n).repeat(2, 1) % V
    latest, stamps = torch.full((2, V), -1), torch.tensor([0, 7])
    with running(OP, backend, device):
        latest, stamps = added(device, latest, stamps, window, predictions)
    assert latest[:, 3].tolist() == [699 * V + 4, 706 * V + 4]
    assert (latest == -1).sum() == 2 * (V - 1) and stamps.tolist() == [700, 707]


@everywhere(OP)
def test_what_is_there_is_overwritten_by_later_stamps_alone(backend, device):
    latest = torch.tensor([[9 * V + 1, 2 * V + 1, -1, -1, -1]])
    with running(OP, backend, device):
        found, _ = added(device, latest, torch.tensor([4]), *[torch.tensor([[0, 1, 2]])] * 2)
    assert found.tolist() == [[9 * V + 1, 5 * V + 1, 6 * V + 2, -1, -1]]


def arguments(**change):
    made = {
        "latest": torch.full((2, V), -1),
        "stamps": torch.tensor([3, 4]),
        "window": torch.tensor([[1, 2, 1], [0, 0, 0]]),
        "predictions": torch.tensor([[2, 3, 4], [4, 3, 2]]),
    }
    return made | change


ZEROS = torch.zeros((2, 4), dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": ZEROS[0]}, ValueError, r"window must be \[B, n\], n >= 1, not \[4\]"),
        ({"window": ZEROS[:, :0]}, ValueError, r"n >= 1, not \[2, 0\]"),
        ({"latest": ZEROS[:1]}, ValueError, r"latest must be \[2, V\], V >= 1, not \[1, 4\]"),
        ({"latest": ZEROS[:, :0]}, ValueError, r"latest must be \[2, V\], V >= 1"),
        ({"stamps": ZEROS}, ValueError, r"stamps must be \[2\], one entry per row of window"),
        ({"predictions": ZEROS}, ValueError, r"predictions must be \[2, 3\].*not \[2, 4\]"),
        ({"latest": ZEROS.float()}, TypeError, "latest must be int64, not float32"),
        ({"stamps": ZEROS[0, :2].int()}, TypeError, "stamps must be int64, not int32"),
        ({"stamps": ZEROS[:, 0]}, ValueError, r"contiguous; pass stamps.contiguous\(\)"),
        ({"latest": ZEROS.to("meta")}, ValueError, "latest is on meta but window is on cpu"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cllm_kernels.guess_pool_add(**arguments(**change))


def test_as_torch_sees_it():
    state = arguments()
    torch.library.opcheck(torch.ops.cllm_kernels.guess_pool_add.default, tuple(state.values()))
    latest, stamps = added("cpu", *state.values())

    def call(*tensors):
        cllm_kernels.guess_pool_add(*tensors)
        return tensors[0] + 0

    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*state.values()), latest)
    assert torch.equal(state["latest"], latest) and torch.equal(state["stamps"], stamps)
