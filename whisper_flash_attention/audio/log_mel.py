"""Whisper's input, the log-mel spectrogram, computed on any device for many clips at a time.

As `WhisperFeatureExtractor` in Transformers ("Robust Speech Recognition via Large-Scale Weak
Supervision", Radford et al., 2022, section 2.2): frames of 400 samples, 160 apart, under a Hann
window, reflected at the ends; power spectrum; mel filters (Slaney's); logarithm, at most 8 below
the clip's highest; (x + 4) / 4. Silence behind a clip is known without being computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whisper_flash_attention.audio.load import SAMPLING_RATE
from whisper_flash_attention.audio.mel import HOP, WINDOW, MelBank, mel_bank
from whisper_flash_attention.audio.waveforms import MOST_CHANNELS, mono_tensor, unchecked_samples
from whisper_flash_attention.errors import AudioError, OptionError

FRAMES = 3000
SAMPLES = FRAMES * HOP
REACH = WINDOW // 2
SILENCE = -10.0  # the logarithm of the least power that counts
RANGE = 8.0

# Mono samples `[T]` in float32: an array on the host, or a tensor where features are wanted. The
# clips of one call are of one kind.
Mono = npt.NDArray[np.float32] | Tensor


@torch.no_grad()
def log_mel(
    clips: Sequence[Any] | npt.NDArray[Any] | Tensor,
    *,
    sampling_rate: int = SAMPLING_RATE,
    mel_bins: int = 80,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-mel features `[B, mel_bins, 3000]` of clips, on the device.

    Each clip's first 30 s count; shorter ones are as if followed by silence. Within 1e-4 of what
    Transformers' `WhisperFeatureExtractor` computes in float32. Tensors on the device
    at 16,000 Hz stay there, and the host waits for it once, at the end; samples on the host get
    there in one copy per some dozens of clips.

    Args:
        clips: a list of clips as `mono_samples` takes them (mono or stereo, floating point or
            int16, of any length); or an array or tensor, `[T]` for one clip, `[B, T]` for several
            mono ones. A list of numbers is one clip.
        sampling_rate: of all clips, in Hz; others than 16,000 are resampled, on the host.
        mel_bins: 80, or 128 for large-v3 and turbo.
        device: where to compute; None for where the first clip is.
        dtype: of the result; computed in float32.

    Raises:
        AudioError: a clip is empty, of a shape that is not sound, or not finite in its first 30 s.
        OptionError: there are no clips, or `mel_bins` is below 1.
    """
    given = _as_list(clips)
    target = _target(given[0], device)
    samples = _mono(given, sampling_rate, target)
    bank = mel_bank(_checked(mel_bins), target)
    out = torch.empty((len(samples), mel_bins, FRAMES), device=target, dtype=dtype)
    part = max(1, bank.frames_at_a_time // FRAMES)
    peaks = []
    for start in range(0, len(samples), part):
        padded = _padded(
            [each[:SAMPLES] for each in samples[start : start + part]], SAMPLES, target
        )
        peaks.append(_write(bank, padded, out[start : start + part]))
    _check_finite(peaks)
    return out


@torch.no_grad()
def log_mel_whole(
    samples: Any,
    *,
    sampling_rate: int = SAMPLING_RATE,
    mel_bins: int = 80,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-mel features `[1, mel_bins, T // 160]` of one recording of any length.

    For `generate` on recordings of more than 30 s, as `WhisperFeatureExtractor` gives them with
    `truncation=False, padding="longest"`: nothing is padded, and the range ends 8 below the highest
    of the whole recording. Beside the samples and the result it takes the memory of a copy of the
    samples.

    Args:
        samples: one clip as `mono_samples` takes it, of `T` samples at 16,000 Hz.
        sampling_rate, mel_bins, device, dtype: as for `log_mel`.

    Raises:
        AudioError: the recording is not finite, of a shape that is not sound, or has no more than
            the 200 samples that are reflected at its ends.
        OptionError: `mel_bins` is below 1.
    """
    target = _target(samples, device)
    [mono] = _mono([samples], sampling_rate, target)
    if len(mono) <= REACH:
        raise AudioError(f"a recording of {len(mono)} samples is too short: give {REACH + 1}")
    bank = mel_bank(_checked(mel_bins), target)
    padded = _padded([mono], len(mono), target)
    out = torch.empty((1, mel_bins, len(mono) // HOP), device=target, dtype=dtype)
    _check_finite([_write(bank, padded, out)])
    return out


def _checked(mel_bins: int) -> int:
    if mel_bins < 1:
        raise OptionError(f"mel_bins is {mel_bins!r}: Whisper has 80, or 128 since large-v3")
    return mel_bins


def _as_list(clips: Any) -> list[Any]:
    if isinstance(clips, np.ndarray | Tensor):
        if clips.ndim == 2 and clips.shape[1] <= MOST_CHANNELS:
            raise AudioError(
                f"an array of several clips is [B, T], but has shape {list(clips.shape)}; "
                "give stereo clips as a list"
            )
        clips = list(clips) if clips.ndim == 2 else [clips]
    found = list(clips)
    if not found:
        raise OptionError("there are no clips")
    return [found] if all(isinstance(each, int | float) for each in found) else found


def _target(clip: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return clip.device if isinstance(clip, Tensor) else torch.device("cpu")


def _mono(clips: list[Any], sampling_rate: int, device: torch.device) -> list[Mono]:
    """Mono samples `[T]` at 16 kHz of every clip, as tensors if all are such on the device."""
    there = all(isinstance(each, Tensor) and each.device.type == device.type for each in clips)
    if there and sampling_rate == SAMPLING_RATE:
        return [mono_tensor(each) for each in clips]
    return [unchecked_samples(each, sampling_rate) for each in clips]


def _padded(samples: list[Mono], total: int, device: torch.device) -> Tensor:
    """`[B, T]` on the device: clips, silent up to `total`, as far as any frame sees anything.

    With the `REACH` samples that are reflected at both ends.
    """
    longest = max(len(each) for each in samples)
    frames = max(1, min(total // HOP, (longest + REACH - 1) // HOP + 1))
    width = max((frames - 1) * HOP + WINDOW, 2 * REACH + 1)  # all that is reflected at the start
    room = _gathered(samples, width, device)
    room[:, :REACH] = room[:, REACH + 1 : 2 * REACH + 1].flip(1)
    beyond = width - (REACH + total)
    if beyond > 0:
        room[:, -beyond:] = room[:, -2 * beyond - 1 : -beyond - 1].flip(1)
    return room


def _gathered(samples: list[Mono], width: int, device: torch.device) -> Tensor:
    """`[B, width]` on the device: clips from `REACH` on, then zeros; one copy from the host."""
    there = [each for each in samples if isinstance(each, Tensor)]
    if there:
        return _gathered_there(there, width, device)
    pinned = device.type == "cuda"
    room = torch.empty((len(samples), width), pin_memory=pinned)
    for row, each in zip(room.numpy(), samples, strict=True):
        end = min(REACH + len(each), width)
        row[REACH:end] = each[: end - REACH]
        row[end:] = 0.0
    return room.to(device, non_blocking=pinned)


def _gathered_there(samples: list[Tensor], width: int, device: torch.device) -> Tensor:
    """As `_gathered`, for clips on the device: few kernels if all are of one length."""
    if len({len(each) for each in samples}) == 1:
        clips = torch.stack(samples)
    else:
        clips = pad_sequence(samples, batch_first=True)
    room = torch.zeros((len(samples), width), device=device)
    end = min(REACH + clips.shape[1], width)
    room[:, REACH:end] = clips[:, : end - REACH]
    return room


def _write(bank: MelBank, padded: Tensor, out: Tensor) -> Tensor:
    """Write the features of `padded` clips into `out`, `[B, mel_bins, frames]`, up to its end.

    Returns the highest of each clip's logarithms, `[B, 1, 1]`.
    """
    frames = min(out.shape[2], (padded.shape[1] - WINDOW) // HOP + 1)
    rows = out[:, :, :frames]
    heard = rows if out.dtype == torch.float32 else torch.empty_like(rows, dtype=torch.float32)
    bank.power(padded, heard)
    peaks = heard.log10_().amax(dim=(1, 2), keepdim=True).clamp_(min=SILENCE)
    rows.copy_(scale_(heard, peaks))
    out[:, :, frames:] = scale_(torch.full_like(peaks, SILENCE), peaks)
    return peaks


def scale_(heard: Tensor, peak: Tensor) -> Tensor:
    """Features of logarithms of mel power, in their place: at most 8 below the peak, then scaled.

    Args:
        heard: float32 `[..., mel_bins, frames]`.
        peak: the highest of the recording, to be broadcast.
    """
    lowest = (peak - RANGE).clamp_(min=SILENCE)
    torch.maximum(heard, lowest, out=heard)
    return torch.add(heard.new_ones(()), heard, alpha=0.25, out=heard)


def _check_finite(peaks: list[Tensor]) -> None:
    """Raise if sound was such that its power is not a number; this waits for the device, once."""
    if not bool(torch.cat(peaks).isfinite().all()):
        raise AudioError("the samples hold numbers that are not finite, or too large to be sound")
