"""What collecting writes and training reads: a response of the model, and how Jacobi iteration
came to each of its blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockStates:
    """The Jacobi trajectory of one block (CLLM, arXiv 2403.00835, section 3.1).

    Attributes:
        states: every state, from the initial guess to the fixed point, each as long as the block.
            The fixed point is the last one and appears once; a guess that is right from the start
            makes a trajectory of one state.
    """

    states: list[list[int]]

    @property
    def fixed_point(self) -> list[int]:
        """The block as one-token decoding gives it."""
        return self.states[-1]

    @property
    def first_divergence(self) -> list[int]:
        """Per state, the index of its first wrong token; the block's length if there is none."""
        return [first_difference(state, self.fixed_point) for state in self.states]

    @property
    def iterations(self) -> int:
        """Forward passes until the block is known to be final, the last one included.

        A pass over a state confirms the longest right prefix of it and one token more, so the block
        is final after the pass over the first state that is right but for its last token.
        """
        last = len(self.fixed_point) - 1
        return 1 + next(
            number for number, first in enumerate(self.first_divergence) if first >= last
        )


@dataclass(frozen=True)
class TrainingExample:
    """A prompt, the model's greedy response to it, and the trajectory of each of its blocks.

    Attributes:
        id: the prompt's name in its source.
        prompt: token ids, P of them.
        response: token ids, T of them, the end-of-text token included where the response ended.
        block_size: n; the last block is shorter where n does not divide T.
        blocks: ceil(T / n) trajectories, or fewer where some blocks were left out (`block_index`).
        block_index: which block of the response each entry of `blocks` is.
    """

    id: str
    prompt: list[int]
    response: list[int]
    block_size: int
    blocks: list[BlockStates]
    block_index: list[int]

    def block_start(self, entry: int) -> int:
        """Index in `response` of the first token of ``blocks[entry]``."""
        return self.block_index[entry] * self.block_size


def first_difference(left: list[int], right: list[int]) -> int:
    """Index of the first place where two equally long lists differ; their length if none."""
    pairs = zip(left, right, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(left))
