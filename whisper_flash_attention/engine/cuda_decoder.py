"""The decoder on an NVIDIA GPU: kernels in CUDA graphs, tokens chosen without the host.

Greedy decoding with plain rules never leaves the device: a recorded step ends with the choice of
the next token and the next input row, and the host only replays it, looking every few steps at
whether all rows have ended. With other rules, sampling, scores or beams a step ends with the
logits, and the choice is made by PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from whisper_flash_attention.engine import torch_decoder
from whisper_flash_attention.engine.cuda_graphs import LOOK_EVERY, Graphs, Look
from whisper_flash_attention.engine.kv_cache import DecodeState
from whisper_flash_attention.engine.logits_processors import FusedRules, History
from whisper_flash_attention.engine.request import Decoded, Request
from whisper_flash_attention.engine.sampling import check_finite
from whisper_flash_attention.engine.triton_layers import FusedStep
from whisper_flash_attention.engine.weights import DecoderWeights
from whisper_flash_attention.engine.workspace import Workspace
from whisper_flash_attention.kernels.greedy_sample import pick
from whisper_flash_attention.kernels.launch import Overlap, compiling, interpreted, set_pdl
from whisper_flash_attention.kernels.logits import logits

# So many steps are given to the device before it is waited for.
HEAD_START = 32


class DeviceDecoder:
    """Turns tokens into logits, or a prompt into an answer, on one state's buffers.

    Rows of the batch take the first slots of the state; the others count as ended and cost next to
    nothing.
    """

    def __init__(
        self, weights: DecoderWeights, state: DecodeState, work: Workspace, graphs: Graphs
    ) -> None:
        self._weights = weights
        self._state = state
        self._work = work
        self._graphs = graphs
        self._step = FusedStep(weights, state, work)
        self._rules: tuple[object, ...] | None = None
        self._kind: tuple[object, ...] | None = None
        self._rows = 0
        self._compiled = False
        # What was last watched, [B] float32.
        self.watched: torch.Tensor | None = None

    @property
    def state(self) -> DecodeState:
        """The buffers that the decoder works on."""
        return self._state

    def prepare(self) -> None:
        """Make ready on memory that others may have used meanwhile."""
        self._rules = None
        self._kind = None
        self._rows = 0
        self._state.tokens.zero_()
        self._work.prepare()

    def start(
        self, states: torch.Tensor, prompt: torch.Tensor, watch: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Take the encoder's states [clips, S, D] and the prompt [B, P]; give logits [B, V]."""
        self._run_prompt(states, prompt, "logits", self._store_logits, watch)
        # `advance` moves on by one before its pass.
        self._state.positions.fill_(prompt.shape[1] - 1)
        return self._raw(len(prompt))

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token per row [B] and give the next logits [B, V] in float32."""
        self._state.tokens[: len(tokens)] = tokens
        self._run(("step", "logits", self._state.branching), self._advance)
        return self._raw(len(tokens))

    def greedy(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        request: Request,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Decoded:
        """The whole answer by the best token of every step, under rules that kernels know.

        `meanwhile` is called once the device has been given work: all of it, or where rows may end
        `HEAD_START` steps.

        Raises:
            NotFinite: a logit was NaN or infinite.
        """
        rules, pad = request.rules.fused, request.pad
        assert rules is not None
        self._set_rules(rules, prompt, request)
        self._run_prompt(
            states, prompt, f"pick {pad}", lambda count: self._pick(count, pad), request.watch
        )
        steps = request.max_length - prompt.shape[1] - 1
        may_end = bool(request.eos) and rules.min_length < request.max_length
        look = Look(self._state.finished) if may_end else None
        first = min(steps, HEAD_START) if may_end else steps
        is_over = self._take(range(first), pad, look)
        meanwhile()
        if not is_over:
            self._take(range(first, steps), pad, look)
        return self._answer(prompt, request, may_end)

    def _take(self, steps: range, pad: int, look: Look | None) -> bool:
        """Take steps, which are counted from 0; True if all rows had ended before the last.

        Beyond `HEAD_START` the host waits at every look for the look before: it would otherwise ask
        for all steps before the device has done the few that the answers need.
        """
        for done in steps:
            waits = done >= HEAD_START
            if look is not None and done % LOOK_EVERY == 0 and look.all_hold(wait=waits):
                return True
            self.step(pad)
        return False

    def step(self, pad: int) -> None:
        """Run every row's last token, and choose the next; rows that have ended get `pad`."""
        self._run(("step", pad), lambda: self._one_step(pad))

    def begin(
        self, states: torch.Tensor, starts: Starts, rules: FusedRules, request: Request
    ) -> None:
        """Run prompts given encoder states [B, S, D], and choose the first token of every row.

        Args:
            rules: of any of the rows, for what they have in common; so is the request.
        """
        batch, pad = len(starts.prompt), request.pad
        self._set_flags(rules, request.eos)
        self._rules = None
        self._work.settings[:batch].copy_(starts.settings)
        self._work.limits[:batch].copy_(starts.limits)
        self._run_prompt(
            states,
            starts.prompt,
            f"pick {pad}",
            lambda count: self._pick(count, pad),
            request.watch,
            starts,
        )

    def clear(self, rules: FusedRules, request: Request) -> None:
        """Have no row; `adopt` brings them, of which rules and request are as in `begin`."""
        self._set_flags(rules, request.eos)
        self._rules = None
        self._rows = 0
        self._work.settings.zero_()
        self._work.x.zero_()
        state = self._state
        for tensor in (state.positions, state.limits, state.failed, state.sum_logprobs):
            tensor.zero_()
        state.finished.fill_(True)
        if not self._compiled:
            self._compile(1, lambda count: self._pick(count, request.pad))

    def adopt(self, other: DeviceDecoder, slots: torch.Tensor, length: int) -> None:
        """Let the first N rows of another decoder, which just began, go on in `slots` [N] int64.

        Args:
            length: tokens of the longest prompt.
        """
        rows = len(slots)
        self._state.adopt(other._state, slots, length + 1)
        self._work.settings.index_copy_(0, slots, other._work.settings[:rows])
        self._step.residual(1).index_copy_(0, slots, other._step.residual(1)[:rows])

    def _set_rules(self, rules: FusedRules, prompt: torch.Tensor, request: Request) -> None:
        """Fill the tables that the kernels read; those of the last call often still hold."""
        batch, length = prompt.shape
        key = (rules, request.eos, request.max_length, length)
        vocabulary = self._state.layout.vocabulary
        if key != self._rules:
            self._rules = key
            self._set_flags(rules, request.eos)
            settings = torch.tensor(rules.settings(vocabulary, request.max_length))
            self._work.settings.copy_(settings.expand(self._state.layout.slots, -1))
        elif rules.timestamps is None:
            return
        limits = rules.limits(History(prompt, length), vocabulary)
        self._work.limits[:batch] = limits
        if rules.timestamps is None:
            self._work.limits[batch:] = limits[:1]

    def _set_flags(self, rules: FusedRules, eos: tuple[int, ...]) -> None:
        kind = rules.kind(eos)
        if kind != self._kind:
            self._kind = kind
            flags = self._work.flags
            flags.copy_(rules.flags(len(flags), eos, flags.device))

    def _run_prompt(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        purpose: str,
        finish: Callable[[int], None],
        watch: tuple[int, int] | None,
        starts: Starts | None = None,
    ) -> None:
        """Run the prompt through all layers, from a fresh state, and `finish` the pass.

        Where rows have `starts` of their own they end at the same place of a pass: shorter ones
        begin at positions below 0.
        """
        batch, count = prompt.shape
        state, work = self._state, self._work
        place = None if watch is None else watch[1]
        if not self._compiled:
            self._compile(min(count, state.layout.prompt), finish)
        if batch != self._rows:
            self._rows = batch
            work.absent.fill_(True)
            work.absent[:batch] = False
        if count > state.layout.prompt:
            self._run_long_prompt(states, _padded(prompt, state.layout.slots), place, starts)
            self._run(("long prompt", purpose), lambda: finish(1))
            self._look_at(watch, batch)
            return
        work.prompt[:batch, :count] = prompt
        ragged = starts is not None
        if starts is not None:
            work.starts.zero_()
            work.starts[:batch] = starts.lengths - count
            self._set_places(starts.places + count - starts.lengths)
        if work.states is not None:
            work.states[: len(states)].copy_(states)
        else:
            torch_decoder.fill_cross(self._weights, states, state)

        def launch() -> None:
            self._reset()
            if work.states is not None:
                torch_decoder.fill_cross(self._weights, work.states, state)
            state.output[:, :count].copy_(work.prompt[:, :count])
            if ragged:
                state.positions.copy_(work.starts)
            self._step.embed(work.prompt[:, :count], ragged=ragged)
            self._step.layers(count)
            if place is not None:
                rows = self._step.residual(count).view(state.layout.slots, count, -1)
                work.watched.copy_(
                    torch_decoder.rows_at(rows, work.places) if ragged else rows[:, place]
                )
            finish(count)

        key: tuple[Hashable, ...] = ("ragged prompt" if ragged else "prompt", purpose, count)
        if place is not None:
            key = (*key, "watched" if ragged else place)
        self._run(key, launch)
        self._look_at(watch, batch)

    def _look_at(self, watch: tuple[int, int] | None, batch: int) -> None:
        """How likely the watched token was, from what the prompt's pass kept of its place."""
        if watch is not None:
            rows = self._work.watched[:batch]
            self.watched = torch_decoder.probability(self._weights, rows, watch[0])

    def _run(self, key: Hashable, launch: Callable[[], None]) -> None:
        self._graphs.run(key, launch)
        set_pdl(Overlap.NONE)

    def _compile(self, count: int, finish: Callable[[int], None]) -> None:
        """Have all kernels of a decode compiled at once, before the first pass needs one."""
        self._compiled = True
        if interpreted():
            return
        with compiling():
            for tokens in {count, 1}:
                self._step.layers(tokens)
                finish(tokens)
        set_pdl(Overlap.NONE)

    def _run_long_prompt(
        self, states: torch.Tensor, prompt: torch.Tensor, place: int | None, starts: Starts | None
    ) -> None:
        """A prompt of many tokens, [slots, P], through PyTorch's matrix products."""
        state, count = self._state, prompt.shape[1]
        self._reset()
        torch_decoder.fill_cross(self._weights, states, state)
        state.output[:, :count].copy_(prompt)
        rows = torch_decoder.forward(self._weights, state, prompt, 0)
        last, watched = rows[:, -1], None if place is None else rows[:, place]
        state.positions.fill_(count - 1)
        if starts is not None:
            state.positions[: len(starts.lengths)] = starts.lengths - 1
            last = torch_decoder.rows_at(rows, state.positions.long())
            self._set_places(starts.places)
            watched = None if place is None else torch_decoder.rows_at(rows, self._work.places)
        self._work.x[: state.layout.slots].copy_(last)
        if watched is not None:
            self._work.watched.copy_(watched)

    def _set_places(self, places: torch.Tensor) -> None:
        """Which token of a row in a pass, [B] int64, is the one behind which another is watched."""
        self._work.places.zero_()
        self._work.places[: len(places)] = places

    def _reset(self) -> None:
        state = self._state
        state.positions.zero_()
        state.failed.zero_()
        state.sum_logprobs.zero_()
        state.finished.copy_(self._work.absent)
        state.limits.copy_(self._work.limits)

    def _advance(self) -> None:
        self._state.positions.add_(1)
        self._step.embed(self._state.tokens[:, None])
        self._step.layers(1)
        self._store_logits(1)

    def _one_step(self, pad: int) -> None:
        self._step.layers(1)
        self._pick(1, pad)

    def _logits(self, count: int, raw: torch.Tensor | None) -> None:
        state, work, norm = self._state, self._work, self._weights.final_norm
        logits(
            self._step.residual(count),
            norm.weight,
            norm.bias,
            self._weights.projection,
            work.flags,
            state.limits,
            work.settings,
            work.best,
            raw=raw,
            tokens_per_slot=count,
            eps=norm.eps,
        )

    def _store_logits(self, count: int) -> None:
        assert self._work.logits is not None
        self._logits(count, self._work.logits)

    def _pick(self, count: int, pad: int) -> None:
        state, work = self._state, self._work
        self._logits(count, None)
        pick(
            work.best,
            work.flags,
            state.limits,
            work.settings,
            tokens=state.tokens,
            output=state.output,
            positions=state.positions,
            finished=state.finished,
            failed=state.failed,
            sum_logprobs=state.sum_logprobs,
            embedding=self._weights.embedding,
            position_embedding=self._weights.positions,
            x=self._step.residual(1),
            pad=pad,
            tokens_per_slot=count,
        )

    def _raw(self, batch: int) -> torch.Tensor:
        assert self._work.logits is not None
        return self._work.logits[:batch]

    def _answer(self, prompt: torch.Tensor, request: Request, may_end: bool) -> Decoded:
        batch, begin = prompt.shape
        output = self._state.output[:batch, : request.max_length].clone()
        longest = output.new_full((), request.max_length - begin - 1)
        if may_end:
            ends = torch.tensor(request.eos, device=output.device)
            over = torch.isin(output[:, begin:], ends).int().cumsum(1) > 0
            longest = (~over).sum(1).max()
        failed, length = torch.stack([self._state.failed[:batch].any(), longest]).tolist()
        if failed:
            check_finite(self._state.failed[:batch])
        sums = self._state.sum_logprobs[:batch].clone() if request.want_logprobs else None
        kept = min(begin + 1 + length, request.max_length)
        watched = None if request.watch is None else self.watched
        return Decoded(output[:, :kept], sum_logprobs=sums, watched=watched)


def _padded(prompt: torch.Tensor, slots: int) -> torch.Tensor:
    """The prompt with rows of zeros up to the number of slots."""
    padded = prompt.new_zeros((slots, prompt.shape[1]))
    padded[: len(prompt)] = prompt
    return padded


@dataclass(frozen=True)
class Starts:
    """Prompts of rows that begin together, each with a length and rules of its own.

    Args:
        prompt: [B, P] int64, padded at the ends of rows.
        lengths: of the rows, [B] int64.
        places: positions in the prompts behind which a token is watched, [B] int64.
        settings: [B, 8] int32, and limits: [B, 4] int32, as the kernels `logits` and `pick` read
            them.
    """

    prompt: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor
    settings: torch.Tensor
    limits: torch.Tensor
