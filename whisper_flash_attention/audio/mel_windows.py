"""Log-mel features of a recording of any length, window by window, in bounded memory.

The range of features ends 8 below the highest of the whole recording, which is therefore gone
through once before the first window. Of what is held the features are kept; a recording that is
left in its file is read a second time, as its windows are asked for. The numbers are the same
either way: both compute the same pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from whisper_flash_attention.audio.audio_source import HELD_SECONDS, AudioSource
from whisper_flash_attention.audio.load import SAMPLING_RATE, Samples
from whisper_flash_attention.audio.log_mel import (
    REACH,
    SAMPLES,
    SILENCE,
    log_mel,
    scale_,
)
from whisper_flash_attention.audio.mel import HOP, WINDOW, MelBank, mel_bank
from whisper_flash_attention.errors import AudioError

# Frames that are computed at once.
PIECE = 3000
# Samples that a piece looks at.
ENOUGH = (PIECE - 1) * HOP + WINDOW


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
        self._pieces: deque[Tensor] = deque()
        self._begin = 0  # the frame at which these begin
        self._peak = torch.full((), SILENCE, device=device)
        held = audio.samples
        if held is not None and held.size <= SAMPLES:
            features = log_mel([held], mel_bins=mel_bins, device=device, dtype=dtype)
            self._whole: Tensor | None = features[0]
            self.samples = held.size
        else:
            self.samples = 0
            self._whole = self._listen()
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
    def _listen(self) -> Tensor | None:
        """Go through the recording for its length and its peak; the features if it is held."""
        seconds = self._sound.seconds
        is_held = seconds is not None and seconds <= HELD_SECONDS
        kept = []
        for piece in _log_power(self._counted(), self._bank, self._device):
            self._peak = torch.maximum(self._peak, piece.amax())
            if is_held:
                kept.append(piece)
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
        while self._begin + sum(piece.shape[1] for piece in self._pieces) < end:
            self._pieces.append(next(self._coming))
            while self._pieces and self._begin + self._pieces[0].shape[1] <= start:
                self._begin += self._pieces.popleft().shape[1]
        found = [self._peak.new_empty(self._bank.mel_bins, 0), *self._pieces]
        return torch.cat(found, dim=1)[:, start - self._begin : end - self._begin]


def _first(count: int, audio: AudioSource) -> Iterator[Samples]:
    """So many samples, and no look beyond, where a damaged recording would be told of again."""
    left = count
    for block in audio.blocks():
        yield block[:left]
        left -= block.size
        if left <= 0:
            return
    raise AudioError(f"{audio.name}: became shorter while it was read")


def _log_power(blocks: Iterator[Samples], bank: MelBank, device: torch.device) -> Iterator[Tensor]:
    """Logarithm of the mel power of all frames, `[mel_bins, PIECE]` float32 and a rest at a time.

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
            yield _piece(room[:ENOUGH], bank, device)
            room = room[PIECE * HOP :]
    frames = (room.size - REACH) // HOP
    if is_first or frames < 1:
        return
    beyond = (frames - 1) * HOP + WINDOW - room.size
    if beyond > 0:
        room = np.concatenate([room, room[-2 : -2 - beyond : -1]])
    yield _piece(room[: (frames - 1) * HOP + WINDOW], bank, device)


def _piece(padded: Samples, bank: MelBank, device: torch.device) -> Tensor:
    frames = (padded.size - WINDOW) // HOP + 1
    out = torch.empty((1, bank.mel_bins, frames), device=device)
    with torch.no_grad():
        bank.power(torch.from_numpy(padded)[None].to(device), out)
        return out[0].log10_().clamp_(min=SILENCE)
