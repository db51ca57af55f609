"""Run a model: features to encoder states, encoder states and a prompt to tokens.

    engine = Engine.of(model)                 # reads the weights in place; or Engine(weights)
    states = engine.encode(features)          # [clips, 1500, D]
    decoded = engine.decode(states, prompt, request)
    for finished in engine.decode_stream(more_jobs, slots, max_length=448): ...

A decode uses buffers from one arena (`layout`) and a decoder that turns tokens into logits:
`torch_decoder` on every device, `cuda_decoder` with Triton kernels and CUDA graphs on
NVIDIA GPUs. Tokens are chosen on the device (`cuda_decoder`), with any logits processors
(`sampling`), or by beam search (`beam`). `scheduler` lets a stream of clips share the rows of one
batch; `memory_plan` computes what a decode needs before it runs.
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
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from whisper_flash_attention.engine import beam
from whisper_flash_attention.engine.cuda_graphs import GraphCache, GraphRecorder, is_recorded
from whisper_flash_attention.engine.device_memory import release_cached
from whisper_flash_attention.engine.encoder import Encoder, TorchEncoder
from whisper_flash_attention.engine.layout import (
    DecodeState,
    Layout,
    SharedArena,
    cache_bytes,
    has_encoder_kernels,
    has_kernels,
    layout_for,
    slots_layout,
    state_bytes,
)
from whisper_flash_attention.engine.logits_processors import LogitsProcessors
from whisper_flash_attention.engine.request import DecodeOutput, Request
from whisper_flash_attention.engine.sampling import choose_tokens
from whisper_flash_attention.engine.scheduler import (
    DecodeJob,
    FinishedJob,
    Slots,
    StreamChecker,
    run_slots,
)
from whisper_flash_attention.engine.torch_decoder import TorchDecoder
from whisper_flash_attention.engine.torch_slots import TorchSlots
from whisper_flash_attention.engine.weights import (
    EncoderWeights,
    Weights,
    WeightsSnapshot,
    collect_weights,
)
from whisper_flash_attention.errors import OptionError

# Layouts whose recorded graphs are kept; they share the arena, so that only graphs add up.
MOST_LAYOUTS = 8


class Engine:
    """Run one model's weights. Calls from several threads run one after another.

    On a CPU so do the calls of all engines of a process: each call uses all of PyTorch's threads.

    Nothing of the weights is copied. The buffers of the largest decode so far, those of one stream,
    and the CUDA graphs on them, are kept for the next call; `release` frees them.
    """

    _engines: ClassVar[WeakKeyDictionary[Any, Engine]] = WeakKeyDictionary()
    _alive: ClassVar[WeakSet[Engine]] = WeakSet()
    _registry_lock = threading.Lock()
    # Of all engines on CPUs: each call starts a thread per core, which others would only delay.
    _cpu_lock = threading.RLock()

    def __init__(self, weights: Weights, snapshot: WeightsSnapshot | None = None) -> None:
        self.weights = weights
        self._snapshot = snapshot
        self._lock = self._new_lock()
        self._reset_buffers()
        Engine._alive.add(self)

    @property
    def has_kernels(self) -> bool:
        """Whether it decodes by Triton kernels and CUDA graphs, of which sizes are recorded."""
        return has_kernels(self.weights.device)

    def _new_lock(self) -> threading.RLock:
        """Return a lock of its own, on a CPU the one of all engines there."""
        return Engine._cpu_lock if self.weights.device.type == "cpu" else threading.RLock()

    def _reset_buffers(self) -> None:
        """Start without buffers and graphs."""
        self._recorder = GraphRecorder()
        # Encoder and decodes take turns in one arena. A stream has its own: it encodes meanwhile.
        memory = SharedArena(self.weights.device)
        self._encoder = encoder_for(self.weights.encoder, self._recorder, memory)
        self._buffers = Buffers(self.weights, self._recorder, memory, self._encoder.space_bytes)
        # Buffers of finished streams; those of a running stream are not shared.
        self._idle: list[Buffers] = []
        # Where a decode calls back, and the callback encodes.
        self._is_decoding = False

    @classmethod
    def of(cls, model: Any) -> Engine:
        """Return the model's engine, a new one if parameters moved or modules were replaced."""
        with cls._registry_lock:
            engine = cls._engines.get(model)
            snapshot = None if engine is None else engine._snapshot
            if engine is None or snapshot is None or not snapshot.unchanged():
                cls._engines.pop(model, None)
                engine = cls(collect_weights(model), WeightsSnapshot(model))
                cls._engines[model] = engine
            return engine

    @classmethod
    def release_of(cls, model: Any) -> None:
        """Give back what the model's engine keeps, if it has one."""
        with cls._registry_lock:
            engine = cls._engines.get(model)
        if engine is not None:
            engine.release()

    @classmethod
    def forget(cls, model: Any) -> None:
        """Drop the model's engine, its buffers and graphs."""
        with cls._registry_lock:
            cls._engines.pop(model, None)

    @classmethod
    def _renew_after_fork(cls) -> None:
        """Replace locks and buffers in a child process.

        Locks held by other threads of the parent are never released in the child, and their work on
        the buffers is never finished. GPU buffers, unusable in a child, are left alone.
        """
        cls._registry_lock = threading.Lock()
        cls._cpu_lock = threading.RLock()
        for engine in list(cls._alive):
            engine._lock = engine._new_lock()
            if engine.weights.device.type == "cpu":
                engine._reset_buffers()

    @torch.no_grad()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encoder states [B, 1500, D] of log-mel features [B, mel bins, 3000]."""
        features = features.to(self.weights.dtype)
        with self._lock, self._on_device():
            if not self._is_decoding:
                return self._encoder.run(features)
            memory = SharedArena(self.weights.device)
            return encoder_for(self.weights.encoder, self._recorder, memory).run(features)

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
        request = Request(
            processors=LogitsProcessors(), max_length=2, eos=(), pad=0, want_logits=True
        )
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
    ) -> DecodeOutput:
        """Tokens for every row of `prompt` [B, P], given encoder states [clips, S, D].

        Row r belongs to clip r // (B // clips). The rows of one beam search are adjacent.

        Args:
            meanwhile: called once, before the host waits for the device: where kernels choose the
                tokens, after work was queued; otherwise before decoding. Its errors are raised.

        Raises:
            NotFinite: NaN or infinity in the logits.
            OptionError: the rows do not form whole beam searches.
        """
        with self._lock, self._on_device():
            before, self._is_decoding = self._is_decoding, True
            try:
                return self._decode(states, prompt, request, meanwhile)
            finally:
                self._is_decoding = before

    def _decode(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        request: Request,
        meanwhile: Callable[[], None],
    ) -> DecodeOutput:
        layout = layout_for(self.weights.decoder, states, prompt, request)
        decoder: beam.BranchingDecoder
        if not layout.kernels:
            decoder = TorchDecoder(self.weights.decoder, self._buffers.state(layout))
        else:
            decoder = on_device = self._buffers.cuda_decoder(layout)
            if not layout.raw:
                return on_device.greedy(states, prompt, request, meanwhile)
        meanwhile()
        if request.beams is not None:
            return beam.search(decoder, states, prompt, request)
        return choose_tokens(decoder, states, prompt, request)

    def decode_stream(
        self,
        more: Callable[[int], Sequence[DecodeJob]],
        slots: int,
        *,
        max_length: int,
        refill: int | None = None,
        is_waiting: Callable[[int], bool] = lambda free: False,
    ) -> Iterator[FinishedJob]:
        """Decode a stream of clips in `slots` slots; yield each result as soon as it is complete.

        Other calls of the engine may run between two results, and within `more`.

        Args:
            more: returns at most the given number of jobs, called whenever slots are free; the
                stream ends when it returns none and all slots are free.
            max_length: maximum number of tokens per clip, prompt included.
            refill: number of free slots before more jobs are requested; by default an eighth of
                the slots with kernels, otherwise 1.
            is_waiting: whether `more` would return jobs for this number of slots, as for
                `run_slots`.

        Raises:
            NotFinite: NaN or infinity in the logits; the message has the job's tag.
            OptionError: a job does not fit the stream, or `slots` or `refill` is out of range.
        """
        if slots < 1 or not (refill is None or 1 <= refill <= slots):
            raise OptionError(f"slots {slots}, refill {refill}: give 1 or more, refill up to slots")
        jobs = more(slots)
        if not jobs:
            return
        with self._stream_buffers() as buffers:
            check = StreamChecker(jobs[0], max_length)
            check(jobs[0])
            with self._exclusive():
                layout = slots_layout(
                    self.weights.decoder,
                    slots=slots,
                    keys=len(jobs[0].states),
                    max_length=max_length,
                    form=jobs[0].request.cross_attention,
                )
                refill = refill or (max(1, slots // 8) if layout.kernels else 1)
                rows = self._make_slots(layout, buffers, jobs[0], slots, refill)
            yield from run_slots(
                jobs,
                more,
                rows,
                slots=slots,
                refill=refill,
                check=check,
                exclusive=self._exclusive,
                is_waiting=is_waiting,
            )

    def _make_slots(
        self, layout: Layout, buffers: Buffers, first: DecodeJob, slots: int, refill: int
    ) -> Slots:
        weights = self.weights.decoder
        if not layout.kernels:
            return TorchSlots(weights, buffers.state(layout))
        from whisper_flash_attention.engine.cuda_slots import CudaSlots

        decoder = buffers.cuda_decoder(layout)
        prefill = self._buffers.cuda_decoder
        return CudaSlots(weights, decoder, prefill, first, slots=slots, refill=refill)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock, torch.no_grad(), self._on_device():
            yield

    @contextmanager
    def _stream_buffers(self) -> Iterator[Buffers]:
        """Lend buffers to one stream; those of one finished stream are kept."""
        with self._lock:
            buffers = self._idle.pop() if self._idle else self._new_buffers()
        try:
            yield buffers
        finally:
            with self._lock:
                self._idle = [buffers]

    def _new_buffers(self) -> Buffers:
        return Buffers(self.weights, self._recorder, SharedArena(self.weights.device))

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the weights' device current, where kernels are launched."""
        device = self.weights.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def release(self) -> None:
        """Give back the buffers and graphs that are kept between calls.

        On a GPU they go to the driver, with what PyTorch's allocator holds free, and with the
        workspaces of cuBLAS unless another engine has recorded their use.
        """
        with self._lock:
            self._buffers.release()
            self._idle.clear()
            self._encoder.release()
            self._recorder.release()
            if self.weights.device.type == "cuda":
                release_cached(self.weights.device, workspaces=not is_recorded())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Engine._renew_after_fork)

if TYPE_CHECKING:
    from whisper_flash_attention.engine.cuda_decoder import CudaDecoder


class Buffers:
    """Provide states and decoders for one decode at a time; each call invalidates the last.

    The caches of a state lie where the encoder works, which has its turn before. Everything else
    lies beyond that, and a decoder finds it as it was left.

    Args:
        encoder_bytes: what the encoder uses of the arena for a number of clips.
    """

    def __init__(
        self,
        weights: Weights,
        recorder: GraphRecorder,
        memory: SharedArena,
        encoder_bytes: Callable[[int], int] = lambda clips: 0,
    ) -> None:
        self._weights = weights
        self._recorder = recorder
        self._memory = memory
        self._encoder_bytes = encoder_bytes
        self._decoders: OrderedDict[Layout, CudaDecoder] = OrderedDict()
        self._last: Layout | None = None
        memory.on_release(self._drop)

    def state(self, layout: Layout) -> DecodeState:
        """Return a state of this layout for `TorchDecoder`."""
        return DecodeState.allocate(layout, self._memory.of(state_bytes(layout)))

    def cuda_decoder(self, layout: Layout) -> CudaDecoder:
        """Return a decoder of this layout on kernels, with its recorded graphs."""
        from whisper_flash_attention.engine.cuda_decoder import CudaDecoder
        from whisper_flash_attention.engine.triton_layers import Workspace

        rest = self._rest(layout)
        arena = self._memory.of(decoder_bytes(layout, self._encoder_bytes(layout.clips)))
        decoder = self._decoders.get(layout)
        if decoder is None:
            state = DecodeState.allocate(layout, arena, rest)
            work = Workspace.allocate(layout, arena)
            decoder = CudaDecoder(self._weights.decoder, state, work, GraphCache(self._recorder))
            self._decoders[layout] = decoder
            while len(self._decoders) > MOST_LAYOUTS:
                self._decoders.popitem(last=False)
        self._decoders.move_to_end(layout)
        if layout != self._last or self._memory.overwritten > rest:
            # Another layout, or the encoder with more clips, may have overwritten its tables.
            decoder.prepare()
            self._last = layout
        self._memory.overwritten = 0
        return decoder

    def release(self) -> None:
        """Give all memory back."""
        self._memory.release()

    def _drop(self) -> None:
        self._decoders.clear()
        self._last = None

    def _rest(self, layout: Layout) -> int:
        """Where in the arena everything but the caches begins."""
        return max(cache_bytes(layout), self._encoder_bytes(layout.clips))


def decoder_bytes(layout: Layout, encoder: int) -> int:
    """Device memory of a decoder, of whose arena the encoder uses `encoder` bytes."""
    from whisper_flash_attention.engine.triton_layers import workspace_bytes

    caches = cache_bytes(layout)
    return max(caches, encoder) + state_bytes(layout) - caches + workspace_bytes(layout)


def encoder_for(weights: EncoderWeights, recorder: GraphRecorder, memory: SharedArena) -> Encoder:
    """Return the fastest encoder for the device and dtype of these weights."""
    if has_encoder_kernels(weights.positions.device, weights.positions.dtype):
        from whisper_flash_attention.engine.triton_encoder import TritonEncoder

        return TritonEncoder(weights, recorder, memory)
    return TorchEncoder(weights, recorder)


# What intercepts PyTorch's operations would see the engine's instead of a model's.


def intercepted_by(device: torch.device) -> str | None:
    """What changes or intercepts operations on this device in this thread, in words."""
    return "autocast" if torch.is_autocast_enabled(device.type) else operation_mode()


def operation_mode() -> str | None:
    """The mode or transform that intercepts operations in this thread, in words."""
    # A default device is a mode, too, but changes no operation on existing tensors.
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in stack if type(mode) is not DeviceContext]
    if modes:
        return type(modes[-1]).__name__
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return None
