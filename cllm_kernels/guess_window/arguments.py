"""The arguments that guess_window and guess_candidates share, checked."""

from __future__ import annotations

from torch import Tensor

from cllm_kernels._common import check_int64, shape_text


def check_sources(
    op: str,
    window: Tensor,
    latest: Tensor | None,
    sequences: Tensor | None,
    generated: Tensor | None,
    starts: Tensor | None,
    longest: int,
    least: int,
    end: int | None,
    odds: Tensor | None,
    proposed: Tensor | None,
    since: Tensor | None,
) -> tuple[list[Tensor], int]:
    """All tensors that are given, and how many columns of sequences are looked at; arguments as
    `cllm_kernels.guess_window` has them.

    Raises:
        ValueError, TypeError: as there, in the name of `op`.
    """
    if window.dim() != 2 or window.shape[1] < 1:
        raise ValueError(f"{op}: window must be [B, n], n >= 1, not {shape_text(window)}")
    _check(op, "window", window, window, 2)
    tensors = [window]
    if latest is not None:
        _check(op, "latest", latest, window, 2)
        tensors.append(latest)
    if sequences is not None:
        if generated is None or starts is None:
            missing = "generated" if generated is None else "starts"
            raise ValueError(f"{op}: sequences needs {missing}, [B] int64; pass it too")
        _check(op, "sequences", sequences, window, 2)
        _check(op, "generated", generated, window, 1)
        _check(op, "starts", starts, window, 1)
        tensors += (sequences, generated, starts)
        columns = sequences.shape[1]
        end = columns if end is None else end
        if not 1 <= end <= columns:
            raise ValueError(f"{op}: end must be from 1 to L = {columns}, not {end}")
        fewest = 1 if odds is None else 0
        for name, value, lowest in (("longest", longest, fewest), ("least", least, 1)):
            if value < lowest:
                raise ValueError(f"{op}: {name} must be at least {lowest}, not {value}")
    elif latest is None:
        raise ValueError(f"{op}: nothing to guess from; pass latest, sequences or both")
    if odds is not None:
        tensors += _check_odds(op, window, sequences, longest, odds, proposed, since)
    elif proposed is not None or since is not None:
        name = "since" if proposed is None else "proposed"
        raise ValueError(f"{op}: {name} is kept with odds, which is None; pass it too")
    return tensors, end or 0


def kept_together(op: str, odds: object, proposed: object, since: object) -> None:
    """ValueError where some of the three are given and others are None."""
    if len({kept is None for kept in (odds, proposed, since)}) > 1:
        raise ValueError(f"{op}: odds, proposed and since go together; pass all or none")


def _check_odds(
    op: str,
    window: Tensor,
    sequences: Tensor | None,
    longest: int,
    odds: Tensor,
    proposed: Tensor | None,
    since: Tensor | None,
) -> tuple[Tensor, ...]:
    rows, n = window.shape
    if sequences is None:
        raise ValueError(f"{op}: odds needs sequences, which tell what was right; pass it too")
    if proposed is None or since is None:
        missing = f"proposed, [{rows}, 3, {n}]" if proposed is None else f"since, [{rows}]"
        raise ValueError(f"{op}: odds needs {missing} int64; pass it too")
    named = {"odds": odds, "proposed": proposed, "since": since}
    wanted = {"odds": (rows, 2 + longest, 2), "proposed": (rows, 3, n), "since": (rows,)}
    for name, tensor in named.items():
        if tensor.shape != wanted[name]:
            raise ValueError(f"{op}: {name} must be {list(wanted[name])}, not {shape_text(tensor)}")
    check_int64(op, ("window", window), **named)
    return odds, proposed, since


def _check(op: str, name: str, tensor: Tensor, window: Tensor, dims: int) -> None:
    shape = tensor.shape
    rows = window.shape[0]
    if len(shape) != dims or shape[0] != rows or (dims == 2 and shape[1] < 1):
        of_rows = f"[{rows}], one entry per row of window"
        wanted = {"latest": f"[{rows}, V], V >= 1", "sequences": f"[{rows}, L], L >= 1"}
        raise ValueError(
            f"{op}: {name} must be {wanted.get(name, of_rows)}, not {shape_text(tensor)}"
        )
    check_int64(op, ("window", window), **{name: tensor})
