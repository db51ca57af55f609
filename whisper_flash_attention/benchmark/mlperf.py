"""MLPerf Inference's Offline scenario for Whisper, with our transcriber as the system under test.

MLPerf's own load generator draws the samples, hands them over all at once, takes the time and
writes its log files. What it is not: a submission. Samples are made of any recordings, weights may
be random, and a run may be shorter than the rules ask; `UNOFFICIAL` goes with every row.

Responses are logged as MLPerf's reference implementation logs them, one 64-bit integer per
character, so that its accuracy script reads the log of a run.
"""

from __future__ import annotations

import array
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from whisper_flash_attention import validation as check
from whisper_flash_attention._version import __version__
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.benchmark.environment import driver_memory, package_version
from whisper_flash_attention.benchmark.measure import GB, peak_rss
from whisper_flash_attention.benchmark.spoken import Sample, bundled_spoken, read_manifest, repack
from whisper_flash_attention.errors import BenchmarkError, MissingPackage, OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.parity.report import WordErrors
from whisper_flash_attention.transcribe import Transcriber

UNOFFICIAL = "not an MLPerf result: not submitted to MLCommons, nor reviewed"
# The characters that the reference logs; their places are the integers.
ALPHABET = " abcdefghijklmnopqrstuvwxyz'0123456789$¢£€%+-"
# A run has to take this long, by the rules.
OFFICIAL_SECONDS = 600.0
WARM_UP_BATCHES = 2
# Every fifth of the 120 orders of the packaged recordings makes a sample.
ORDERS_APART = 5
SUMMARY, ACCURACY = "mlperf_log_summary.txt", "mlperf_log_accuracy.json"


def load_generator() -> Any:
    """The module of MLPerf's load generator.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise MissingPackage(
            "MLPerf's load generator is not installed: pip install mlcommons-loadgen"
        ) from error
    return mlperf_loadgen


def offline_options(new_tokens: int | None) -> DecodeOptions:
    """Options as the reference decodes: greedily, once, without timestamps.

    `new_tokens` forces that many for every sample; None leaves the length to the model.
    """
    return DecodeOptions(
        mode="batched",
        vad_filter=False,
        temperature=0.0,
        compression_ratio_threshold=None,
        logprob_threshold=None,
        no_speech_threshold=None,
        without_timestamps=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )


def sample_library(manifest: Path | None) -> list[Sample]:
    """The samples of a manifest; without one, the packaged recordings joined in 24 orders.

    The packaged recordings fill one sample. In other orders they fill others, so that the load
    generator has samples to choose from.

    Raises:
        AudioError: a recording cannot be read.
        BenchmarkError: the manifest cannot be read, or none of its recordings is short enough.
    """
    if manifest is not None:
        return repack(read_manifest(manifest))
    load = cache(load_audio)
    orders = list(permutations(bundled_spoken()))[::ORDERS_APART]
    return [sample for order in orders for sample in repack(order, load)]


@dataclass(frozen=True)
class Response:
    """The text of a sample, and its number of tokens."""

    text: str
    tokens: int


@dataclass
class OfflineSystem:
    """The system under test: samples in, texts out, as many side by side as a batch holds.

    Args:
        transcriber: ours.
        samples: all of the library.
        batch_size: windows at a time.
        new_tokens: of every sample; None where the model decides.
    """

    transcriber: Transcriber
    samples: Sequence[Sample]
    batch_size: int
    new_tokens: int | None = None

    def transcribe(self, indices: Sequence[int], report: Callable[[int, Response], None]) -> None:
        """Transcribe samples; `report` takes places in `indices` and responses as they are done."""
        done = self.transcriber.transcribe_each(
            (self.samples[index].samples for index in indices),
            language="en",
            options=offline_options(self.new_tokens),
            batch_size=self.batch_size,
        )
        for place, found in done:
            tokens = sum(len(segment.tokens) for segment in found.segments)
            if self.new_tokens is not None and tokens != self.new_tokens:
                raise BenchmarkError(f"{self.new_tokens} tokens were forced, and {tokens} came")
            report(place, Response(found.text, tokens))

    def warm_up(self) -> float:
        """Samples per second of a few batches, after one that is not timed."""
        indices = [i % len(self.samples) for i in range(WARM_UP_BATCHES * self.batch_size)]
        self.transcribe(indices, lambda place, response: None)
        start = time.perf_counter()
        self.transcribe(indices, lambda place, response: None)
        return len(indices) / (time.perf_counter() - start)


def run_offline(
    system: OfflineSystem, *, accuracy: bool, rate: float, least_seconds: float, folder: Path
) -> dict[str, Any]:
    """Run the load generator once in one mode; its log files go to `folder`.

    Args:
        rate: samples per second that it shall expect; with `least_seconds` the number of samples
            of a performance run follows from it. An accuracy run takes every sample once.

    Returns:
        the number of samples, the tokens of their responses, and, of a performance run, the load
        generator's rate and verdict.

    Raises:
        whatever the transcriber raised.
    """
    loadgen = load_generator()
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(loadgen, folder, rate, least_seconds, len(system.samples))
    modes = loadgen.TestMode
    settings.mode = modes.AccuracyOnly if accuracy else modes.PerformanceOnly
    failures: list[BaseException] = []
    tokens: list[int] = []

    def issue(queries: Sequence[Any]) -> None:
        waiting = set(range(len(queries)))

        def complete(place: int, response: Response) -> None:
            tokens.append(response.tokens)
            waiting.remove(place)
            _complete(loadgen, queries[place].id, response)

        try:
            system.transcribe([query.index for query in queries], complete)
        # Whatever it is, it may not unwind through the load generator's frames, which would end
        # the process; and the load generator waits for every sample.
        except BaseException as error:
            failures.append(error)
            for place in waiting:
                _complete(loadgen, queries[place].id, Response("", 0))

    library = loadgen.ConstructQSL(
        len(system.samples), len(system.samples), lambda indices: None, lambda indices: None
    )
    under_test = loadgen.ConstructSUT(issue, lambda: None)
    try:
        loadgen.StartTestWithLogSettings(under_test, library, settings, _logging(loadgen, folder))
    finally:
        loadgen.DestroySUT(under_test)
        loadgen.DestroyQSL(library)
    if failures:
        raise failures[0]
    found = {"samples": len(tokens), "tokens": sum(tokens)}
    return found if accuracy else found | read_summary(folder / SUMMARY)


def _settings(loadgen: Any, folder: Path, rate: float, least_seconds: float, samples: int) -> Any:
    """The rules for Whisper that are built into the load generator, shortened as requested."""
    user = folder / "user.conf"
    user.write_text(f"*.Offline.target_qps = {rate:.6f}\n")
    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.Offline
    settings.FromConfig(str(user), "whisper", "Offline")
    if least_seconds < OFFICIAL_SECONDS:
        settings.min_duration_ms = round(1e3 * least_seconds)
    # As many as there are, where these are not LibriSpeech's.
    settings.min_query_count = min(settings.min_query_count, samples)
    settings.performance_sample_count_override = samples
    return settings


def _logging(loadgen: Any, folder: Path) -> Any:
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    logging = loadgen.LogSettings()
    logging.log_output = output
    logging.enable_trace = False
    return logging


def _complete(loadgen: Any, query: int, response: Response) -> None:
    data = encode(response.text)
    address, length = data.buffer_info()
    size = length * data.itemsize
    logged = loadgen.QuerySampleResponse(query, address, size, response.tokens)
    loadgen.QuerySamplesComplete([logged])  # which copies the data


def encode(text: str) -> array.array[int]:
    """The characters of a text that the reference logs, as their places in `ALPHABET`."""
    places = (ALPHABET.find(letter) for letter in text.lower().strip())
    return array.array("q", [place for place in places if place >= 0])


def decode(data: str) -> str:
    """The text of a response in an accuracy log, where it is hexadecimal."""
    return "".join(ALPHABET[place] for place in array.array("q", bytes.fromhex(data)))


def read_summary(path: Path) -> dict[str, Any]:
    """The rate and the verdict in the summary of a performance run.

    Raises:
        BenchmarkError: there is none, as the load generator found an error.
    """
    text = path.read_text("utf-8")
    rate = re.search(r"Samples per second: *([\d.e+-]+)", text)
    verdict = re.search(r"Result is *: *(\w+)", text)
    if rate is None or verdict is None:
        raise BenchmarkError(f"the load generator reports no rate: see {path}")
    return {"samples_per_second": float(rate[1]), "verdict": verdict[1]}


def word_error_rate(
    samples: Sequence[Sample], log: Path, normalise: Callable[[str], str]
) -> float | None:
    """Word error rate of an accuracy log, both texts reduced to `ALPHABET` and normalised."""
    errors = WordErrors()
    for row in json.loads(log.read_text("utf-8")):
        reference = decode(encode(samples[row["qsl_idx"]].transcript).tobytes().hex())
        errors.add(normalise(reference), normalise(decode(row["data"])))
    return errors.rate


def english_normaliser(tokenizer: Any) -> tuple[Callable[[str], str], bool]:
    """Whisper's normaliser of English, and whether it maps British spellings to American ones.

    The mapping comes with a checkpoint (normalizer.json) or with openai-whisper.
    """
    from importlib.resources import files

    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    mapping = getattr(tokenizer, "english_spelling_normalizer", None)
    if mapping is None and package_version("openai-whisper"):
        mapping = json.loads(files("whisper").joinpath("normalizers/english.json").read_text())
    return EnglishTextNormalizer(mapping or {}), bool(mapping)


@dataclass(frozen=True)
class MlperfCase:
    """What is measured.

    Args:
        checkpoint: as users name it; of random weights the size.
        random_weights: whether the weights are random; there is no accuracy to measure then.
        device, dtype: by name.
        batch_size: windows at a time.
        new_tokens: of every sample; None leaves them to the model.
        seconds: that a performance run takes at least.
        target_qps: samples per second that the load generator expects; None measures before.
        accuracy, performance: the runs that are requested.

    Raises:
        OptionError: a number is out of range, or no run is left.
    """

    checkpoint: str
    random_weights: bool
    device: str
    dtype: str
    batch_size: int
    new_tokens: int | None = None
    seconds: float = OFFICIAL_SECONDS
    target_qps: float | None = None
    accuracy: bool = True
    performance: bool = True

    def __post_init__(self) -> None:
        check.whole_number("batch_size", self.batch_size, least=1)
        for name, number in (("seconds", self.seconds), ("target_qps", self.target_qps)):
            check.optional(check.number, name, number, "a number above 0", above=0)
        if self.random_weights and not self.performance:
            raise OptionError("random weights have no accuracy: measure performance")
        if not (self.accuracy or self.performance):
            raise OptionError("nothing to measure: neither performance nor accuracy")

    @property
    def measures_accuracy(self) -> bool:
        """Whether there is an accuracy run: one is requested, and the weights are a model's."""
        return self.accuracy and not self.random_weights


def measure_mlperf(
    case: MlperfCase,
    transcriber: Transcriber,
    samples: Sequence[Sample],
    folder: Path,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Run what the case has, and return its row.

    Args:
        folder: log files go to "performance" and "accuracy" in it.
        environment: of this machine.

    Raises:
        BenchmarkError: a sample got another number of tokens than forced, or the load generator
            found an error.
        MissingPackage: the load generator is not installed.
    """
    load_generator()
    system = OfflineSystem(transcriber, samples, case.batch_size, case.new_tokens)
    device = torch.device(case.device)
    is_cuda = device.type == "cuda"
    rate = case.target_qps or system.warm_up()
    lengths = [sample.seconds for sample in samples]
    row: dict[str, Any] = {
        "setting": "mlperf-offline",
        "official": False,
        "note": UNOFFICIAL,
        "system": "ours-batched",
        "version": __version__,
        "load_generator": package_version("mlcommons-loadgen"),
        **asdict(case),
        "accuracy": case.measures_accuracy,
        "library_samples": len(samples),
        "library_seconds": sum(lengths),
        "target_qps": rate,
    }
    runs = {"rate": rate, "least_seconds": case.seconds}
    if case.performance:
        found = run_offline(system, accuracy=False, folder=folder / "performance", **runs)
        speed = found["samples_per_second"]
        row |= found | {
            "tokens_per_sample": found["tokens"] / found["samples"],
            "realtime_factor": speed * sum(lengths) / len(lengths),
        }
    if case.measures_accuracy:
        run_offline(system, accuracy=True, folder=folder / "accuracy", **runs)
        normalise, with_spelling = english_normaliser(transcriber.processor.tokenizer)
        row["wer"] = word_error_rate(samples, folder / "accuracy" / ACCURACY, normalise)
        row["spelling_normalised"] = with_spelling
    return row | {
        "rss_peak_gb": peak_rss(),
        "vram_allocated_gb": torch.cuda.max_memory_allocated(device) / GB if is_cuda else None,
        "vram_driver_gb": driver_memory(device)[0],
        "environment": environment,
    }
