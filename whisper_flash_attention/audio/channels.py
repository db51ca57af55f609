"""Mix the channels of a recording to one, or read one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

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
    """Make one channel of many, piece after piece of a recording.

    Where channels cancel each other (a microphone cable with swapped wires turns the phase of one
    side), the mix would lose what they hold. The loudest channel is then used instead, until the
    mix is sound again. This is decided for each piece from the pieces before it, so that it is
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
        """Return one channel `[T]` of a piece `[T, channels]`."""
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
        powers = np.square(samples).mean(axis=0, dtype=np.float64)  # [channels]
        powers[self._weights == 0.0] = 0.0
        loudest = int(powers.argmax())
        if not powers[loudest] > _SILENT:
            return
        kept = np.square(mixed).mean(dtype=np.float64)
        expected = (np.square(self._weights) * powers).sum()
        if kept < _CANCELLED * expected:
            self._substitute = loudest if self._substitute is None else self._substitute
        elif kept > _RECOVERED * expected:
            self._substitute = None
