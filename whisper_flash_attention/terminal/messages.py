"""Keep other packages' messages off the screen, and put ours on it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the messages and progress bars of Transformers and the Hub's client, and warnings.

    Errors are raised as ever. Everything is as before afterwards.
    """
    from huggingface_hub.utils import logging as hub_messages
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as messages

    # The two switches of Transformers turn the Hub's bars along with their own.
    disable_both: Callable[[], None] = messages.disable_progress_bar
    enable_both: Callable[[], None] = messages.enable_progress_bar
    verbosity, hub_verbosity = messages.get_verbosity(), hub_messages.get_verbosity()
    had_bars, had_hub_bars = messages.is_progress_bar_enabled(), not are_progress_bars_disabled()
    messages.set_verbosity(logging.ERROR)
    hub_messages.set_verbosity(logging.ERROR)
    disable_both()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.set_verbosity(verbosity)
        hub_messages.set_verbosity(hub_verbosity)
        if had_bars:
            enable_both()
        (enable_progress_bars if had_hub_bars else disable_progress_bars)()


@contextmanager
def report_warnings(tell: Callable[[str], None]) -> Iterator[None]:
    """Pass each warning in this package's log to `tell`, as a line that says that it is one."""
    handler = _Teller(tell)
    logger = logging.getLogger("whisper_flash_attention")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(f"{record.levelname.lower()}: {record.getMessage()}")
