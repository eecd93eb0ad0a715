"""Dense and FlexAttention masks are the predicate of a packed row, written out token by token."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm
from cllm import ConsistencyConfig
from cllm.training import masks
from cllm.training.masks import PackedTokens, attention_masks, dense_mask, flex_mask
from cllm.training.packing import ConsistencyCollator
from cllm.traits import CHUNKED, FULL, SLIDING, UnsupportedModelError
from tests.decoding.tiny_models import fresh_model
from tests.training.definition import defined_loss, every_state, first_states, random_example

KINDS = [(FULL, None), (SLIDING, 5), (CHUNKED, 4)]


def packed(seed: int, columns: int = 8, consistency: str = "global") -> dict[str, torch.Tensor]:
    samples = [
        every_state(random_example(seed)),
        first_states(random_example(seed + 1, prompt=3, response=9)),
        every_state(random_example(seed + 2, prompt=1, response=6, block_size=8)),
    ]
    config = ConsistencyConfig(consistency=consistency)
    return ConsistencyCollator(config, samples_per_row=2, column_multiple=columns)(samples)


def tokens_of(batch: dict[str, torch.Tensor]) -> PackedTokens:
    names = ("sample_ids", "segment_ids", "position_ids", "visible")
    return PackedTokens(*(batch[name] for name in names))


def brute_force(batch: dict[str, torch.Tensor], kind: str, size: int | None) -> torch.Tensor:
    """[B, S, S], pair by pair."""
    rows, columns = batch["input_ids"].shape
    mask = torch.zeros(rows, columns, columns, dtype=torch.bool)
    for row in range(rows):
        sample, segment, position, visible = (
            batch[name][row].tolist()
            for name in ("sample_ids", "segment_ids", "position_ids", "visible")
        )
        for q in range(columns):
            for k in range(columns):
                if sample[q] == -1 or sample[k] == -1:
                    mask[row, q, k] = q == k
                    continue
                if sample[q] != sample[k]:
                    continue
                if segment[k] == 0:
                    seen = position[k] < visible[q]
                else:
                    seen = segment[k] == segment[q] and position[k] <= position[q]
                if kind == SLIDING:
                    seen = seen and position[q] - position[k] < size
                if kind == CHUNKED:
                    seen = seen and position[q] // size == position[k] // size
                mask[row, q, k] = seen
    return mask


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 500),
    kind=st.sampled_from(KINDS),
    consistency=st.sampled_from(["global", "local"]),
)
def test_masks_are_the_predicate(seed, kind, consistency):
    batch = packed(seed, consistency=consistency)
    expected = brute_force(batch, *kind)
    tokens = tokens_of(batch)
    assert torch.equal(dense_mask(tokens, *kind)[:, 0], expected)
    additive = dense_mask(tokens, *kind, dtype=torch.float32)[:, 0]
    assert torch.equal(additive == 0, expected)
    assert (additive[~expected] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_gives_what_the_dense_mask_gives(kind):
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    batch = packed(3, columns=128)
    tokens = tokens_of(batch)
    rows, columns = batch["input_ids"].shape
    block, dense = flex_mask(tokens, *kind), dense_mask(tokens, *kind)
    assert torch.equal(create_mask(block.mask_mod, rows, 1, columns, columns, "cpu"), dense)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, rows, 2, columns, 16, generator=generator).unbind()
    found = flex_attention(query, key, value, block_mask=block)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flex_attention_skips_blocks_that_hold_nothing():
    example = random_example(0, prompt=200, response=300, block_size=16, states=1)
    batch = ConsistencyCollator(ConsistencyConfig(), column_multiple=128)([every_state(example)])
    block = flex_mask(tokens_of(batch), FULL, None)
    dense = dense_mask(tokens_of(batch), FULL, None)[0, 0]
    blocks = dense.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(1).any(-1)
    assert torch.equal(block.to_dense()[0, 0].bool(), blocks)
    assert not blocks.all()


def test_a_compiled_mask_is_made_once_a_shape_and_follows_the_batch(monkeypatch):
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(create_block_mask, backend=counter)
    monkeypatch.setattr(masks, "_block_mask_maker", lambda on_gpu: compiled)
    seen = []
    for seed in range(4):
        example = random_example(seed, prompt=60 + 100 * seed, response=48, block_size=16, states=1)
        collator = ConsistencyCollator(ConsistencyConfig(), column_multiple=512)
        batch = collator([every_state(example)])
        dense = dense_mask(tokens_of(batch), SLIDING, 40)[:, 0]
        blocks = dense.unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).any(2).any(-1)
        found = flex_mask(tokens_of(batch), SLIDING, 40).to_dense()[:, 0].bool()
        assert torch.equal(found, blocks)
        seen.append(blocks)
    assert counter.frame_count == 1
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("family", ["llama", "qwen2-local"])
def test_a_model_with_flex_attention_gives_the_same_loss(family):
    model = fresh_model(family)
    config = ConsistencyConfig()
    samples = [every_state(random_example(1)), first_states(random_example(2))]
    batch = ConsistencyCollator(config, column_multiple=128)(samples)
    expected = defined_loss(model, samples, config)
    model.set_attn_implementation("flex_attention")
    cllm.patch_training(model, config)
    # transformers compiles flex_attention; eagerly it is the same arithmetic
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_mask_or_one_a_layer_type():
    tokens = tokens_of(packed(1))
    alone = attention_masks(tokens, {FULL: None}, "sdpa", torch.float32)
    assert alone.dtype == torch.bool
    both = attention_masks(tokens, {FULL: None, SLIDING: 5}, "eager", torch.bfloat16)
    assert set(both) == {FULL, SLIDING}
    assert both[SLIDING].dtype == torch.bfloat16
    assert (both[SLIDING] != both[FULL]).any()


def test_refuses_an_attention_that_takes_no_mask():
    tokens = tokens_of(packed(1))
    with pytest.raises(UnsupportedModelError, match="set_attn_implementation"):
        attention_masks(tokens, {FULL: None}, "flash_attention_2", torch.float32)
