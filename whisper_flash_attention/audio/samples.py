"""Samples as callers provide them: mono float32 at 16 kHz, mixed, resampled, checked for silence.

Arrays that are a recording go through `recording_channels`, which also checks their scale; clips
whose features are computed, as `WhisperFeatureExtractor` takes them, through `mono_samples`,
`mono_tensor` and `unchecked_samples`. `ChannelMixer` mixes the channels of decoded files;
`is_silence` recognizes samples without sound, for which Whisper invents words ("you").
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.validation import shown

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Samples = npt.NDArray[np.float32]

SAMPLING_RATE = 16_000  # Hz; what every Whisper checkpoint was trained on

# An axis of a two-dimensional array with at most this many entries is that of channels.
MOST_CHANNELS = 8
# Hz. Below there is no speech to understand; no recorder samples above.
LEAST_RATE, MOST_RATE = 2_000, 1_000_000
# Samples that are resampled at a time; bounds what FFmpeg holds.
_RESAMPLED_AT_ONCE = 1 << 18
# Floating point is nominally within [-1, 1]. Lossy codecs and resampling overshoot by a little;
# beyond this, samples are on the scale of whole numbers.
_OVERSHOOT, _MOST_FLOAT = 2.0, 8.0
_SCALES = {16: 2.0**15, 24: 2.0**23, 32: 2.0**31}
# A mix that has less than this share of the power of the loudest channel has lost its sound.
_LOST = 0.01


def check_finite(samples: Samples) -> None:
    """Raise `AudioError` if not all of the mono samples `[T]` are finite."""
    # The sum of their squares is enough, in one pass without allocation, unless it overflows.
    if not math.isfinite(float(np.dot(samples, samples))) and not np.isfinite(samples).all():
        raise AudioError("the samples hold numbers that are not finite")


def unchecked_samples(clip: Any, sampling_rate: int, wanted_rate: int = 16_000) -> Samples:
    """The samples of one clip, mono, `[T]` in float32 at `wanted_rate` Hz, finite or not.

    Args:
        clip: NumPy array, torch tensor or list: mono `[T]`, or `[channels, T]` or `[T, channels]`
            with at most 8 channels, which are averaged. Floating point, nominally within [-1, 1],
            or whole numbers, which are scaled by the range of their type (int16: by 2^15; uint8
            is centred on 128, as in a WAV file).
        sampling_rate: of `clip`, in Hz; resampled by FFmpeg where it differs from `wanted_rate`.

    Raises:
        AudioError: the clip is empty, not of numbers, or of another shape; or the rate is no whole
            number from 2,000 to 1,000,000.
    """
    rate = checked_rate(sampling_rate)
    samples = _mono(_as_floats(_as_array(clip)))
    if samples.size == 0:
        raise AudioError("there is no sound in 0 samples")
    return samples if rate == wanted_rate else _resampled(samples, rate, wanted_rate)


def recording_channels(
    recording: Any, sampling_rate: Any = 16_000, wanted_rate: int = 16_000
) -> Samples:
    """The channels of a recording, `[channels, T]` in float32 within [-1, 1] at `wanted_rate` Hz.

    Args:
        recording: NumPy array, torch tensor on any device, or what NumPy makes an array of: mono
            `[T]`, or `[channels, T]` or `[T, channels]` with at most 8 channels. Whole numbers
            (int8, int16, int32, int64, uint8) are scaled by the range of their type. Floating point
            is nominally within [-1, 1]: what is above is clipped; samples on the scale of whole
            numbers (above 8, or whole numbers above 1), and 16-bit samples in wider whole numbers,
            are scaled to [-1, 1] with a warning in the log.
        sampling_rate: of `recording`, in Hz; resampled by FFmpeg where it differs.

    Raises:
        AudioError: the recording is empty, not of real numbers, not finite, has no values that can
            be read (meta, sparse), or is of another shape; or the rate is no whole number from
            2,000 to 1,000,000.
    """
    rate = checked_rate(sampling_rate)
    array = _as_array(recording)
    axis = _channel_axis(array.shape)
    if axis is None:
        array = array[None]
    elif axis == 1:
        array = array.T
    if array.size == 0:
        raise AudioError("there is no sound in 0 samples")
    samples = _on_scale(array)
    if rate != wanted_rate:
        channels = [_resampled(channel, rate, wanted_rate) for channel in samples]
        samples = np.clip(np.stack(channels), -1.0, 1.0)
        if samples.size == 0:
            raise AudioError(f"there is no sound in {array.shape[1]} samples at {rate} Hz")
    # PyTorch takes no memory that must not be written to, and no reversed axes.
    return np.require(samples, np.float32, ["C", "W"])


def mix(channels: Samples) -> Samples:
    """Mix channels `[channels, T]` into one `[T]`: their mean.

    Where channels cancel one another out (opposite phases), the loudest is taken instead, with a
    warning in the log.
    """
    mixed: Samples
    if len(channels) == 1:
        mixed = channels[0]
        return mixed
    mixed = channels.mean(axis=0, dtype=np.float32)
    powers = [float(np.dot(each, each)) for each in channels]
    if float(np.dot(mixed, mixed)) < _LOST * max(powers):
        loudest = int(np.argmax(powers))
        logger.warning(
            "the %d channels of the samples cancel one another out when they are mixed: channel %d "
            "is taken instead",
            len(channels),
            loudest + 1,
        )
        mixed = channels[loudest]
    return mixed


def checked_rate(sampling_rate: Any) -> int:
    """Return a sampling rate as a plain number of Hz.

    Raises:
        AudioError: it is no whole number from 2,000 to 1,000,000.
    """
    is_number = isinstance(sampling_rate, numbers.Real) and not isinstance(sampling_rate, bool)
    if is_number and LEAST_RATE <= sampling_rate <= MOST_RATE and sampling_rate % 1 == 0:
        return int(sampling_rate)
    raise AudioError(
        f"sampling rate {shown(sampling_rate)}: give the samples per second, a whole number from "
        f"{LEAST_RATE:,} to {MOST_RATE:,}"
    )


def mono_tensor(clip: Tensor) -> Tensor:
    """The samples of one clip, mono, `[T]` in float32, on the device where they are.

    Nothing waits for that device: whether all samples are finite is not checked.

    Args:
        clip: as `mono_samples` takes it.

    Raises:
        AudioError: the clip is empty, not of numbers, or of another shape.
    """
    import torch

    if clip.dtype == torch.uint8:
        samples = (clip.float() - 128) / 128
    elif clip.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        samples = clip.float() / -float(torch.iinfo(clip.dtype).min)
    elif clip.is_floating_point():
        samples = clip.float()
    else:
        raise _wrong_kind(clip.dtype)
    axis = _channel_axis(samples.shape)
    samples = samples if axis is None else samples.mean(dim=axis)
    if samples.numel() == 0:
        raise AudioError("there is no sound in 0 samples")
    return samples


def _as_array(clip: Any) -> npt.NDArray[Any]:
    try:
        if hasattr(clip, "detach"):
            return _array_of_tensor(clip)
        return np.asarray(clip)
    # Arrays of other libraries raise whatever they like where they cannot become one of NumPy's.
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, AudioError):
            raise
        kind = type(clip).__name__
        raise AudioError(f"a {kind} that cannot be read as an array of samples: {error}") from error


def _array_of_tensor(tensor: Tensor) -> npt.NDArray[Any]:
    import torch

    if tensor.is_meta:
        raise AudioError("the samples are a meta tensor, which holds no values")
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise AudioError(f"the samples are a {layout} tensor; give a dense one")
    plain = tensor.detach().cpu()
    # NumPy has no bfloat16 and no tensors of float8.
    return np.asarray((plain.float() if plain.is_floating_point() else plain).numpy())


def _as_floats(array: npt.NDArray[Any]) -> Samples:
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found later
            return array.astype(np.float32, copy=False)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - np.float32(128)) / np.float32(128)
    if np.issubdtype(array.dtype, np.signedinteger) and array.dtype.kind == "i":
        return array.astype(np.float32) / np.float32(-float(np.iinfo(array.dtype).min))
    raise _wrong_kind(array.dtype)


def _on_scale(array: npt.NDArray[Any]) -> Samples:
    """Samples `[channels, T]` of any dtype as float32 within [-1, 1]."""
    if array.dtype.kind == "i" and array.dtype.itemsize > 2:
        most = max(abs(int(array.min())), abs(int(array.max())))
        bits = next((bits for bits in (16, 32) if most <= _SCALES[bits]), None)
        if bits is None:
            raise AudioError(
                f"the samples reach {most}, which is beyond 32 bits: give them in floating point "
                "within [-1, 1]"
            )
        if most and 8 * array.dtype.itemsize != bits:
            _warn_of_scale(f"whole numbers of type {array.dtype}", most, bits)
        return array.astype(np.float32) / np.float32(_SCALES[bits])
    samples = _as_floats(array)
    low, high = float(samples.min()), float(samples.max())
    peak = max(-low, high)
    if not math.isfinite(low + high):
        raise AudioError("the samples hold numbers that are not finite")
    if peak <= 1.0:
        return samples
    if peak > _MOST_FLOAT or bool((samples == np.rint(samples)).all()):
        bits = next((bits for bits, scale in _SCALES.items() if peak <= _OVERSHOOT * scale), None)
        if bits is None:
            raise AudioError(
                f"the samples reach {peak:.3g}, which is on no scale of sound: give floating point "
                "within [-1, 1]"
            )
        _warn_of_scale(f"floating point ({array.dtype})", peak, bits)
        samples = samples / np.float32(_SCALES[bits])
    elif peak > _OVERSHOOT:
        logger.warning(
            "the samples reach %.3g, above the 1.0 of floating point: they are clipped", peak
        )
    return np.clip(samples, -1.0, 1.0)


def _warn_of_scale(kind: str, peak: float, bits: int) -> None:
    logger.warning(
        "the samples are %s and reach %.6g: they are taken for samples of %d bits, and divided by "
        "%d",
        kind,
        peak,
        bits,
        int(_SCALES[bits]),
    )


def _wrong_kind(dtype: object) -> AudioError:
    return AudioError(
        "samples must be floating point or whole numbers (int8, int16, int32, uint8), but are "
        f"{dtype}"
    )


def _mono(array: Samples) -> Samples:
    axis = _channel_axis(array.shape)
    if axis is None:
        return array
    mixed: Samples = array.mean(axis=axis, dtype=np.float32)
    return mixed


def _channel_axis(shape: Sequence[int]) -> int | None:
    """The axis to average over; None for one that is mono."""
    if len(shape) == 1:
        return None
    few = [axis for axis, length in enumerate(shape) if 1 <= length <= MOST_CHANNELS]
    if len(shape) != 2 or len(few) != 1:
        raise AudioError(
            f"a clip must be [T], [channels, T] or [T, channels] with at most {MOST_CHANNELS} "
            f"channels, but has shape {list(shape)}; give several clips as a list"
        )
    return few[0]


def _resampled(samples: Samples, rate: int, wanted_rate: int) -> Samples:
    """Samples `[T]` at another rate, by the resampler that decoding uses."""
    import av

    resampler = av.AudioResampler(format="fltp", layout="mono", rate=wanted_rate)
    frames = []
    for start in range(0, samples.size, _RESAMPLED_AT_ONCE):
        part = np.ascontiguousarray(samples[None, start : start + _RESAMPLED_AT_ONCE])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
        frame.sample_rate = rate
        frames += resampler.resample(frame)
    frames += resampler.resample(None)
    parts = [each.to_ndarray()[0] for each in frames]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


# Weights of ITU-R BS.775's mix to mono: against left and right the centre, which both loudspeakers
# play, is 3 dB louder and surrounds are 3 dB softer. It leaves the low-frequency effects out.
_FRONT, _CENTRE, _SURROUND = 0.5**0.5, 1.0, 0.5
_WEIGHTS = {
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "WL", "WR", "DL", "DR"), _FRONT),
    "FC": _CENTRE,
    **dict.fromkeys(("BL", "BR", "BC", "SL", "SR", "SDL", "SDR", "SSL", "SSR"), _SURROUND),
    **dict.fromkeys(("TC", "TFL", "TFC", "TFR", "TBL", "TBC", "TBR", "TSL", "TSR"), _SURROUND),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
    "AMBI0": 1.0,  # a sound field's omnidirectional part; the others have directions as their signs
}

# Mean square of the mix against that of channels that have nothing in common. Below the first the
# channels cancel each other; above the second they no longer do.
_CANCELLED, _RECOVERED = 0.01, 0.1
# Mean square of the loudest channel, -80 dB of full scale, below which there is nothing to lose.
_SILENT = 1e-8


def mix_weights(names: Sequence[str]) -> Samples:
    """Return the share `[channels]` of each channel in the mix; the shares' sum is 1.

    Args:
        names: FFmpeg's names of the channels. Where a name has no standard weight, as those of
            channels without a place ("NONE"), all channels have the same.
    """
    known = all(name in _WEIGHTS or name.startswith("AMBI") for name in names)
    weights = np.array([_WEIGHTS.get(name, 0.0) if known else 1.0 for name in names], np.float32)
    if not weights.any():  # low-frequency effects alone
        weights[:] = 1.0
    return np.asarray(weights / weights.sum(), np.float32)


@dataclass(slots=True)
class ChannelMixer:
    """Make one channel of many, block by block of a recording.

    Where channels cancel each other (a microphone cable with swapped wires turns the phase of one
    side), the mix would lose what they hold. The loudest channel is then used instead, until the
    mix is sound again. This is decided for each block from the blocks before it, so that it is
    decided the same whenever a recording is read with the same sampling rate.

    Args:
        channel: the only one to read, from 1; None mixes them.

    Attributes:
        replaced: samples for which a channel was used in place of the mix.
        missing: samples of silence in place of `channel`, where a recording has fewer channels.
    """

    channel: int | None = None
    replaced: int = 0
    missing: int = 0
    _names: tuple[str, ...] = ()
    _weights: Samples = field(default_factory=lambda: np.ones(1, np.float32))
    _substitute: int | None = None

    def mix(self, samples: Samples, names: tuple[str, ...]) -> Samples:
        """Return one channel `[T]` of a block `[T, channels]`."""
        if self.channel is not None:
            if self.channel <= samples.shape[1]:
                return samples[:, self.channel - 1]
            self.missing += len(samples)
            return np.zeros(len(samples), np.float32)
        if samples.shape[1] == 1:
            return samples[:, 0]
        if names != self._names:
            self._names, self._weights, self._substitute = names, mix_weights(names), None
        with np.errstate(invalid="ignore", over="ignore"):  # the caller checks for such numbers
            mixed = self._weighted(samples)
            self._judge(samples, mixed)
        if self._substitute is None:
            return mixed
        self.replaced += len(samples)
        return samples[:, self._substitute]

    def _weighted(self, samples: Samples) -> Samples:
        """Sum up channel by channel: the order of a matrix product depends on sizes."""
        used = np.flatnonzero(self._weights)
        if (self._weights[used] == self._weights[used[0]]).all():
            total: Samples = samples[:, used[0]].copy()
            for index in used[1:]:
                total += samples[:, index]
            total /= np.float32(len(used))
            return total
        total = samples[:, used[0]] * self._weights[used[0]]
        for index in used[1:]:
            total += samples[:, index] * self._weights[index]
        return total

    def _judge(self, samples: Samples, mixed: Samples) -> None:
        # Dot products, since a mean over the first axis takes longer than resampling.
        powers = np.array([np.dot(each, each) for each in samples.T], np.float64) / len(samples)
        powers[self._weights == 0.0] = 0.0
        loudest = int(powers.argmax())
        if not powers[loudest] > _SILENT:
            return
        kept = float(np.dot(mixed, mixed)) / len(mixed)
        expected = (np.square(self._weights) * powers).sum()
        if kept < _CANCELLED * expected:
            self._substitute = loudest if self._substitute is None else self._substitute
        elif kept > _RECOVERED * expected:
            self._substitute = None


# Nothing shorter is a word.
SHORTEST = SAMPLING_RATE // 10
# Rounding to 16 bits, with dither, moves samples by up to two steps of 2^-15 either way.
NOISE = np.float32(4 / 32768)


def is_silence(samples: Samples) -> bool:
    """Return whether samples `[T]` at 16 kHz are too few for a word, or nothing but rounding noise.

    A constant level (DC) is no sound either. NaN is not silence, so that it is found later.
    """
    return length_of_silence([samples]) is not None


def length_of_silence(blocks: Iterable[Samples]) -> int | None:
    """Return the number of samples in all blocks `[T]` if they are silence; None if there is sound.

    Blocks are taken until there is sound, in most recordings a single one.
    """
    size, low, high = 0, np.float32(np.inf), np.float32(-np.inf)
    for block in blocks:
        size += block.size
        # A few samples far apart nearly always suffice.
        for some in (block[:: 1 + block.size // 64], block):
            if some.size:
                low, high = np.minimum(low, some.min()), np.maximum(high, some.max())
            if size >= SHORTEST and not high - low <= NOISE:
                return None
    return size
