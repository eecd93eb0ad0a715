"""A backend from its in-place pass: gradients beside the losses, or recomputed."""

from __future__ import annotations

from functools import partial

from cllm_kernels.linear_consistency_loss import chunked, swept
from cllm_kernels.linear_consistency_loss.chunk import Pass
from cllm_kernels.linear_consistency_loss.options import (
    Gradients,
    Implementation,
    LossOptions,
    Operands,
    Results,
)


def driven_by(in_place: Pass) -> Implementation:
    def losses(operands: Operands, options: LossOptions, wanted: Gradients) -> Results:
        if options.recompute:
            return swept.losses(operands, options, in_place)
        return chunked.losses(operands, options, wanted, in_place)

    return Implementation(losses, partial(swept.gradients, in_place=in_place))
