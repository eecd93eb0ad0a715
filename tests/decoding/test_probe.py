"""What a layout's probe makes of the errors it finds."""

from __future__ import annotations

import pytest
import torch

from cllm.decoding.layouts import judged

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
