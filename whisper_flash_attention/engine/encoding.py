"""The encoder as a CUDA graph for a few clips: there its hundreds of launches are the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from whisper_flash_attention.engine.encoder import encode
from whisper_flash_attention.engine.graphs import Recorder
from whisper_flash_attention.engine.weights import EncoderWeights

# More clips keep the GPU busy while the host launches, and their temporaries are large.
MOST_CLIPS = 4


@dataclass(frozen=True)
class _Recorded:
    features: torch.Tensor
    states: torch.Tensor
    graph: torch.cuda.CUDAGraph


class EncoderGraphs:
    """One recorded pass per number of clips."""

    def __init__(self, weights: EncoderWeights, recorder: Recorder) -> None:
        self._weights = weights
        self._recorded: dict[torch.Size, _Recorded] = {}
        self._recorder = recorder

    def takes(self, features: torch.Tensor) -> bool:
        """Whether features [B, mel bins, frames] are on a GPU and few."""
        return features.is_cuda and torch.version.hip is None and len(features) <= MOST_CLIPS

    def run(self, features: torch.Tensor) -> torch.Tensor:
        """Encoder states [B, T, D] of features [B, mel bins, 2 T]; the first time it records."""
        recorded = self._recorded.get(features.shape)
        if recorded is None:
            static = features.clone()
            states = static.new_empty(len(static), *self._weights.positions.shape)
            graph = self._recorder.record(lambda: encode(self._weights, static, states))
            self._recorded[features.shape] = _Recorded(static, states, graph)
            return states.clone()
        recorded.features.copy_(features)
        recorded.graph.replay()
        return recorded.states.clone()

    def release(self) -> None:
        """Forget the recordings and give back their memory."""
        self._recorded.clear()
