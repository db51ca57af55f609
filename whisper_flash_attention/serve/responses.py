"""Results in the shapes of OpenAI's API: objects, text, subtitles, and events of a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from whisper_flash_attention.languages import LANGUAGES
from whisper_flash_attention.serve.fields import SpeechRequest
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.tokenizer import Detokenizer
from whisper_flash_attention.transcribe.writers import render

# Positions of the encoder per second of audio, which count as input tokens.
AUDIO_TOKENS_PER_SECOND = 50
MEDIA_TYPES = {
    "json": "application/json",
    "verbose_json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}


class ResponseBuilder:
    """Collects what one transcription gives, and renders it.

    Args:
        request: what was requested.
    """

    def __init__(self, request: SpeechRequest) -> None:
        self._request = request
        self._written = False
        self._count = 0
        self._logprobs = 0

    def events(
        self, recording: Recording, segments: Sequence[Segment], tokenizer: Detokenizer
    ) -> list[dict[str, Any]]:
        """Events of a window's segments: each as a delta of the text, and as a segment."""
        found = []
        for segment in map(recording.located, segments):
            # Blanks between segments are in their tokens, where the language has any.
            text = tokenizer.decode(segment.tokens, skip_special_tokens=True)
            text = text if self._written else text.lstrip()
            self._written = self._written or bool(text)
            delta: dict[str, Any] = {"type": "transcript.text.delta", "delta": text}
            if self._request.logprobs:
                delta["logprobs"] = self._new_logprobs(recording, segment, tokenizer)
            found += [delta, self._segment_event(segment)]
            self._count += 1
        return found

    def _segment_event(self, segment: Segment) -> dict[str, Any]:
        row: dict[str, Any] = {
            "type": "transcript.text.segment",
            "id": f"seg_{self._count}",
            "start": segment.start,
            "end": segment.end,
            "text": segment.text,
            "speaker": "",
        }
        if self._request.response_format == "verbose_json":
            row = segment_row(replace(segment, id=self._count)) | row
            if "word" in self._request.granularities:
                row["words"] = words_of([segment])
        return row

    def _new_logprobs(
        self, recording: Recording, segment: Segment, tokenizer: Detokenizer
    ) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens of a segment, which follow those of the last one."""
        end = self._logprobs + sum(token < tokenizer.end for token in segment.tokens)
        begin, self._logprobs = self._logprobs, end
        return token_logprobs(recording.token_probabilities[begin:end], tokenizer)

    def done_event(
        self, transcription: Transcription, recordings: Sequence[Recording], tokenizer: Detokenizer
    ) -> dict[str, Any]:
        """The last event, with the whole text and the usage in tokens."""
        audio = math.ceil(transcription.seconds * AUDIO_TOKENS_PER_SECOND)
        output = sum(len(each.tokens) for each in transcription.segments)
        event: dict[str, Any] = {
            "type": "transcript.text.done",
            "text": transcription.text,
            "languages": [{"code": transcription.language}],
            "usage": {
                "type": "tokens",
                "input_tokens": audio,
                "input_token_details": {"audio_tokens": audio, "text_tokens": 0},
                "output_tokens": output,
                "total_tokens": audio + output,
            },
        }
        if self._request.logprobs:
            event["logprobs"] = all_logprobs(recordings, tokenizer)
        return event

    def body(
        self,
        transcription: Transcription,
        recordings: Sequence[Recording],
        tokenizer: Detokenizer,
        task: str,
    ) -> str:
        """The whole response, in the requested format."""
        request = self._request
        if request.response_format == "text":
            return transcription.text + "\n"
        if request.response_format in ("srt", "vtt"):
            return render(transcription, request.response_format, request.subtitles)
        fields: dict[str, Any] = {"text": transcription.text}
        usage = {"type": "duration", "seconds": transcription.seconds}
        if request.response_format == "verbose_json":
            # The language of the text, which a translation has in English.
            language = "en" if task == "translate" else transcription.language
            fields = {
                "task": task,
                "language": LANGUAGES[language],
                "duration": transcription.seconds,
                **fields,
            }
            if not request.granularities or "segment" in request.granularities:
                fields["segments"] = [segment_row(each) for each in transcription.segments]
            if "word" in request.granularities:
                fields["words"] = words_of(transcription.segments)
        elif request.logprobs:
            fields["logprobs"] = all_logprobs(recordings, tokenizer)
        return dumps({**fields, "usage": usage})


def segment_row(segment: Segment) -> dict[str, Any]:
    """A segment of `verbose_json`."""
    row = {
        "id": segment.id,
        "seek": segment.seek,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature or 0.0,
        "avg_logprob": segment.avg_logprob or 0.0,
        "compression_ratio": segment.compression_ratio or 0.0,
        "no_speech_prob": segment.no_speech_prob or 0.0,
    }
    if segment.channel is not None:
        row["channel"] = segment.channel
    if segment.language is not None:
        row["language"] = segment.language
    return row


def words_of(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Words of `verbose_json`."""
    return [
        {"word": str(word), "start": word.start, "end": word.end}
        for segment in segments
        for word in segment.words
    ]


def all_logprobs(recordings: Sequence[Recording], tokenizer: Detokenizer) -> list[dict[str, Any]]:
    """Text tokens of all channels with their log-probabilities."""
    return [
        row for each in recordings for row in token_logprobs(each.token_probabilities, tokenizer)
    ]


def token_logprobs(
    pairs: Sequence[tuple[int, float]], tokenizer: Detokenizer
) -> list[dict[str, Any]]:
    """Tokens with their bytes and log-probabilities; a probability of 0 has the least float32."""
    return [
        {
            "token": tokenizer.decode([token]),
            "bytes": list(tokenizer.bytes_of(token)),
            "logprob": math.log(max(probability, 1.2e-38)),
        }
        for token, probability in pairs
    ]


def dumps(value: Any) -> str:
    """JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def server_sent(event: Any) -> bytes:
    """An event of a stream, as its bytes."""
    data = event if isinstance(event, str) else dumps(event)
    return f"data: {data}\n\n".encode()
