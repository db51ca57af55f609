"""Mel power of sound on one device: frames, spectra and filters, in parts of bounded memory.

The arithmetic below `log_mel`. A spectrum is squared where it is, as real and imaginary parts
beside one another, since complex operations are slow on a CPU.
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
# Windowed samples, real and imaginary parts of their spectrum, and its power.
BYTES_PER_FRAME = 4 * (WINDOW + 3 * FREQUENCIES)
# What the frames of a part may take. On a CPU near its caches, and little enough that the C library
# keeps freed memory for the next part, since new pages cost more than the work on them; on a GPU
# all that dozens of clips need.
CPU_BYTES, GPU_BYTES = 4 << 20, 512 << 20
# Mel filters are zero for most frequencies. Multiplied in groups, a CPU skips most of that; a GPU
# would rather launch one kernel.
CPU_GROUPS, GPU_GROUPS = 4, 1


@dataclass(frozen=True, slots=True)
class Group:
    """Mel filters `first` to `last`: `weights` [filters, columns] of what they do not ignore."""

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

    @property
    def mel_bins(self) -> int:
        return self.groups[-1].last

    def power(self, samples: Tensor, out: Tensor) -> None:
        """Write the mel power of every frame into `out`, part by part.

        Args:
            samples: float32 `[B, T]`; frame i is samples 160 i to 160 i + 400.
            out: float32 `[B, mel_bins, frames]`, rows of frames contiguous.
        """
        frames = samples.unfold(1, WINDOW, HOP)  # [B, frames, 400], a view
        for part in _even_parts(frames.shape[1], self.frames_at_a_time // len(samples)):
            spectrum = torch.fft.rfft(frames[:, part] * self.window)
            squares = torch.view_as_real(spectrum)
            squares.mul_(squares)  # PyTorch's square is a power, and slower on a CPU
            power = squares[..., 0] + squares[..., 1]  # [B, frames, 201]
            for group in self.groups:
                weights = group.weights.expand(len(samples), -1, -1)
                heard = out[:, group.first : group.last, part]
                torch.bmm(weights, power[:, :, group.columns].transpose(1, 2), out=heard)


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
    weights = rows[:, start:stop].contiguous().to(device)
    return Group(first, first + len(rows), slice(start, stop), weights)


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
