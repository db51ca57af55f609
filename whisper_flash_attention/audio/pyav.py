"""What has to be done differently from one release of PyAV to another (14 to 19 are supported)."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av import AudioLayout


@cache
def _release() -> tuple[int, int]:
    import av

    major, minor = av.__version__.split(".")[:2]
    return int(major), int(minor)


def open_options() -> dict[str, Any]:
    """Return options of `av.open` for titles that are not UTF-8, an error before PyAV 19."""
    return {"metadata_errors": "ignore"} if _release() < (19, 0) else {}


def keep_layout(layout: AudioLayout) -> AudioLayout:
    """Keep PyAV from freeing a layout that FFmpeg frees as well, and return it.

    From 17.1 to 18 PyAV copies a layout without its list of channels, which only unusual orders
    have, and frees that list with the copy: the second free ends the process. Such a copy is kept
    for ever (some 50 bytes each).
    """
    if (17, 1) <= _release() < (19, 0) and " channels (" in layout.name:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
    return layout
