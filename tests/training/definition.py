"""Consistency training as its paper defines it, with a forward for every state: no packing, no
trimming, all logits. What the packed loss is tested against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm import ConsistencyConfig
from cllm.training.examples import BlockStates, TrainingExample
from cllm.training.sampling import SampledExample
from tests.decoding.tiny_models import VOCAB


def logits_of(model: Any, tokens: list[int]) -> Tensor:
    """[len(tokens), V] of a plain forward."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def divergence(student: Tensor, teacher: Tensor, config: ConsistencyConfig) -> Tensor:
    """[R] of logits [R, V]."""
    q = F.log_softmax(student / config.temperature, dim=-1)
    p = F.log_softmax(teacher.detach() / config.temperature, dim=-1)
    if config.divergence == "forward_kl":
        return (p.exp() * (p - q)).sum(-1)
    if config.divergence == "reverse_kl":
        return (q.exp() * (q - p)).sum(-1)
    m = (config.beta * p.exp() + (1 - config.beta) * q.exp()).log()
    left, right = (p.exp() * (p - m)).sum(-1), (q.exp() * (q - m)).sum(-1)
    return config.beta * left + (1 - config.beta) * right


def defined_sums(
    model: Any, samples: list[SampledExample], config: ConsistencyConfig, teacher: Any = None
) -> tuple[Tensor, Tensor, int, int]:
    """Sums of the consistency and the autoregressive terms, counted rows and labels.

    Args:
        teacher: another model; None: `model` itself.
    """
    teacher = model if teacher is None else teacher
    consistency, ar = torch.zeros((), dtype=model.dtype), torch.zeros((), dtype=model.dtype)
    rows = labels = 0
    for sample in samples:
        example = sample.example
        for entry, number in sample.picks:
            block, start = example.blocks[entry], example.block_start(entry)
            prefix = example.prompt + example.response[:start]
            target = block.states[number + 1 if config.consistency == "local" else -1]
            state = block.states[number]
            student = logits_of(model, prefix + state)
            with torch.no_grad():
                taught = logits_of(teacher, prefix + target)
            # row i predicts token i + 1 of the block; it counts if an input up to i is wrong
            counted = [
                len(prefix) + i
                for i in range(len(state) - 1)
                if state[: i + 1] != block.fixed_point[: i + 1]
            ]
            consistency = consistency + divergence(student[counted], taught[counted], config).sum()
            rows += len(counted)
        logits = logits_of(model, example.prompt + example.response)
        logits = logits[len(example.prompt) - 1 : -1]
        ar = ar + F.cross_entropy(
            logits,
            torch.tensor(example.response),
            label_smoothing=config.label_smoothing,
            reduction="sum",
        )
        labels += len(example.response)
    return consistency, ar, rows, labels


def defined_loss(
    model: Any, samples: list[SampledExample], config: ConsistencyConfig, teacher: Any = None
) -> Tensor:
    """The mean over rows, plus ar_weight times the mean over response tokens."""
    consistency, ar, rows, labels = defined_sums(model, samples, config, teacher)
    return consistency / max(rows, 1) + config.ar_weight * ar / labels


def random_example(
    seed: int, prompt: int = 5, response: int = 13, block_size: int = 4, states: int = 3
) -> TrainingExample:
    """A text of random tokens whose states get nearer to it, as Jacobi iteration's do."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    text = tokens(response)
    blocks = []
    for start in range(0, response, block_size):
        right = text[start : start + block_size]
        trajectory = [
            right[:done] + [(token + 1) % VOCAB for token in right[done:]]
            for done in range(0, len(right), max(1, len(right) // states))
        ]
        blocks.append(BlockStates([*trajectory, right]))
    return TrainingExample(
        f"random {seed}", tokens(prompt), text, block_size, blocks, list(range(len(blocks)))
    )


def every_state(example: TrainingExample) -> SampledExample:
    """All states of all blocks but the fixed points."""
    return SampledExample(
        example,
        [
            (entry, number)
            for entry, block in enumerate(example.blocks)
            for number in range(len(block.states) - 1)
        ],
    )


def first_states(example: TrainingExample) -> SampledExample:
    """The initial guess of every block that has one that is wrong."""
    picks = [(entry, 0) for entry, block in enumerate(example.blocks) if len(block.states) > 1]
    return SampledExample(example, picks)
