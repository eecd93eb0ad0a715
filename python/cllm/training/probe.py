"""Whether a model's packed forward is what separate forwards are: found out, not assumed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..head import LanguageHead, evaluating
from ..traits import UnsupportedModelError
from .config import ConsistencyConfig
from .examples import BlockStates, TrainingExample
from .forwards import clean_columns, packed_hidden_states, two_part_hidden_states
from .gate import AdapterGate
from .packing import ConsistencyCollator
from .sampling import SampledExample

logger = logging.get_logger(__name__)
_MOST = 0.5  # difference of hidden states that may pass for rounding


@torch.no_grad()
def check_packed_forward(head: LanguageHead, kinds: dict[str, int | None]) -> float:
    """Compare a packed row of two samples with noisy segments to forwards over single texts.

    Returns:
        The relative difference of hidden states up to which two forwards are taken for the same.

    Raises:
        UnsupportedModelError: if they differ by more than rounding: every loss would be wrong.
    """
    model = head.model
    # far above rounding, far below what a wrong mask or position does
    full = model.dtype in (torch.float32, torch.float64)
    bound = 1e-2 if full else 0.1
    batch = _batch(model, ConsistencyConfig())
    name = type(model).__name__
    # a compiled model is not to be compiled for these shapes
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        packed = packed_hidden_states(head, kinds, batch)[0].float()
        errors, rounding, ahead = [], [], [0.0]
        for text, columns in _texts(batch):
            alone = head.hidden_states(input_ids=text[None])[0].float()
            errors.append(_apart(packed[columns], alone[-len(columns) :]))
            if not full:
                # the same text at another width of forward, with one and another text behind it
                one, other = (
                    head.hidden_states(input_ids=torch.cat([text, behind])[None])[0].float()
                    for behind in (text, text.flip(0))
                )
                rounding.append(_apart(one[: len(text)], alone))
                ahead.append(_apart(other[: len(text)], one[: len(text)]))
    # at one width what stands behind a text makes no difference, not even in rounding
    worst = max(errors) if max(ahead) < bound else float("inf")
    if rounding:
        # in 16 bits, a trained adapter can make of rounding what a wrong mask makes in other
        # models; only so far, as hidden states of different texts are about 1 apart
        bound = max(bound, min(3 * max(rounding), _MOST))
    if not worst < bound:
        raise UnsupportedModelError(
            f"{name} does not give on a packed row what it gives on the same texts one by one "
            f"(hidden states differ by {worst:.2g}, relative): it does not keep to the mask and "
            "positions it is given, so it cannot be trained this way"
        )
    return bound


@torch.no_grad()
def check_gated_forward(
    head: LanguageHead, kinds: dict[str, int | None], gate: AdapterGate, bound: float
) -> None:
    """Compare the clean columns of a gated row to those of the base model, and find out whether
    clean and noisy columns may go one after the other.

    Args:
        bound: of `check_packed_forward`.

    Raises:
        UnsupportedModelError: if they are not the same to the bit, or an adapter does not go
            through the gate.
    """
    model = head.model
    batch = _batch(model, ConsistencyConfig(gated=True))
    clean = batch["segment_ids"] == 0
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        base = packed_hidden_states(head, kinds, batch)
        gated = gate.hidden_states(~clean, lambda: packed_hidden_states(head, kinds, batch))
    gate.check_layers_ran()
    if not torch.equal(base[clean], gated[clean]):
        raise UnsupportedModelError(
            f"in {type(model).__name__} the adapters reach tokens that the gate keeps them out of, "
            "so clean text would not be the base model's"
        )
    gate.two_parts = _same_in_two_parts(head, kinds, gate, batch, gated, bound)


def _same_in_two_parts(
    head: LanguageHead,
    kinds: dict[str, int | None],
    gate: AdapterGate,
    batch: dict[str, Tensor],
    gated: Tensor,
    bound: float,
) -> bool:
    """Whether a KV cache of the clean columns gives what one forward gives, [B, S, H]."""
    model = head.model
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        try:
            parts = two_part_hidden_states(head, kinds, batch, gate, clean_columns(batch))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            logger.info(
                f"{type(model).__name__} trains in one part, which is slower: its forward takes no "
                f"cache of the clean columns ({type(error).__name__}: {error})"
            )
            return False
    there = batch["sample_ids"] >= 0
    return _apart(parts[there].float(), gated[there].float()) < bound


def _apart(found: Tensor, expected: Tensor) -> float:
    """Largest relative difference of two [N, H]; infinite where either is not finite."""
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(apart.nan_to_num(nan=float("inf")).max())


def _batch(model: Any, config: ConsistencyConfig) -> dict[str, Tensor]:
    """One packed row of two samples."""
    samples = [_sample(model.config.get_text_config().vocab_size, seed) for seed in (1, 2)]
    collator = ConsistencyCollator(config, samples_per_row=2, column_multiple=128)
    device = model.get_input_embeddings().weight.device
    return {name: value.to(device) for name, value in collator(samples).items()}


def _sample(vocabulary: int, seed: int) -> SampledExample:
    """A prompt of 3 + seed tokens and two blocks of 4, one wrong state each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (11 + seed,), generator=generator).tolist()
    prompt, response = tokens[: 3 + seed], tokens[3 + seed :]
    blocks = []
    for start in (0, 4):
        right = response[start : start + 4]
        wrong = [(token + 1) % vocabulary for token in right]
        blocks.append(BlockStates([right[:1] * (start > 0) + wrong[start > 0 :], right]))
    example = TrainingExample(f"probe {seed}", prompt, response, 4, blocks, [0, 1])
    return SampledExample(example, [(0, 0), (1, 0)])


def _texts(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Every text of the row, with the columns in which its last tokens stand: of each sample its
    clean tokens, of each noisy segment the clean tokens it may see and itself."""
    tokens, samples, segments, visible = (
        batch[name][0] for name in ("input_ids", "sample_ids", "segment_ids", "visible")
    )
    texts = []
    for sample in samples.unique().tolist():
        if sample < 0:
            continue
        clean = tokens[(samples == sample) & (segments == 0)]
        for segment in segments[samples == sample].unique().tolist():
            columns = ((samples == sample) & (segments == segment)).nonzero().flatten()
            prefix = 0 if segment == 0 else int(visible[columns[0]])
            texts.append((torch.cat([clean[:prefix], tokens[columns]]), columns))
    return texts
