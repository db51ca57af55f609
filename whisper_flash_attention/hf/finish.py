"""What stock Whisper's `generate` makes of one decode of one window, without its loop over windows.

Stock cuts prompt, end and padding off each row, and pads what is left to the longest row. It goes
on to a second window where a row ends after a pair of timestamps in the middle of the audio; such
decodes are left to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from whisper_flash_attention.engine.request import Decoded


@dataclass(frozen=True)
class Finish:
    """How sequences `[B, P + N]` become what `generate` returns.

    Args:
        prompt: P, the length of the prompt.
        eos, pad: the ids of the end and of the padding.
        timestamp_begin: the first timestamp's id.
        one_window: a single window was forced, and the sequences are returned as they are.
    """

    prompt: int
    eos: int
    pad: int
    timestamp_begin: int
    one_window: bool

    def lengths(self, decoded: Decoded) -> np.ndarray | None:
        """Tokens of each row's answer, int64 `[B]`; None if stock would go on or do otherwise."""
        ids = decoded.sequences[:, self.prompt :].cpu().numpy()
        lengths = np.full(ids.shape[0], ids.shape[1])
        padding = (ids == self.pad).sum(axis=1) - (self.pad == self.eos)
        lengths -= np.where(ids[:, -1] == self.pad, padding, 0)
        if lengths.min() < 1:
            return None
        lengths -= ids[np.arange(ids.shape[0]), lengths - 1] == self.eos
        return lengths if self._is_last_window(ids, lengths) else None

    def sequences(self, decoded: Decoded) -> torch.Tensor | None:
        """The ids that `generate` returns, `[B, longest]` int64; None if stock must do it."""
        if self.one_window:
            return decoded.sequences
        lengths = self.lengths(decoded)
        if lengths is None:
            return None
        longest = int(lengths.max())
        ids = decoded.sequences[:, self.prompt : self.prompt + longest]
        if self.pad == self.eos:
            return ids.contiguous()
        places = torch.arange(longest, device=ids.device)
        ends = torch.from_numpy(lengths).to(ids.device)
        return ids.where(places < ends[:, None], self.pad)

    def _is_last_window(self, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether no row holds a pair of timestamps, or each that does ends in a single one."""
        stamps = ids >= self.timestamp_begin
        if not stamps.any():
            return True
        for row, length in zip(stamps, lengths, strict=True):
            answer = row[:length]
            has_pair = bool((answer[:-1] & answer[1:]).any())
            if has_pair and answer[-2:].tolist() != [False, True]:
                return False
        return True
