"""Beam search.

The arithmetic is that of Transformers' `_beam_search` (transformers/generation/utils.py, 5.17 to
5.23), operation by operation, so that ties break alike: per clip the best `candidates` of all
continuations, of which the `num_beams` best unfinished ones continue, and the ended ones compete by
length-normalised score for `num_beams` places among the finished.

A beam that continues another slot's copies nothing: `state.ancestors[b, t]` is the slot that holds
position t of slot b, and only those numbers are re-ordered.

With `patience` a search ends by the rules of openai-whisper (whisper/decoding.py) instead: it is
over when `places` results have ended, and none gives its place to a likelier one.

On a GPU the host polls every few steps for the end of the search without waiting; steps beyond the
end change nothing. Beam sampling is checked in every step, because each step draws random numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from whisper_flash_attention.engine.cuda_graphs import POLL_INTERVAL, CompletionPoll
from whisper_flash_attention.engine.layout import DecodeState
from whisper_flash_attention.engine.logits_processors import History
from whisper_flash_attention.engine.request import Beams, DecodeOutput, Request
from whisper_flash_attention.engine.sampling import Decoder, check_finite
from whisper_flash_attention.errors import OptionError

# Added to scores that must not win, as in Transformers.
EXCLUDED = -1.0e9


class BranchingDecoder(Decoder, Protocol):
    """A decoder whose rows may share their past through `state.ancestors`."""

    @property
    def state(self) -> DecodeState:
        """The buffers that the decoder works on."""


def search(
    decoder: BranchingDecoder, states: Tensor, prompt: Tensor, request: Request
) -> DecodeOutput:
    """Decode by beams.

    Args:
        states: the encoder's output [clips, S, D].
        prompt: [searches * num_beams, P] int64, equal and adjacent rows per search; a clip has one
            search or more.
        request: with `beams`.

    Returns:
        Sequences [searches * num_return_sequences, L], best first, with `beam_indices`,
        `sequences_scores` and `running`.

    Raises:
        NotFinite: the logits held NaN or infinity.
        OptionError: the prompt's rows are not those of whole searches.
    """
    assert request.beams is not None
    _check_rows(len(prompt), len(states), request.beams)
    beams = _BeamState(prompt, request, request.beams)
    logits = decoder.start(states, prompt, request.probe)
    state = decoder.state
    own = torch.arange(len(state.ancestors), dtype=torch.int32, device=prompt.device)
    # The slot itself, until beams move: positions not cached yet will be written there.
    state.ancestors.copy_(own[:, None])
    state.branching = True
    try:
        _extend(decoder, beams, logits, request)
    finally:
        state.branching = False
    probe_probability = decoder.probe_probability if request.probe is not None else None
    return replace(beams.output(), probe_probability=probe_probability)


def steps_between_polls(prompt: Tensor) -> int:
    """Return the number of steps between two polls for the end of the search."""
    return POLL_INTERVAL if prompt.is_cuda else 1


def _extend(decoder: BranchingDecoder, beams: _BeamState, logits: Tensor, request: Request) -> None:
    """Run steps until the search is over, or a few more."""
    first, rows = beams.prompt.shape[1], len(beams.prompt)
    poll, interval = CompletionPoll(beams.done), steps_between_polls(beams.prompt)
    for length in range(first, request.max_length):
        tokens, sources = beams.step(logits, length)
        if length + 1 == request.max_length:
            break
        if request.sample:
            if bool(beams.done):
                break
        elif (length - first) % interval == 0 and poll.all_true():
            break
        past = decoder.state.ancestors[:rows, :length]
        past.copy_(past[sources])
        logits = decoder.advance(tokens)


class _BeamState:
    """The beams of all searches: the running ones and the best finished ones.

    B searches of K beams, C candidates each. Paths are [2, rows, T] int64 with the capacity T in
    tokens: the tokens, and for every token chosen the row that it extended (-1: none).
    """

    def __init__(self, prompt: Tensor, request: Request, beams: Beams) -> None:
        rows, length = prompt.shape
        device = prompt.device
        self.prompt = prompt
        self.done = torch.zeros((), dtype=torch.bool, device=device)
        self._request = request
        self._beams = beams
        self._count = rows // beams.num_beams
        # Transformers fills its sequences with the padding and its indices with -1.
        self._paths = prompt.new_full((2, rows, request.max_length), request.pad)
        self._paths[1] = -1
        self._paths[0, :, :length] = prompt
        # The rows of a search are alike so far.
        first_rows = self._paths[:, :: beams.num_beams]
        self._finished_paths = first_rows.repeat_interleave(beams.places, dim=1)
        shape = (self._count, beams.num_beams)
        # All beams are equal at first: only one of them may be extended.
        self._scores = torch.zeros(shape, device=device)
        self._scores[:, 1:] = EXCLUDED
        finished_shape = (self._count, beams.places)
        self._finished_scores = torch.full(finished_shape, EXCLUDED, device=device)
        self._finished = torch.zeros(finished_shape, dtype=torch.bool, device=device)
        self._improvable = torch.ones((self._count, 1), dtype=torch.bool, device=device)
        self._not_finite = torch.zeros(rows, dtype=torch.bool, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._ends = torch.tensor(request.eos, dtype=prompt.dtype, device=device)
        searches = torch.arange(self._count, device=device)[:, None]
        self._first_beam = searches * beams.num_beams
        self._first_candidate = searches * beams.candidates
        self._first_contender = searches * (beams.places + beams.candidates)
        self._stay = torch.arange(beams.places, device=device).expand(finished_shape)
        # Only the best `num_beams` candidates may finish; the others can only continue.
        self._may_finish = torch.arange(beams.candidates, device=device) < beams.num_beams
        self._all_scores: list[Tensor] = []
        self._all_logits: list[Tensor] = []

    def step(self, logits: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Choose from logits [rows, V], where every beam has `length` tokens.

        Returns:
            The next token of every beam [rows], and the row that it extends [rows], int64.
        """
        paths, scores, ended = self._candidates(self._log_probabilities(logits, length), length)
        self._steps += ~self.done
        self._finish(paths, scores, ended, length)
        tokens, sources = self._continue(paths, scores, ended, length)
        self._stop(ended, length + 1)
        return tokens, sources

    def output(self) -> DecodeOutput:
        """The result, once the search is over."""
        check_finite(self._not_finite)
        beams, request, begin = self._beams, self._request, self.prompt.shape[1]
        grouped = self._by_search(self._finished_paths)
        tokens, origins = grouped[:, :, : beams.num_return_sequences].flatten(1, 2)
        indices = origins[:, begin:].int()
        longest, steps = torch.stack([(indices >= 0).sum(dim=1).max(), self._steps]).tolist()
        return DecodeOutput(
            tokens[:, : begin + longest],
            tuple(self._all_scores[:steps]) if request.want_scores else None,
            tuple(self._all_logits[:steps]) if request.want_logits else None,
            beam_indices=indices[:, :longest],
            sequences_scores=self._finished_scores[:, : beams.num_return_sequences].flatten(),
            running=self._paths[0, :, : begin + steps],
        )

    def _log_probabilities(self, logits: Tensor, length: int) -> Tensor:
        request = self._request
        self._not_finite |= ~torch.isfinite(logits.sum(dim=-1)) & ~self.done
        if request.want_logits:
            self._all_logits.append(logits.clone(memory_format=torch.contiguous_format))
        logprobs = torch.log_softmax(logits, dim=-1)
        logprobs = request.processors.apply(logprobs, History(self._paths[0], length))
        if request.want_scores:
            self._all_scores.append(logprobs.contiguous())
        return logprobs

    def _candidates(self, logprobs: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Paths [2, B * C, T], scores [B, C] and whether they end [B, C], best first."""
        vocabulary, beams = logprobs.shape[-1], self._beams
        totals = logprobs.view(self._count, beams.num_beams, -1) + self._scores[:, :, None]
        totals = totals.view(self._count, -1)
        if self._request.sample:
            chosen = torch.multinomial(torch.softmax(totals, dim=-1), beams.candidates)
            scores = totals.gather(1, chosen)
            if beams.sort_sampled:
                scores, order = scores.sort(dim=-1, descending=True)
                chosen = chosen.gather(1, order)
        else:
            scores, chosen = torch.topk(totals, beams.candidates)
        sources = (chosen // vocabulary + self._first_beam).flatten()
        tokens = chosen % vocabulary
        paths = self._paths.index_select(1, sources)
        paths[0, :, length] = tokens.flatten()
        paths[1, :, length] = sources
        if length + 1 >= self._request.max_length:
            return paths, scores, torch.ones_like(tokens, dtype=torch.bool)
        return paths, scores, torch.isin(tokens, self._ends)

    def _continue(
        self, paths: Tensor, scores: Tensor, ended: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Make the best unfinished candidates the new beams; as `step`."""
        scores = scores + ended.float() * EXCLUDED
        best = torch.topk(scores, self._beams.num_beams)[1]
        self._scores = scores.gather(1, best)
        new = paths.index_select(1, (best + self._first_candidate).flatten())
        self._paths = torch.where(self.done, self._paths, new)
        return new[0, :, length], new[1, :, length]

    def _finish(self, paths: Tensor, scores: Tensor, ended: Tensor, length: int) -> None:
        """Keep the best of the finished paths and of the candidates that end now."""
        beams = self._beams
        if beams.patience is None:
            ended = ended & self._may_finish
        else:
            ended = self._patiently_ended(paths[0, :, length].view(ended.shape), ended)
        scores = scores / (length + 1 - self.prompt.shape[1]) ** beams.length_penalty
        if beams.early_stopping is True and beams.patience is None:
            scores = scores + self._finished.all(dim=-1, keepdim=True).float() * EXCLUDED
        scores = scores + (~self._improvable).float() * EXCLUDED
        scores = scores + (~ended).float() * EXCLUDED
        contenders = torch.cat((self._finished_scores, scores), dim=1)
        best = torch.topk(contenders, beams.places)[1]
        best = torch.where(self.done, self._stay, best)
        self._finished_scores = contenders.gather(1, best)
        self._finished = torch.cat((self._finished, ended), dim=1).gather(1, best)
        groups = (self._by_search(self._finished_paths), self._by_search(paths))
        merged = torch.cat(groups, dim=2).flatten(1, 2)
        self._finished_paths = merged.index_select(1, (best + self._first_contender).flatten())

    def _patiently_ended(self, tokens: Tensor, ended: Tensor) -> Tensor:
        """Which candidates [B, C] finish: the likeliest, as far as there are free places.

        At the full length all have ended, and those without an end token only fill up places until
        there are as many results as beams.
        """
        beams = self._beams
        own_end = torch.isin(tokens, self._ends)
        running_before = (~own_end).cumsum(dim=-1) - (~own_end).int()
        ends = own_end & (running_before < beams.num_beams)
        count = self._finished.sum(dim=-1, keepdim=True)
        ends &= count + ends.cumsum(dim=-1) <= beams.places
        cut = ended & ~own_end
        most = min(beams.num_beams, beams.places)
        cut &= count + ends.sum(dim=-1, keepdim=True) + cut.cumsum(dim=-1) <= most
        return ends | cut

    def _by_search(self, paths: Tensor) -> Tensor:
        """Paths [2, B * N, T] as [2, B, N, T]."""
        return paths.view(2, self._count, -1, paths.shape[-1])

    def _stop(self, ended: Tensor, length: int) -> None:
        """Update whether the search is over, now that the beams have `length` tokens.

        It is over if no running beam can get better than the finished ones (an estimate for
        `length_penalty` above 0, unless `early_stopping` is "never"), if all places are taken and
        `early_stopping` is True, or if no beam can continue; with `patience` if all places are
        taken or no beam can continue.
        """
        beams, begin = self._beams, self.prompt.shape[1]
        if beams.patience is not None:
            self.done |= self._finished.all() | ended.all()
            return
        longest = beams.early_stopping == "never" and beams.length_penalty > 0.0
        length_generated = (self._request.max_length if longest else length) - begin
        possible = self._scores[:, :1] / length_generated**beams.length_penalty
        worst = self._finished_scores.min(dim=1, keepdim=True)[0]
        worst = torch.where(self._finished, worst, EXCLUDED)
        self._improvable &= (possible > worst).any(dim=-1, keepdim=True)
        self.done |= ~self._improvable.any() | ended.all()
        if beams.early_stopping is True:
            self.done |= self._finished.all()


def _check_rows(rows: int, clips: int, beams: Beams) -> None:
    if rows % clips or rows // clips % beams.num_beams:
        raise OptionError(
            f"a prompt of {rows} rows for {clips} clips: give {beams.num_beams} rows, one for each "
            "beam, or a multiple of that, for each clip"
        )
