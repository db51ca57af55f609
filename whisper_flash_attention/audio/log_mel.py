"""Log-mel spectrograms, the input of Whisper, computed on any device.

As `WhisperFeatureExtractor` in Transformers ("Robust Speech Recognition via Large-Scale Weak
Supervision", Radford et al., 2022, section 2.2): frames of 400 samples, 160 apart, under a Hann
window, reflected at the ends; power spectrum; mel filters (Slaney); logarithm, at most 8 below the
highest of the clip; (x + 4) / 4. Trailing padding is filled with a constant. A spectrum is squared
as real and imaginary parts beside one another, since complex operations are slow on a CPU.

`log_mel` computes features of many clips, `log_mel_whole` those of one recording, and `MelWindows`
provides windows of a recording of any length in bounded memory. Since features end 8 below the
highest of the whole recording, that reads the recording once before its first window. Features of
samples in memory are kept; a recording that is left in its file is read again for its windows. Both
compute the same blocks, and so give the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whisper_flash_attention.audio.audio_source import HELD_SECONDS, AudioSource
from whisper_flash_attention.audio.samples import (
    MOST_CHANNELS,
    SAMPLING_RATE,
    Samples,
    mono_tensor,
    unchecked_samples,
)
from whisper_flash_attention.errors import AudioError, OptionError

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
                mel = out[:, group.first : group.last, part]
                torch.bmm(weights, power[:, :, group.columns].transpose(1, 2), out=mel)


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
    """Slaney's mel filters, [mel_bins, 201], each of unit area.

    Triangles whose corners are equally far apart in mels: below 1 kHz 3 mels are 200 Hz, above it
    27 mels are a factor of 6.4 (Slaney's Auditory Toolbox; librosa's and Transformers' "slaney").
    The float64 operations are those of `transformers.audio_utils.mel_filter_bank`, in its order, so
    that the filters are its filters to the last bit.
    """
    mels = np.linspace(0.0, 15.0 + np.log(8000.0 / 1000.0) * (27.0 / np.log(6.4)), mel_bins + 2)
    corners = 200.0 * mels / 3.0
    is_high = mels >= 15.0
    corners[is_high] = 1000.0 * np.exp(np.log(6.4) / 27.0 * (mels[is_high] - 15.0))
    slopes = corners[None] - np.linspace(0, SAMPLING_RATE // 2, FREQUENCIES)[:, None]
    steps = np.diff(corners)
    bank = np.maximum(
        np.zeros(1), np.minimum(-slopes[:, :-2] / steps[:-1], slopes[:, 2:] / steps[1:])
    )
    bank *= (2.0 / (corners[2:] - corners[:-2]))[None]
    return torch.from_numpy(bank).float().t().contiguous()


FRAMES = 3000
SAMPLES = FRAMES * HOP
REACH = WINDOW // 2
SILENCE = -10.0  # the logarithm of the least power that counts
RANGE = 8.0

# Mono samples `[T]` in float32: an array on the host, or a tensor where features are wanted. The
# clips of one call are of one kind.
Mono = Samples | Tensor


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
    mel = rows if out.dtype == torch.float32 else torch.empty_like(rows, dtype=torch.float32)
    bank.power(padded, mel)
    peaks = mel.log10_().amax(dim=(1, 2), keepdim=True).clamp_(min=SILENCE)
    rows.copy_(scale_(mel, peaks))
    out[:, :, frames:] = scale_(torch.full_like(peaks, SILENCE), peaks)
    return peaks


def scale_(mel: Tensor, peak: Tensor) -> Tensor:
    """Features of logarithms of mel power, in their place: at most 8 below the peak, then scaled.

    Args:
        mel: float32 `[..., mel_bins, frames]`.
        peak: the highest of the recording, to be broadcast.
    """
    lowest = (peak - RANGE).clamp_(min=SILENCE)
    torch.maximum(mel, lowest, out=mel)
    return torch.add(mel.new_ones(()), mel, alpha=0.25, out=mel)


def _check_finite(peaks: list[Tensor]) -> None:
    """Raise if sound was such that its power is not a number; this waits for the device, once."""
    if not bool(torch.cat(peaks).isfinite().all()):
        raise AudioError("the samples hold numbers that are not finite, or too large to be sound")


# Frames that are computed at once.
BLOCK = 3000
# Samples that a block is computed from.
ENOUGH = (BLOCK - 1) * HOP + WINDOW


class MelWindows:
    """Windows of one recording.

    Up to 30 s it is as if silence followed, as in `log_mel`; of a longer one features are as in
    `log_mel_whole`, and zeros follow its end.

    Args:
        sound: the recording, which is read to its end here.
        mel_bins: 80, or 128 for large-v3 and turbo.
        device, dtype: of the windows; computed in float32, on the device.

    Attributes:
        samples: how many the recording has, at 16 kHz.
        frames: of the recording, at least 1; features beyond are silence.

    Raises:
        AudioError: as `AudioSource.blocks`; or the samples are no sound.
    """

    def __init__(
        self, audio: AudioSource, *, mel_bins: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._sound = audio
        self._bank = mel_bank(mel_bins, device)
        self._device, self._dtype = device, dtype
        self._coming: Iterator[Tensor] = iter(())
        self._kept: deque[Tensor] = deque()
        self._begin = 0  # the frame at which these begin
        self._peak = torch.full((), SILENCE, device=device)
        held = audio.samples
        if held is not None and held.size <= SAMPLES:
            features = log_mel([held], mel_bins=mel_bins, device=device, dtype=dtype)
            self._whole: Tensor | None = features[0]
            self.samples = held.size
        else:
            self.samples = 0
            self._whole = self._scan()
        self.frames = max(1, self.samples // HOP)
        if self._whole is None:
            self._coming = _log_power(_first(self.samples, audio), self._bank, device)
        else:
            self._sound = AudioSource()  # is not needed any more

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return self.samples / SAMPLING_RATE

    @torch.no_grad()
    def window(self, start: int, length: int) -> Tensor:
        """Features `[mel_bins, length]` from frame `start` on, zeros beyond the end.

        Of a recording that is not held, windows must be taken in order of their starts.

        Raises:
            AudioError: as `AudioSource.blocks`, or the file has become shorter.
            ValueError: what is wanted was passed.
        """
        if self._whole is not None:
            part = self._whole[:, start : start + length]
        else:
            power = self._power(start, max(start, min(start + length, self.frames)))
            part = scale_(power, self._peak).to(self._dtype)
        return torch.nn.functional.pad(part, (0, length - part.shape[1]))

    @torch.no_grad()
    def _scan(self) -> Tensor | None:
        """Go through the recording for its length and its peak; the features if it is held."""
        seconds = self._sound.seconds
        is_held = seconds is not None and seconds <= HELD_SECONDS
        kept = []
        for block in _log_power(self._counted(), self._bank, self._device):
            self._peak = torch.maximum(self._peak, block.amax())
            if is_held:
                kept.append(block)
        if not bool(self._peak.isfinite()):
            raise AudioError("the samples hold numbers that are not finite, or too large for sound")
        return scale_(torch.cat(kept, dim=1), self._peak).to(self._dtype) if kept else None

    def _counted(self) -> Iterator[Samples]:
        for block in self._sound.blocks():
            self.samples += block.size
            yield block

    def _power(self, start: int, end: int) -> Tensor:
        """Logarithms of the mel power of frames `start` to `end`; those before are dropped."""
        if start < self._begin:
            raise ValueError(f"frame {start} was passed: windows begin at {self._begin} or later")
        while self._begin + sum(block.shape[1] for block in self._kept) < end:
            self._kept.append(next(self._coming))
            while self._kept and self._begin + self._kept[0].shape[1] <= start:
                self._begin += self._kept.popleft().shape[1]
        found = [self._peak.new_empty(self._bank.mel_bins, 0), *self._kept]
        return torch.cat(found, dim=1)[:, start - self._begin : end - self._begin]


def frame_levels(features: Tensor) -> Tensor:
    """The level of every frame `[..., T]` in dB, of features `[..., mel_bins, T]`."""
    power = (10.0 ** (4 * features.float() - 4)).sum(dim=-2)
    return 10 * power.log10()


def _first(count: int, audio: AudioSource) -> Iterator[Samples]:
    """The next `count` samples, and none beyond: damage there would be reported again."""
    left = count
    for block in audio.blocks():
        yield block[:left]
        left -= block.size
        if left <= 0:
            return
    raise AudioError(f"{audio.name}: became shorter while it was read")


def _log_power(blocks: Iterator[Samples], bank: MelBank, device: torch.device) -> Iterator[Tensor]:
    """Logarithm of the mel power of all frames, `[mel_bins, BLOCK]` float32 and a rest at a time.

    Frame i is centred on sample 160 i; the recording is reflected at its ends. There are as many as
    whole hops.
    """
    # From `REACH` before the first frame that is not computed yet; at first, to be reflected.
    room = np.zeros(0, np.float32)
    is_first = True
    for block in blocks:
        room = np.concatenate([room, block])
        if is_first:
            if room.size <= REACH:
                continue
            room = np.concatenate([room[REACH:0:-1], room])
            is_first = False
        while room.size >= ENOUGH:
            yield _block(room[:ENOUGH], bank, device)
            room = room[BLOCK * HOP :]
    frames = (room.size - REACH) // HOP
    if is_first or frames < 1:
        return
    beyond = (frames - 1) * HOP + WINDOW - room.size
    if beyond > 0:
        room = np.concatenate([room, room[-2 : -2 - beyond : -1]])
    yield _block(room[: (frames - 1) * HOP + WINDOW], bank, device)


def _block(padded: Samples, bank: MelBank, device: torch.device) -> Tensor:
    frames = (padded.size - WINDOW) // HOP + 1
    out = torch.empty((1, bank.mel_bins, frames), device=device)
    with torch.no_grad():
        bank.power(torch.from_numpy(padded)[None].to(device), out)
        return out[0].log10_().clamp_(min=SILENCE)
