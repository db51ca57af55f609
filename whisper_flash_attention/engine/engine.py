"""The story: features become encoder states, states and a prompt become tokens.

    engine = Engine.of(model)                 # reads the weights in place, watches them
    states = engine.encode(features)          # [clips, 1500, D]
    decoded = engine.decode(states, prompt, request)
    for finished in engine.decode_stream(more_jobs, slots, max_length=448): ...

A decode takes buffers (`cache`) cut from one arena, a decoder that turns tokens into logits
(`plain` in PyTorch everywhere, `device` with Triton kernels and CUDA graphs on NVIDIA's GPUs), and
chooses tokens: on the device without the host (`device`), with any rules (`choose`), or by beams
(`beam`). `plan` says what a decode takes, before it is run. `slots` lets many clips, one after
another, share the rows of one batch.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch

from whisper_flash_attention.engine import beam
from whisper_flash_attention.engine.cuda_graphs import Graphs, Recorder
from whisper_flash_attention.engine.encoder import Encoder, PlainEncoder
from whisper_flash_attention.engine.kv_cache import DecodeState, state_bytes
from whisper_flash_attention.engine.layout import (
    Arena,
    Layout,
    has_encoder_kernels,
    layout_for,
    slots_layout,
)
from whisper_flash_attention.engine.logits_processors import Rules
from whisper_flash_attention.engine.request import Decoded, Request
from whisper_flash_attention.engine.sampling import choose_tokens
from whisper_flash_attention.engine.scheduler import Checks, Finished, Job, Rows, serve
from whisper_flash_attention.engine.torch_decoder import PlainDecoder
from whisper_flash_attention.engine.torch_slots import PlainSlots
from whisper_flash_attention.engine.weights import EncoderWeights, Watch, Weights, collect
from whisper_flash_attention.errors import OptionError

# Layouts whose recorded graphs are kept; they share the arena, so that only graphs add up.
MOST_LAYOUTS = 8


class Engine:
    """Runs one model's weights. Calls from several threads wait for one another.

    Nothing of the model is copied. The buffers of the largest decode so far, those of one stream,
    and the CUDA graphs on them, are kept for the next one; `release` gives them back.
    """

    _engines: ClassVar[WeakKeyDictionary[Any, Engine]] = WeakKeyDictionary()
    _alive: ClassVar[WeakSet[Engine]] = WeakSet()
    _making = threading.Lock()

    def __init__(self, model: Any) -> None:
        self.weights: Weights = collect(model)
        self._watch = Watch(model)
        self._lock = threading.RLock()
        self._make_space()
        Engine._alive.add(self)

    def _make_space(self) -> None:
        """Begin without buffers and graphs."""
        self._recorder = Recorder()
        self._buffers = Buffers(self.weights, self._recorder)
        # Of a stream that has ended: while one runs, what it has in its slots is its own.
        self._idle: list[Buffers] = []
        self._encoder = encoder_for(self.weights.encoder, self._recorder)

    @classmethod
    def of(cls, model: Any) -> Engine:
        """The model's engine; a new one if its parameters moved or modules were replaced."""
        with cls._making:
            engine = cls._engines.get(model)
            if engine is None or not engine._watch.unchanged():
                cls._engines.pop(model, None)
                engine = cls._engines[model] = cls(model)
            return engine

    @classmethod
    def forget(cls, model: Any) -> None:
        """Drop the model's engine, its buffers and graphs."""
        with cls._making:
            cls._engines.pop(model, None)

    @classmethod
    def _renew_after_fork(cls) -> None:
        """Replace locks and buffers in a child process.

        No thread of the child will release what other threads of its parent held, or finish what
        they were doing to the buffers. Those of a GPU, which a child cannot use, are left alone.
        """
        cls._making = threading.Lock()
        for engine in list(cls._alive):
            engine._lock = threading.RLock()
            if engine.weights.device.type == "cpu":
                engine._make_space()

    @torch.no_grad()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encoder states [B, 1500, D] of log-mel features [B, mel bins, 3000]."""
        features = features.to(self.weights.dtype)
        with self._lock, self._on_device():
            return self._encoder.run(features)

    def language_logits(
        self, states: torch.Tensor, start: int, languages: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[B, N]` of the languages' tokens after the token that starts a prompt.

        Args:
            states: encoder states `[B, S, D]`.
            start: id of <|startoftranscript|>.
            languages: ids, int64 `[N]` on the device of the states.
        """
        prompt = languages.new_full((states.shape[0], 1), start)
        request = Request(rules=Rules(), max_length=2, eos=(), pad=0, want_logits=True)
        logits = self.decode(states, prompt, request).logits
        assert logits is not None
        return logits[0][:, languages]

    @torch.no_grad()
    def decode(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        request: Request,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Decoded:
        """Tokens for every row of `prompt` [B, P], given encoder states [clips, S, D].

        Row r belongs to clip r // (B // clips). In a search by beams the rows of one search stand
        side by side.

        Args:
            meanwhile: called once: where kernels choose the tokens, when the device has work to do
                and before it is waited for; otherwise at first. What it raises is raised.

        Raises:
            NotFinite: NaN or infinity in the logits.
            OptionError: the rows are not those of whole searches by beams.
        """
        with self._lock, self._on_device():
            layout = layout_for(self.weights.decoder, states, prompt, request)
            decoder: beam.BranchingDecoder
            if not layout.kernels:
                decoder = PlainDecoder(self.weights.decoder, self._buffers.state(layout))
            else:
                decoder = on_device = self._buffers.device_decoder(layout)
                if not layout.raw:
                    return on_device.greedy(states, prompt, request, meanwhile)
            meanwhile()
            if request.beams is not None:
                return beam.search(decoder, states, prompt, request)
            return choose_tokens(decoder, states, prompt, request)

    def decode_stream(
        self,
        more: Callable[[int], Sequence[Job]],
        slots: int,
        *,
        max_length: int,
        refill: int | None = None,
    ) -> Iterator[Finished]:
        """Decode clip after clip in so many slots, and give every answer as soon as it is there.

        Other calls of the engine may come between two answers, and within `more`.

        Args:
            more: asked for so many jobs or fewer whenever slots are free; the stream ends when it
                gives none and all slots are free.
            max_length: tokens per clip at most, prompt included.
            refill: so many slots must be free, or all, before more jobs are asked for; where the
                kernels run, an eighth of the slots if it is not given, and else one.

        Raises:
            NotFinite: NaN or infinity in the logits; the message has the job's tag.
            OptionError: a job does not fit, or a number makes no sense.
        """
        if slots < 1 or not (refill is None or 1 <= refill <= slots):
            raise OptionError(f"slots {slots}, refill {refill}: give 1 or more, refill up to slots")
        jobs = more(slots)
        if not jobs:
            return
        with self._lent_buffers() as buffers:
            check = Checks(jobs[0], max_length)
            check(jobs[0])
            with self._turn():
                layout = slots_layout(
                    self.weights.decoder,
                    slots=slots,
                    keys=len(jobs[0].states),
                    max_length=max_length,
                    form=jobs[0].request.cross_attention,
                )
                refill = refill or (max(1, slots // 8) if layout.kernels else 1)
                rows = self._rows(layout, buffers, jobs[0], slots, refill)
            yield from serve(
                jobs, more, rows, slots=slots, refill=refill, check=check, turn=self._turn
            )

    def _rows(self, layout: Layout, buffers: Buffers, first: Job, slots: int, refill: int) -> Rows:
        weights = self.weights.decoder
        if not layout.kernels:
            return PlainSlots(weights, buffers.state(layout))
        from whisper_flash_attention.engine.cuda_slots import DeviceSlots

        decoder = buffers.device_decoder(layout)
        entry = self._buffers.device_decoder
        return DeviceSlots(weights, decoder, entry, first, slots=slots, refill=refill)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock, torch.no_grad(), self._on_device():
            yield

    @contextmanager
    def _lent_buffers(self) -> Iterator[Buffers]:
        """Buffers for one stream; those of one are kept."""
        with self._lock:
            lent = self._idle.pop() if self._idle else Buffers(self.weights, self._recorder)
        try:
            yield lent
        finally:
            with self._lock:
                self._idle = [lent]

    def _on_device(self) -> AbstractContextManager[Any]:
        """Launches go to the current device: make it the weights'."""
        device = self.weights.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def release(self) -> None:
        """Give back the buffers and graphs that are kept between calls."""
        with self._lock:
            self._buffers.release()
            self._idle.clear()
            self._encoder.release()
            self._recorder.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Engine._renew_after_fork)

if TYPE_CHECKING:
    from whisper_flash_attention.engine.cuda_decoder import DeviceDecoder


class Buffers:
    """Hands out states and decoders. What was handed out before is void: one decode at a time."""

    def __init__(self, weights: Weights, recorder: Recorder) -> None:
        self._weights = weights
        self._recorder = recorder
        self._arena: Arena | None = None
        self._decoders: OrderedDict[Layout, DeviceDecoder] = OrderedDict()
        self._last: Layout | None = None

    def state(self, layout: Layout) -> DecodeState:
        """A state of this layout for the plain decoder."""
        return DecodeState.cut(layout, self._room(layout, state_bytes(layout)))

    def device_decoder(self, layout: Layout) -> DeviceDecoder:
        """A decoder of this layout on kernels, with the graphs that it recorded before."""
        from whisper_flash_attention.engine.cuda_decoder import DeviceDecoder
        from whisper_flash_attention.engine.workspace import Workspace, workspace_bytes

        arena = self._room(layout, state_bytes(layout) + workspace_bytes(layout))
        decoder = self._decoders.get(layout)
        if decoder is None:
            state = DecodeState.cut(layout, arena)
            work = Workspace.cut(layout, arena)
            decoder = DeviceDecoder(self._weights.decoder, state, work, Graphs(self._recorder))
            self._decoders[layout] = decoder
            while len(self._decoders) > MOST_LAYOUTS:
                self._decoders.popitem(last=False)
        self._decoders.move_to_end(layout)
        if layout != self._last:
            # Another layout may have written over this one's tables.
            decoder.prepare()
            self._last = layout
        return decoder

    def release(self) -> None:
        """Give all memory back."""
        self._decoders.clear()
        self._arena = None
        self._last = None

    def _room(self, layout: Layout, size: int) -> Arena:
        if self._arena is None or self._arena.capacity < size:
            self.release()
            self._arena = Arena(layout.device, size)
        return self._arena


def encoder_for(weights: EncoderWeights, recorder: Recorder) -> Encoder:
    """The encoder that is fastest where these weights are."""
    if has_encoder_kernels(weights.positions.device, weights.positions.dtype):
        from whisper_flash_attention.engine.triton_encoder import FusedEncoder

        return FusedEncoder(weights, recorder)
    return PlainEncoder(weights, recorder)
