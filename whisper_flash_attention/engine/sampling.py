"""Choose tokens with any logits processors: greedy or sampled, optionally keeping scores."""

from __future__ import annotations

from typing import Protocol

import torch

from whisper_flash_attention.engine.greedy import GreedyChooser, are_finite
from whisper_flash_attention.engine.logits_processors import History
from whisper_flash_attention.engine.request import DecodeOutput, Request, stays_on_device
from whisper_flash_attention.errors import NotFinite


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
