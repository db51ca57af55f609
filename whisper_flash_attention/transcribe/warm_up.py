"""What a first call takes that later ones do not: compiling kernels, recording graphs, buffers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples

logger = logging.getLogger(__name__)


def warm_up_calls(batch_size: int) -> Iterator[list[Samples]]:
    """Recordings of real speech for calls that meet the shapes of a batch size.

    A full batch, its halves down to one, and one more than a batch, which has a rest.
    """
    speech = load_audio(bundled_recordings()[0].path)
    speech = np.resize(speech, 20 * SAMPLING_RATE)
    counts = {batch_size + 1}
    while batch_size > 1:
        counts.add(batch_size)
        batch_size = (batch_size + 1) // 2
    for count in sorted(counts | {1}, reverse=True):
        yield [speech] * count


def announce_compilation(device_type: str) -> None:
    """Say once that kernels are compiled, where none of an earlier run are kept."""
    if device_type != "cuda" or _kernels_are_kept():
        return
    logger.warning(
        "first use on this machine: kernels for the GPU are compiled, which takes up to some "
        "minutes; they are kept in %s",
        _folder(),
    )


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)


def _kernels_are_kept() -> bool:
    folder = _folder()
    return folder.is_dir() and any(folder.iterdir())
