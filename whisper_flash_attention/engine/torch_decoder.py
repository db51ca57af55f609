"""The decoder in PyTorch, for CPUs and devices without Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from whisper_flash_attention.engine.layout import DecodeState
from whisper_flash_attention.engine.weights import (
    HEAD_WIDTH,
    Attention,
    DecoderLayer,
    DecoderWeights,
    embed,
    keys_values,
    linear,
    normalize,
    queries_keys_values,
)

SCALE = HEAD_WIDTH**-0.5
# Up to this many queries of a clip, products of matrices read transposed keys faster than PyTorch's
# fused attention reads keys.
FEW_QUERIES = 8


class TorchDecoder:
    """Turns tokens into logits, one pass at a time, on the state's buffers."""

    def __init__(self, weights: DecoderWeights, state: DecodeState) -> None:
        self._weights = weights
        self._state = state
        self._length = 0
        # Probability of the last probe, [B] float32.
        self.probe_probability: torch.Tensor | None = None

    @property
    def state(self) -> DecodeState:
        """The buffers that the decoder works on."""
        return self._state

    def start(
        self, states: torch.Tensor, prompt: torch.Tensor, probe: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Take the encoder's states [clips, S, D] and the prompt [B, P]; give logits [B, V]."""
        self._length = 0
        fill_cross(self._weights, states, self._state)
        logits = self.extend(prompt)
        if probe is not None:
            token, place = probe
            self.probe_probability = probability(self._weights, self._last[:, place], token)
        return logits

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token per row [B] and give the next logits [B, V] in float32."""
        return self.extend(tokens[:, None])

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [B, P] and give the logits [B, V] after the last."""
        self._last = forward(self._weights, self._state, tokens, self._length)
        self._length += tokens.shape[1]
        return logits(self._weights, self._last[:, -1])


@dataclass(frozen=True)
class TokenPositions:
    """Where one token of every row stands.

    Args:
        at: positions [B] int64.
        end: one more than the last of them.
        seen: which positions a row sees, bool [B, 1, 1, end]; its own is the last. What the cache
            holds of the others must be finite all the same.
    """

    at: torch.Tensor
    end: int
    seen: torch.Tensor

    @classmethod
    def of(cls, positions: list[int], device: torch.device) -> TokenPositions:
        """One position for each row."""
        at = torch.tensor(positions, device=device)
        end = max(positions) + 1
        return cls(at, end, torch.arange(end, device=device) <= at[:, None, None, None])


def fill_cross(weights: DecoderWeights, states: torch.Tensor, state: DecodeState) -> None:
    """Store what cross-attention reads of the encoder's output `states` [clips, S, D].

    That is the output itself, or its keys and values projected for every layer. There may be fewer
    clips than the state has room for.
    """
    clips = len(states)
    if state.states is not None:
        state.states[:clips].copy_(states)
        return
    assert state.cross_keys is not None and state.cross_values is not None
    for index, layer in enumerate(weights.layers):
        attention = layer.cross_attention
        keys, values = keys_values(states, attention)
        if state.layout.transposed_keys:
            # Clip by clip: PyTorch transposes matrices in blocks, and other tensors number by
            # number.
            for each, mine in zip(keys, state.cross_keys[index], strict=False):
                mine.view(each.t().shape).copy_(each.t())
        else:
            state.cross_keys[index, :clips].copy_(split_heads(keys))
        state.cross_values[index, :clips].copy_(split_heads(values))


def forward(
    weights: DecoderWeights,
    state: DecodeState,
    tokens: torch.Tensor,
    position: int | TokenPositions,
) -> torch.Tensor:
    """Run `tokens` [B, P] through all layers, and write their keys and values into the cache.

    Args:
        position: of the first token of all rows, or the places of one token a row (P is 1). Rows
            may be padded at their ends: what the cache holds of the padding is never seen, for a
            later token takes its place.

    Returns:
        Their output before the final norm, [B, P, D].
    """
    where = (
        position.at[:, None]
        if isinstance(position, TokenPositions)
        else slice(position, position + tokens.shape[1])
    )
    x = embed(tokens, weights) + weights.positions[where]
    for index, layer in enumerate(weights.layers):
        x += _self_attention(layer, state, index, x, position)
        x += _cross_attention(layer, state, index, x)
        hidden = F.gelu(linear(normalize(x, layer.ffn_norm), layer.fc1))
        x += linear(hidden, layer.fc2)
    return x


def rows_at(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token of every row: [B, D] of x [B, P, D] at `positions` [B] int64."""
    return x[torch.arange(len(x), device=x.device), positions]


def logits(weights: DecoderWeights, x: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] in float32, rounded to the model's dtype first, of residual rows x [B, D]."""
    return linear(normalize(x, weights.final_norm), weights.projection).float()


def probability(weights: DecoderWeights, x: torch.Tensor, token: int) -> torch.Tensor:
    """Unprocessed probability of a token after residual rows x [B, D]: float32 [B]."""
    return logits(weights, x).softmax(dim=-1)[:, token]


def _self_attention(
    layer: DecoderLayer,
    state: DecodeState,
    index: int,
    x: torch.Tensor,
    position: int | TokenPositions,
) -> torch.Tensor:
    attention = layer.self_attention
    projected = queries_keys_values(normalize(x, layer.self_norm), attention)
    query, key, value = (split_heads(each) for each in projected)
    keys = _extend(state, state.keys[index], key, position)
    values = _extend(state, state.values[index], value, position)
    seen = position.seen if isinstance(position, TokenPositions) else None
    # A prompt starts at position 0, so that PyTorch's causal mask is the right one.
    causal = x.shape[1] > 1
    assert not causal or position == 0
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, is_causal=causal)
    return linear(join_heads(out), attention.out)


def _extend(
    state: DecodeState, cached: torch.Tensor, new: torch.Tensor, position: int | TokenPositions
) -> torch.Tensor:
    """Write new keys or values [B, H, P, 64] into the cache; all up to them, [B, H, end, 64]."""
    if isinstance(position, TokenPositions):
        end = position.end
        cached[torch.arange(len(new), device=new.device), :, position.at] = new[:, :, 0]
    else:
        end = position + new.shape[2]
        cached[:, :, position:end].copy_(new)
    return _past(state, cached, end)


def _past(state: DecodeState, cached: torch.Tensor, end: int) -> torch.Tensor:
    """Cached keys or values [B, H, end, 64], each position from the slot that is its ancestor."""
    if not state.branching:
        return cached[:, :, :end]
    rows = state.ancestors[:, :end].long()
    return cached.transpose(1, 2)[rows, torch.arange(end, device=rows.device)].transpose(1, 2)


def _cross_attention(
    layer: DecoderLayer, state: DecodeState, index: int, x: torch.Tensor
) -> torch.Tensor:
    attention = layer.cross_attention
    query = linear(normalize(x, layer.cross_norm), attention.q)
    if state.states is not None:
        out = _absorbed(attention, query, state.states)
    else:
        assert state.cross_keys is not None and state.cross_values is not None
        keys, values = state.cross_keys[index], state.cross_values[index]
        out = _projected(query, keys, values, state.layout.transposed_keys)
    return linear(out, attention.out)


def _projected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """Attention of queries [B, P, D] over keys and values [clips, H, S, 64].

    Args:
        transposed: whether the keys are [clips, H, 64, S].
    """
    batch, count, width = query.shape
    clips, heads = keys.shape[:2]
    # All the rows of a clip (beams, prompt tokens) become queries over one read of its keys.
    q = query.view(clips, batch // clips * count, heads, HEAD_WIDTH).transpose(1, 2)
    if transposed and q.shape[2] <= FEW_QUERIES:
        out = torch.matmul(torch.matmul(q * SCALE, keys).softmax(dim=-1), values)
    else:
        keys = keys.transpose(2, 3).contiguous() if transposed else keys
        out = F.scaled_dot_product_attention(q, keys, values)
    return out.transpose(1, 2).reshape(batch, count, width)


def _absorbed(attention: Attention, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Attention of queries [B, P, D] over the encoder's states [clips, S, D] themselves.

    scores = (W_k^T q) . e and out = W_v (sum_j p_j e_j) + b_v, head by head: k_proj has no bias,
    and attention weights sum to one.
    """
    batch, count, width = query.shape
    clips = states.shape[0]
    heads = width // HEAD_WIDTH
    q = query.view(batch * count, heads, HEAD_WIDTH).transpose(0, 1) * SCALE
    folded = torch.bmm(q, attention.k.weight.view(heads, HEAD_WIDTH, width))
    folded = folded.transpose(0, 1).reshape(clips, -1, width)
    scores = torch.bmm(folded, states.transpose(1, 2))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(states.dtype)
    context = torch.bmm(weights, states).view(batch * count, heads, width).transpose(0, 1)
    out = torch.bmm(context, attention.v.weight.view(heads, HEAD_WIDTH, width).transpose(1, 2))
    out = out.transpose(0, 1).reshape(batch, count, width)
    return out if attention.v.bias is None else out + attention.v.bias


def split_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, L, D] as [B, H, L, 64]."""
    return x.view(*x.shape[:2], -1, HEAD_WIDTH).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, L, 64] as [B, L, D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)
