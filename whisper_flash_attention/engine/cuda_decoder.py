"""The decoder on an NVIDIA GPU: kernels in CUDA graphs, tokens chosen without the host.

Greedy decoding with processors that the kernels support stays on the device: a recorded step ends
with the next token and the next input row. The host replays it and polls every few steps for the
end. With other processors, sampling, scores or beams a step ends with the logits, and PyTorch
operations choose the token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from whisper_flash_attention.engine import torch_decoder
from whisper_flash_attention.engine.cuda_graphs import POLL_INTERVAL, CompletionPoll, GraphCache
from whisper_flash_attention.engine.layout import DecodeState, length_bucket
from whisper_flash_attention.engine.logits_processors import History, KernelProcessors
from whisper_flash_attention.engine.request import DecodeOutput, Request
from whisper_flash_attention.engine.sampling import check_finite
from whisper_flash_attention.engine.triton_layers import TritonLayers, Workspace
from whisper_flash_attention.engine.weights import DecoderWeights
from whisper_flash_attention.kernels.greedy_sample import greedy_sample
from whisper_flash_attention.kernels.launch import Overlap, compiling, interpreted, set_pdl
from whisper_flash_attention.kernels.logits import logits

# Steps that the host queues before it waits for the device.
HEAD_START = 32


class CudaDecoder:
    """Turns tokens into logits, or decodes greedily, on one state's buffers.

    Rows of the batch take the first slots of the state; the others count as finished and take
    almost no time.
    """

    def __init__(
        self, weights: DecoderWeights, state: DecodeState, work: Workspace, graphs: GraphCache
    ) -> None:
        self._weights = weights
        self._state = state
        self._work = work
        self._graphs = graphs
        self._step = TritonLayers(weights, state, work)
        self._tables_key: tuple[object, ...] | None = None
        self._flags_key: tuple[object, ...] | None = None
        self._rows = 0
        self._compiled = False
        # Probability of the last probe, [B] float32.
        self.probe_probability: torch.Tensor | None = None

    @property
    def state(self) -> DecodeState:
        """The buffers that the decoder works on."""
        return self._state

    def prepare(self) -> None:
        """Initialise the buffers again after others used the memory."""
        self._tables_key = None
        self._flags_key = None
        self._rows = 0
        self._state.tokens.zero_()
        self._work.prepare()

    def start(
        self, states: torch.Tensor, prompt: torch.Tensor, probe: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Logits [B, V] after the prompt [B, P], given the encoder's states [clips, S, D]."""
        self._run_prompt(states, prompt, "logits", self._store_logits, probe)
        # `advance` increments positions before its pass.
        self._state.positions.fill_(prompt.shape[1] - 1)
        return self._raw(len(prompt))

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token per row [B]; return the next logits [B, V] in float32."""
        self._state.tokens[: len(tokens)] = tokens
        self._run(("step", "logits", self._state.branching), self._advance)
        return self._raw(len(tokens))

    def greedy(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        request: Request,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> DecodeOutput:
        """Decode greedily with processors that the kernels support.

        `meanwhile` is called once steps are queued: all of them, or `HEAD_START` where rows may end
        early.

        Raises:
            NotFinite: a logit was NaN or infinite.
        """
        processors, pad = request.processors.kernel_processors, request.pad
        assert processors is not None
        self._set_processors(processors, prompt, request)
        self._run_prompt(
            states, prompt, f"greedy {pad}", lambda count: self._sample(count, pad), request.probe
        )
        steps = request.max_length - prompt.shape[1] - 1
        may_end = bool(request.eos) and processors.min_length < request.max_length
        poll = CompletionPoll(self._state.finished) if may_end else None
        first = min(steps, HEAD_START) if may_end else steps
        is_over = self._run_steps(range(first), pad, poll)
        meanwhile()
        if not is_over:
            self._run_steps(range(first, steps), pad, poll)
        return self._output(prompt, request, may_end)

    def _run_steps(self, steps: range, pad: int, poll: CompletionPoll | None) -> bool:
        """Run steps, counted from 0; return True if all rows had ended before the last.

        Beyond `HEAD_START` the host waits at each poll for the previous one, so that it does not
        queue many steps that are not needed.
        """
        for done in steps:
            waits = done >= HEAD_START
            if poll is not None and done % POLL_INTERVAL == 0 and poll.all_true(wait=waits):
                return True
            self.step(pad)
        return False

    def step(self, pad: int) -> None:
        """Run every row's last token and choose the next; ended rows get `pad`."""
        self._run(("step", pad), lambda: self._one_step(pad))

    def begin(
        self,
        states: torch.Tensor,
        prompts: RaggedPrompts,
        processors: KernelProcessors,
        request: Request,
    ) -> None:
        """Run prompts given encoder states [B, S, D], and choose the first token of every row.

        Args:
            processors, request: of any row; the rows differ only in lengths and positions.
        """
        pad = request.pad
        self._set_flags(processors, request.eos)
        self._tables_key = None
        self._run_prompt(
            states,
            prompts.prompt,
            f"greedy {pad}",
            lambda count: self._sample(count, pad),
            request.probe,
            prompts,
        )

    def clear(self, processors: KernelProcessors, request: Request) -> None:
        """Start without rows, which `adopt` adds; arguments as of `begin`."""
        self._set_flags(processors, request.eos)
        self._tables_key = None
        self._rows = 0
        self._work.settings.zero_()
        self._work.adopted_probability.zero_()
        self._work.x.zero_()
        state = self._state
        for tensor in (state.positions, state.limits, state.failed, state.sum_logprobs):
            tensor.zero_()
        state.finished.fill_(True)
        if not self._compiled:
            self._compile(1, lambda count: self._sample(count, request.pad))

    @property
    def adopted_probability(self) -> torch.Tensor:
        """Probability of the probe of the row that was adopted in each slot, [slots] float32."""
        return self._work.adopted_probability

    def adopt(self, other: CudaDecoder, prompts: RaggedPrompts, request: Request) -> None:
        """Continue the rows of another decoder, after its `begin`, in the slots of `prompts`."""
        rows, probe, theirs = len(prompts.slots), request.probe, other._work
        capacity = min(self._state.layout.positions, other._state.layout.positions)
        length = min(length_bucket(prompts.prompt.shape[1] + 1), capacity)
        slots = self._work.adopted[:rows]
        slots.copy_(prompts.slots)

        def launch() -> None:
            self._state.adopt(other._state, slots, length)
            self._work.settings.index_copy_(0, slots, theirs.settings[:rows])
            self._step.residual(1).index_copy_(0, slots, other._step.residual(1)[:rows])
            if probe is not None:
                found = torch_decoder.probability(self._weights, theirs.probe_rows[:rows], probe[0])
                self.adopted_probability.index_copy_(0, slots, found)

        # A graph holds addresses of both decoders; powers of two bound the number of graphs.
        if rows & (rows - 1):
            launch()
        else:
            token = None if probe is None else probe[0]
            other._run(("adopt", weakref.ref(self), rows, length, token), launch)

    def _set_processors(
        self, processors: KernelProcessors, prompt: torch.Tensor, request: Request
    ) -> None:
        """Fill the tables that the kernels read, unless those of the last call are the same."""
        batch, length = prompt.shape
        key = (processors, request.eos, request.max_length, length)
        vocabulary = self._state.layout.vocabulary
        if key != self._tables_key:
            self._tables_key = key
            self._set_flags(processors, request.eos)
            settings = torch.tensor(processors.settings(vocabulary, request.max_length))
            self._work.settings.copy_(settings.expand(self._state.layout.slots, -1))
        elif processors.timestamps is None:
            return
        limits = processors.limits(History(prompt, length), vocabulary)
        self._work.limits[:batch] = limits
        if processors.timestamps is None:
            self._work.limits[batch:] = limits[:1]

    def _set_flags(self, processors: KernelProcessors, eos: tuple[int, ...]) -> None:
        key = processors.token_bits(eos)
        if key != self._flags_key:
            self._flags_key = key
            flags = self._work.flags
            flags.copy_(processors.flags(len(flags), eos, flags.device))

    def _run_prompt(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        variant: str,
        finish: Callable[[int], None],
        probe: tuple[int, int] | None,
        prompts: RaggedPrompts | None = None,
    ) -> None:
        """Run the prompt through all layers, from a fresh state, then `finish` the pass.

        With `starts`, rows end at the same column of the pass: shorter ones begin at positions
        below 0.
        """
        batch, count = prompt.shape
        state, work = self._state, self._work
        place = None if probe is None else probe[1]
        if not self._compiled:
            is_short = count <= state.layout.prompt
            self._compile(
                count if is_short else state.layout.prompt, finish, states if is_short else None
            )
        if batch != self._rows:
            self._rows = batch
            work.absent.fill_(True)
            work.absent[:batch] = False
            work.first_positions.zero_()
            work.probe_positions.zero_()
        if prompts is not None:
            self._set_tables(prompts)
        if count > state.layout.prompt:
            self._run_long_prompt(states, _padded(prompt, state.layout.slots), place, prompts)
            self._run(("long prompt", variant), lambda: finish(1))
            if prompts is None:
                self._read_probe(probe, batch)
            return
        work.prompt[:batch, :count] = prompt
        ragged = prompts is not None
        if work.states is not None:
            work.states[: len(states)].copy_(states)
        else:
            self._step.project_states(states)

        def launch() -> None:
            self._reset()
            if work.states is not None:
                self._step.project_states(work.states)
            state.output[:, :count].copy_(work.prompt[:, :count])
            if ragged:
                state.positions.copy_(work.first_positions)
            self._step.embed(work.prompt[:, :count], ragged=ragged)
            self._step.layers(count)
            if place is not None:
                rows = self._step.residual(count).view(state.layout.slots, count, -1)
                work.probe_rows.copy_(
                    torch_decoder.rows_at(rows, work.probe_positions) if ragged else rows[:, place]
                )
            finish(count)

        key: tuple[Hashable, ...] = ("ragged prompt" if ragged else "prompt", variant, count)
        if place is not None:
            key = (*key, "probe" if ragged else place)
        self._run(key, launch)
        if not ragged:
            self._read_probe(probe, batch)

    def _read_probe(self, probe: tuple[int, int] | None, batch: int) -> None:
        """Compute the probe's probability from the residual rows that the prompt pass kept."""
        if probe is not None:
            rows = self._work.probe_rows[:batch]
            self.probe_probability = torch_decoder.probability(self._weights, rows, probe[0])

    def _run(self, key: Hashable, launch: Callable[[], None]) -> None:
        self._graphs.run(key, launch)
        set_pdl(Overlap.NONE)

    def _compile(
        self, count: int, finish: Callable[[int], None], states: torch.Tensor | None = None
    ) -> None:
        """Compile all kernels of a decode in parallel, before the first pass."""
        self._compiled = True
        if interpreted():
            return
        with compiling():
            if self._step.projects and states is not None:
                self._step.project_states(states)
            for tokens in {count, 1}:
                self._step.layers(tokens)
                finish(tokens)
        set_pdl(Overlap.NONE)

    def _run_long_prompt(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        place: int | None,
        prompts: RaggedPrompts | None,
    ) -> None:
        """Run a long prompt, [slots, P], by PyTorch's matrix products."""
        state, count = self._state, prompt.shape[1]
        self._reset()
        torch_decoder.fill_cross(self._weights, states, state)
        state.output[:, :count].copy_(prompt)
        rows = torch_decoder.forward(self._weights, state, prompt, 0)
        last, probe_probability = rows[:, -1], None if place is None else rows[:, place]
        state.positions.fill_(count - 1)
        if prompts is not None:
            # Here all rows begin at the first column.
            state.positions.add_(self._work.first_positions)
            last = torch_decoder.rows_at(rows, state.positions.long())
            self._work.probe_positions.add_(self._work.first_positions)
            probe_probability = (
                None if place is None else torch_decoder.rows_at(rows, self._work.probe_positions)
            )
        self._work.x[: state.layout.slots].copy_(last)
        if probe_probability is not None:
            self._work.probe_rows.copy_(probe_probability)

    def _set_tables(self, prompts: RaggedPrompts) -> None:
        """Store the tables of the first rows."""
        work, batch = self._work, len(prompts.prompt)
        tables = (work.first_positions, work.probe_positions, work.settings, work.limits)
        torch._foreach_copy_(
            [table[:batch] for table in tables],
            [prompts.first_positions, prompts.probe_positions, prompts.settings, prompts.limits],
        )

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
        self._sample(1, pad)

    def _logits(self, count: int, raw: torch.Tensor | None) -> None:
        state, work, norm = self._state, self._work, self._weights.final_norm
        logits(
            self._step.residual(count),
            norm.weight,
            norm.bias,
            self._weights.projection.weight,
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

    def _sample(self, count: int, pad: int) -> None:
        state, work = self._state, self._work
        self._logits(count, None)
        greedy_sample(
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

    def _output(self, prompt: torch.Tensor, request: Request, may_end: bool) -> DecodeOutput:
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
        probe_probability = None if request.probe is None else self.probe_probability
        return DecodeOutput(
            output[:, :kept], sum_logprobs=sums, probe_probability=probe_probability
        )


def _padded(prompt: torch.Tensor, slots: int) -> torch.Tensor:
    """The prompt with rows of zeros up to the number of slots."""
    padded = prompt.new_zeros((slots, prompt.shape[1]))
    padded[: len(prompt)] = prompt
    return padded


@dataclass(frozen=True)
class RaggedPrompts:
    """Prompts of rows that start together, each with its own length and processor settings.

    Args:
        prompt: [B, P] int64, padded at the ends of rows.
        slots: in which the rows go on, [B] int64.
        first_positions: of each row in the pass of all, in which they end together: its length - P,
            [B] int64.
        probe_positions: the column of the pass at which `Request.probe` is read, [B] int64.
        settings, limits: [B, 8] and [B, 4] int64, as the kernels `logits` and `greedy_sample` read
            them.
    """

    prompt: torch.Tensor
    slots: torch.Tensor
    first_positions: torch.Tensor
    probe_positions: torch.Tensor
    settings: torch.Tensor
    limits: torch.Tensor
