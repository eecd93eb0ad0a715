from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_kernels
from cllm_kernels.guess_window import OP
from tests.kernels.backends import everywhere, running, slow_interpreter

V = 7


def guessed(device, window, *rest, **options):
    """Runs the op on a copy of the window, and gives it back on the CPU."""
    window = window.clone().to(device)
    rest = [None if tensor is None else tensor.to(device) for tensor in rest]
    assert cllm_kernels.guess_window(window, *rest, **options) is None
    return window.cpu()


def table(*rows):
    """latest [B, V] of {token: latest token behind it}, entries of different stamps."""
    made = torch.full((len(rows), V), -1)
    for number, known in enumerate(rows):
        for stamp, (token, following) in enumerate(known.items()):
            made[number, token] = stamp * V + following
    return made


def definition(window, known, text, longest, least):
    """What a row's window becomes, written out in lists."""
    for length in range(longest, 0, -1) if text else ():
        if length < least or length > len(text):
            continue
        for place in range(len(text) - length - 1, -1, -1):
            if text[place : place + length] == text[-length:]:
                since = text[place + length :]
                return window[:1] + [since[i % len(since)] for i in range(len(window) - 1)]
    made = window[:1]
    for own in window[1:]:
        made.append(known.get(made[-1], own))
    return made


@everywhere(OP)
@settings(max_examples=80)
@given(data=st.data())
def test_every_row_is_as_written_out(backend, device, data):
    """Texts that repeat themselves, in left-padded columns with room behind them."""
    token = st.integers(0, data.draw(st.integers(0, V - 1)))
    texts = data.draw(st.lists(st.lists(token, min_size=1, max_size=20), max_size=4))
    n = data.draw(st.integers(1, 9))
    pooled, searched = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    longest = data.draw(st.integers(1, 3 if slow_interpreter(backend, device) else 6))
    least = data.draw(st.integers(1, 4))
    room, more = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
    width = max(map(len, texts), default=1)
    # what stands around a text is made of its tokens too
    rows = [[text[0]] * (width - len(text)) + text + [text[-1]] * (room + more) for text in texts]
    draw_row = st.lists(token, min_size=n, max_size=n)
    windows = [data.draw(draw_row) for _ in texts]
    known = [data.draw(st.dictionaries(token, token)) for _ in texts]
    arguments = [torch.tensor(windows, dtype=torch.int64).view(-1, n)]
    arguments.append(table(*known) if pooled else None)
    if searched:
        arguments.append(torch.tensor(rows, dtype=torch.int64).view(-1, width + room + more))
        arguments.append(torch.full((len(texts),), width))
        arguments.append(torch.tensor([width - len(t) for t in texts], dtype=torch.int64))
    end = data.draw(st.sampled_from([None, width + room]))
    with running(OP, backend, device):
        found = guessed(device, *arguments, longest=longest, least=least, end=end)
    wanted = [
        definition(window, pairs if pooled else {}, text if searched else [], longest, least)
        for window, pairs, text in zip(windows, known, texts, strict=True)
    ]
    assert found.tolist() == wanted


@everywhere(OP)
def test_the_text_is_searched_before_the_pool_is_asked(backend, device):
    text = torch.tensor([[0, 5, 6, 1, 2, 1, 2, 9, 9], [0, 3, 4, 5, 2, 1, 6, 9, 9]])
    window = torch.tensor([[2, 0, 0, 0, 0], [6, 4, 4, 4, 4]])
    latest = table({2: 3, 3: 4}, {6: 0, 0: 5, 4: 1})
    generated, starts = torch.tensor([7, 7]), torch.tensor([1, 1])
    rest = (text, generated, starts)
    with running(OP, backend, device):
        # "1 2" goes on with itself; row 1 ends as never before: 6 -> 0 -> 5, then its own 4, 1
        both = guessed(device, window, latest, *rest, longest=3, least=2)
        assert both.tolist() == [[2, 1, 2, 1, 2], [6, 0, 5, 4, 1]]
        # two tokens are not three
        other = guessed(device, window, latest, *rest, longest=3, least=3)
        assert other.tolist() == [[2, 3, 4, 0, 0], [6, 0, 5, 4, 1]]
        alone = guessed(device, window, None, *rest)
        assert alone.tolist() == [[2, 1, 2, 1, 2], [6, 4, 4, 4, 4]]
        pool = guessed(device, window, latest)
        assert pool.tolist() == [[2, 3, 4, 0, 0], [6, 0, 5, 4, 1]]


@everywhere(OP)
def test_long_texts(backend, device):
    """Of the places that a text's end stands at, near its beginning and in every part of it."""
    width, longest = 2600, 4
    plain = torch.arange(10, 10 + width)
    text = plain.repeat(6, 1)
    places = [0, 3, 1021, 1024, 1027, 2400]
    for row, place in enumerate(places):
        text[row, place : place + 4] = text[row, -4:]
    text[5, 40:44] = text[5, -4:]  # an earlier one as long is not taken
    text[5, 2500:2503] = text[5, -3:]  # nor a later one that is shorter
    generated, starts = torch.full((6,), width), torch.tensor([0, 1, 0, 5, 9, 0])
    window = text[:, -1:].repeat(1, 3)
    with running(OP, backend, device):
        found = guessed(device, window, None, text, generated, starts, longest=longest)
    wanted = [[row[-1], *row[p + 4 : p + 6]] for row, p in zip(text.tolist(), places, strict=True)]
    assert found.tolist() == wanted


@everywhere(OP)
def test_rows_out_of_bounds_read_nothing_beyond_them(backend, device):
    """A state that no caller has: text that ends outside of its columns, tokens without a place in
    the table. Guesses may be any tokens of the row then, and every backend's are the same."""
    text = torch.tensor([[1, 2, 1, 2]] * 6)
    generated = torch.tensor([0, -3, 9, 4, 4, 1])
    starts = torch.tensor([0, 0, 0, -2, 7, 0])
    window = torch.tensor([[V, 1, 2], [-1, 1, 2], [2, 3, 3], [2, 3, 3], [2, 3, 3], [1, 5, 5]])
    latest = table(*[{1: 6}] * 6)
    wanted = [[V, 1, 6], [-1, 1, 6], [2, 1, 2], [2, 1, 2], [2, 3, 3], [1, 6, 5]]
    with running(OP, backend, device):
        assert guessed(device, window, latest, text, generated, starts).tolist() == wanted
        # the text ends where the columns do that are looked at
        found = guessed(device, window[2:3], None, text[:1], generated[2:3], starts[:1], end=3)
        assert found.tolist() == [[2, 2, 1]]


@everywhere(OP)
def test_no_rows_and_windows_of_one(backend, device):
    rows = torch.zeros((0, 4), dtype=torch.int64)
    column = torch.zeros(0, dtype=torch.int64)
    with running(OP, backend, device):
        assert guessed(device, rows, rows, rows, column, column).shape == (0, 4)
        window, text = torch.tensor([[1], [2]]), torch.tensor([[1, 1], [2, 2]])
        pool, places = table({1: 2}, {2: 1}), (torch.tensor([2, 2]), torch.tensor([0, 0]))
        assert torch.equal(guessed(device, window, pool), window)
        assert torch.equal(guessed(device, window, pool, text, *places), window)


def arguments(**change):
    made = {
        "window": torch.tensor([[1, 5, 5], [2, 5, 5]]),
        "latest": table({1: 3}, {2: 4}),
        "sequences": torch.tensor([[0, 1, 3, 1], [1, 2, 1, 2]]),
        "generated": torch.tensor([4, 4]),
        "starts": torch.tensor([1, 0]),
    }
    return made | change


ZEROS = torch.zeros((2, 4), dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": ZEROS[0]}, ValueError, r"window must be \[B, n\], n >= 1, not \[4\]"),
        ({"window": ZEROS[:, :0]}, ValueError, r"n >= 1, not \[2, 0\]"),
        ({"window": ZEROS.int()}, TypeError, "window must be int64, not int32"),
        ({"window": ZEROS[:, ::2]}, ValueError, r"contiguous; pass window.contiguous\(\)"),
        ({"latest": ZEROS[:1]}, ValueError, r"latest must be \[2, V\], V >= 1, not \[1, 4\]"),
        ({"latest": ZEROS[:, :0]}, ValueError, r"latest must be \[2, V\], V >= 1"),
        ({"latest": ZEROS.float()}, TypeError, "latest must be int64, not float32"),
        ({"latest": ZEROS.to("meta")}, ValueError, "latest is on meta but window is on cpu"),
        ({"sequences": ZEROS[:, :0]}, ValueError, r"sequences must be \[2, L\], L >= 1"),
        ({"generated": ZEROS}, ValueError, r"generated must be \[2\], one entry per row"),
        ({"generated": None}, ValueError, "sequences needs generated"),
        ({"starts": None}, ValueError, "sequences needs starts"),
        ({"starts": ZEROS[0, :3]}, ValueError, r"starts must be \[2\].*not \[3\]"),
        ({"starts": ZEROS[:, 0]}, ValueError, r"pass starts.contiguous\(\)"),
        ({"sequences": None, "latest": None}, ValueError, "nothing to guess from"),
        ({"longest": 0}, ValueError, "longest must be at least 1, not 0"),
        ({"least": 0}, ValueError, "least must be at least 1, not 0"),
        ({"end": 0}, ValueError, "end must be from 1 to L = 4, not 0"),
        ({"end": 5}, ValueError, "end must be from 1 to L = 4, not 5"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cllm_kernels.guess_window(**arguments(**change))


@pytest.mark.parametrize("left_out", [(), ("latest",), ("sequences", "generated", "starts")])
def test_as_torch_sees_it(left_out):
    state = arguments(**dict.fromkeys(left_out))
    op = torch.ops.cllm_kernels.guess_window.default
    torch.library.opcheck(op, (*state.values(), 3, 1, 4))

    def call(window, *rest):
        cllm_kernels.guess_window(window, *rest)
        return window + 0

    wanted = call(state["window"].clone(), *list(state.values())[1:])
    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*state.values()), wanted)
    assert torch.equal(state["window"], wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("backend", ["triton"])
def test_a_cuda_graph_replays_it(backend):
    """What is read at a replay is what the tensors hold then, the length of the text as well."""
    with running(OP, backend, "cuda"):
        moved = {name: tensor.cuda() for name, tensor in arguments().items()}
        cllm_kernels.guess_window(**moved)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cllm_kernels.guess_window(**moved)
        for generated in (4, 2, 3):
            state = arguments(generated=torch.tensor([generated] * 2))
            for name, tensor in state.items():
                moved[name].copy_(tensor)
            graph.replay()
            with cllm_kernels.use_backend("auto"):
                wanted = guessed("cpu", *state.values())
            assert torch.equal(moved["window"].cpu(), wanted)
