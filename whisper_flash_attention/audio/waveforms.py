"""Sound that a caller brings, of any kind, as mono float32 samples at one rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.errors import AudioError

if TYPE_CHECKING:
    from torch import Tensor

# An axis of a two-dimensional array with at most so many entries is that of channels.
MOST_CHANNELS = 8


def mono_samples(
    clip: Any, sampling_rate: int, wanted_rate: int = 16_000
) -> npt.NDArray[np.float32]:
    """The samples of one clip, mono, `[T]` in float32 at `wanted_rate` Hz.

    Args:
        clip: NumPy array, torch tensor or list: mono `[T]`, or `[channels, T]` or `[T, channels]`
            with at most 8 channels, which are averaged. Floating point, nominally within [-1, 1],
            or whole numbers, which are scaled by the range of their type (int16: by 2^15).
        sampling_rate: of `clip`, in Hz; resampled by FFmpeg where it differs from `wanted_rate`.

    Raises:
        AudioError: the clip is empty, not of numbers, not finite, or of another shape; or the rate
            is not positive.
    """
    samples = unchecked_samples(clip, sampling_rate, wanted_rate)
    check_finite(samples)
    return samples


def check_finite(samples: npt.NDArray[np.float32]) -> None:
    """Raise `AudioError` if not all of the mono samples `[T]` are finite."""
    # The sum of their squares tells, in one pass that allocates nothing, unless it is too large.
    if not math.isfinite(float(np.dot(samples, samples))) and not np.isfinite(samples).all():
        raise AudioError("the samples hold numbers that are not finite")


def unchecked_samples(
    clip: Any, sampling_rate: int, wanted_rate: int = 16_000
) -> npt.NDArray[np.float32]:
    """As `mono_samples`, for a caller that sees to it that all samples are finite."""
    if sampling_rate <= 0:
        raise AudioError(f"sampling rate {sampling_rate}: give the samples per second, above 0")
    samples = _mono(_as_floats(_as_array(clip)))
    if samples.size == 0:
        raise AudioError("there is no sound in 0 samples")
    return (
        samples if sampling_rate == wanted_rate else _resampled(samples, sampling_rate, wanted_rate)
    )


def mono_tensor(clip: Tensor) -> Tensor:
    """The samples of one clip, mono, `[T]` in float32, on the device where they are.

    Nothing waits for that device: whether all samples are finite is not looked at.

    Args:
        clip: as `mono_samples` takes it.

    Raises:
        AudioError: the clip is empty, not of numbers, or of another shape.
    """
    import torch

    if clip.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
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
    if hasattr(clip, "detach"):
        tensor = clip.detach().cpu()
        return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
    try:
        return np.asarray(clip)
    except ValueError as error:
        raise AudioError(f"the samples of one clip are not of one length: {error}") from error


def _as_floats(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32, copy=False)
    if np.issubdtype(array.dtype, np.signedinteger):
        return array.astype(np.float32) / np.float32(-float(np.iinfo(array.dtype).min))
    raise _wrong_kind(array.dtype)


def _wrong_kind(dtype: object) -> AudioError:
    return AudioError(f"samples must be floating point or signed whole numbers, but are {dtype}")


def _mono(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    axis = _channel_axis(array.shape)
    if axis is None:
        return array
    mixed: npt.NDArray[np.float32] = array.mean(axis=axis, dtype=np.float32)
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


def _resampled(
    samples: npt.NDArray[np.float32], rate: int, wanted_rate: int
) -> npt.NDArray[np.float32]:
    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=wanted_rate)
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([each.to_ndarray()[0] for each in frames])
