"""Looking at a flag on the device without waiting for it."""

from __future__ import annotations

import torch

# Steps between two looks at whether a decode has ended.
LOOK_EVERY = 8


class Look:
    """Whether all of `flags` (bool) hold, as of some steps ago: the host does not wait for a GPU.

    On a CPU the answer is the present one.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self._flags = flags
        self._answer = torch.zeros((), dtype=torch.bool, pin_memory=flags.is_cuda)
        self._event: torch.cuda.Event | None = None

    def all_hold(self, *, wait: bool = False) -> bool:
        """Read the last copy if it has arrived, and ask for another.

        Args:
            wait: until the last copy has arrived.
        """
        if not self._flags.is_cuda:
            return bool(self._flags.all())
        if self._event is not None and wait:
            self._event.synchronize()
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            return False
        if self._event is not None and bool(self._answer):
            return True
        self._answer.copy_(self._flags.all(), non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()
        return False
