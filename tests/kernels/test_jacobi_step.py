from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_kernels
from cllm_kernels.jacobi_step import OP, reference
from tests.kernels.backends import everywhere, running, slow_interpreter

NAMES = (
    *("window", "predictions", "output", "lengths", "generated", "progress", "done"),
    *("limits", "stop_ids", "fill"),
)
EMPTY = -9  # what output holds where nothing was committed


def make(window, predictions, *, limits=30, capacity=30, stop_ids=(), fill=False, **state):
    """A state of len(window) rows; keyword values may be one number for all rows or a list."""
    rows, n = len(window), len(window[0])

    def column(value):
        return torch.tensor(value if isinstance(value, list) else [value] * rows)

    guesses = torch.arange(1000, 1000 + capacity + n).repeat(rows, 1)
    return {
        "window": torch.tensor(window),
        "predictions": torch.tensor(predictions),
        "output": torch.full((rows, capacity), EMPTY),
        "lengths": column(state.get("lengths", 100)),
        "generated": column(state.get("generated", 0)),
        "progress": column(state.get("progress", 0)),
        "done": column(state.get("done", False)),
        "limits": column(limits),
        "stop_ids": torch.tensor(stop_ids, dtype=torch.int64),
        "fill": guesses if fill else None,
    }


def step(state, device="cpu", **options):
    """Runs the op on a copy: the state after it, and what it accepted, on the CPU."""
    moved = {k: None if v is None else v.clone().to(device) for k, v in state.items()}
    accepted = cllm_kernels.jacobi_step(*(moved[name] for name in NAMES), **options)
    return {k: None if v is None else v.cpu() for k, v in moved.items()}, accepted.cpu().tolist()


@everywhere(OP)
def test_leftover_predictions_then_fill(backend, device):
    state = make([[1, 2, 3, 4]], [[2, 3, 9, 8]], fill=True, generated=5)
    with running(OP, backend, device):
        after, accepted = step(state, device)
    assert accepted == [3]  # p[0], p[1], p[2]: w[3] = 4 is not p[2] = 9
    assert after["output"][0, 5:9].tolist() == [2, 3, 9, EMPTY]
    assert after["window"].tolist() == [[9, 8, 1009, 1010]]  # positions 9 and 10 of the output
    assert (after["lengths"].item(), after["generated"].item()) == (103, 8)
    assert after["progress"].item() == 0 and not after["done"].item()


@everywhere(OP)
def test_without_fill_the_last_prediction_is_repeated(backend, device):
    with running(OP, backend, device):
        after, accepted = step(make([[1, 2, 3, 4]], [[2, 9, 7, 8]]), device)
    assert accepted == [2]
    assert after["window"].tolist() == [[9, 7, 8, 8]]


@everywhere(OP)
@pytest.mark.parametrize("mode", ["sliding", "block"])
def test_all_and_none_accepted(backend, device, mode):
    state = make([[1, 2, 3], [1, 2, 3]], [[2, 3, 4], [5, 3, 4]])
    with running(OP, backend, device):
        after, accepted = step(state, device, mode=mode)
    assert accepted == [3, 1]
    assert after["output"][:, :4].tolist() == [[2, 3, 4, EMPTY], [5, EMPTY, EMPTY, EMPTY]]
    if mode == "sliding":
        assert after["window"].tolist() == [[4, 4, 4], [5, 3, 4]]
        assert after["lengths"].tolist() == [103, 101]
    else:
        assert after["window"].tolist() == [[4, 4, 4], [1, 5, 3]]
        assert after["lengths"].tolist() == [103, 100]  # the second block is still being iterated
        assert after["progress"].tolist() == [0, 1]


@everywhere(OP)
@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("accept", ["all", "one"])
def test_a_window_of_one_is_ordinary_decoding(backend, device, mode, accept):
    with running(OP, backend, device):
        after, accepted = step(make([[1], [4]], [[2], [4]]), device, mode=mode, accept=accept)
    assert accepted == [1, 1]
    assert after["window"].tolist() == [[2], [4]] and after["lengths"].tolist() == [101, 101]
    assert after["progress"].tolist() == [0, 0]


@everywhere(OP)
@pytest.mark.parametrize("mode", ["sliding", "block"])
def test_a_row_that_is_done_stays_as_it_is(backend, device, mode):
    state = make([[1, 2], [1, 2]], [[2, 3], [2, 3]], done=[True, False], generated=4)
    with running(OP, backend, device):
        after, accepted = step(state, device, mode=mode)
    assert accepted == [0, 2]
    for name in ("window", "output", "lengths", "generated", "progress", "done"):
        assert torch.equal(after[name][0], state[name][0]), name


@everywhere(OP)
def test_a_stop_in_the_middle_ends_the_row_there(backend, device):
    state = make([[1, 2, 3, 4]] * 2, [[2, 3, 4, 5]] * 2, stop_ids=(99, 3), generated=[0, 7])
    state["predictions"][1, 1] = 50  # row 1 accepts 2 tokens, neither of them a stop
    with running(OP, backend, device):
        after, accepted = step(state, device)
    assert accepted == [2, 2]
    assert after["done"].tolist() == [True, False]
    assert after["output"][0, :3].tolist() == [2, 3, EMPTY]
    assert after["window"][0].tolist() == [3, 2, 3, 4]  # last committed token; guesses untouched
    assert after["lengths"].tolist() == [102, 102]


@everywhere(OP)
def test_a_stop_beyond_the_accepted_run_is_no_stop(backend, device):
    with running(OP, backend, device):
        after, accepted = step(make([[1, 7, 3]], [[2, 3, 4]], stop_ids=(3, 4)), device)
    assert accepted == [1] and not after["done"].item()


@everywhere(OP)
@pytest.mark.parametrize(("limit", "count"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_the_limit_cuts_the_run(backend, device, limit, count):
    state = make([[1, 2, 3]], [[2, 3, 4]], limits=10 + limit, generated=10)
    with running(OP, backend, device):
        after, accepted = step(state, device)
    assert accepted == [count]
    assert after["done"].item() == (limit <= 3)
    assert after["lengths"].item() == 100 + count


@everywhere(OP)
def test_no_room_ends_the_row_before_it_commits(backend, device):
    state = make([[1, 2], [1, 2]], [[2, 3], [2, 3]], limits=[5, 0], generated=[5, 2])
    with running(OP, backend, device):
        after, accepted = step(state, device)
    assert accepted == [0, 0] and after["done"].tolist() == [True, True]
    for name in ("window", "output", "lengths", "generated", "progress"):
        assert torch.equal(after[name], state[name]), name


@everywhere(OP)
def test_accept_one_keeps_the_rest_as_guesses(backend, device):
    with running(OP, backend, device):
        after, accepted = step(make([[1, 2, 3]], [[2, 3, 4]]), device, accept="one")
        assert accepted == [1] and after["window"].tolist() == [[2, 3, 4]]
        block, accepted = step(make([[1, 2, 3]], [[2, 3, 4]]), device, mode="block", accept="one")
    assert accepted == [1] and block["window"].tolist() == [[1, 2, 3]]
    assert block["progress"].item() == 1 and block["lengths"].item() == 100


@everywhere(OP)
def test_a_block_is_iterated_to_its_fixed_point(backend, device):
    """Three iterations of one block, then the next begins; lengths move only at the end."""
    state = make([[1, 20, 30, 40]], [[2, 31, 41, 51]], fill=True)
    with running(OP, backend, device):
        state, accepted = step(state, device, mode="block")
        assert accepted == [1] and state["window"].tolist() == [[1, 2, 31, 41]]
        assert (state["progress"].item(), state["lengths"].item()) == (1, 100)

        state["predictions"] = torch.tensor([[2, 3, 41, 52]])
        state, accepted = step(state, device, mode="block")
        assert accepted == [1] and state["window"].tolist() == [[1, 2, 3, 41]]
        assert (state["progress"].item(), state["lengths"].item()) == (2, 100)

        state["predictions"] = torch.tensor([[2, 3, 41, 5]])
        state, accepted = step(state, device, mode="block")
        assert accepted == [2] and state["window"].tolist() == [[5, 1004, 1005, 1006]]
        assert (state["progress"].item(), state["lengths"].item()) == (0, 104)
        assert state["output"][0, :5].tolist() == [2, 3, 41, 5, EMPTY]


@everywhere(OP)
def test_a_stop_inside_a_block_counts_the_committed_part(backend, device):
    state = make([[1, 2, 3, 4]], [[2, 3, 4, 5]], progress=1, generated=1, stop_ids=(2, 4))
    with running(OP, backend, device):
        after, accepted = step(state, device, mode="block")
    assert accepted == [2]  # 3 and 4; the stop token 2 was committed before and is not looked at
    assert after["lengths"].item() == 103 and after["progress"].item() == 0
    assert after["window"].tolist() == [[4, 2, 3, 4]] and after["done"].item()


@everywhere(OP)
def test_no_rows_and_long_windows(backend, device):
    with running(OP, backend, device):
        empty = [torch.zeros((0, 4), dtype=torch.int64, device=device) for _ in range(3)]
        columns = [torch.zeros(0, dtype=torch.int64, device=device) for _ in range(3)]
        done = torch.zeros(0, dtype=torch.bool, device=device)
        assert cllm_kernels.jacobi_step(*empty, *columns, done, *columns[:2]).shape == (0,)
        n = 130  # longer than a warp, and no power of two
        row = list(range(n + 1))
        for mismatch in (1, 31, 32, 33, 64, 129):
            window = row[:n]
            window[mismatch] = -1
            state = make([window], [row[1:]], limits=400, capacity=400, fill=True)
            after, accepted = step(state, device)
            assert accepted == [mismatch]
            leftover = row[mismatch : n + 1]
            fresh = list(range(1000 + n, 1000 + mismatch - 1 + n))
            assert after["window"][0].tolist() == leftover + fresh


def random_state(draw):
    rows = draw(st.integers(0, 5))
    n = draw(st.integers(1, 19))
    capacity = draw(st.integers(0, 40))
    mode = draw(st.sampled_from(["sliding", "block"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    limits = integers(0, capacity + 1, rows)
    generated = (torch.rand(rows, generator=generator) * (limits + 1)).long().clamp(max=capacity)
    state = {
        "window": integers(0, 3, rows, n),
        "predictions": integers(0, 3, rows, n),
        "output": torch.full((rows, capacity), EMPTY),
        "lengths": integers(0, 100, rows),
        "generated": generated,
        "progress": integers(0, n, rows) if mode == "block" else torch.zeros_like(limits),
        "done": torch.rand(rows, generator=generator) < 0.2,
        "limits": limits,
        "stop_ids": integers(0, 40, draw(st.integers(0, 3))),
        "fill": integers(0, 3, rows, capacity + n) if draw(st.booleans()) else None,
    }
    return state, mode, generator


@everywhere(OP)
@settings(max_examples=60)
@given(data=st.data())
def test_many_steps_equal_the_reference(backend, device, data):
    """Every tensor of the state, after each of several steps, on random states."""
    state, mode, generator = random_state(data.draw)
    accept = data.draw(st.sampled_from(["all", "one"]))
    n = state["window"].shape[1]
    with running(OP, backend, device):
        for _ in range(2 if slow_interpreter(backend, device) else 5):
            wanted = {k: None if v is None else v.clone() for k, v in state.items()}
            wanted_accepted = reference.jacobi_step(
                *(wanted[name] for name in NAMES), mode=mode, accept=accept
            )
            state, accepted = step(state, device, mode=mode, accept=accept)
            assert accepted == wanted_accepted.tolist()
            for name, value in wanted.items():
                assert value is None or torch.equal(state[name], value), name
            # The next forward: mostly what the window holds, so that runs of every length occur.
            kept = torch.cat([state["window"][:, 1:], state["window"][:, :1]], dim=1)
            other = torch.randint(0, 3, kept.shape, generator=generator)
            change = torch.rand(kept.shape, generator=generator) < 1.5 / n
            state["predictions"] = torch.where(change, other, kept)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"mode": "slide"}, ValueError, "mode must be one of sliding, block, not 'slide'"),
        ({}, {"accept": "two"}, ValueError, "accept must be one of all, one, not 'two'"),
        ({"window": torch.zeros(2, dtype=torch.int64)}, {}, ValueError, r"window must be \[B, n\]"),
        ({"window": torch.zeros((2, 0), dtype=torch.int64)}, {}, ValueError, "n >= 1"),
        ({"predictions": torch.zeros((2, 2), dtype=torch.int64)}, {}, ValueError, "predictions"),
        ({"output": torch.zeros((3, 5), dtype=torch.int64)}, {}, ValueError, r"output must be \[2"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, {}, ValueError, r"lengths must be \[2\]"),
        (
            {"done": torch.zeros(2, dtype=torch.int64)},
            {},
            TypeError,
            "done must be bool, not int64",
        ),
        ({"limits": torch.zeros(2)}, {}, TypeError, "limits must be int64, not float32"),
        ({"stop_ids": torch.tensor(1)}, {}, ValueError, r"stop_ids must be \[S\], not \[\]"),
        (
            {"fill": torch.zeros((2, 2), dtype=torch.int64)},
            {},
            ValueError,
            "fill must have at least",
        ),
        (
            {"output": torch.zeros((5, 2), dtype=torch.int64).t()},
            {},
            ValueError,
            r"output must be contiguous; pass output.contiguous\(\)",
        ),
        (
            {"limits": torch.zeros(2, dtype=torch.int64, device="meta")},
            {},
            ValueError,
            "limits is on meta but window is on cpu",
        ),
    ],
)
def test_bad_arguments_are_named(change, options, error, message):
    state = make([[1, 2, 3]] * 2, [[2, 3, 4]] * 2) | change
    with pytest.raises(error, match=message):
        cllm_kernels.jacobi_step(*(state[name] for name in NAMES), **options)


@pytest.mark.parametrize(
    "change", [{"progress": 3}, {"progress": -1}, {"generated": 31}, {"limits": 31}]
)
def test_a_state_out_of_bounds_is_refused_unchanged(change):
    state = make([[1, 2, 3]] * 2, [[2, 3, 4]] * 2)
    for name, value in change.items():
        state[name][1] = value
    with running(OP, "cpp", "cpu"):
        before = {k: None if v is None else v.clone() for k, v in state.items()}
        with pytest.raises(ValueError, match="row 1 is out of bounds"):
            cllm_kernels.jacobi_step(*(state[name] for name in NAMES))
    for name in NAMES:
        assert state[name] is None or torch.equal(state[name], before[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_cuda_graph_replays_the_step(backend):
    state = make([[1, 2, 3, 4]], [[2, 3, 9, 8]], fill=True)
    wanted, first = step(state)
    _, second = step(wanted)
    with running(OP, backend, "cuda"):
        moved = {k: v.cuda() for k, v in state.items()}
        step(state, "cuda")  # compiles what needs compiling, outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            accepted = cllm_kernels.jacobi_step(*(moved[name] for name in NAMES))
        assert moved["generated"].item() == 0  # captured, not run
        graph.replay()
        assert accepted.tolist() == first
        assert torch.equal(moved["window"].cpu(), wanted["window"])
        graph.replay()
        assert accepted.tolist() == second
