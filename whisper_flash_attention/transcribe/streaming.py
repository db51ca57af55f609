"""Windows one after another through the engine's slots, and those with bad results once more.

First results differ in length, and share slots: one that has ended makes room for the next window.
Bad results are few; their windows, with their encoder states, are put aside until there are some to
be decoded again at higher temperatures together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.scheduler import Job
from whisper_flash_attention.transcribe.window_decoder import DecodingResult, WindowDecoder

# Windows that are decoded again together, as a share of the slots: the slots wait meanwhile, and
# states are held until then.
SLOTS_PER_SECOND_TRY = 8


@dataclass(frozen=True, eq=False)
class Window:
    """A window to be decoded.

    Args:
        states: the encoder's, `[S, D]`, in memory of their own.
        prompt: of any length.
        owner: what it belongs to, by the name that errors give it.
    """

    states: Tensor
    prompt: Sequence[int]
    owner: Any

    def __str__(self) -> str:
        return str(self.owner)


def decode_windows(
    engine: Engine,
    decoder: WindowDecoder,
    more: Callable[[int], Sequence[Window]],
    slots: int,
) -> Iterator[tuple[Window, DecodingResult]]:
    """The result of every window, as `WindowDecoder.decode` gives it, as soon as it is known.

    Args:
        decoder: one that `fits_slots`.
        more: gives so many windows or fewer; it is asked again when results have been taken, until
            it has none after the last result.
        slots: windows that are decoded side by side.

    Raises:
        NotFinite: NaN or infinity in the logits of a window.
    """
    bad: list[tuple[Window, DecodingResult]] = []
    most, since = max(1, slots // SLOTS_PER_SECOND_TRY), 0

    def jobs(count: int) -> list[Job]:
        return [decoder.job(each.states, each.prompt, each) for each in more(count)]

    while True:
        has_any = False
        for finished in engine.decode_stream(jobs, slots, max_length=decoder.max_length):
            has_any = True
            window, result = finished.job.tag, decoder.result(finished)
            if decoder.is_last(result):
                yield window, result
            else:
                bad.append((window, result))
            since = since + 1 if bad else 0
            # The first of them has not to wait for ever.
            if len(bad) >= most or since >= slots:
                yield from _again(decoder, bad)
                bad, since = [], 0
        if not has_any:
            return
        # What these say may be what further windows waited for.
        yield from _again(decoder, bad)
        bad, since = [], 0


def _again(
    decoder: WindowDecoder, bad: Sequence[tuple[Window, DecodingResult]]
) -> Iterator[tuple[Window, DecodingResult]]:
    if bad:
        states = torch.stack([window.states for window, _ in bad])
        prompts = [window.prompt for window, _ in bad]
        results = decoder.decode_with_fallback(states, prompts, [result for _, result in bad])
        for (window, _), result in zip(bad, results, strict=True):
            yield window, result
