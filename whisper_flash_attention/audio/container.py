"""Open a recording for FFmpeg (a file by its name, bytes, or a file object), and choose a track.

`readable` provides what can be read from its beginning at any time. A file on disk stays where it
is. A stream (standard input, a named pipe, a file object that cannot seek) is copied to its end: to
memory as long as it is small, then to a temporary file, up to a bound. A device is refused, and a
pipe without data is given up after a time limit. FFmpeg gets bytes only (`open_container`), through
PyAV, whose releases differ in what is handled here. `choose_track` selects an audio track by
its number or the language in its tags.
"""

from __future__ import annotations

import ctypes
import io
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from weakref import WeakKeyDictionary

from whisper_flash_attention.audio.lengths import (
    CorrectedFile,
    Correction,
    length_correction,
    mp3_frames,
)
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.validation import shown

if TYPE_CHECKING:
    from av import AudioLayout, AudioStream
    from av.container import InputContainer

# Of a stream: what a WAV file can hold, 6 hours of 48 kHz stereo.
MOST_BYTES = 4 * 2**30
# Of a stream, held in memory; what is longer is on disk.
MOST_IN_MEMORY = 32 * 2**20
CHUNK = 2**20
# For the next bytes of a named pipe.
PIPE_SECONDS = 60.0
# Interval at which a reader that waits for a pipe checks whether it is still needed.
_POLL_SECONDS = 0.2

_KINDS = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def readable(source: Any, stop: threading.Event | None = None) -> Path | bytes | Shared:
    """Return what can be read from its beginning as often as needed, by several readers at once.

    Args:
        source: the name of a file, its bytes, or a file that was opened for reading bytes. A file
            that cannot seek is read to its end here.
        stop: once it is set, the result does not matter any more.

    Raises:
        AudioError: it is none of these, a device or a socket; or a stream is longer than
            `MOST_BYTES`, does not fit on the disk, or gives nothing for `PIPE_SECONDS`.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        return spool(_chunks_of_pipe(path, stop), printable(path)) if _is_pipe(path) else path
    if not hasattr(source, "read"):
        raise AudioError(
            f"a recording is a path, bytes, a file that is open for reading bytes, or samples, but "
            f"got {shown(source)}"
        )
    if isinstance(source, Shared):
        return source.again()
    name = name_of_file(source)
    if isinstance(source, io.TextIOBase):
        raise AudioError(f'{name}: is open as text; open it with mode "rb", or take its `.buffer`')
    try:
        _refuse_device(source, name)
        if not _can_seek(source):
            return spool(_chunks_of_file(source, name), name)
    except (OSError, ValueError) as error:  # closed, or not open for reading
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{name}: cannot be read ({error})") from error
    return Shared(source, name)


def name_of_file(file: Any) -> str:
    """Return what messages call a file object, on one line that is safe to print."""
    name = getattr(file, "name", None)  # a number, for one opened by its descriptor
    return printable(name) if isinstance(name, str) else "<file>"


class Spooled(SpooledTemporaryFile[bytes]):
    """A stream's copy, in memory or in a temporary file, deleted with its last reference."""

    def __del__(self) -> None:
        self.close()


def spool(chunks: Iterable[bytes], name: str, most_bytes: int | None = None) -> Shared:
    """Copy a stream to its end.

    Args:
        chunks: of the stream.
        name: what messages call it.
        most_bytes: bound of its length; `MOST_BYTES` if left out.

    Raises:
        AudioError: it is longer, or there is no room on the disk.
    """
    most = MOST_BYTES if most_bytes is None else most_bytes
    copy = Spooled(max_size=MOST_IN_MEMORY)
    length = 0
    try:
        for chunk in chunks:
            length += len(chunk)
            if length > most:
                raise AudioError(
                    f"{name}: more than {most / 2**30:g} GiB came through this stream, and no end; "
                    "write a long recording into a file and name that, and cut one that never ends"
                )
            copy.write(chunk)
    except OSError as error:
        raise AudioError(
            f"{name}: cannot be copied into a temporary file after {length / 2**20:.0f} MiB "
            f"({error.strerror or error}); write it into a file and name that"
        ) from error
    return Shared(copy, name)


class Shared(io.RawIOBase):
    """A reader of a file with a position of its own, beside others of the same file.

    Closing it leaves the file open.
    """

    def __init__(self, file: Any, name: str) -> None:
        super().__init__()
        self._file = file
        self._lock = _lock_of(file)
        self._at = 0
        self.name = name

    def again(self) -> Shared:
        """Return another reader, at the file's beginning."""
        return Shared(self._file, self.name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            with self._lock:
                self._file.seek(self._at)
                found = self._file.read(len(buffer))
        # A file of any package (an archive, a bucket) raises whatever it likes.
        except Exception as error:
            raise AudioError(f"{self.name}: cannot be read ({error})") from error
        if not isinstance(found, bytes | bytearray | memoryview):
            raise AudioError(f"{self.name}: read() gives {type(found).__name__}, not bytes")
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            with self._lock:
                offset = self._file.seek(offset, os.SEEK_END)
        elif whence == os.SEEK_CUR:
            offset += self._at
        self._at = max(0, offset)
        return self._at

    def tell(self) -> int:
        return self._at


_LOCKS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
# Guards the table, and is the lock of files that cannot be in it.
_GUARD = threading.RLock()


def _lock_of(file: Any) -> Any:
    """Return the lock that all readers of a file share."""
    with _GUARD:
        try:
            return _LOCKS.setdefault(file, threading.Lock())
        except TypeError:
            return _GUARD


def _can_seek(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    return hasattr(file, "seek") and (seekable is None or bool(seekable()))


def _refuse_device(file: Any, name: str) -> None:
    try:
        mode = os.fstat(file.fileno()).st_mode
    except (AttributeError, OSError, TypeError):  # bytes in memory, a file in an archive
        return
    _refuse_kind(mode, name)


def _refuse_kind(mode: int, name: str) -> None:
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise AudioError(f"{name}: is {kind}, not a recording; name a file, or use a pipe")


def _is_pipe(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a name with a NUL
        raise AudioError(f"{shown(str(path))}: cannot be the name of a file ({error})") from error
    except OSError:  # opening it raises the error
        return False
    _refuse_kind(mode, printable(path))
    return stat.S_ISFIFO(mode)


def _chunks_of_file(file: Any, name: str) -> Iterator[bytes]:
    # `read1` gives what is there, so that Ctrl-C is noticed between two chunks.
    read = getattr(file, "read1", file.read)
    while True:
        chunk = read(CHUNK)
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise AudioError(f"{name}: read() gives {type(chunk).__name__}, not bytes")
        if not chunk:
            return
        yield bytes(chunk)


def _chunks_of_pipe(path: Path, stop: threading.Event | None) -> Iterator[bytes]:
    """What comes through a named pipe, opened so that a pipe without a writer does not block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise AudioError(f"{printable(path)}: cannot be opened ({error.strerror})") from error
    try:
        has_begun, deadline = False, time.monotonic() + PIPE_SECONDS
        while not (stop is not None and stop.is_set()):
            try:
                chunk = os.read(descriptor, CHUNK)
            except BlockingIOError:  # there is a writer, which has nothing yet
                chunk = None
            if chunk:
                yield chunk
                has_begun, deadline = True, time.monotonic() + PIPE_SECONDS
            elif chunk is not None and has_begun:
                return
            elif chunk is not None and _had_writer(descriptor):
                has_begun = True  # and is read once more: it may have written since
            elif time.monotonic() > deadline:
                raise AudioError(
                    f"{printable(path)}: is a named pipe through which nothing came for "
                    f"{PIPE_SECONDS:g} s; start the program that writes to it first"
                )
            else:
                _wait(descriptor, has_writer=chunk is None)
    finally:
        os.close(descriptor)


def _had_writer(descriptor: int) -> bool:
    """Whether a writer has come and gone; only Linux tells of one that wrote nothing."""
    if sys.platform != "linux":
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def _wait(descriptor: int, *, has_writer: bool) -> None:
    """Wait a moment, at most until there is something to read."""
    if has_writer:
        select.select([descriptor], [], [], _POLL_SECONDS)
    else:  # `select` returns at once as long as there is no writer
        time.sleep(_POLL_SECONDS / 4)


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


# A file's name, or what it holds: bytes, or a file that was opened for reading bytes.
Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | io.RawIOBase

# Formats that announce no length: what FFmpeg reports for them is an estimate from the bit rate.
_LENGTH_IS_A_GUESS = frozenset(
    (
        *("aac", "ac3", "aptx", "aptx_hd", "amr", "amrnb", "amrwb", "dts", "eac3", "g722", "g726"),
        *("g726le", "gsm", "loas", "mlp", "sbc", "swf", "truehd"),
    )
)


@dataclass(frozen=True, slots=True)
class OpenedContainer:
    """A recording that FFmpeg reads.

    Args:
        name: what messages call it.
        container: PyAV's.
        announces_length: whether lengths in the container come from the file and are no estimate.
        mp3_frames: how many frames an mp3 file announces, if it does.
        correction: of the length in its header, if that was wrong.
    """

    name: str
    container: InputContainer
    announces_length: bool
    mp3_frames: int | None
    correction: Correction | None


def name_of(source: Source) -> str:
    """Return what messages call it, on one line that is safe to print."""
    if isinstance(source, str | os.PathLike):
        return printable(os.fsdecode(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>"
    return name_of_file(source)


@contextmanager
def open_container(source: Source) -> Iterator[OpenedContainer]:
    """Open a recording for as long as the context lasts.

    Raises:
        AudioError: it is missing, a folder, empty, or no recording; or reading it fails within the
            context.
    """
    import av

    name = name_of(source)
    try:
        # FFmpeg gets bytes instead of a name, and no protocol: a playlist can open nothing else.
        options = {"protocol_whitelist": "none"}
        with _opened(source) as file:
            if _is_empty(file):
                raise AudioError(f"{name}: the file is empty (0 bytes)")
            correction = length_correction(file)
            read = file if correction is None else cast(BinaryIO, CorrectedFile(file, correction))
            frames = mp3_frames(file)
            with av.open(read, mode="r", options=options, **open_options()) as container:
                kind = container.format.name
                is_guess = kind in _LENGTH_IS_A_GUESS or kind == "mp3"
                frames = frames if kind == "mp3" else None
                yield OpenedContainer(name, container, not is_guess, frames, correction)
    except FileNotFoundError as error:
        raise AudioError(f"{name}: there is no such file") from error
    except IsADirectoryError as error:
        raise AudioError(f"{name}: is a folder, not a recording; name the files in it") from error
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise AudioError(f"{name}: is not a recording that can be read ({reason})") from error


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """Yield a file to read bytes from, which is closed afterwards if it was opened here."""
    found = readable(source)
    if isinstance(found, Path):
        with found.open("rb") as file:
            yield file
    elif isinstance(found, bytes):
        yield io.BytesIO(found)
    else:
        yield cast(BinaryIO, found)


def _is_empty(file: BinaryIO) -> bool:
    file.seek(0)
    empty = not file.read(1)
    file.seek(0)
    return empty


# The two-letter code, the three-letter one, and the bibliographic one where it differs.
_CODES = """
aa aar|ab abk|ae ave|af afr|ak aka|am amh|an arg|ar ara|as asm|av ava|ay aym|az aze|ba bak|be bel
bg bul|bi bis|bm bam|bn ben|bo bod tib|br bre|bs bos|ca cat|ce che|ch cha|co cos|cr cre
cs ces cze|cu chu|cv chv|cy cym wel|da dan|de deu ger|dv div|dz dzo|ee ewe|el ell gre|en eng
eo epo|es spa|et est|eu eus baq|fa fas per|ff ful|fi fin|fj fij|fo fao|fr fra fre|fy fry|ga gle
gd gla|gl glg|gn grn|gu guj|gv glv|ha hau|he heb|hi hin|ho hmo|hr hrv|ht hat|hu hun|hy hye arm
hz her|ia ina|id ind|ie ile|ig ibo|ii iii|ik ipk|io ido|is isl ice|it ita|iu iku|ja jpn|jv jav
jw jav|ka kat geo|kg kon|ki kik|kj kua|kk kaz|kl kal|km khm|kn kan|ko kor|kr kau|ks kas|ku kur
kv kom|kw cor|ky kir|la lat|lb ltz|lg lug|li lim|ln lin|lo lao|lt lit|lu lub|lv lav|mg mlg
mh mah|mi mri mao|mk mkd mac|ml mal|mn mon|mr mar|ms msa may|mt mlt|my mya bur|na nau|nb nob
nd nde|ne nep|ng ndo|nl nld dut|nn nno|no nor|nr nbl|nv nav|ny nya|oc oci|oj oji|om orm|or ori
os oss|pa pan|pi pli|pl pol|ps pus|pt por|qu que|rm roh|rn run|ro ron rum|ru rus|rw kin|sa san
sc srd|sd snd|se sme|sg sag|si sin|sk slk slo|sl slv|sm smo|sn sna|so som|sq sqi alb|sr srp
ss ssw|st sot|su sun|sv swe|sw swa|ta tam|te tel|tg tgk|th tha|ti tir|tk tuk|tl tgl|tn tsn
to ton|tr tur|ts tso|tt tat|tw twi|ty tah|ug uig|uk ukr|ur urd|uz uzb|ve ven|vi vie|vo vol
wa wln|wo wol|xh xho|yi yid|yo yor|za zha|zh zho chi|zu zul
"""

_THREE_LETTERS = {
    code: codes[1]
    for entry in _CODES.replace("\n", "|").split("|")
    if (codes := entry.split())
    for code in codes
}


def language_key(tag: str) -> str:
    """Normalize a language tag so that equal languages compare equal.

    "en", "eng", "EN" and "en-US" give "eng"; "ger" and "de" give "deu". An unknown tag is returned
    in lower case, without its region.
    """
    language = tag.strip().replace("_", "-").split("-")[0].lower()
    return _THREE_LETTERS.get(language, language)


@dataclass(frozen=True, slots=True)
class AudioTrack:
    """One audio track of a recording, as its container describes it.

    Args:
        number: its place among the audio tracks, from 1.
        codec: FFmpeg's name of the decoder ("aac", "opus"), or "unknown".
        language: the tag in the container ("eng", "de"), if there is one.
        title: the track's title, if there is one.
        channels: number of channels; 0 if the container does not know.
        layout: FFmpeg's name of the channel layout ("stereo", "5.1(side)").
        rate: sampling rate in Hz; 0 if the container does not know.
        seconds: length, where the container announces one for this track.
        default: whether the container marks it as the one to play.
    """

    number: int
    codec: str
    language: str | None
    title: str | None
    channels: int
    layout: str
    rate: int
    seconds: float | None
    default: bool

    def __str__(self) -> str:
        parts = [f"{self.number}: {self.codec}", self.language or "no language"]
        parts += [repr(self.title)] * (self.title is not None)
        parts += [f"{self.channels} channel{'' if self.channels == 1 else 's'} ({self.layout})"]
        parts += [f"{self.rate} Hz"]
        parts += [] if self.seconds is None else [f"{self.seconds:.1f} s"]
        parts += ["default"] * self.default
        return ", ".join(parts)


def tracks_of(container: InputContainer) -> list[AudioTrack]:
    """List the audio tracks of an open container, in its order."""
    return [_describe(number, each) for number, each in enumerate(container.streams.audio, 1)]


def choose_track(
    container: InputContainer, track: int | str | None, name: str
) -> tuple[AudioTrack, AudioStream]:
    """Return the track to read.

    Args:
        track: its number from 1, a language tag, or None for the one that FFmpeg calls best. Of
            several tracks in one language the one marked as default, or else the first, is taken.
        name: of the recording, for messages.

    Raises:
        AudioError: there is no such track, or none that can be decoded. The message lists the
            tracks, one a line.
    """
    tracks = tracks_of(container)
    if not tracks:
        raise AudioError(f"{name}: there is no audio stream that can be decoded")
    if track is None:
        best = container.streams.best("audio")
        chosen = next(
            (each for each in tracks if container.streams.audio[each.number - 1] is best), None
        )
        if chosen is None:  # FFmpeg's best is one without a decoder only if all are
            raise AudioError(f"{name}: there is no audio stream that can be decoded")
    elif isinstance(track, int):
        if track > len(tracks):
            raise AudioError(f"{name}: there is no audio track {track}; {listing(tracks)}")
        chosen = tracks[track - 1]
    else:
        wanted = language_key(track)
        found = [each for each in tracks if each.language and language_key(each.language) == wanted]
        if not found:
            raise AudioError(f"{name}: there is no audio track in {track!r}; {listing(tracks)}")
        chosen = next((each for each in found if each.default), found[0])
    stream = container.streams.audio[chosen.number - 1]
    if stream.codec_context is None:
        raise AudioError(f"{name}: audio track {chosen.number} has a codec that cannot be decoded")
    return chosen, stream


def listing(tracks: list[AudioTrack]) -> str:
    """List the tracks for a message, in its line: line breaks are escaped in a terminal."""
    return f"its audio tracks are {'; '.join(map(str, tracks))}"


def _describe(number: int, stream: AudioStream) -> AudioTrack:
    from av.stream import Disposition

    context = stream.codec_context
    layout = None if context is None else keep_layout(context.layout)
    return AudioTrack(
        number=number,
        codec="unknown" if context is None else context.name,
        language=_tag(stream, "language"),
        title=_tag(stream, "title"),
        channels=0 if layout is None else layout.nb_channels,
        layout="unknown" if layout is None else layout.name,
        rate=0 if context is None else context.sample_rate or 0,
        seconds=_seconds(stream),
        default=bool(Disposition(stream.disposition) & Disposition.default),
    )


def _tag(stream: AudioStream, key: str) -> str | None:
    """A text from the container, in printable characters; None for an empty one."""
    text = stream.metadata.get(key, "")
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    text = text.strip()
    return None if not text or (key == "language" and text.lower() == "und") else text[:200]


def _seconds(stream: AudioStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # Matroska has no field for it; most writers add this tag.
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
