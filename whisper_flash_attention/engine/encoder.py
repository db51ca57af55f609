"""How a whole batch is encoded: by which encoder, in which parts, with which CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from whisper_flash_attention.engine import torch_encoder
from whisper_flash_attention.engine.cuda_graphs import Graphs, Recorder, recording
from whisper_flash_attention.engine.decode_plan import has_encoder_kernels
from whisper_flash_attention.engine.kv_cache import Arena
from whisper_flash_attention.engine.weights import EncoderWeights

if TYPE_CHECKING:
    from whisper_flash_attention.engine.triton_encoder import EncoderPass

# Beyond so many clips PyTorch's operations keep a GPU busy while the host launches.
MOST_PLAIN_CLIPS = 4
# Up to so many clips launches are the time: kernels overlap with their predecessors (programmatic
# dependent launch), and the last norm is recorded, too, though its result must then be copied.
FEW_CLIPS = 4
# Sizes of parts whose recordings are kept; they share their space.
MOST_PARTS = 8


class Encoder(Protocol):
    """Encodes batches, on buffers that it keeps between calls."""

    def run(self, features: Tensor) -> Tensor:
        """Encoder states [B, T, D] of features [B, mel bins, 2 T]."""

    def release(self) -> None:
        """Forget recordings, and give back their memory."""


def encoder_for(weights: EncoderWeights, recorder: Recorder) -> Encoder:
    """The encoder that is fastest where these weights are."""
    if has_encoder_kernels(weights.positions.device, weights.positions.dtype):
        return FusedEncoder(weights, recorder)
    return PlainEncoder(weights, recorder)


@dataclass(frozen=True)
class _Recorded:
    features: Tensor
    states: Tensor
    graph: torch.cuda.CUDAGraph


class PlainEncoder:
    """PyTorch's operations; on an NVIDIA GPU recorded for few clips, once per number of clips."""

    def __init__(self, weights: EncoderWeights, recorder: Recorder) -> None:
        self._weights = weights
        self._recorded: dict[torch.Size, _Recorded] = {}
        self._recorder = recorder

    def run(self, features: Tensor) -> Tensor:
        few = len(features) <= MOST_PLAIN_CLIPS
        if few and features.is_cuda and torch.version.hip is None:
            return self._replay(features)
        return torch_encoder.encode(self._weights, features)

    def _replay(self, features: Tensor) -> Tensor:
        recorded = self._recorded.get(features.shape)
        if recorded is None:
            static = features.clone()
            states = static.new_empty(len(static), *self._weights.positions.shape)
            graph = self._recorder.record(
                lambda: torch_encoder.encode(self._weights, static, states)
            )
            self._recorded[features.shape] = _Recorded(static, states, graph)
            return states.clone()
        recorded.features.copy_(features)
        recorded.graph.replay()
        return recorded.states.clone()

    def release(self) -> None:
        self._recorded.clear()


class FusedEncoder:
    """Triton kernels: a batch in parts, each replayed on one space that is as large as the largest.

    The last norm of many clips is launched beside the recording, and writes what the caller gets.
    """

    def __init__(self, weights: EncoderWeights, recorder: Recorder) -> None:
        self._weights = weights
        self._recorder = recorder
        self._space: Arena | None = None
        self._parts: OrderedDict[int, tuple[EncoderPass, Graphs]] = OrderedDict()

    def run(self, features: Tensor) -> Tensor:
        from whisper_flash_attention.engine.triton_encoder import clips_per_part
        from whisper_flash_attention.kernels.launch import Overlap, set_pdl

        states = features.new_empty(len(features), *self._weights.positions.shape)
        clips = clips_per_part(self._weights, len(features))
        for some, out in zip(torch.split(features, clips), torch.split(states, clips), strict=True):
            part, graphs = self._part(len(some))
            few = len(some) <= FEW_CLIPS
            part.enter(some)
            set_pdl(Overlap.EARLY if few else Overlap.NONE)
            graphs.run("pass", part.whole if few else part.layers)
            set_pdl(Overlap.NONE)
            if few:
                out.copy_(part.states)
            else:
                part.leave(out)
        return states

    def _part(self, clips: int) -> tuple[EncoderPass, Graphs]:
        """A pass over so many clips, and its recording."""
        from whisper_flash_attention.engine.triton_encoder import EncoderPass, space_bytes
        from whisper_flash_attention.kernels.launch import Overlap, set_pdl

        found = self._parts.get(clips)
        if found is None:
            size = space_bytes(self._weights, clips)
            if self._space is None or self._space.capacity < size:
                self.release()
                self._space = Arena(self._weights.positions.device, size)
            self._space.restart()
            part = EncoderPass(self._weights, clips, self._space)
            set_pdl(Overlap.EARLY if clips <= FEW_CLIPS else Overlap.NONE)
            with recording(self._weights.positions.device):
                part.compile()
            found = self._parts[clips] = part, Graphs(self._recorder)
            while len(self._parts) > MOST_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(clips)
        return found

    def release(self) -> None:
        self._parts.clear()
        self._space = None
