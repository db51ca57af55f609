"""Whisper's input, the log-mel spectrogram, computed on any device for many clips at a time.

As `WhisperFeatureExtractor` in Transformers ("Robust Speech Recognition via Large-Scale Weak
Supervision", Radford et al., 2022, section 2.2): frames of 400 samples, 160 apart, under a Hann
window, reflected at the ends; power spectrum; mel filters (Slaney's); logarithm, at most 8 below
the clip's highest; (x + 4) / 4. Silence behind a clip is known without being computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whisper_flash_attention.audio.load import SAMPLING_RATE
from whisper_flash_attention.audio.waveforms import mono_samples
from whisper_flash_attention.errors import OptionError

WINDOW = 400
HOP = 160
FRAMES = 3000
SAMPLES = FRAMES * HOP
REACH = WINDOW // 2
FREQUENCIES = WINDOW // 2 + 1
LEAST_POWER = 1e-10
SILENCE = -10.0  # its logarithm
RANGE = 8.0
# Clips whose frames and spectra are in memory at a time.
PART = 8


@torch.no_grad()
def log_mel(
    clips: Sequence[Any] | npt.NDArray[Any] | Tensor,
    *,
    sampling_rate: int = SAMPLING_RATE,
    mel_bins: int = 80,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-mel features `[B, mel_bins, 3000]` of clips, on the device.

    Each clip's first 30 s count; shorter ones are as if followed by silence. Within 1e-4 of what
    Transformers' `WhisperFeatureExtractor` computes in float32.

    Args:
        clips: a list of clips, or one as a NumPy array or a torch tensor, as `mono_samples` takes
            them: mono or stereo, floating point or int16, of any length. A list of numbers is one
            clip.
        sampling_rate: of all clips, in Hz; others than 16,000 are resampled.
        mel_bins: 80, or 128 for large-v3 and turbo.
        device: where to compute.
        dtype: of the result; computed in float32.

    Raises:
        AudioError: a clip is empty, not finite or of a shape that is not sound.
        OptionError: there are no clips, or `mel_bins` is below 1.
    """
    if mel_bins < 1:
        raise OptionError(f"mel_bins is {mel_bins!r}: Whisper has 80, or 128 since large-v3")
    samples = [mono_samples(clip, sampling_rate)[:SAMPLES] for clip in _as_list(clips)]
    device = torch.device(device)
    filters = _filters(mel_bins).to(device)
    window = torch.hann_window(WINDOW, device=device)
    out = torch.empty((len(samples), mel_bins, FRAMES), device=device, dtype=dtype)
    for start in range(0, len(samples), PART):
        part = _padded(samples[start : start + PART], device)
        heard = torch.matmul(filters, _power(part, window).transpose(1, 2))
        heard, frames = heard.clamp_(min=LEAST_POWER).log10_(), heard.shape[2]
        lowest = heard.amax(dim=(1, 2), keepdim=True) - RANGE
        rows = out[start : start + PART]
        rows[:, :, :frames] = torch.maximum(heard, lowest, out=heard).mul_(0.25).add_(1.0)
        if frames < FRAMES:
            rows[:, :, frames:] = lowest.clamp_(min=SILENCE).mul_(0.25).add_(1.0)
    return out


def _as_list(clips: Any) -> list[Any]:
    if isinstance(clips, np.ndarray | Tensor):
        return [clips]
    found = list(clips)
    if not found:
        raise OptionError("there are no clips")
    return [found] if all(isinstance(each, int | float) for each in found) else found


def _padded(samples: list[npt.NDArray[np.float32]], device: torch.device) -> Tensor:
    """`[B, T]` with what the first and last frames see beyond the clips, up to silence."""
    longest = max(len(each) for each in samples)
    frames = min(FRAMES, (longest + REACH - 1) // HOP + 1)
    room = np.zeros((len(samples), (frames - 1) * HOP + WINDOW), np.float32)
    for row, each in zip(room, samples, strict=True):
        row[REACH : REACH + len(each)] = each
    room[:, :REACH] = room[:, REACH + 1 : 2 * REACH + 1][:, ::-1]
    end = REACH + SAMPLES
    if room.shape[1] > end:
        room[:, end:] = room[:, end - 1 - (room.shape[1] - end) : end - 1][:, ::-1]
    return torch.from_numpy(room).to(device)


def _power(samples: Tensor, window: Tensor) -> Tensor:
    """Power of every frame's frequencies, [B, frames, 201]."""
    spectrum = torch.fft.rfft(samples.unfold(1, WINDOW, HOP) * window)
    real, imaginary = spectrum.real, spectrum.imag
    power: Tensor = real.square().addcmul_(imaginary, imaginary)
    return power


@lru_cache
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
