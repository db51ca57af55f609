"""The minimum time of a row: its bytes and operations at measured ceilings.

A phase takes the longer of moving its bytes at the copy bandwidth and doing its multiplications at
the matmul rate (S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009). Phases
follow one another, so their times add up. Counted: the encoder, the projection of its output to
cross-attention keys and values, every decode step, and the logits. Not counted: the host-to-device
copy, launches, norms, activation functions, and the choice of a token. Matrices are read once per
phase for the whole batch. Intermediates of a layer are not counted, because a fused layer need not
write them; the output of each layer is written and read once.

Cross-attention has two forms. "Projected" reads cached keys and values, 2 x D per position and
layer. "Absorbed" moves the key and value projections to the query's side, (W_k^T q) e, and so reads
the encoder's output, D per position and layer, with the two projections' weights on top and D/64
times the arithmetic. The floor of a row is the lower of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from whisper_flash_attention.benchmark.settings import (
    ENCODER_FRAMES,
    ENCODER_POSITIONS,
    PROMPT_TOKENS,
    ModelSize,
    Setting,
)

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a machine: bytes moved (read plus written) and operations, per second."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """Time of one phase: the slower of the memory and the multipliers."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


@dataclass(frozen=True)
class Workload:
    """One `generate` call: a model, its decoder's depth, clips, new tokens, bytes per number."""

    size: ModelSize
    decoder_layers: int
    batch_size: int
    new_tokens: int
    bytes_per_number: int

    @classmethod
    def of(cls, size: ModelSize, decoder_layers: int, setting: Setting, dtype: str) -> Workload:
        """The workload of one row."""
        batch, tokens = setting.batch_size, setting.new_tokens
        return cls(size, decoder_layers, batch, tokens, BYTES[dtype])


@dataclass(frozen=True)
class Floor:
    """Seconds per `generate` call that no implementation can beat on this machine."""

    projected: float
    absorbed: float

    @property
    def seconds(self) -> float:
        """The lower of the two forms."""
        return min(self.projected, self.absorbed)


def floor(work: Workload, ceilings: Ceilings) -> Floor:
    """Minimum seconds of one `generate` call, in both forms of cross-attention."""
    encoder = encoder_seconds(work, ceilings)
    projection = cross_projection_seconds(work, ceilings)
    lengths = [PROMPT_TOKENS + step for step in range(work.new_tokens)]
    projected = sum(step_seconds(work, ceilings, length) for length in lengths)
    absorbed = sum(step_seconds(work, ceilings, length, absorbed=True) for length in lengths)
    return Floor(projected=encoder + projection + projected, absorbed=encoder + absorbed)


def encoder_seconds(work: Workload, ceilings: Ceilings) -> float:
    """Two convolutions and the layers, each a phase."""
    return sum(ceilings.seconds(moved, flops) for moved, flops in encoder_phases(work))


def encoder_phases(work: Workload) -> list[tuple[int, int]]:
    """Bytes moved and operations of every phase; a multiplication and an addition are two."""
    size, batch, number = work.size, work.batch_size, work.bytes_per_number
    d, frames, positions = size.d_model, ENCODER_FRAMES, ENCODER_POSITIONS
    first = (
        number * (3 * size.mel_bins * d + batch * frames * (size.mel_bins + d)),
        2 * batch * frames * 3 * size.mel_bins * d,
    )
    second = (
        number * (3 * d * d + batch * (frames + positions) * d),
        2 * batch * positions * 3 * d * d,
    )
    weights = 4 * d * d + 2 * d * size.ffn
    layer = (
        number * (weights + 2 * batch * positions * d),
        2 * batch * positions * weights + 4 * batch * positions * positions * d,
    )
    return [first, second, *[layer] * size.encoder_layers]


def cross_projection_seconds(work: Workload, ceilings: Ceilings) -> float:
    """Keys and values of the encoder's output, for every decoder layer."""
    d, clips = work.size.d_model, work.batch_size * ENCODER_POSITIONS
    layer = ceilings.seconds(
        work.bytes_per_number * (2 * d * d + 3 * clips * d), 2 * clips * 2 * d * d
    )
    return work.decoder_layers * layer


def step_seconds(
    work: Workload, ceilings: Ceilings, length: int, *, absorbed: bool = False
) -> float:
    """One token for every clip, with `length` tokens in the self-attention cache before it.

    A call with N new tokens is counted as N such steps: the first represents the prompt, whose few
    tokens share one read of the weights.
    """
    d, heads = work.size.d_model, work.size.heads
    batch, layers, number = work.batch_size, work.decoder_layers, work.bytes_per_number
    # Self-attention's four matrices, cross-attention's query and output, and the feed-forward.
    weights = layers * (6 * d * d + 2 * d * work.size.ffn)
    self_cache = layers * 2 * batch * length * d
    if absorbed:
        weights += layers * 2 * d * d
        cross_read = layers * batch * ENCODER_POSITIONS * d
        cross_flops = layers * batch * 4 * heads * ENCODER_POSITIONS * d
    else:
        cross_read = layers * 2 * batch * ENCODER_POSITIONS * d
        cross_flops = layers * batch * 4 * ENCODER_POSITIONS * d
    dense = ceilings.seconds(
        number * (weights + work.size.vocabulary * d),
        2 * batch * (weights + work.size.vocabulary * d),
    )
    cross = ceilings.seconds(number * cross_read, cross_flops)
    own = ceilings.seconds(number * self_cache, 2 * batch * layers * 2 * length * d)
    return dense + cross + own
