"""The exceptions that this package raises for users, and their distinction from bugs.

    WhisperFlashError
    ├── UnsupportedAttention     no back-end, or not the one requested, can run this attention
    ├── KernelShapeError         tensors or a configuration do not fit a Triton kernel
    ├── WeightsError             a checkpoint is missing, truncated, wrong or hostile
    ├── AudioError               a recording is missing, not audio, or empty
    ├── DecoderError             the processes that decode recordings cannot run
    ├── OptionError              an option has an unknown or impossible value
    ├── DeviceError              the requested device does not exist
    ├── MissingPackage           an optional package is needed; the message names the extra
    ├── IncompatibleTransformers a Transformers internal that is used here has changed
    ├── NotFinite                the model computed NaN or infinity
    ├── BatchError               results of an archive cannot be written, or are damaged
    └── BenchmarkError           the benchmark cannot do what was requested

EngineBypassed is a warning: `generate` ran without the engine although nothing required that.

Every message names what was requested, what was found and what to do. The command line prints
the message as one line and exits with code 2.
"""


class WhisperFlashError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedAttention(WhisperFlashError, ValueError):
    """No attention back-end (or not the one requested by name) can run these inputs."""


class KernelShapeError(WhisperFlashError, ValueError):
    """Tensors or a launch configuration do not fit a Triton kernel. The message has both."""


class WeightsError(WhisperFlashError, ValueError):
    """A checkpoint cannot be read. The message names the file and what was wrong with it."""


class AudioError(WhisperFlashError, ValueError):
    """A recording cannot be read. The message names the file and what was wrong with it."""


class DecoderError(WhisperFlashError, RuntimeError):
    """The processes that decode recordings cannot be started, or were stopped."""


class OptionError(WhisperFlashError, ValueError):
    """An option has a value that is unknown or impossible. The message lists what is possible."""


class DeviceError(WhisperFlashError, RuntimeError):
    """The requested device does not exist on this machine."""


class MissingPackage(WhisperFlashError, ImportError):
    """An optional package is needed. The message names the extra to install."""


class IncompatibleTransformers(WhisperFlashError, ImportError):
    """The installed Transformers lacks an internal that this package uses."""


class EngineBypassed(UserWarning):
    """`generate` ran on Transformers' own code where the engine should have run: right, but slow.

    The installed Transformers calls this package in a way that is not known here.
    """


class NotFinite(WhisperFlashError, ArithmeticError):
    """The model computed NaN or infinity, so that its tokens are meaningless."""


class BatchError(WhisperFlashError, RuntimeError):
    """Results of an archive cannot be written or read, or all of its workers have died."""


class BenchmarkError(WhisperFlashError, RuntimeError):
    """The benchmark cannot run what was requested, or cannot use the results it found."""


# Raised where code does not fit the code that it calls: a package of another version, a missing
# name, a broken invariant. These do not depend on the recording.
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
    """Whether an error would occur with other recordings as well, so that the run must end.

    All others are attributed to the recording: codecs, storage and numerics raise many kinds of
    `ValueError`, `RuntimeError` and `LookupError` about odd input. Errors of this package are
    never bugs, `MissingPackage` (an `ImportError`) included.
    """
    return isinstance(error, BUGS) and not isinstance(error, WhisperFlashError)
