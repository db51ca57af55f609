from __future__ import annotations

import inspect
import json
import pydoc
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.transcribe import Segment, Transcriber, Transcription, Word
from whisper_flash_attention.transcribe.notebook import notebook_bar

seconds = st.floats(0, 1e6, allow_nan=False)
numbers = st.none() | st.floats(-10, 10, allow_nan=False)
words = st.builds(
    lambda a, b, text: Word(min(a, b), max(a, b), text, 0.5), seconds, seconds, st.text()
)
segments = st.builds(
    lambda a, b, text, tokens, number, spoken: Segment(
        min(a, b), max(a, b), text, tuple(tokens), avg_logprob=number, words=tuple(spoken)
    ),
    seconds,
    seconds,
    st.text(),
    st.lists(st.integers(0, 51_866)),
    numbers,
    st.lists(words, max_size=3),
)
transcriptions = st.builds(
    lambda text, rows, length: Transcription(text, "en", tuple(rows), length),
    st.text(),
    st.lists(segments, max_size=4),
    seconds,
)


@given(transcriptions)
def test_json_gives_back_an_equal_transcription(transcription: Transcription) -> None:
    text = json.dumps(transcription.to_dict())
    assert Transcription.from_dict(json.loads(text)) == transcription


@pytest.mark.parametrize(
    ("start", "end"), [(-0.1, 1), (2, 1), (0, float("inf")), (float("nan"), 1), (0, float("nan"))]
)
def test_a_segment_with_impossible_times_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="a segment cannot go from"):
        Segment(start, end, "hello")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": "", "language": "en", "segments": []},
        {"text": "", "language": "en", "segments": [], "seconds": 1.0, "mood": "sad"},
        {"text": "", "language": "en", "segments": [{"start": 0, "end": 1}], "seconds": 1.0},
        {"text": "", "language": "en", "segments": 7, "seconds": 1.0},
    ],
)
def test_what_is_not_a_transcription_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="this is not a transcription"):
        Transcription.from_dict(fields)


def test_languages_and_their_probabilities_are_in_json() -> None:
    spoken = Transcription(
        text="hello",
        language="en",
        segments=(Segment(0.0, 1.0, "hello", language="en"), Segment(1.0, 2.0, "hallo")),
        seconds=2.0,
        language_probability=0.75,
        all_language_probs=(("en", 0.75), ("de", 0.25)),
    )
    fields = json.loads(json.dumps(spoken.to_dict()))
    assert fields["language_probability"] == 0.75
    assert fields["all_language_probs"] == {"en": 0.75, "de": 0.25}
    assert fields["segments"][0]["language"] == "en" and "language" not in fields["segments"][1]
    assert Transcription.from_dict(fields) == spoken
    hash(spoken)


def test_a_repr_is_short(tmp_path: Path) -> None:
    segments = tuple(Segment(at, at + 1, "word") for at in range(1000))
    found = Transcription("word " * 1000, "en", segments, 1000.0, path="talks/one.wav")
    assert len(repr(found)) < 200
    assert "1000 segments" in repr(found) and "talks/one.wav" in repr(found)
    assert repr(Transcription("a", "en", segments[:1], 1.0)) == (
        "Transcription('a', language='en', 1 segment, 1.00 s)"
    )


def test_a_notebook_shows_a_table_that_plays(tmp_path: Path) -> None:
    path = tmp_path / "<talk>.wav"
    path.write_bytes(b"RIFF")
    segments = (Segment(61.5, 63.0, "<b>bold</b> & free"),)
    found = Transcription("", "de", segments, 70.0, 0.987, path=str(path))
    shown = found._repr_html_()
    assert "1:01.50 - 1:03.00" in shown and "currentTime=61.5" in shown
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; free" in shown and "<b>" not in shown
    assert "&lt;talk&gt;.wav, de (99 %), 70.0 s" in shown
    assert 'src="data:audio/' in shown
    path.unlink()
    assert "<audio" not in found._repr_html_()
    assert "<audio" not in Transcription("", "en", segments, 70.0)._repr_html_()
    many = tuple(Segment(at, at + 1, "word") for at in range(1200))
    assert "and 200 more segments" in Transcription("", "en", many, 1200.0)._repr_html_()


def test_a_words_text_keeps_its_blank_and_its_str_does_not() -> None:
    words = [Word(0, 1, " self", 1.0), Word(1, 2, "-substantial", 1.0)]
    assert "".join(word.text for word in words) == " self-substantial"
    assert [str(word) for word in words] == ["self", "-substantial"]


def test_the_path_is_no_part_of_the_fields() -> None:
    found = Transcription("a", "en", (), 1.0, path="a.wav")
    assert "path" not in found.to_dict()
    assert Transcription.from_dict(found.to_dict()) == found


class FakeDisplay(types.ModuleType):
    """`IPython.display` of a notebook."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.shown: list[list[str]] = []

    def HTML(self, text: str) -> str:
        return text

    def display(self, text: str, *, display_id: bool) -> types.SimpleNamespace:
        assert display_id
        bar = [text]
        self.shown.append(bar)
        return types.SimpleNamespace(update=bar.append)


def test_a_notebook_shows_one_labelled_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notebook_bar("talk.wav") is None
    display, kernel = FakeDisplay(), types.ModuleType("ipykernel.zmqshell")
    kernel.ZMQInteractiveShell = types.SimpleNamespace(initialized=lambda: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", kernel)
    update = notebook_bar("<talk>.wav")
    assert update is not None
    update(0.5)
    update(1.0)
    [bar] = display.shown
    assert bar == [
        '<progress value="0.000"></progress> 0 % &lt;talk&gt;.wav',
        '<progress value="0.500"></progress> 50 % &lt;talk&gt;.wav',
        '<progress value="1.000"></progress> 100 % &lt;talk&gt;.wav',
    ]


def test_signatures_show_the_options() -> None:
    for method in (Transcriber.transcribe, Transcriber.stream, Transcriber.transcribe_each):
        parameters = inspect.signature(method).parameters
        assert parameters["beam_size"].default is None
        assert parameters["temperature"].default == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        assert parameters["task"].default == "transcribe"
        assert parameters["batch_size"].default == 16
        assert "arguments" not in parameters
    assert "word_timestamps: 'bool' = False" in pydoc.render_doc(Transcriber.transcribe)
