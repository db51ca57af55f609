"""Systems that turn recordings into text, each set up as its documentation recommends.

Each has a process for itself (`peer_process`), in which its loader imports what it needs and no
more, as memory is measured there. All decode greedily, with their own defaults otherwise, which
their settings state. A forced number of tokens, which is for random weights, makes all of them
decode every window of 30 s once, to that many tokens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Protocol

from whisper_flash_attention.audio.audio_source import AudioInput, AudioSource
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.benchmark.word_alignment import TimedWord

# Formats of checkpoints.
TRANSFORMERS, OPENAI, CTRANSLATE2 = "transformers", "openai", "ctranslate2"
GGML, GGML_8_BITS = "ggml", "ggml-q8_0"
FORMATS = (TRANSFORMERS, OPENAI, CTRANSLATE2, GGML, GGML_8_BITS)

WINDOW = 30  # seconds
CPU, GPU = "cpu", "cuda"
FLOATS = ("float32", "float16", "bfloat16")
OURS = "ours"
GB = 1e9
_PACKAGE = "whisper-flash-attention"
# Of systems that would start the command ffmpeg for every file (`read_file`).
READER = {"files_read_by": _PACKAGE}
# With forced tokens: every window is decoded once, whatever comes out.
ONCE: dict[str, Any] = {
    "temperature": 0.0,
    "without_timestamps": True,
    "condition_on_previous_text": False,
    **dict.fromkeys(("compression_ratio_threshold", "no_speech_threshold")),
}


# Options whose defaults a row states, where a system has them.
_STATED = (
    *("beam_size", "temperature", "condition_on_previous_text", "without_timestamps"),
    *("compression_ratio_threshold", "no_speech_threshold", "vad_filter"),
    *("logprob_threshold", "log_prob_threshold"),
)


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a function's options that decide how much is decoded, and how."""
    parameters = signature(function).parameters
    return {
        name: parameters[name].default
        for name in _STATED
        if name in parameters and parameters[name].default is not Parameter.empty
    }


@dataclass(frozen=True)
class PeerCheckpoint:
    """A checkpoint on disk.

    Attributes:
        files: the path by format.
        end_of_text: id of <|endoftext|>; all ids below it are text.
        is_multilingual: whether it knows languages besides English.
        alignment_heads: (layer, head) pairs that give words their times; None if none are named.
    """

    files: dict[str, str]
    end_of_text: int
    is_multilingual: bool
    alignment_heads: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Setup:
    """What a system is loaded with.

    Args:
        checkpoint: its files.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "float16", "bfloat16" or "int8".
        batch_size: chunks at a time, of a system that has to know it when it is loaded.
        threads: on the CPU.
        new_tokens: forced for every window; None leaves the length to the model.
        word_alignment: what this package's words are timed by.
    """

    checkpoint: PeerCheckpoint
    device: str
    dtype: str
    batch_size: int
    threads: int
    new_tokens: int | None = None
    word_alignment: str = "tokens"

    @property
    def kind(self) -> str:
        """The kind of the device."""
        return self.device.partition(":")[0]

    @property
    def device_index(self) -> int:
        """The number of the GPU."""
        return int(self.device.partition(":")[2] or 0)


@dataclass(frozen=True)
class Request:
    """What a system is to transcribe.

    Args:
        path: of the recording.
        language: its code; None has it detected.
        batch_size: chunks of it at a time, for systems that take several.
        word_times: whether to give its words with their times, too.
    """

    path: str
    language: str | None
    batch_size: int = 1
    word_times: bool = False


class Texts:
    """What a call gives: texts as they come, text tokens of systems that count them, and words."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.parts: list[str] = []
        self.first_seconds: float | None = None
        self.tokens: int | None = None
        self.words: list[TimedWord] = []

    def add(self, text: str, tokens: int | None = None) -> None:
        """Take the next text, and the number of its tokens."""
        if self.first_seconds is None and text.strip():
            self.first_seconds = time.perf_counter() - self._start
        self.parts.append(text)
        if tokens is not None:
            self.tokens = (self.tokens or 0) + tokens

    def add_words(self, words: Iterable[tuple[str, float | None, float | None]]) -> None:
        """Take words with their starts and ends; those without one are left out."""
        for text, start, end in words:
            if start is not None and end is not None:
                self.words.append(TimedWord(text, float(start), float(end)))

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)


class Transcribe(Protocol):
    """A loaded system: adds what a recording has."""

    def __call__(self, request: Request, texts: Texts) -> None: ...


# A system that is ready, and the options that it was given.
Loaded = tuple[Transcribe, dict[str, Any]]


@dataclass(frozen=True)
class System:
    """A package, and how it goes through a recording.

    Attributes:
        name: of rows.
        distribution, module: the package, and what it is imported as.
        install: how to get it.
        formats: of checkpoints, by dtype; one that is missing is not supported.
        load: its loader.
        devices: kinds of devices.
        is_batched: whether it takes several chunks at a time.
        can_change: whether it takes another number of chunks without being loaded again.
        can_force: whether it can decode windows to a given number of tokens.
        times_words: whether it gives words their times.
        has_processes: whether it works in several processes, whose memory counts together. Those
            that read files for a system do not count: the command ffmpeg would do so for it.
    """

    name: str
    distribution: str
    module: str
    install: str
    formats: dict[str, str]
    load: Callable[[Setup], Loaded]
    devices: tuple[str, ...] = (CPU, GPU)
    is_batched: bool = False
    can_change: bool = True
    can_force: bool = True
    times_words: bool = True
    has_processes: bool = False

    def why_not(self, device: str, dtype: str, new_tokens: int | None) -> str | None:
        """Why it cannot do this work; None if it can."""
        if device not in self.devices:
            return f"does not run on {device}"
        if dtype not in self.formats:
            return f"does not compute in {dtype}"
        if new_tokens is not None and not self.can_force:
            return "cannot be made to decode a given number of tokens"
        return None


def read_file(path: str) -> Samples:
    """Samples `[T]` of a file, read as this package's transcriber does, by several processes."""
    with AudioOpener() as opener:
        (opened,) = opener.open_each([AudioInput(path)])
        audio = opened.result()
        assert isinstance(audio, AudioSource)
        return audio.whole()


def load_ours(setup: Setup, mode: str) -> Loaded:
    """This package's transcriber."""
    import torch

    from whisper_flash_attention.options import DecodeOptions
    from whisper_flash_attention.transcribe import Transcriber

    torch.set_num_threads(setup.threads)
    transcriber = Transcriber.from_pretrained(
        setup.checkpoint.files[TRANSFORMERS],
        device=setup.device,
        compute_type=setup.dtype,
        quiet=True,
    )
    settings: dict[str, Any] = {"mode": mode, "beam_size": 1}
    if setup.new_tokens is not None:
        settings |= ONCE | {"logprob_threshold": None, "vad_filter": False}
        settings |= dict.fromkeys(("min_new_tokens", "max_new_tokens"), setup.new_tokens)

    def transcribe(request: Request, texts: Texts) -> None:
        options = {**settings, "language": request.language}
        if request.word_times:
            options |= {"word_timestamps": True, "word_alignment": setup.word_alignment}
        if mode == "batched":
            options["batch_size"] = request.batch_size
        for segment in transcriber.stream(request.path, **options):
            texts.add(f" {segment.text}", len(segment.tokens))
            texts.add_words((word.text, word.start, word.end) for word in segment.words)

    defaults = defaults_of(DecodeOptions) | {"vad_filter": mode == "batched"}
    return transcribe, defaults | settings | {"word_alignment": setup.word_alignment}


def load_stock(setup: Setup, *, chunked: bool) -> Loaded:
    """Transformers' pipeline: chunks side by side, or its own long form."""
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    torch.set_num_threads(setup.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recognise: Any = pipeline(
        "automatic-speech-recognition",
        model=setup.checkpoint.files[TRANSFORMERS],
        device=setup.device,
        dtype=getattr(torch, setup.dtype),
    )
    settings: dict[str, Any] = {"return_timestamps": True}
    if chunked:
        settings = {"chunk_length_s": WINDOW}
    plain, counts = recognise.model.generate, list[int]()

    def counted(*arguments: Any, **options: Any) -> Any:
        """As `generate`, whose text tokens the pipeline does not tell."""
        found = plain(*arguments, **options)
        ids = found["sequences"] if isinstance(found, dict) else found
        counts.append(int((ids < setup.checkpoint.end_of_text).sum()))
        return found

    recognise.model.generate = counted
    # The pipeline would search with five beams.
    generate: dict[str, Any] = {"num_beams": 1, "do_sample": False}
    if setup.new_tokens is not None:
        generate |= dict.fromkeys(("min_new_tokens", "max_new_tokens"), setup.new_tokens)
        if chunked:
            settings["stride_length_s"] = 0  # no window is decoded twice

    def transcribe(request: Request, texts: Texts) -> None:
        options: dict[str, Any] = {**settings, "generate_kwargs": dict(generate)}
        if setup.checkpoint.is_multilingual and request.language is not None:
            options["generate_kwargs"] |= {"language": request.language, "task": "transcribe"}
        if chunked:
            options["batch_size"] = request.batch_size
        if request.word_times:
            options["return_timestamps"] = "word"
        counts.clear()
        found = recognise(read_file(request.path), **options)
        texts.add(found["text"], sum(counts))
        if request.word_times:
            texts.add_words((each["text"], *each["timestamp"]) for each in found["chunks"])

    attention = recognise.model.config._attn_implementation
    return transcribe, settings | generate | {"attention": attention} | READER


def set_alignment_heads(model: Any, heads: Iterable[tuple[int, int]]) -> None:
    """Mark the heads that give words their times in openai-whisper's model.

    It knows them itself of checkpoints that it is given by name, and not of files.
    """
    import torch

    mask = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)


def load_openai_whisper(setup: Setup) -> Loaded:
    """openai-whisper's `transcribe`."""
    import torch
    import whisper

    torch.set_num_threads(setup.threads)
    model = whisper.load_model(setup.checkpoint.files[OPENAI], device=setup.device)
    if setup.checkpoint.alignment_heads is not None:
        set_alignment_heads(model, setup.checkpoint.alignment_heads)
    settings: dict[str, Any] = {"fp16": setup.dtype == "float16"}
    if setup.new_tokens is not None:
        settings |= ONCE | {"logprob_threshold": None, "sample_len": setup.new_tokens}

    def transcribe(request: Request, texts: Texts) -> None:
        options = {**settings, "language": request.language, "word_timestamps": request.word_times}
        found = model.transcribe(read_file(request.path), **options)
        texts.add(found["text"], sum(len(segment["tokens"]) for segment in found["segments"]))
        words = (word for segment in found["segments"] for word in segment.get("words", ()))
        texts.add_words((word["word"], word["start"], word["end"]) for word in words)

    return transcribe, defaults_of(whisper.transcribe) | settings | READER


def load_faster_whisper(setup: Setup, *, batched: bool) -> Loaded:
    """faster-whisper's model, or its pipeline for batches."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(
        setup.checkpoint.files[CTRANSLATE2],
        device=setup.kind,
        device_index=setup.device_index,
        compute_type=setup.dtype,
        cpu_threads=setup.threads,
    )
    settings: dict[str, Any] = {"beam_size": 1}
    runner: Any = BatchedInferencePipeline(model) if batched else model
    in_windows = batched and setup.new_tokens is not None
    suppressed = {}
    if setup.new_tokens is not None:
        # CTranslate2 stops at half of the greatest length, in which the prompt counts.
        prompt = 4 if model.model.is_multilingual else 2
        most = 2 * setup.new_tokens - prompt
        settings |= ONCE | {"log_prob_threshold": None, "max_new_tokens": most}
        # By default it looks them up in the tokenizer, of which a random one has no signs.
        config = Path(setup.checkpoint.files[CTRANSLATE2], "config.json").read_text("utf-8")
        suppressed = {"suppress_tokens": json.loads(config)["suppress_ids"]}

    def transcribe(request: Request, texts: Texts) -> None:
        options = {**settings, **suppressed, "word_timestamps": request.word_times}
        if batched:
            options["batch_size"] = request.batch_size
        source: str | Samples = request.path
        if in_windows:
            source = _decoded(request.path)
            options |= {"vad_filter": False, "clip_timestamps": clips_of(source)}
        segments, _ = runner.transcribe(source, language=request.language, **options)
        for segment in segments:
            texts.add(segment.text, len(segment.tokens))
            texts.add_words((word.word, word.start, word.end) for word in segment.words or ())

    # CTranslate2 has options of its own in the environment.
    environment = {name: value for name, value in os.environ.items() if name.startswith("CT2_")}
    stated = defaults_of(runner.transcribe) | settings | {"compute_type": setup.dtype}
    if in_windows:
        stated |= {"vad_filter": False, "clip_timestamps": f"every {WINDOW} s"}
    return transcribe, stated | environment


def _decoded(path: str) -> Samples:
    """The samples of a file, by faster-whisper's reader."""
    from faster_whisper import decode_audio

    samples: Samples = decode_audio(path, sampling_rate=SAMPLING_RATE)
    return samples


def clips_of(samples: Samples) -> list[dict[str, float]]:
    """Windows of 30 s, the last one shorter, as faster-whisper takes them."""
    seconds = samples.size / SAMPLING_RATE
    starts = range(0, max(1, -(-samples.size // (WINDOW * SAMPLING_RATE))) * WINDOW, WINDOW)
    return [{"start": start, "end": min(seconds, start + WINDOW)} for start in starts]


def load_whisper_cpp(setup: Setup) -> Loaded:
    """whisper.cpp, as pywhispercpp carries it."""
    from pywhispercpp.model import Model

    name = GGML_8_BITS if setup.dtype == "int8" else GGML
    settings: dict[str, Any] = {"n_threads": setup.threads}
    model = Model(
        setup.checkpoint.files[name],
        redirect_whispercpp_logs_to=None,
        print_progress=False,
        **settings,
    )
    found_by_itself = "auto" if setup.checkpoint.is_multilingual else "en"

    def transcribe(request: Request, texts: Texts) -> None:
        # Segments of one word; the model keeps what it was given for later calls.
        single = request.word_times
        options = {"max_len": int(single), "split_on_word": single, "token_timestamps": single}
        found = model.transcribe(
            read_file(request.path),
            language=request.language or found_by_itself,
            new_segment_callback=lambda segment: texts.add(f" {segment.text}"),
            **options,
        )
        if single:
            texts.add_words((each.text, each.t0 / 100, each.t1 / 100) for each in found)

    return transcribe, settings | {"weights": name, "decoding": "greedy"} | READER


def load_whisperx(setup: Setup) -> Loaded:
    """whisperX's pipeline, without alignment."""
    import whisperx

    settings: dict[str, Any] = {"beam_size": 1}
    model = whisperx.load_model(
        setup.checkpoint.files[CTRANSLATE2],
        setup.kind,
        device_index=setup.device_index,
        compute_type=setup.dtype,
        threads=setup.threads,
        language=None if setup.checkpoint.is_multilingual else "en",
        asr_options=settings,
    )

    def transcribe(request: Request, texts: Texts) -> None:
        samples = read_file(request.path)
        found = model.transcribe(samples, batch_size=request.batch_size, language=request.language)
        for segment in found["segments"]:
            texts.add(f" {segment['text']}")

    return transcribe, settings | READER


def load_vllm(setup: Setup) -> Loaded:
    """vLLM, which takes windows of 30 s; all of a recording's at a time."""
    from vllm import LLM, SamplingParams

    positions = 448
    model = LLM(
        model=setup.checkpoint.files[TRANSFORMERS],
        dtype=setup.dtype,
        max_model_len=positions,
        max_num_seqs=setup.batch_size,
        limit_mm_per_prompt={"audio": 1},
        gpu_memory_utilization=0.9,
    )
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": positions - 4}
    if setup.new_tokens is not None:
        settings |= dict.fromkeys(("min_tokens", "max_tokens"), setup.new_tokens)
        settings["ignore_eos"] = True
    sampling = SamplingParams(**settings)

    def transcribe(request: Request, texts: Texts) -> None:
        samples = read_file(request.path)
        prompt = "<|startoftranscript|>"
        if setup.checkpoint.is_multilingual:
            prompt += f"<|{request.language or 'en'}|><|transcribe|>"
        step = WINDOW * SAMPLING_RATE
        prompts = [
            {
                "prompt": f"{prompt}<|notimestamps|>",
                "multi_modal_data": {"audio": (samples[start : start + step], SAMPLING_RATE)},
            }
            for start in range(0, samples.size, step)
        ]
        for found in model.generate(prompts, sampling, use_tqdm=False):
            texts.add(f" {found.outputs[0].text}", len(found.outputs[0].token_ids))

    return transcribe, settings | {"max_num_seqs": setup.batch_size} | READER


_INT8 = (*FLOATS, "int8")
# The first fields of `System`, after the name.
_OURS = (
    *(_PACKAGE, "whisper_flash_attention", f"pip install {_PACKAGE}"),
    dict.fromkeys(_INT8, TRANSFORMERS),
)
_STOCK = (
    *("transformers", "transformers", "pip install transformers"),
    dict.fromkeys(FLOATS, TRANSFORMERS),
)
_OPENAI = (
    *("openai-whisper", "whisper", "pip install openai-whisper"),
    dict.fromkeys(("float32", "float16"), OPENAI),
)
_FASTER = (
    *("faster-whisper", "faster_whisper", "pip install faster-whisper"),
    dict.fromkeys(_INT8, CTRANSLATE2),
)
_CPP = (
    *("pywhispercpp", "_pywhispercpp", "pip install pywhispercpp"),
    {"float32": GGML, "int8": GGML_8_BITS},
)
_WHISPERX = (
    *("whisperx", "whisperx", "pip install whisperx, which needs PyTorch 2.8"),
    dict.fromkeys(_INT8, CTRANSLATE2),
)
_VLLM = ("vllm", "vllm", "pip install 'vllm[audio]'", dict.fromkeys(FLOATS, TRANSFORMERS))

SYSTEMS = {
    system.name: system
    for system in (
        System(
            *(f"{OURS}-sequential", *_OURS, partial(load_ours, mode="sequential")),
            has_processes=True,
        ),
        System(
            *(f"{OURS}-batched", *_OURS, partial(load_ours, mode="batched")),
            is_batched=True,
            has_processes=True,
        ),
        System("stock-long-form", *_STOCK, partial(load_stock, chunked=False)),
        System("stock-chunked", *_STOCK, partial(load_stock, chunked=True), is_batched=True),
        System("openai-whisper", *_OPENAI, load_openai_whisper),
        System("faster-whisper-sequential", *_FASTER, partial(load_faster_whisper, batched=False)),
        System(
            "faster-whisper-batched",
            *(*_FASTER, partial(load_faster_whisper, batched=True)),
            is_batched=True,
        ),
        System("whisper.cpp", *_CPP, load_whisper_cpp, devices=(CPU,), can_force=False),
        System(
            *("whisperx", *_WHISPERX, load_whisperx),
            is_batched=True,
            can_force=False,
            times_words=False,
        ),
        System(
            *("vllm", *_VLLM, load_vllm),
            devices=(GPU,),
            is_batched=True,
            can_change=False,
            times_words=False,
            has_processes=True,
        ),
    )
}
