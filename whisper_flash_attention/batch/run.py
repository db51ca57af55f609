"""One run over an archive: what is there, what is left, an engine, the results."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.decoder_pool import DECODE_TIMEOUT, DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.batch.items import Item, longest_first
from whisper_flash_attention.batch.manifest import Archive, read_archive
from whisper_flash_attention.batch.model import Model, Opener, RunOptions
from whisper_flash_attention.batch.progress import ArchiveProgress, Summary, summarize
from whisper_flash_attention.batch.results import held, prepare
from whisper_flash_attention.batch.rows import Row
from whisper_flash_attention.batch.shards import check_format
from whisper_flash_attention.batch.sink import Sink
from whisper_flash_attention.batch.stages import (
    ENGINES,
    DeviceLost,
    OnProgress,
    TranscribeStage,
    Work,
    alike_together,
    decode,
)
from whisper_flash_attention.batch.storage import check_protocols, is_url
from whisper_flash_attention.errors import DeviceError, OptionError, is_bug
from whisper_flash_attention.options import SubtitleOptions, TranscribeOptions
from whisper_flash_attention.terminal import print_line
from whisper_flash_attention.transcribe.writers import SUBTITLES

SHOWN_REJECTED = 10


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the engine `ray` runs.

    Args:
        address: of the cluster's head, or "auto"; None is the cluster that this process is
            connected to, else one on this machine that lasts as long as the run.
        gpus_per_worker: GPUs of a model; None is 1 where the cluster has any, else 0.
    """

    address: str | None = None
    gpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        check.optional(check.text, "address", self.address)
        share = check.optional(
            check.number, "gpus_per_worker", self.gpus_per_worker, "a number, 0 or more", least=0
        )
        object.__setattr__(self, "gpus_per_worker", share)


def run_batch(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Opener = "small",
    run_options: RunOptions = RunOptions(),
    engine: str = "local",
    cluster: Cluster = Cluster(),
    workers: int | None = None,
    group_hours: float = 4.0,
    group_files: int | None = None,
    output_format: str = "jsonl",
    subtitles: Sequence[str] = (),
    subtitle_options: SubtitleOptions = SubtitleOptions(),
    resume: bool = True,
    retry_errors: bool = False,
    limit: int | None = None,
    decode_timeout: float = DECODE_TIMEOUT,
    console: Console | None = None,
) -> Summary:
    """Transcribe an archive into shards of rows; given again, go on where it stopped.

    Args:
        source: a folder, a pattern, or a manifest (csv, jsonl, parquet), local or a URL.
        output: local folder of the results; made if need be.
        model: a checkpoint, as `Transcriber.from_pretrained` takes it, or `Model` with a device.
        run_options: language, task and decoding, where a manifest's row has no value of its own.
        engine: "local" (this process) or "ray" (Ray Data, any number of machines).
        cluster: where "ray" runs.
        workers: processes that decode ("local"), or models ("ray"); None chooses.
        group_hours: hours of audio that a model has side by side; bounds the memory.
        group_files: the most recordings that a model has side by side; None is as many as there is
            room for ("local"), or 4 times the windows that are decoded at a time ("ray"). (Of a
            small archive, "ray" has both smaller.)
        output_format: of the shards, "jsonl" or "parquet".
        subtitles: "srt", "vtt", "ass" or several, as files below `output/subtitles`.
        subtitle_options: how these are cut.
        resume: keep what earlier runs finished; otherwise their results are set aside.
        retry_errors: do recordings again whose rows have an error.
        limit: the most recordings of this run.
        decode_timeout: seconds without progress after which decoding a recording is given up, which
            is an error of that recording.
        console: for progress, warnings and errors of recordings; None shows nothing.

    Returns:
        What it came to; recordings that failed are counted there, and have rows with their error.

    Raises:
        OptionError: misuse; ids that are there twice; another run is writing to the folder.
        MissingPackage: Ray, pyarrow, or what a URL needs is not installed.
        BatchError: results cannot be written (a full disk, say). What is in shards is safe.
        DecoderError: the processes that decode cannot be started.
        WhisperFlashError: the model cannot be loaded, or do what is requested.
    """
    started = time.monotonic()
    opener = Model(model) if isinstance(model, str) else model
    check.instance("run_options", run_options, RunOptions)
    check.instance("cluster", cluster, Cluster)
    work = Work(opener, run_options, group_hours, group_files, workers, decode_timeout)
    _check(str(output), engine, output_format, subtitles, subtitle_options, limit)
    if engine != "ray" and cluster != Cluster():
        raise OptionError("address and gpus_per_worker are for engine 'ray'")
    shown = console or Console(quiet=True)
    archive = read_archive(str(source))
    check_protocols(archive.items)
    _report_rejected(archive, shown)
    folder = Path(output)
    with held(folder):
        finished = prepare(
            folder,
            _settings(opener, run_options, subtitles, subtitle_options),
            resume=resume,
            retry_errors=retry_errors,
            tell=lambda line: print_line(shown, line),
        )
        left = [item for item in archive.items if item.id not in finished.ids]
        todo = longest_first([run_options.resolved(item) for item in left[:limit]])
        if len(left) < len(archive.items):
            print_line(
                shown, f"{len(archive.items) - len(left)} of {len(archive.items)} are there already"
            )
        ids = (item.id for item in archive.items)
        sink = Sink(
            *(folder, finished, output_format),
            subtitles=tuple(subtitles),
            subtitle_options=subtitle_options,
            ids=ids,
        )
        if todo:
            count = "1 recording" if len(todo) == 1 else f"{len(todo)} recordings"
            print_line(shown, f"{count} to transcribe; loading the model {opener.source}")
            progress = ArchiveProgress(shown, todo)
            rows = (
                run_local(todo, work, progress.advance)
                if engine == "local"
                else _on_ray(todo, work, cluster)
            )
            _collect(cast("Any", rows), sink, progress)
        summary = summarize(
            len(archive.items),
            archive.rejected,
            len(left) - sum(item.id in finished.ids for item in left),
            finished.tally,
            sink.tally,
            time.monotonic() - started,
        )
        summary.write(folder)
    return summary


def _collect(rows: Any, sink: Sink, progress: ArchiveProgress) -> None:
    """Bring an engine's rows to the sink; when it ends early, too, what is there is written."""
    with closing(rows), progress:
        try:
            for several in rows:
                progress.add(sink.take(several))
        except Exception as error:
            if is_bug(error):
                error.add_note("a bug, of which no recording is the cause; what is done is kept")
            raise
        finally:
            sink.flush()


def _on_ray(todo: list[Item], work: Work, cluster: Cluster) -> Iterator[list[Row]]:
    from whisper_flash_attention.batch.ray_engine import run_on_ray

    return run_on_ray(todo, work, cluster.address, cluster.gpus_per_worker)


def _check(
    output: str,
    engine: str,
    output_format: str,
    subtitles: Sequence[str],
    subtitle_options: SubtitleOptions,
    limit: int | None,
) -> None:
    check.one_of("engine", engine, ENGINES)
    check_format(output_format)
    check.instance("subtitle_options", subtitle_options, SubtitleOptions)
    if subtitle_options != SubtitleOptions() and not subtitles:
        raise OptionError("lines and cues are for subtitles: choose formats of these, too")
    for name in check.values("subtitles", subtitles, "a list of srt, vtt and ass"):
        check.one_of("subtitles", name, SUBTITLES)
    check.optional(check.whole_number, "limit", limit, least=1)
    if is_url(output):
        raise OptionError(
            f"{output}: results are written to a local folder, with renames and a lock that a "
            "bucket does not have; copy it there when the run is done"
        )


def _settings(
    opener: Opener,
    run_options: RunOptions,
    subtitles: Sequence[str],
    subtitle_options: SubtitleOptions,
) -> dict[str, Any]:
    """What results depend on, so that no folder has rows of two kinds."""
    usual = asdict(TranscribeOptions()) | asdict(SubtitleOptions())
    given = asdict(run_options.options) | asdict(subtitle_options)
    # Folders of earlier releases know neither channels nor tracks, nor how subtitles are cut.
    options = {
        name: value
        for name, value in given.items()
        if name in ("language", "task") or value != usual[name]
    }
    return {
        "model": opener.source,
        **options,
        **asdict(run_options.decode),
        "subtitles": sorted(subtitles),
    }


def _report_rejected(archive: Archive, console: Console) -> None:
    def tell(line: str) -> None:
        print_line(console, line)

    if archive.unused:
        tell(f"columns that mean nothing here: {', '.join(archive.unused)}")
    for each in archive.rejected[:SHOWN_REJECTED]:
        tell(f"error: row {each.row} of the manifest: {each.reason}")
    if len(archive.rejected) > SHOWN_REJECTED:
        tell(f"error: {len(archive.rejected) - SHOWN_REJECTED} more rows cannot be read")


def run_local(
    items: Sequence[Item], work: Work, on_progress: OnProgress | None = None
) -> Generator[list[Row]]:
    """The engine `local`: give the row of each recording as soon as it is done.

    One model in this process transcribes side by side what other processes decode.

    Memory holds what is transcribed (`Work.most_seconds`), and what `AudioOpener.open_each` decodes
    ahead.

    Raises:
        DecoderError: the processes that decode cannot be started.
        WhisperFlashError: what would be the same for every recording.
    """
    stage = TranscribeStage(work.opener, work.run_options)
    items = alike_together(items, lambda item: item, work.run_options)
    pool = DecoderPool(work.workers, timeout=work.decode_timeout, decode=work.decode, reuse=True)
    with (
        AudioOpener(pool) as opener,
        closing(decode(items, opener)) as decoded,
        closing(stage.stream(decoded, work, on_progress)) as rows,
    ):
        try:
            for row in rows:
                yield [row]
        except DeviceLost as error:
            raise DeviceError(f"the GPU failed ({error}); the same command goes on") from error
