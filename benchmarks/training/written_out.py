"""Consistency training as published, written plainly: every block by itself, three forwards each.

Kou et al. 2024, arXiv 2403.00835, section 3.2: a training example is one block's trajectory and all
text before it. The autoregressive loss takes a forward and a backward over prompt, prefix and fixed
point; the consistency loss a forward over the same for the teacher (without a graph, for its
gradient is stopped) and a forward and a backward over prompt, prefix and noisy state. All logits
are kept. The gradients of a response's blocks are summed for one optimiser step, so that both sides
of the benchmark take as many steps.

`counted_rows` computes the same three forwards' loss over exactly the rows and labels that the
packed loss counts, divided by the same numbers: it proves that both sides do the same mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm import ConsistencyConfig
from cllm.training.examples import first_difference
from cllm.training.sampling import SampledExample


class Block(NamedTuple):
    """One training example of the published algorithm."""

    prefix: list[int]  # prompt and response before the block
    fixed_point: list[int]
    state: list[int]

    @property
    def wrong(self) -> int:
        """Index of the state's first wrong token; rows from here on count."""
        return first_difference(self.state, self.fixed_point)

    @property
    def rows(self) -> slice:
        """Rows of the logits that count: each has a wrong input, and a next token in the block."""
        start = len(self.prefix)
        return slice(start + self.wrong, start + len(self.state) - 1)


def blocks_of(sample: SampledExample) -> Iterator[Block]:
    """Every block with its sampled state; its first state where none was to be sampled."""
    example, picks = sample.example, dict(sample.picks)
    for entry, block in enumerate(example.blocks):
        prefix = example.prompt + example.response[: example.block_start(entry)]
        yield Block(prefix, block.fixed_point, block.states[picks.get(entry, 0)])


def last_block(sample: SampledExample) -> SampledExample:
    """The same response with its last block alone to train on."""
    example, last = sample.example, len(sample.example.blocks) - 1
    alone = replace(example, blocks=example.blocks[last:], block_index=example.block_index[last:])
    return SampledExample(alone, [(0, state) for entry, state in sample.picks if entry == last])


def tokens_forwarded(sample: SampledExample) -> int:
    """By the three forwards of all blocks."""
    return sum(3 * (len(block.prefix) + len(block.state)) for block in blocks_of(sample))


def _logits(model: Any, tokens: list[int]) -> Tensor:
    """[L, V]"""
    ids = torch.tensor([tokens], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0].float()


def published(model: Any, sample: SampledExample, config: ConsistencyConfig) -> None:
    """Adds the gradients of one response: two backwards a block."""
    blocks = list(blocks_of(sample))
    prompt = len(sample.example.prompt)
    for block in blocks:
        clean, noisy = block.prefix + block.fixed_point, block.prefix + block.state

        labels = torch.tensor(clean, device=model.device)
        labels[:prompt] = -100
        ar = F.cross_entropy(
            _logits(model, clean)[:-1], labels[1:], label_smoothing=config.label_smoothing
        )
        (config.ar_weight * ar / len(blocks)).backward()

        with torch.no_grad():
            teacher = F.softmax(_logits(model, clean) / config.temperature, dim=-1)
        student = F.log_softmax(_logits(model, noisy) / config.temperature, dim=-1)
        # soft cross-entropy: the forward KL and the teacher's entropy, which has no gradient
        rows = -(teacher * student).sum(dim=-1)
        counts = torch.zeros_like(rows)
        counts[block.rows] = 1.0
        consistency = (rows * counts).sum() / counts.sum().clamp(min=1)
        (consistency / len(blocks)).backward()


def counted_rows(model: Any, sample: SampledExample, config: ConsistencyConfig) -> float:
    """Adds the gradients of one response and returns its loss, the packed loss's own definition:
    the mean KL over counted rows, and ar_weight times the mean over all response tokens.

    From the logits on in fp64: with 49152 smoothed labels torch's fp32 cross-entropy leaves errors
    of 1e-3 in the gradient (measured against a model in fp64 throughout, from which the packed
    loss's gradient in fp32 lies 5e-6).
    """
    blocks = list(blocks_of(sample))
    counted = sum(max(0, block.rows.stop - block.rows.start) for block in blocks)
    total = 0.0
    for block in blocks:
        clean, start = block.prefix + block.fixed_point, len(block.prefix)
        ar = F.cross_entropy(
            _logits(model, clean)[start - 1 : -1].double(),
            torch.tensor(block.fixed_point, device=model.device),
            label_smoothing=config.label_smoothing,
            reduction="sum",
        )
        ar = config.ar_weight * ar / len(sample.example.response)
        ar.backward()
        total += ar.item()
        if block.rows.start >= block.rows.stop:
            continue
        with torch.no_grad():
            teacher = _logits(model, clean)[block.rows].double() / config.temperature
            teacher = F.log_softmax(teacher, dim=-1)
        student = _logits(model, block.prefix + block.state)[block.rows].double()
        student = student / config.temperature
        consistency = F.kl_div(
            F.log_softmax(student, dim=-1), teacher, reduction="sum", log_target=True
        )
        consistency = consistency / counted
        consistency.backward()
        total += consistency.item()
    return total
