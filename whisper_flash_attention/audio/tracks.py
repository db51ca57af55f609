"""The audio tracks of a recording, the languages in their tags, and which one is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from whisper_flash_attention.audio.container import keep_layout
from whisper_flash_attention.errors import AudioError, OptionError

if TYPE_CHECKING:
    from av import AudioStream
    from av.container import InputContainer

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


def check_track(track: int | str | None) -> None:
    """Raise `OptionError` if `track` can be neither a number nor a language tag."""
    if isinstance(track, bool) or not isinstance(track, int | str | None):
        raise OptionError(f"track must be a number or a language, got {track!r}")
    if (isinstance(track, int) and track < 1) or (isinstance(track, str) and not track.strip()):
        raise OptionError(f"track must be 1 or more, or a language such as 'en', got {track!r}")


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
    """List the tracks for a message, one line each."""
    return "its audio tracks are\n" + "\n".join(f"  {each}" for each in tracks)


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
