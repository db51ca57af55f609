"""Whether an exception is about a recording, or a bug of a program."""

from __future__ import annotations

from whisper_flash_attention.errors import WhisperFlashError

# What Python raises where code does not fit the code that it calls: a package of another version,
# a name that is gone, a broken invariant. No recording can be blamed for these.
BUGS = (
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    ImportError,
    NotImplementedError,
    SyntaxError,
)


def is_bug(error: BaseException) -> bool:
    """Whether the same would happen with other recordings, so that the run must end.

    Everything else is taken to be about the recording at hand: codecs, storage and numerics raise
    many kinds of `ValueError`, `RuntimeError` and `LookupError` about odd input. What this package
    raises on purpose is never a bug, `MissingPackage` (an `ImportError`) included.
    """
    return isinstance(error, BUGS) and not isinstance(error, WhisperFlashError)
