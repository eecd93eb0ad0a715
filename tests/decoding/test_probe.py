"""What a layout's probe makes of the errors it finds."""

from __future__ import annotations

import pytest
import torch

from cllm.decoding import layouts
from cllm.decoding.layouts import Layout, judged
from cllm.decoding.support import check_model

from .tiny_models import CONFIGS, prompts, tiny_model

RIGHT = [0.03, 0.02, 0.05, 0.04, 0.01, 0.03, 0.06, 0.05, 0.02, 0.03, 0.04]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("errors", "passes"),
    [
        ([*RIGHT, 0.02], True),
        ([*RIGHT, 0.25], True),  # as found behind the first tokens of a prompt, by rounding alone
        ([*RIGHT, 0.6], False),
        ([0.02, 0.2] * 6, False),  # one of two rows
        ([*[0.02] * 8, *[0.2] * 4], False),
        ([*RIGHT, float("nan")], False),
        ([float("nan")] * 12, False),
    ],
)
def test_one_rounded_token_condemns_no_layout_of_16_bits(errors, passes, dtype):
    assert (judged(torch.tensor(errors), dtype) < 0.1) == passes


def test_in_fp32_the_largest_counts():
    assert judged(torch.tensor([0.001, 0.5, 0.002]), torch.float32) == 0.5
    assert judged(torch.tensor([0.001, float("nan")]), torch.float32) == float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_16_bits_let_no_other_layout_pass(family, dtype):
    """Each layout passes or fails as it does in fp32, where the largest error counts."""
    ids = prompts([9])["input_ids"][0]
    found = []
    for kind in (torch.float32, dtype):
        model = tiny_model(family, kind)
        traits, bound = check_model(model), 1e-2 if kind is torch.float32 else 0.1
        rows = [ids[:8], ids[:8].flip(0)[:6]]
        expected = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
        passes = {}
        for layout in (Layout(False, "folded"), Layout(False, "own"), Layout(True, "own")):
            try:
                with layout.applied(model):
                    error = layouts._probe_error(model, traits, rows, expected, layout, False)
                passes[str(layout)] = error < bound
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
                passes[str(layout)] = False
        found.append(passes)
    assert found[0] == found[1] and any(found[0].values())
