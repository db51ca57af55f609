"""Transcriptions through OpenAI's own client: every format, every field, and the same text."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.documents import page, python_blocks
from tests.serve.live_server import MODEL, Live
from tools.option_tables import with_fields
from whisper_flash_attention.serve.fields import FIELDS
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.writers import render

TEXT = "He was not an old-sposed young man."


def test_json_is_the_text_and_the_seconds(live: Live, clip: bytes) -> None:
    found = live.client().audio.transcriptions.create(file=clip, model=MODEL)
    assert found.text == TEXT
    assert found.usage is not None and found.usage.type == "duration"
    assert found.usage.seconds == pytest.approx(2.99)


def test_text_and_subtitles_are_those_of_transcribe(
    live: Live, clip: bytes, transcriber: Transcriber
) -> None:
    create = live.client().audio.transcriptions.create
    expected = transcriber.transcribe(clip)
    assert create(file=clip, model=MODEL, response_format="text") == expected.text + "\n"
    for name in ("srt", "vtt"):
        found: Any = create(file=clip, model=MODEL, response_format=name)
        assert found == render(expected, name)


def test_verbose_json_has_segments_and_words_as_they_are_requested(
    live: Live, clip: bytes, transcriber: Transcriber
) -> None:
    create = live.client().audio.transcriptions.create
    options: Any = {"file": clip, "model": MODEL, "response_format": "verbose_json"}
    expected = transcriber.transcribe(clip, word_timestamps=True)

    plain = create(**options)
    assert (plain.language, plain.duration, plain.words) == ("english", 2.99, None)
    [segment] = plain.segments
    assert (segment.id, segment.seek, segment.text) == (0, 0, TEXT)
    assert segment.avg_logprob < 0 < segment.compression_ratio

    both = create(**options, timestamp_granularities=["word", "segment"])
    words = [(word.word, word.start, word.end) for word in both.words]
    assert words == [(str(w), w.start, w.end) for s in expected.segments for w in s.words]
    assert [each.tokens for each in both.segments] == [list(s.tokens) for s in expected.segments]

    alone = create(**options, timestamp_granularities=["word"])
    assert alone.segments is None and alone.words == both.words


def test_logprobs_are_those_of_the_text_tokens(live: Live, clip: bytes) -> None:
    create = live.client().audio.transcriptions.create
    found = create(file=clip, model=MODEL, include=["logprobs"])
    assert found.logprobs is not None
    assert "".join(str(each.token) for each in found.logprobs).strip() == TEXT
    assert all(each.logprob is not None and each.logprob <= 0 for each in found.logprobs)
    assert bytes(map(int, found.logprobs[0].bytes or ())) == b" He"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "he was not an old sposed young man"}, {"initial_prompt": None}),
        ({"keywords": ["ill-disposed", "Dashwood"]}, {"hotwords": "ill-disposed, Dashwood"}),
        ({"language": "en", "temperature": 0}, {}),
        ({"extra_body": {"beam_size": 2, "temperature": [0.0]}}, {"beam_size": 2}),
        ({"extra_body": {"without_timestamps": True}}, {"without_timestamps": True}),
        ({"extra_body": {"prefix": "He"}}, {"prefix": "He"}),
        ({"chunking_strategy": "auto"}, {"mode": "batched"}),
        (
            {"chunking_strategy": {"type": "server_vad", "threshold": 0.4}},
            {"mode": "batched", "vad_parameters": {"threshold": 0.4}},
        ),
    ],
)
def test_fields_have_the_effect_of_transcribes_options(
    live: Live,
    clip: bytes,
    transcriber: Transcriber,
    fields: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    if "prompt" in fields:
        expected = {"initial_prompt": fields["prompt"]}
    if "chunking_strategy" in fields:
        pytest.importorskip("silero_vad", reason="the extra vad is not installed")
    found = live.client().audio.transcriptions.create(file=clip, model=MODEL, **fields)
    assert found.text == transcriber.transcribe(clip, **expected).text


def test_a_temperature_samples(live: Live, clip: bytes) -> None:
    found = live.client().audio.transcriptions.create(file=clip, model=MODEL, temperature=0.1)
    assert "young man" in found.text


def test_events_of_a_stream_build_the_text(live: Live, bundled_recordings: Any) -> None:
    recording = bundled_recordings[0].path.read_bytes()
    events = list(
        live.client().audio.transcriptions.create(
            file=recording, model=MODEL, stream=True, include=["logprobs"]
        )
    )
    *first, last = events
    assert last.type == "transcript.text.done"
    deltas = [each for each in first if each.type == "transcript.text.delta"]
    assert "".join(each.delta for each in deltas).strip() == last.text
    assert sum(len(each.logprobs or ()) for each in deltas) == len(last.logprobs or ())
    segments = [each for each in first if each.type == "transcript.text.segment"]
    assert [each.id for each in segments] == [f"seg_{n}" for n in range(len(segments))]
    assert last.usage is not None
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens


def test_a_stream_of_verbose_json_carries_words(live: Live, clip: bytes) -> None:
    response = live.post(
        clip,
        **{
            "stream": "true",
            "response_format": "verbose_json",
            "timestamp_granularities[]": "word",
        },
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    [segment] = [row for row in map(json.loads, lines) if row["type"] == "transcript.text.segment"]
    assert " ".join(word["word"] for word in segment["words"]).startswith("He was not")
    assert segment["seek"] == 0


def test_sixteen_clients_get_the_texts_of_transcribe(
    live: Live, clip: bytes, transcriber: Transcriber
) -> None:
    """With options of their own: words, a prompt, no timestamps."""
    kinds: list[dict[str, Any]] = [
        {},
        {"word_timestamps": True},
        {"initial_prompt": "Mr. Dashwood"},
        {"without_timestamps": True},
    ]

    async def all_texts() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            create = client.audio.transcriptions.create
            jobs = [create(file=clip, model=MODEL, extra_body=kind) for kind in 4 * kinds]
            return [found.text for found in await asyncio.gather(*jobs)]

    assert asyncio.run(all_texts()) == 4 * [
        transcriber.transcribe(clip, **kind).text for kind in kinds
    ]
    assert live.is_idle()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_all_recordings_have_the_texts_of_transcribe(
    live: Live, shared_audio: Any, transcriber: Transcriber, part: int
) -> None:
    """Alone and from sixteen clients, greedily: samples depend on the order of the requests."""
    paths = [path for path in sorted(shared_audio.iterdir()) if path.suffix != ".json"][part::3]
    expected = [transcriber.transcribe(path, temperature=0.0).text for path in paths]

    def text(path: Any) -> str:
        found: str = live.post(path.read_bytes(), **{"temperature[]": "0"}).json()["text"]
        return found

    assert [text(path) for path in paths] == expected
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(text, paths)) == expected


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"beam_sise": "3"}, 400, "beam_sise", "did you mean 'beam_size'"),
        ({"beam_size": "x"}, 400, "beam_size", "a whole number, 1 to 100"),
        ({"beam_size": "0"}, 400, "beam_size", "beam_size is 0: give a whole number, 1 to 100"),
        ({"mode": "parallel"}, 400, "mode", "mode is 'parallel': give sequential or batched"),
        ({"channel": "left"}, 400, "channel", "channel is 'left': give mix, each, or"),
        ({"vad_parameters[treshold]": "1"}, 400, "vad_parameters", "VAD parameter 'treshold'"),
        ({"temperature": "hot"}, 400, "temperature", "numbers from 0 to 2"),
        ({"language": "germn"}, 400, "language", "did you mean german"),
        ({"language": "de"}, 400, None, "needs a multilingual model"),
        ({"languages[]": ["en", "de"]}, 400, None, "needs a multilingual model"),
        ({"response_format": "diarized_json"}, 400, "response_format", "speakers"),
        ({"known_speaker_names[]": "a"}, 400, "known_speaker_names", "speakers"),
        ({"known_speaker_references[]": "a"}, 400, "known_speaker_references", "speakers"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities", "verbose_json"),
        ({"include[]": "logprobs", "response_format": "text"}, 400, "include", "json"),
        ({"stream": "true", "response_format": "srt"}, 400, "stream", "srt"),
        ({"stream": "perhaps"}, 400, "stream", "true or false"),
        ({"prompt": "a", "initial_prompt": "b"}, 400, "prompt", "the same"),
        ({"language": ["en", "de"]}, 400, "language", "twice"),
        ({"chunking_strategy": "manual"}, 400, "chunking_strategy", "auto"),
        ({"chunking_strategy[type]": "semantic"}, 400, "chunking_strategy", "server_vad"),
        ({"max_line_width": "9"}, 400, "max_line_width", "srt and vtt"),
        ({"model": "large"}, 404, "model", "there are: tiny.en"),
    ],
)
def test_fields_that_are_refused(
    live: Live, clip: bytes, fields: Any, status: int, param: str | None, message: str
) -> None:
    response = live.post(clip, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_requests_that_are_no_form(live: Live, clip: bytes) -> None:
    url = f"{live.url}/v1/audio/transcriptions"
    for response, message in (
        (httpx.post(url, json={"file": "x"}), "multipart/form-data"),
        (httpx.post(url, content=b"x" * 99), "multipart/form-data"),
        (httpx.post(url, files={"model": (None, "tiny.en")}), "the field file is missing"),
        (httpx.post(url, files={"files": ("a", clip)}), "did you mean 'file'"),
        (httpx.post(f"{url}?modell=x", files={"file": ("a", clip)}), "did you mean 'model'"),
        (
            httpx.post(url, content=b"--x\r\n", headers={"content-type": "multipart/form-data"}),
            "cannot be read",
        ),
        (httpx.post(url, files={"file": ("a.wav", b"noise" * 100)}), "a.wav: is not a recording"),
        (httpx.post(url, files={"file": ("a.wav", b"")}), "a.wav: the file is empty"),
    ):
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
    assert httpx.get(f"{live.url}/v2/nothing").json()["error"]["message"].endswith("Not Found")
    assert httpx.get(url).status_code == 405


def test_silence_has_no_text(live: Live) -> None:
    import io
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(32000))
    found = live.post(file.getvalue(), response_format="verbose_json").json()
    assert (found["text"], found["segments"], found["duration"]) == ("", [], 1.0)
    assert live.post(file.getvalue(), stream="true").text.endswith("data: [DONE]\n\n")


def test_models_and_health(live: Live) -> None:
    client = live.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok", "loaded": [MODEL]}


def test_translations_need_a_multilingual_model(live: Live, clip: bytes) -> None:
    response = live.post(clip, "translations", model=MODEL)
    assert response.status_code == 400
    assert 'task="translate" needs a multilingual model' in response.json()["error"]["message"]


def test_the_document_describes_every_field(live: Live) -> None:
    document = httpx.get(f"{live.url}/openapi.json").json()
    route = document["paths"]["/v1/audio/transcriptions"]["post"]
    schema = route["requestBody"]["content"]["multipart/form-data"]["schema"]
    names = {name.removesuffix("[]") for name in schema["properties"]}
    assert names == {*FIELDS, "file"}
    assert httpx.get(f"{live.url}/docs").status_code == 200


def test_the_example_of_the_documentation(
    live: Live, bundled_recordings: Any, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    [block] = python_blocks(page("serve.md"))
    (tmp_path / "talk.mp3").write_bytes(bundled_recordings[1].path.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(block.replace("http://127.0.0.1:8000", live.url).replace('"turbo"', '"tiny.en"'), {})
    assert capsys.readouterr().out == f"{TEXT}\n"


def test_the_table_of_fields_is_current() -> None:
    text = page("serve.md")
    assert text == with_fields(text), "run `python -m tools.option_tables`"
