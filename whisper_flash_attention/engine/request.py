"""The request and the result of a decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from whisper_flash_attention.engine.logits_processors import LogitsProcessors
from whisper_flash_attention.errors import OptionError

CROSS_ATTENTION = ("auto", "projected", "absorbed")


@dataclass(frozen=True)
class Beams:
    """Beam search, with the option names of Transformers' `generate`.

    Args:
        num_beams: K, number of sequences extended in parallel.
        num_return_sequences: number of sequences returned per search.
        length_penalty: a finished sequence's score is divided by its length to this power.
        early_stopping: True, False or "never".
        candidates: C, continuations considered per search and step; Transformers takes K times the
            number of tokens that may end a row plus one, at least 2 K.
        patience: P; a search is over when round(P K) results have ended, each among candidates that
            are likelier than the K-th which runs on, as in openai-whisper (`whisper/decoding.py`).
            None is the rule of Transformers. Not with `sample`.
        sort_sampled: sampled continuations are ranked by score, not by the order of the draw; only
            the first K may finish.
    """

    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    candidates: int
    sort_sampled: bool = False
    patience: float | None = None

    @property
    def places(self) -> int:
        """Number of finished results that a search keeps."""
        if self.patience is None:
            return self.num_beams
        return max(1, round(self.patience * self.num_beams))


@dataclass(frozen=True)
class Request:
    """How tokens are chosen and when to stop.

    Args:
        processors: logits processors, in order.
        max_length: maximum number of tokens per row, prompt included.
        eos: tokens that end a row; without any, rows run to `max_length`.
        pad: token after the end of a row.
        sample: draw from the distribution instead of taking its maximum.
        beams: beam search; the prompt then has `beams.num_beams` rows per search.
        temperature: divides the processed scores when `sample` is set.
        want_logprobs: sum the log-probabilities of the chosen tokens, ends included, of the
            processed scores before the temperature; not with beams.
        want_scores, want_logits: keep the float32 scores [B, V] of every step, after and before
            the processors.
        probe: a token and a position in the prompt; return the unprocessed probability of that
            token directly after that position, for every row.
        cross_attention: "projected" (keys and values per layer), "absorbed" (the encoder's states
            themselves) or "auto".
        on_token: called with the new tokens [B] of every step; slows decoding.
    """

    processors: LogitsProcessors
    max_length: int
    eos: tuple[int, ...]
    pad: int
    sample: bool = False
    beams: Beams | None = None
    temperature: float = 1.0
    want_scores: bool = False
    want_logits: bool = False
    want_logprobs: bool = False
    probe: tuple[int, int] | None = None
    cross_attention: str = "auto"
    on_token: Callable[[torch.Tensor], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.cross_attention not in CROSS_ATTENTION:
            raise OptionError(
                f"cross_attention {self.cross_attention!r}: give one of "
                f"{', '.join(CROSS_ATTENTION)}"
            )


@dataclass(frozen=True)
class DecodeOutput:
    """Tokens of every row, [B, L] int64: prompt, generated tokens, end, padding.

    `scores` and `logits` hold a float32 tensor [B, V] per step if requested,
    `sum_logprobs` and `probe_probability` one float32 number per row [B]. A beam search
    also gives `beam_indices`, the row that each generated token extended, int32 [B, N] with -1
    after the end; `sequences_scores` [B] float32; and `running`, the tokens of the unfinished
    beams.
    """

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    sum_logprobs: torch.Tensor | None = None
    probe_probability: torch.Tensor | None = None
    beam_indices: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    running: torch.Tensor | None = None


def stays_on_device(request: Request) -> bool:
    """Whether the kernels can choose this request's tokens."""
    return (
        request.processors.kernel_processors is not None
        and not request.sample
        and request.beams is None
        and not request.want_scores
        and not request.want_logits
        and request.on_token is None
    )
