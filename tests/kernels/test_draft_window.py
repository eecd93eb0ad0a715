from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_kernels
from cllm_kernels.draft_window import OP
from tests.kernels.backends import everywhere, running


def definition(checked, guesses, accepted, generated, progress, fill):
    """A row's next window, written out."""
    n = len(guesses)
    if progress is not None:
        exact = n if progress == 0 else progress + 1
        return [checked[i] if i < exact else guesses[i - 1] for i in range(n)]
    made = [checked[0]]
    for i in range(1, n):
        behind = max(accepted - 1 + i, 0)
        if behind < n:
            made.append(guesses[behind])
        elif fill is None:
            made.append(guesses[-1])
        else:
            made.append(fill[min(max(generated - 1 + i, 0), len(fill) - 1)])
    return made


@everywhere(OP)
@settings(max_examples=100)
@given(data=st.data())
def test_every_row_is_as_written_out(backend, device, data):
    rows, n = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9))
    blocks, filled = data.draw(st.booleans()), data.draw(st.booleans())
    verify = n if blocks else data.draw(st.integers(1, n))
    columns = data.draw(st.integers(1, 12))

    def block(width, most=9):
        cells = st.lists(st.integers(0, most), min_size=rows * width, max_size=rows * width)
        return torch.tensor(data.draw(cells), dtype=torch.int64).view(rows, width)

    checked, guesses = block(verify), block(n)
    accepted, generated = block(1, n)[:, 0], block(1, columns)[:, 0]
    progress = block(1, n - 1)[:, 0] if blocks else None
    fill = block(columns) if filled else None
    arguments = (checked, guesses, accepted, generated, progress, fill)
    moved = [None if one is None else one.contiguous().to(device) for one in arguments]
    window = torch.full((rows, n), -1, device=device)
    with running(OP, backend, device):
        assert cllm_kernels.draft_window(window, *moved) is None
    lists = [[None] * rows if one is None else one.tolist() for one in arguments]
    assert window.tolist() == [definition(*row) for row in zip(*lists, strict=True)]


@everywhere(OP)
def test_a_state_that_no_caller_has_reads_nothing_beyond_it(backend, device):
    guesses, fill = torch.tensor([[1, 2, 3]] * 3), torch.tensor([[7, 8]] * 3)
    far = torch.tensor([-(2**40), 2**40, 0])
    arguments = [one.to(device) for one in (guesses + 3, guesses, far, far)]
    window = torch.zeros(3, 3, dtype=torch.int64, device=device)
    with running(OP, backend, device):
        cllm_kernels.draft_window(window, *arguments, fill=fill.to(device))
        assert window.tolist() == [[4, 1, 1], [4, 8, 8], [4, 1, 2]]
        cllm_kernels.draft_window(window, *arguments, progress=far.to(device))
        assert window.tolist() == [[4, 5, 6]] * 3


def arguments(**change):
    zeros = torch.zeros(2, 3, dtype=torch.int64)
    made = dict.fromkeys(("window", "checked", "guesses"), zeros)
    return made | dict.fromkeys(("accepted", "generated"), zeros[:, 0].clone()) | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": torch.zeros(3).long()}, ValueError, r"window must be \[B, n\]"),
        ({"checked": torch.zeros(2, 4).long()}, ValueError, r"checked must be \[2, v\], v 1 to 3"),
        (
            {"checked": torch.zeros(2, 2).long(), "progress": torch.zeros(2).long()},
            ValueError,
            r"checked must be \[2, 3\], not \[2, 2\]",
        ),
        ({"guesses": torch.zeros(2, 2).long()}, ValueError, r"guesses must be \[2, 3\]"),
        ({"accepted": torch.zeros(3).long()}, ValueError, r"accepted must be \[2\], one entry"),
        ({"fill": torch.zeros(2, 0).long()}, ValueError, r"fill must be \[2, F\], F >= 1"),
        ({"generated": torch.zeros(2)}, TypeError, "generated must be int64, not float32"),
        ({"guesses": torch.zeros(3, 2).long().T}, ValueError, "guesses must be contiguous"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cllm_kernels.draft_window(**arguments(**change))


@pytest.mark.parametrize("given_", [(), ("fill",), ("progress",)])
def test_as_torch_sees_it(given_):
    tokens = [torch.randint(0, 9, (2, 3)) for _ in range(4)]
    numbers = [torch.tensor([1, 2]), torch.tensor([4, 0])]
    progress = torch.tensor([2, 0]) if "progress" in given_ else None
    fill = tokens[3] if "fill" in given_ else None
    rest = (tokens[1], tokens[2], *numbers, progress, fill)
    torch.library.opcheck(torch.ops.cllm_kernels.draft_window.default, (tokens[0], *rest))

    def call(window):
        cllm_kernels.draft_window(window, *rest)
        return window + 0

    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(tokens[0].clone()), call(tokens[0].clone()))
