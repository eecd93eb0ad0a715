from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_kernels
from cllm_kernels.guess_candidates import OP
from cllm_kernels.guess_window.reference import GUESS
from tests.kernels.backends import everywhere, running, slow_interpreter
from tests.kernels.guesses import V, Weighed, several, table


def found(device, window, count, *rest, **options):
    """The op's candidates on the CPU; it leaves the window as it is."""
    before = window.clone()
    moved = [None if tensor is None else tensor.to(device) for tensor in (window, *rest)]
    windows = cllm_kernels.guess_candidates(moved[0], count, *moved[1:], **options)
    assert torch.equal(moved[0].cpu(), before) and windows.is_contiguous()
    return windows.cpu()


@everywhere(OP)
@settings(max_examples=80)
@given(data=st.data())
def test_every_row_is_as_written_out(backend, device, data):
    """Texts that repeat themselves, in left-padded columns with room behind them."""
    token = st.integers(0, data.draw(st.integers(0, V - 1)))
    texts = data.draw(st.lists(st.lists(token, min_size=1, max_size=20), max_size=4))
    n, count = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 5))
    pooled, searched = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    longest = data.draw(st.integers(1, 2 if slow_interpreter(backend, device) else 5))
    least = data.draw(st.integers(1, 3))
    own_second = data.draw(st.booleans())
    room, more = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
    width = max(map(len, texts), default=1)
    # what stands around a text is made of its tokens too
    rows = [[text[0]] * (width - len(text)) + text + [text[-1]] * (room + more) for text in texts]
    draw_row = st.lists(token, min_size=n, max_size=n)
    windows = [data.draw(draw_row) for _ in texts]
    known = [data.draw(st.dictionaries(token, token)) for _ in texts]
    arguments = [torch.tensor(windows, dtype=torch.int64).view(-1, n), count]
    arguments.append(table(*known) if pooled else None)
    if searched:
        arguments.append(torch.tensor(rows, dtype=torch.int64).view(-1, width + room + more))
        arguments.append(torch.full((len(texts),), width))
        arguments.append(torch.tensor([width - len(t) for t in texts], dtype=torch.int64))
    options = dict(longest=longest, least=least, own_second=own_second)
    options["end"] = data.draw(st.sampled_from([None, width + room]))
    with running(OP, backend, device):
        made = found(device, *arguments, **options)
    assert made.tolist() == [
        several(
            window,
            pairs if pooled else None,
            text if searched else [],
            *(longest, least, count, own_second),
        )
        for window, pairs, text in zip(windows, known, texts, strict=True)
    ]


@everywhere(OP)
@settings(max_examples=60)
@given(data=st.data())
def test_sources_are_ranked_as_written_out(backend, device, data):
    """Rows that grow call by call: the candidates, and all that is kept of what was right."""
    token = st.integers(0, data.draw(st.integers(0, V - 1)))
    rows, calls = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    n, count = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    pooled, own_second = data.draw(st.booleans()), data.draw(st.booleans())
    longest = data.draw(st.integers(0, 2 if slow_interpreter(backend, device) else 3))
    least = data.draw(st.integers(1, 2))
    texts = [data.draw(st.lists(token, min_size=1, max_size=9)) for _ in range(rows)]
    most = max(map(len, texts), default=1)
    sequences = torch.zeros((rows, most + calls * n), dtype=torch.int64)
    starts = torch.tensor([most - len(text) for text in texts], dtype=torch.int64)
    for row, text in enumerate(texts):
        sequences[row, most - len(text) : most] = torch.tensor(text)
    amount = st.integers(0, 40).map(lambda times: times * GUESS // 2)
    draw_odds = st.lists(st.tuples(amount, amount), min_size=2 + longest, max_size=2 + longest)
    written = [Weighed(longest, least, data.draw(draw_odds)) for _ in range(rows)]
    odds = torch.tensor([row.odds for row in written], dtype=torch.int64)
    kept = {
        "odds": odds.view(rows, 2 + longest, 2).to(device),
        "proposed": torch.full((rows, 3, n), -1, device=device),
        "since": torch.full((rows,), -1, device=device),
    }
    options = dict(longest=longest, least=least, own_second=own_second, **kept)
    with running(OP, backend, device):
        for _ in range(calls):
            guesses = st.lists(token, min_size=n - 1, max_size=n - 1)
            windows = [[text[-1], *data.draw(guesses)] for text in texts]
            known = [data.draw(st.dictionaries(token, token)) for _ in texts]
            generated = starts + torch.tensor([len(text) for text in texts], dtype=torch.int64)
            made = found(
                device,
                torch.tensor(windows, dtype=torch.int64).view(-1, n),
                count,
                table(*known) if pooled else None,
                *(sequences, generated, starts),
                **options,
            )
            wanted = [
                several(
                    window,
                    pairs if pooled else None,
                    text,
                    *(longest, least, count, own_second, row),
                )
                for row, window, pairs, text in zip(written, windows, known, texts, strict=True)
            ]
            assert made.tolist() == wanted
            assert kept["odds"].tolist() == [row.odds for row in written]
            assert kept["since"].tolist() == generated.tolist()
            assert kept["proposed"].tolist() == [
                [[kind, *guesses] for kind, guesses in row.proposed] for row in written
            ]
            for row, text in enumerate(texts):
                likely = data.draw(st.sampled_from(wanted[row]))[1:]
                more = [*likely[: data.draw(st.integers(0, n - 1))], data.draw(token)]
                end = int(starts[row]) + len(text)
                sequences[row, end : end + len(more)] = torch.tensor(more)
                text += more


@everywhere(OP)
def test_the_first_is_what_guess_window_takes(backend, device):
    torch.manual_seed(3)
    rows, n, longest = 5, 4, 2
    text = torch.randint(0, V, (rows, 30))
    generated, starts = torch.tensor([30, 17, 9, 2, 1]), torch.tensor([0, 3, 8, 1, 0])
    window = torch.randint(0, V, (rows, n))
    latest = torch.randint(-1, 5 * V, (rows, V))
    for weighed in (False, True):
        kept = {}
        if weighed:
            kept = {
                "odds": torch.randint(1, 9, (rows, 2 + longest, 2)).to(device),
                "proposed": torch.full((rows, 3, n), -1, device=device),
                "since": torch.full((rows,), -1, device=device),
            }
        rest = [tensor.to(device) for tensor in (latest, text, generated, starts)]
        with running(OP, backend, device):
            one = window.clone().to(device)
            cllm_kernels.guess_window(one, *rest, longest=longest, **kept)
            for own_second in (False, True):
                options = dict(longest=longest, own_second=own_second, **kept)
                assert torch.equal(found(device, window, 3, *rest, **options)[:, 0], one.cpu())


@everywhere(OP)
def test_long_texts_go_on_in_several_ways(backend, device):
    """Occurrences in every part of the text, of which the longest come first."""
    width = 2600
    text = torch.arange(10, 10 + width)[None].clone()
    for place, length in ((0, 1), (3, 2), (1023, 3), (1024 + 40, 3), (2300, 1)):
        text[0, place : place + length] = text[0, -length:]
    generated, starts = torch.tensor([width]), torch.tensor([0])
    window = torch.tensor([[int(text[0, -1]), 1, 2]])
    with running(OP, backend, device):
        made = found(device, window, 6, None, text, generated, starts, longest=3, least=1)
    places = [1024 + 43, 1026, 5, 2301, 1]
    wanted = [text[0, p : p + 2].tolist() for p in places]
    assert made[0, :, 1:].tolist() == [*wanted, [1, 2]]


@everywhere(OP)
def test_rows_out_of_bounds_read_nothing_beyond_them(backend, device):
    """A state that no caller has: text that ends outside of its columns, tokens without a place in
    the table."""
    text = torch.tensor([[1, 2, 1, 2]] * 6)
    generated = torch.tensor([0, -3, 9, 4, 4, 1])
    starts = torch.tensor([0, 0, 0, -2, 7, 0])
    window = torch.tensor([[V, 1, 2], [-1, 1, 2], [2, 3, 3], [2, 3, 3], [2, 3, 3], [1, 5, 5]])
    latest = table(*[{1: 6}] * 6)
    wanted = [
        [[V, 1, 6], [V, 1, 2]],
        [[-1, 1, 6], [-1, 1, 2]],
        [[2, 1, 2], [2, 3, 3]],
        [[2, 1, 2], [2, 3, 3]],
        [[2, 3, 3], [2, 3, 3]],
        [[1, 6, 5], [1, 5, 5]],
    ]
    with running(OP, backend, device):
        assert found(device, window, 2, latest, text, generated, starts).tolist() == wanted


@everywhere(OP)
def test_no_rows_and_windows_of_one(backend, device):
    rows, column = torch.zeros((0, 4), dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    with running(OP, backend, device):
        assert found(device, rows, 3, rows, rows, column, column).shape == (0, 3, 4)
        window, pool = torch.tensor([[1], [2]]), table({1: 2}, {2: 1})
        assert found(device, window, 3, pool).tolist() == [[[1]] * 3, [[2]] * 3]


def arguments(**change):
    made = {
        "window": torch.tensor([[1, 5, 5], [2, 5, 5]]),
        "count": 2,
        "latest": table({1: 3}, {2: 4}),
        "sequences": torch.tensor([[0, 1, 3, 1], [1, 2, 1, 2]]),
        "generated": torch.tensor([4, 4]),
        "starts": torch.tensor([1, 0]),
    }
    return made | change


def weighed():
    return {
        "odds": torch.full((2, 5, 2), GUESS),
        "proposed": torch.tensor([[[0, 5, 5], [1, 3, 3], [2, 3, 1]]] * 2),
        "since": torch.tensor([2, 2]),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": 0}, ValueError, "guess_candidates: count must be from 1 to 32, not 0"),
        ({"window": torch.zeros(3).long()}, ValueError, "guess_candidates: window must be"),
        ({"latest": None, "sequences": None}, ValueError, "guess_candidates: nothing to guess"),
        ({"least": 0}, ValueError, "guess_candidates: least must be at least 1, not 0"),
        ({**weighed(), "since": None}, ValueError, r"guess_candidates: odds needs since, \[2\]"),
        ({"starts": torch.zeros(2)}, TypeError, "guess_candidates: starts must be int64"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cllm_kernels.guess_candidates(**arguments(**change))


@pytest.mark.parametrize("left_out", [(), ("latest",), ("sequences", "generated", "starts")])
@pytest.mark.parametrize("kept", [False, True])
def test_as_torch_sees_it(left_out, kept):
    if kept and "sequences" in left_out:
        pytest.skip("what was right is in the text")
    state = list(arguments(**dict.fromkeys(left_out)).values())
    rest = list(weighed().values()) if kept else [None] * 3
    op = torch.ops.cllm_kernels.guess_candidates.default
    torch.library.opcheck(op, (*state, 3, 1, 4, True, *rest))

    def call(*given):
        names = ("odds", "proposed", "since")
        kept = dict(zip(names, given[6:], strict=True))
        return cllm_kernels.guess_candidates(*given[:6], own_second=True, **kept)

    def copied():
        return [one.clone() if isinstance(one, torch.Tensor) else one for one in (*state, *rest)]

    eager, compiled = copied(), copied()
    wanted = call(*eager)
    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*compiled), wanted)
    for one, other in zip(eager, compiled, strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)


def test_compiled_for_windows_of_any_width():
    rest = [arguments()[name] for name in ("latest", "sequences", "generated", "starts")]

    def call(window):
        return cllm_kernels.guess_candidates(window, 3, *rest)

    whole = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 4, 7):
        window = torch.full((2, n), 2)
        assert torch.equal(whole(window), call(window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_cuda_graph_replays_it(backend, kept):
    """What is read at a replay is what the tensors hold then, the length of the text as well."""
    state = arguments() | (weighed() if kept else {})
    with running(OP, backend, "cuda"):
        moved = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        cllm_kernels.guess_candidates(**moved)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            windows = cllm_kernels.guess_candidates(**moved)
        for generated in (4, 2, 3, 4):
            state["generated"] = torch.tensor([generated] * 2)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    moved[name].copy_(value)
            graph.replay()
            with cllm_kernels.use_backend("auto"):
                wanted = cllm_kernels.guess_candidates(**state)
            assert torch.equal(windows.cpu(), wanted)
            for name in weighed() if kept else ():
                assert torch.equal(moved[name].cpu(), state[name]), name
