"""Linear layers in PyTorch, each by the routine that is fastest on its device.

On a CPU in float32 PyTorch's `linear` goes to MKL, which reads the weight of a lone row with one
thread, and on AMD's processors is no faster than oneDNN for matrices.
`docs/decisions/0004-decoding-on-a-cpu.md` has the figures.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from whisper_flash_attention.engine.weights import Linear

# Up to so many rows a tall weight is best multiplied from the left.
FEW_ROWS = 4


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """x weight^T + bias: [..., K] to [..., N]."""
    if not _by_onednn(x):
        return F.linear(x, layer.weight, layer.bias)
    n, k = layer.weight.shape
    if n >= k and x.numel() <= FEW_ROWS * k:
        return _few_rows(x.reshape(-1, k), layer).view(*x.shape[:-1], n)
    answer: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, layer.weight, layer.bias, "none", [], ""
    )
    return answer


def _by_onednn(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def _few_rows(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """weight x^T for x [R, K], transposed; a lone row is doubled, for MKL then uses all threads."""
    rows = len(x)
    columns = x if rows > 1 else x.expand(2, -1).contiguous()
    out = torch.mm(layer.weight, columns.t())[:, :rows].t()
    return out if layer.bias is None else out + layer.bias
