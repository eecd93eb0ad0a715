"""Augmentation of states: correct about half of what is wrong (CLLM, arXiv 2403.00835, section 3.2
and appendix).

Trajectories of an untrained model get right from left to right, nearly one token a state. States
in between, where right tokens stand among wrong ones, are what a consistency LLM will meet when it
decodes. They are made where training reads: a folder of trajectories holds Jacobi's own states and
nothing else, so iteration counts and statistics stay what they say, and other seeds or shares need
no new collection.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

from torch.utils.data import Dataset

from ..examples import BlockStates, TrainingExample


def corrected(
    state: list[int], fixed_point: list[int], generator: random.Random, share: float = 0.5
) -> list[int] | None:
    """A copy of `state` in which each wrong token is put right with probability `share`.

    At least one is put right and at least one left wrong; None where fewer than two are wrong.
    """
    wrong = [
        index
        for index, (found, right) in enumerate(zip(state, fixed_point, strict=True))
        if found != right
    ]
    if len(wrong) < 2:
        return None
    chosen = [index for index in wrong if generator.random() < share]
    if not chosen:
        chosen = [generator.choice(wrong)]
    elif len(chosen) == len(wrong):
        chosen.remove(generator.choice(wrong))
    result = list(state)
    for index in chosen:
        result[index] = fixed_point[index]
    return result


class AugmentedTrajectories(Dataset[TrainingExample]):
    """A data set of trajectories with a corrected state behind each of Jacobi's own.

    The corrected states stand right behind the state that they were made from, so states are still
    ordered from the guess to the fixed point (but `BlockStates.iterations` counts no forward passes
    any more). The same in every epoch and process, whatever the
    order of access.

    For global consistency, whose target is the fixed point. Local consistency has "the next state"
    as its target, which a corrected one does not have; give it the data set as it is.

    Args:
        trajectories: a map-style data set, of `cllm.training.store.load_trajectories` say.
        seed: of the choice of tokens.
        share: of the wrong tokens that is put right.

    Raises:
        ValueError: if `share` is not between 0 and 1.
    """

    def __init__(
        self, trajectories: Dataset[TrainingExample], *, seed: int = 0, share: float = 0.5
    ):
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, not {share!r}")
        self.trajectories = trajectories
        self.seed = seed
        self.share = share

    def __len__(self) -> int:
        return len(self.trajectories)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> TrainingExample:
        example = self.trajectories[index]
        name = f"{self.seed}:{example.id}".encode("utf-8", "surrogatepass")
        generator = random.Random(int.from_bytes(hashlib.sha256(name).digest()[:8], "big"))
        return replace(
            example, blocks=[self._augmented(block, generator) for block in example.blocks]
        )

    def _augmented(self, block: BlockStates, generator: random.Random) -> BlockStates:
        states = []
        for state in block.states:
            states.append(state)
            between = corrected(state, block.fixed_point, generator, self.share)
            if between is not None:
                states.append(between)
        return BlockStates(states)
