"""What notebooks show: a bar while recordings are transcribed, and a table that plays them."""

from __future__ import annotations

import base64
import html
import mimetypes
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_flash_attention.terminal import printable

if TYPE_CHECKING:
    from whisper_flash_attention.transcribe.results import Transcription

# A notebook stores what it shows; a longer recording has no player.
LARGEST_AUDIO = 10_000_000  # bytes
SHOWN_SEGMENTS = 1_000


def notebook_bar(label: str) -> Callable[[float], None] | None:
    """Return what shows the share that is done as one bar; None where this is no notebook."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    interface = sys.modules.get("IPython.display")
    if kernel is None or interface is None or not kernel.ZMQInteractiveShell.initialized():
        return None
    shown = interface.display(interface.HTML(_bar(label, 0.0)), display_id=True)

    def update(share: float) -> None:
        shown.update(interface.HTML(_bar(label, share)))

    return update


def _bar(label: str, share: float) -> str:
    name = html.escape(printable(label))
    return f'<progress value="{share:.3f}"></progress> {100 * share:.0f} % {name}'


def as_html(transcription: Transcription) -> str:
    """Return HTML with the segments' times and texts; a click on a time plays from there."""
    player = f"whisper-{uuid.uuid4().hex}"
    audio = _audio(transcription.path)
    rows = []
    for segment in transcription.segments[:SHOWN_SEGMENTS]:
        times = f"{_clock(segment.start)} - {_clock(segment.end)}"
        if audio is not None:
            go = f"var a=document.getElementById('{player}');a.currentTime={segment.start};a.play()"
            times = f'<a href="javascript:void(0)" onclick="{go}">{times}</a>'
        label = "" if segment.channel is None else f"[channel {segment.channel}] "
        text = html.escape(label + printable(segment.text, is_speech=True))
        rows.append(f'<tr><td>{times}</td><td style="text-align:left">{text}</td></tr>')
    left = len(transcription.segments) - SHOWN_SEGMENTS
    if left > 0:
        rows.append(f"<tr><td></td><td>and {left} more segments</td></tr>")
    sure = transcription.language_probability
    language = transcription.language + ("" if sure is None else f" ({100 * sure:.0f} %)")
    name = "" if transcription.path is None else f"{Path(transcription.path).name}, "
    caption = html.escape(printable(f"{name}{language}, {transcription.seconds:.1f} s"))
    sound = "" if audio is None else f'<audio id="{player}" controls src="{audio}"></audio>'
    return f"{sound}<table><caption>{caption}</caption>{''.join(rows)}</table>"


def _audio(path: str | None) -> str | None:
    """A data URL of a file of moderate size; None for others."""
    if path is None:
        return None
    kind = mimetypes.guess_type(path)[0]
    try:
        if kind is None or Path(path).stat().st_size > LARGEST_AUDIO:
            return None
        content = Path(path).read_bytes()
    except (OSError, ValueError):  # gone since, or no path of this system
        return None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}:{rest:05.2f}"
