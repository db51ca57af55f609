"""Mel power of sound on one device: frames, spectra and filters, in parts of bounded memory.

The arithmetic below `log_mel`. A spectrum stays as real and imaginary parts, one beside the other:
squared in place and multiplied with filters that hold every weight twice, so that no pass is needed
to add the two up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whisper_flash_attention.audio.load import SAMPLING_RATE

WINDOW = 400
HOP = 160
FREQUENCIES = WINDOW // 2 + 1
# Windowed samples, and real and imaginary parts of their spectrum.
BYTES_PER_FRAME = 4 * (WINDOW + 2 * FREQUENCIES)
# What the frames of a part may take: near the caches of a CPU; all that 50 clips need on a GPU.
CPU_BYTES, GPU_BYTES = 5 << 20, 512 << 20
# Mel filters are zero for most frequencies. Multiplied in groups, a CPU skips most of that; a GPU
# would rather launch one kernel.
CPU_GROUPS, GPU_GROUPS = 4, 1


@dataclass(frozen=True, slots=True)
class Group:
    """Mel filters `first` to `last` on what they do not ignore, `columns` of a spectrum.

    `weights` are [last - first, columns], each twice: for the real and the imaginary part.
    """

    first: int
    last: int
    columns: slice
    weights: Tensor


@dataclass(frozen=True, slots=True)
class MelBank:
    """A Hann window [400] and Slaney's mel filters in groups, float32 on one device."""

    window: Tensor
    groups: tuple[Group, ...]
    frames_at_a_time: int

    def power(self, samples: Tensor, out: Tensor) -> None:
        """Write the mel power of every frame into `out`, part by part.

        Args:
            samples: float32 `[B, T]`; frame i is samples 160 i to 160 i + 400.
            out: float32 `[B, mel_bins, frames]`, rows of frames contiguous.
        """
        frames = samples.unfold(1, WINDOW, HOP)  # [B, frames, 400], a view
        for part in _even_parts(frames.shape[1], self.frames_at_a_time // len(samples)):
            spectrum = torch.fft.rfft(frames[:, part] * self.window)
            squares = torch.view_as_real(spectrum).flatten(2).square_()  # [B, frames, 402]
            for group in self.groups:
                weights = group.weights.expand(len(samples), -1, -1)
                heard = out[:, group.first : group.last, part]
                torch.bmm(weights, squares[:, :, group.columns].transpose(1, 2), out=heard)


@lru_cache(maxsize=8)
def mel_bank(mel_bins: int, device: torch.device) -> MelBank:
    """The window and `mel_bins` filters for a device, which are kept there."""
    is_cpu = device.type == "cpu"
    filters = _filters(mel_bins)
    size = -(-mel_bins // (CPU_GROUPS if is_cpu else GPU_GROUPS))
    groups = (_group(filters, first, first + size, device) for first in range(0, mel_bins, size))
    return MelBank(
        torch.hann_window(WINDOW).to(device),
        tuple(groups),
        (CPU_BYTES if is_cpu else GPU_BYTES) // BYTES_PER_FRAME,
    )


def _group(filters: Tensor, first: int, last: int, device: torch.device) -> Group:
    rows = filters[first:last]
    used = rows.any(dim=0).nonzero()
    start, stop = (int(used.min()), int(used.max()) + 1) if len(used) else (0, 1)
    weights = rows[:, start:stop].repeat_interleave(2, dim=1).to(device)
    return Group(first, first + len(rows), slice(2 * start, 2 * stop), weights)


def _even_parts(total: int, most: int) -> Iterator[slice]:
    """Slices of about one length, at most `most` but at least 1, which cover `total`."""
    count = -(-total // max(1, most))
    size = -(-total // count)
    yield from (slice(start, min(start + size, total)) for start in range(0, total, size))


def _filters(mel_bins: int) -> Tensor:
    """Slaney's mel filters, [mel_bins, 201]."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=FREQUENCIES,
        num_mel_filters=mel_bins,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank).float().t().contiguous()
