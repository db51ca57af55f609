"""The memory that an engine keeps between calls: one arena, and decoders cut from it by layout."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from whisper_flash_attention.engine.cuda_graphs import Graphs, Recorder
from whisper_flash_attention.engine.kv_cache import Arena, DecodeState, Layout, state_bytes
from whisper_flash_attention.engine.weights import Weights

if TYPE_CHECKING:
    from whisper_flash_attention.engine.cuda_decoder import DeviceDecoder

# Layouts whose recorded graphs are kept; they share the arena, so that only graphs add up.
MOST_LAYOUTS = 8


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
