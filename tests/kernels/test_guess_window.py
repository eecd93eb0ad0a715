from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_kernels
from cllm_kernels.guess_window import OP
from cllm_kernels.guess_window.reference import GUESS
from tests.kernels.backends import everywhere, running, slow_interpreter
from tests.kernels.guesses import V, Weighed, definition, table


def guessed(device, window, *rest, **options):
    """Runs the op on a copy of the window, and gives it back on the CPU."""
    window = window.clone().to(device)
    rest = [None if tensor is None else tensor.to(device) for tensor in rest]
    assert cllm_kernels.guess_window(window, *rest, **options) is None
    return window.cpu()


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
@settings(max_examples=60)
@given(data=st.data())
def test_sources_are_weighed_as_written_out(backend, device, data):
    """Rows that grow call by call, some by nothing: what is taken, and all that is kept."""
    token = st.integers(0, data.draw(st.integers(0, V - 1)))
    most_calls = 2 if slow_interpreter(backend, device) else 4
    rows, calls = data.draw(st.integers(0, 3)), data.draw(st.integers(1, most_calls))
    n = data.draw(st.integers(2, 6))
    pooled = data.draw(st.booleans())
    longest = data.draw(st.integers(0, 3))
    least = data.draw(st.integers(1, 3))
    texts = [data.draw(st.lists(token, min_size=1, max_size=9)) for _ in range(rows)]
    most = max(map(len, texts), default=1)
    width = most + calls * n
    all_columns = data.draw(st.booleans())  # or those up to where the longest row ends
    sequences = torch.full((rows, width), 0)
    starts = torch.tensor([most - len(text) for text in texts], dtype=torch.int64)
    for row, text in enumerate(texts):
        sequences[row, most - len(text) : most] = torch.tensor(text)
    count = st.integers(0, 40).map(lambda times: times * GUESS // 2)
    # a kind that never was wrong yet, and one that nothing is known of
    draw_odds = st.lists(st.tuples(count, count), min_size=2 + longest, max_size=2 + longest)
    written = [Weighed(longest, least, data.draw(draw_odds)) for _ in range(rows)]
    odds = torch.tensor([row.odds for row in written], dtype=torch.int64)
    odds = odds.view(rows, 2 + longest, 2).to(device)
    proposed = torch.full((rows, 3, n), -1, device=device)
    since = torch.full((rows,), -1, device=device)
    with running(OP, backend, device):
        for _ in range(calls):
            windows = [
                [text[-1], *data.draw(st.lists(token, min_size=n - 1, max_size=n - 1))]
                for text in texts
            ]
            known = [data.draw(st.dictionaries(token, token)) for _ in texts]
            generated = starts + torch.tensor([len(text) for text in texts], dtype=torch.int64)
            found = guessed(
                device,
                torch.tensor(windows, dtype=torch.int64).view(-1, n),
                table(*known) if pooled else None,
                *(sequences, generated, starts),
                longest=longest,
                least=least,
                end=None if all_columns else int(generated.max()) if rows else 1,
                odds=odds,
                proposed=proposed,
                since=since,
            )
            taken = [
                row.take(window, pairs if pooled else None, text)
                for row, window, pairs, text in zip(written, windows, known, texts, strict=True)
            ]
            assert found.tolist() == taken
            assert odds.tolist() == [row.odds for row in written]
            assert since.tolist() == generated.tolist()
            assert proposed.tolist() == [
                [[kind, *guesses] for kind, guesses in row.proposed] for row in written
            ]
            for row, text in enumerate(texts):
                # often what was guessed, so that something is right
                likely = data.draw(st.sampled_from(written[row].proposed))[1]
                more = data.draw(
                    st.one_of(
                        st.just(likely[: data.draw(st.integers(0, n - 1))]),
                        st.lists(token, max_size=n),
                    )
                )
                end = starts[row] + len(text)
                sequences[row, end : end + len(more)] = torch.tensor(more, dtype=torch.int64)
                text += more


@everywhere(OP)
def test_a_source_that_is_wrong_gives_way_to_one_that_is_right(backend, device):
    """A text of which the window always knows what comes, and pool and text never."""
    # an end of one token comes again and again, with another token behind it each time
    text = [token for number in range(8, 48) for token in (7, number)]
    sequences = torch.tensor([text])
    starts, n = torch.zeros(1, dtype=torch.int64), 4
    odds = torch.tensor([[[1, 4], [2, 4], [3, 4]]]) * GUESS
    state = {
        "odds": odds.to(device),
        "proposed": torch.full((1, 3, n), -1, device=device),
        "since": torch.full((1,), -1, device=device),
    }
    latest = torch.zeros((1, 64), dtype=torch.int64)  # 0 behind every token
    taken = []
    with running(OP, backend, device):
        for generated in range(7, 67, 2):
            window = torch.tensor([text[generated - 1 : generated - 1 + n]])
            rest = (sequences, torch.tensor([generated]), starts)
            found = guessed(device, window, latest, *rest, longest=1, **state)
            taken.append(torch.equal(found, window))
    assert not taken[0] and all(taken[-10:])
    (own, pool, looked_up) = state["odds"][0].tolist()
    assert own[0] > 3 * own[1]
    assert pool[0] < pool[1] / 8 and looked_up[0] < looked_up[1] / 8


@everywhere(OP)
def test_odds_that_nobody_has_write_nothing_elsewhere(backend, device):
    """A state that no op has left: kinds and places without a row in the counts."""
    text = torch.tensor([[1, 2, 1, 2]] * 4)
    generated = torch.tensor([4, 4, 4, 9])
    starts = torch.zeros(4, dtype=torch.int64)
    window = torch.tensor([[2, 3, 3]] * 4)
    odds = torch.full((4, 3, 2), GUESS)
    proposed = torch.tensor([[[99, 1, 2], [-7, 1, 2], [3, 1, 2]]] * 4)
    since = torch.tensor([2, 2, 7, -9])
    moved = [tensor.to(device) for tensor in (odds, proposed, since)]
    with running(OP, backend, device):
        state = dict(zip(("odds", "proposed", "since"), moved, strict=True))
        found = guessed(device, window, None, text, generated, starts, longest=1, **state)
    assert found.tolist() == [[2, 1, 2]] * 4
    assert torch.equal(moved[0].cpu(), odds)


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


def weighed(longest=3):
    return {
        "odds": torch.full((2, 2 + longest, 2), GUESS),
        "proposed": torch.tensor([[[0, 3, 1], [1, 3, 3], [2, 1, 1]]] * 2),
        "since": torch.tensor([2, 2]),
    }


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
        ({**weighed(), "longest": -1}, ValueError, "longest must be at least 0, not -1"),
        (
            {**weighed(), "sequences": None},
            ValueError,
            "odds needs sequences, which tell what was right; pass it too",
        ),
        ({"since": ZEROS[0, :2]}, ValueError, "since is kept with odds, which is None"),
        ({**weighed(), "since": None}, ValueError, r"odds needs since, \[2\] int64"),
        ({**weighed(), "proposed": None}, ValueError, r"odds needs proposed, \[2, 3, 3\] int64"),
        ({**weighed(), "longest": 2}, ValueError, r"odds must be \[2, 4, 2\], not \[2, 5, 2\]"),
        ({**weighed(), "since": ZEROS}, ValueError, r"since must be \[2\], not \[2, 4\]"),
        ({**weighed(), "odds": torch.ones(2, 5, 2)}, TypeError, "odds must be int64, not float32"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cllm_kernels.guess_window(**arguments(**change))


@pytest.mark.parametrize("left_out", [(), ("latest",), ("sequences", "generated", "starts")])
@pytest.mark.parametrize("kept", [False, True])
def test_as_torch_sees_it(left_out, kept):
    if kept and "sequences" in left_out:
        pytest.skip("what was right is in the text")
    state = list(arguments(**dict.fromkeys(left_out)).values())
    rest = list(weighed().values()) if kept else [None] * 3
    op = torch.ops.cllm_kernels.guess_window.default
    torch.library.opcheck(op, (*state, 3, 1, 4, *rest))

    def call(*given):
        names = ("odds", "proposed", "since")
        cllm_kernels.guess_window(*given[:5], **dict(zip(names, given[5:], strict=True)))
        return given[0] + 0

    def copied():
        return [None if one is None else one.clone() for one in (*state, *rest)]

    eager, compiled = copied(), copied()
    wanted = call(*eager)
    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*compiled), wanted)
    for one, other in zip(eager, compiled, strict=True):
        assert one is None or torch.equal(one, other)
    assert not kept or not torch.equal(eager[5], rest[0])


def test_compiled_for_windows_of_any_width():
    rest = [arguments()[name] for name in ("latest", "sequences", "generated", "starts")]

    def call(window):
        made = window.clone()
        cllm_kernels.guess_window(made, *rest)
        return made

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
    changed = ("window", *(weighed() if kept else ()))
    with running(OP, backend, "cuda"):
        moved = {name: tensor.cuda() for name, tensor in state.items()}
        cllm_kernels.guess_window(**moved)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cllm_kernels.guess_window(**moved)
        for name, tensor in state.items():
            moved[name].copy_(tensor)
        for generated in (4, 2, 3, 4):
            fresh = arguments(generated=torch.tensor([generated] * 2))
            for name, tensor in fresh.items():
                moved[name].copy_(tensor)
                state[name] = tensor
            graph.replay()
            with cllm_kernels.use_backend("auto"):
                cllm_kernels.guess_window(**state)
            for name in changed:
                assert torch.equal(moved[name].cpu(), state[name]), name
