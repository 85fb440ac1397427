"""Matrix products with weights laid out once, at load, the way the CPU's kernels like them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

ROW_MULTIPLE = 4
"""Rows of a float32 product have the same bits whatever the other rows, once their number is a multiple of this.

Measured, and held by tests: oneDNN's prepacked product from 2 rows on, MKL's plain one from 4 on in multiples of 4.
"""


class Linear:
    """y = x W^T + b for x [rows, in] and W [out, in].

    In float32 on the CPU the weight is prepacked by oneDNN: against torch's own linear (MKL) 2.5 times as fast at 4
    rows, twice at 16, a fifth faster at 512. It is the operator that torch.compile uses for frozen weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._packed = weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_onednn()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


def _has_onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pad_rows(x: Tensor) -> Tensor:
    """Rows of zeros added up to a multiple of ROW_MULTIPLE."""
    missing = -len(x) % ROW_MULTIPLE
    return F.pad(x, (0, 0, 0, missing)) if missing else x
