"""The parts of PyTorch below its documented interface that we call: that they are as we read them.

A PyTorch that fails here has changed; `flash_attention/backends.py` must follow.
"""

from __future__ import annotations

import pytest
import torch

OPERATORS = {
    "_scaled_dot_product_flash_attention": (
        "Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
        "bool return_debug_mask=False, *, float? scale=None"
    ),
    "_scaled_dot_product_flash_attention_for_cpu": (
        "Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, "
        "Tensor? attn_mask=None, float? scale=None"
    ),
    "_scaled_dot_product_cudnn_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, "
        "float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, "
        "float? scale=None"
    ),
    "_scaled_dot_product_efficient_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, "
        "float dropout_p=0., bool is_causal=False, *, float? scale=None"
    ),
}


@pytest.mark.parametrize(("name", "arguments"), OPERATORS.items(), ids=str)
def test_operators_keep_their_arguments(name: str, arguments: str) -> None:
    schema = str(getattr(torch.ops.aten, name).default._schema)
    assert schema.startswith(f"aten::{name}({arguments}) -> (Tensor output, Tensor log")


def test_the_public_function_ends_in_the_operator_that_we_call() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    public = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
    assert torch.equal(public, ours)
