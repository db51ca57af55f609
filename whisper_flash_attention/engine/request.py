"""What a decode is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from whisper_flash_attention.engine.logits_processors import LogitsProcessors
from whisper_flash_attention.errors import OptionError

CROSS_ATTENTION = ("auto", "projected", "absorbed")


@dataclass(frozen=True)
class Beams:
    """A search by beams, with the options of Transformers' `generate` by their names.

    Args:
        num_beams: K, sequences that are extended side by side.
        num_return_sequences: of them, so many are returned for every search.
        length_penalty: a finished sequence's score is divided by its length to this power.
        early_stopping: True, False or "never".
        candidates: C, continuations looked at per search and step; Transformers takes K times the
            number of tokens that may end a row plus one, at least 2 K.
        sort_sampled: sampled continuations are ranked by score, not by the order of the draw; only
            the first K may finish.
    """

    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    candidates: int
    sort_sampled: bool = False


@dataclass(frozen=True)
class Request:
    """How tokens are chosen and when to stop.

    Args:
        rules: what may be chosen, in order.
        max_length: tokens per row at most, prompt included.
        eos: tokens that end a row; none means that rows run to `max_length`.
        pad: what follows a row's end.
        sample: draw from the distribution instead of taking its maximum.
        beams: search by beams; the prompt then has `beams.num_beams` rows for every search.
        temperature: of `sample`: scores are divided by it after the rules.
        want_logprobs: add up the log-probabilities of the tokens chosen, ends included, under the
            scores after the rules and before the temperature; not by beams.
        want_scores, want_logits: keep the float32 scores [B, V] of every step, after and before
            the rules.
        watch: a token and a position in the prompt: how likely that token was right behind it,
            before any rule, is wanted too; of every row of a prompt, those of beams, too.
        cross_attention: "projected" (keys and values per layer), "absorbed" (the encoder's states
            themselves) or "auto".
        on_token: called with the new tokens [B] of every step; slows the decode down.
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
    """The tokens of every row, [B, L] int64: prompt, answer, end, padding.

    `scores` and `logits` hold a float32 tensor [B, V] per step where they were asked for,
    `sum_logprobs` and `probe_probability` one float32 number per row [B]. A beam search
    also gives, for every token of the answers, the row of the beam that it extended, int32 [B, N]
    with -1 behind the end; the answers' scores [B] float32; and the tokens of the beams that were
    still running at the end.
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
