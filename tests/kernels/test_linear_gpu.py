"""Linear layers on a GPU: every size and overlap, and in a recorded graph."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_linear import (
    DTYPES,
    TOLERANCE,
    WIDTHS,
    error,
    random_layer,
    random_projections,
    run,
)
from whisper_flash_attention.kernels.launch import Overlap, set_pdl
from whisper_flash_attention.kernels.linear import linear, qkv


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", list(Overlap), ids=lambda overlap: overlap.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
def test_every_layer_of_every_size(d: int, dtype: torch.dtype, overlap: Overlap) -> None:
    device = torch.device("cuda")
    set_pdl(overlap)
    try:
        for rows in (1, 2, 3, 5, 16, 33, 64, 256):
            for n, k, options in (
                (d, d, {"norm": False, "bias": True, "gelu": False, "residual": True}),
                (d, d, {"norm": True, "bias": True, "gelu": False, "residual": False}),
                (4 * d, d, {"norm": True, "bias": True, "gelu": True, "residual": False}),
                (d, 4 * d, {"norm": False, "bias": True, "gelu": False, "residual": True}),
            ):
                layer = random_layer(rows, n, k, dtype, device)
                out = run(layer, **options)
                assert error(out, layer.expected(**options)) < TOLERANCE[dtype], (rows, n, k)
            for norm in (True, False):
                positions = [i % 8 for i in range(rows)]
                case = random_projections(positions, 1, d, 8, dtype, device, norm=norm)
                qkv(**case.arguments)
                case.check(TOLERANCE[dtype])
    finally:
        set_pdl(Overlap.NONE)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32])
def test_a_graph_replays_a_layer_on_new_input(rows: int) -> None:
    layer = random_layer(rows, 1024, 1024, torch.float16, torch.device("cuda"))
    out = torch.empty_like(layer.residual)
    arguments = (layer.x, layer.weight, layer.bias, out)
    linear(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear(*arguments)
    layer.x.neg_().add_(0.25)
    graph.replay()
    expected = layer.expected(norm=False, bias=True, gelu=False, residual=False)
    assert error(out, expected) < 3e-3
