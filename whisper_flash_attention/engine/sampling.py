"""Choose tokens with any logits processors: greedy or sampled, optionally keeping scores.

On a CPU, where the host knows the tokens so far, `GreedyChooser` gives the tokens of
`LogitsProcessors.apply` and an argmax with few passes over scores: what the grammar forbids are a
few ranges of ids, which are filled in place. NumPy goes through a vocabulary's scores in
microseconds with one thread, where PyTorch would start all of its threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from whisper_flash_attention.engine.logits_processors import (
    History,
    KernelProcessors,
    Timestamps,
)
from whisper_flash_attention.engine.request import DecodeOutput, Request, stays_on_device
from whisper_flash_attention.errors import NotFinite

Scores = npt.NDArray[np.float32]


class Decoder(Protocol):
    """Turns tokens into logits: `TorchDecoder` or `CudaDecoder`."""

    probe_probability: torch.Tensor | None

    def start(
        self, states: torch.Tensor, prompt: torch.Tensor, probe: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Logits [B, V] in float32 after the prompt [B, P].

        With `probe` (as in `Request`) `probe_probability` [B] is set, too.
        """

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] in float32 after one more token per row [B]."""


def choose_tokens(
    decoder: Decoder, states: torch.Tensor, prompt: torch.Tensor, request: Request
) -> DecodeOutput:
    """Decode until every row has ended.

    Raises:
        NotFinite: the logits of a row that had not ended held NaN or infinity.
    """
    if prompt.device.type == "cpu" and stays_on_device(request):
        return _choose_greedily(decoder, states, prompt, request)
    batch, length = prompt.shape
    output = prompt.new_full((batch, request.max_length), request.pad)
    output[:, :length] = prompt
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    bad = torch.zeros_like(finished)
    ends = torch.tensor(request.eos, dtype=prompt.dtype, device=prompt.device)
    sums = torch.zeros(batch, device=prompt.device) if request.want_logprobs else None
    scores, raw = [], []
    logits = decoder.start(states, prompt, request.probe)
    while True:
        bad |= ~torch.isfinite(logits.sum(dim=-1)) & ~finished
        if request.want_logits:
            raw.append(logits.clone(memory_format=torch.contiguous_format))
        processed = request.processors.apply(logits, History(output, length))
        if request.want_scores:
            scores.append(processed.clone(memory_format=torch.contiguous_format))
        token = sample_token(processed, sample=request.sample, temperature=request.temperature)
        if sums is not None:
            chosen = torch.log_softmax(processed, dim=-1).gather(1, token[:, None])[:, 0]
            sums += torch.where(finished, 0.0, chosen)
        token = torch.where(finished, request.pad, token)
        output[:, length] = token
        length += 1
        if request.on_token is not None:
            request.on_token(token)
        finished |= torch.isin(token, ends)
        if length >= request.max_length or bool(finished.all()):
            break
        logits = decoder.advance(token)
    check_finite(bad)
    return DecodeOutput(
        output[:, :length].clone(),
        tuple(scores) if request.want_scores else None,
        tuple(raw) if request.want_logits else None,
        sums,
        decoder.probe_probability if request.probe is not None else None,
    )


def _choose_greedily(
    decoder: Decoder, states: torch.Tensor, prompt: torch.Tensor, request: Request
) -> DecodeOutput:
    """As `choose_tokens`, where the host chooses: it knows the tokens of every row."""
    rows: list[list[int]] = prompt.tolist()
    logits = decoder.start(states, prompt, request.probe)
    processors = request.processors.kernel_processors
    assert processors is not None
    chooser = GreedyChooser(processors, logits.shape[1])
    finished, bad = [False] * len(rows), [False] * len(rows)
    sums = [0.0] * len(rows)
    while True:
        is_finite = are_finite(logits)
        tokens, logprobs = chooser.choose(logits, rows)
        for index, logprob in enumerate(logprobs):
            if finished[index]:
                tokens[index] = request.pad
            else:
                bad[index] |= not is_finite[index]
                sums[index] += logprob
                finished[index] = tokens[index] in request.eos
            rows[index].append(tokens[index])
        if len(rows[0]) >= request.max_length or all(finished):
            break
        logits = decoder.advance(torch.tensor(tokens))
    check_finite(torch.tensor(bad))
    return DecodeOutput(
        torch.tensor(rows),
        sum_logprobs=torch.tensor(sums) if request.want_logprobs else None,
        probe_probability=decoder.probe_probability if request.probe is not None else None,
    )


class GreedyChooser:
    """Chooses the next token of rows that share their processors.

    Args:
        processors: what forbids tokens.
        vocabulary: number of scores of a row; unknown ids do nothing.
    """

    def __init__(self, processors: KernelProcessors, vocabulary: int) -> None:
        self._processors = processors
        stamps = processors.timestamps
        always = processors.suppress + ((stamps.no_timestamps,) if stamps else ())
        self._always, self._at_begin, self._waiting = (
            np.array([token for token in set(tokens) if token < vocabulary], np.int64)
            for tokens in (always, processors.suppress_at_begin, processors.waiting)
        )

    def choose(
        self, logits: torch.Tensor, rows: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[float]]:
        """Choose a token for every row.

        Args:
            logits: [N, V] float32 on the CPU; forbidden ones become minus infinity in place.
            rows: the tokens of each so far, prompt included.

        Returns:
            The tokens, and their log-probabilities among what is allowed.
        """
        processors, scores = self._processors, logits.numpy()
        scores[:, self._always] = -math.inf
        for mine, row in zip(scores, rows, strict=True):
            if len(row) == processors.begin_index:
                mine[self._at_begin] = -math.inf
            if len(row) < processors.min_length:
                mine[self._waiting] = -math.inf
            if processors.timestamps is not None:
                _apply_grammar(processors.timestamps, mine, row)
        tokens: list[int] = scores.argmax(axis=1).tolist()
        logprobs = torch.log_softmax(logits, dim=-1)
        return tokens, [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]


def are_finite(logits: torch.Tensor) -> list[bool]:
    """Whether rows [N, V] float32 on the CPU hold neither NaN nor infinity (nor sum up to it)."""
    with np.errstate(all="ignore"):
        found: list[bool] = np.isfinite(logits.numpy().sum(axis=1)).tolist()
    return found


def _apply_grammar(grammar: Timestamps, scores: Scores, tokens: Sequence[int]) -> None:
    """Forbid what may not follow `tokens` in one row of scores [V]."""
    begin, size = grammar.timestamp_begin, scores.size
    text_from, stamp_from, stamp_end = grammar.next_limits(tokens, size)
    for start, end in ((0, text_from), (begin, stamp_from), (stamp_end, size)):
        scores[start:end] = -math.inf
    if not grammar.detect or text_from >= begin or stamp_from >= stamp_end:
        return
    text, stamps = scores[:begin], scores[stamp_from:stamp_end]
    likeliest = stamps.max()
    if not math.isfinite(likeliest):  # every timestamp is forbidden
        return
    total = likeliest + np.log(np.exp(stamps - likeliest).sum())
    if total > text.max():
        text.fill(-math.inf)


def sample_token(scores: torch.Tensor, *, sample: bool, temperature: float = 1.0) -> torch.Tensor:
    """One token per row of float32 scores [B, V]: the best, or drawn from their softmax.

    Sampling makes the same calls as Transformers does, so that a seed gives the same tokens.
    """
    if not sample:
        return scores.argmax(dim=-1)
    if temperature != 1.0:
        scores = scores / temperature
    return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)


def check_finite(bad: torch.Tensor) -> None:
    """Raise `NotFinite` if any row [B] is bad."""
    rows = torch.nonzero(bad).flatten().tolist()
    if rows:
        raise NotFinite(
            f"the decoder's logits are not finite in row {', '.join(map(str, rows[:8]))} of the "
            "batch: the features or the weights hold NaN or infinity, or the dtype's range is too "
            "small (try bfloat16 or float32)"
        )
