from __future__ import annotations

import pytest

from cllm.trajectory import Iteration, Trajectory

from .simulator import spoken

MATH = (
    "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\n"
    "She makes 9 * 2 = $18 every day at the farmer's market.\n\n#### 18"
)


@pytest.fixture
def sliding() -> Trajectory:
    """Five tokens (10 to 14) in three iterations of a window of four, worked out by hand.

    Iteration 1 knows 10; 11 is drafted right; 99 is wrong; 13 is right behind it, and stays.
    Iteration 2 knows 11 and 12 as well (a guess had been right); 13 is still right.
    Iteration 3 knows 13 and 14 and runs into the limit.
    """
    return Trajectory(
        prompt=[1, 2],
        tokens=[10, 11, 12, 13, 14],
        iterations=[
            Iteration(0, [2, 90, 91, 12], [10, 11, 99, 13], exact=1, accepted=1),
            Iteration(1, [10, 11, 99, 13], [11, 12, 13, 98], exact=2, accepted=2),
            Iteration(3, [12, 13, 98, 92], [13, 14, 97, 96], exact=2, accepted=2),
        ],
        block_size=4,
        mode="sliding",
        pieces={10: "ten", 11: " eleven", 12: "\n", 13: " 13", 14: "!"},
        prompt_text="count",
    )


@pytest.fixture
def block() -> Trajectory:
    """Two blocks of three: tokens 20 to 24, the second block cut by the limit."""
    return Trajectory(
        prompt=[5],
        tokens=[20, 21, 22, 23, 24],
        iterations=[
            Iteration(0, [5, 80, 81], [20, 70, 22], exact=1, accepted=1),
            Iteration(0, [5, 20, 70], [20, 21, 71], exact=2, accepted=1),
            Iteration(0, [5, 20, 21], [20, 21, 22], exact=3, accepted=1),
            Iteration(3, [22, 23, 24], [23, 24, 72], exact=3, accepted=2),
        ],
        block_size=3,
        mode="block",
    )


@pytest.fixture(scope="session")
def math() -> Trajectory:
    """A realistic short answer, 45 tokens."""
    return spoken(MATH, block_size=16)


@pytest.fixture(scope="session")
def long() -> Trajectory:
    """A long generation: more columns than text fits into."""
    return spoken(" ".join([MATH] * 6), block_size=16)
