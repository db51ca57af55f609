"""One odd name, row or place is an error of its own, and ends no run."""

from __future__ import annotations

import os
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audio import faulty_decoders
from tests.batch.fakes import FakeModel, FakeSpeech, all_rows, write_archive, write_wav
from tests.batch.test_manifest import write_jsonl
from tests.batch.test_results import good
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.batch import run_batch
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.manifest import read_archive
from whisper_flash_attention.batch.model import RunOptions
from whisper_flash_attention.batch.results import SUBTITLE_FOLDER, Finished
from whisper_flash_attention.batch.shards import shards_in
from whisper_flash_attention.batch.sink import Sink, SubtitleNames, alike, subtitle_path
from whisper_flash_attention.batch.stages import Decoded, TranscribeStage, decode
from whisper_flash_attention.batch.storage import is_url, opened, utf8_id
from whisper_flash_attention.errors import MissingPackage, OptionError

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and names of bytes are POSIX's")
SEGMENT = {"start": 0.0, "end": 2.0, "text": "a", "tokens": [], "words": []}


def errors_of(folder: Path) -> dict[str, str | None]:
    return {name: row["error_kind"] for name, row in all_rows(folder).items()}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/a.wav", True),
        ("zip://a.wav::file://x.zip", True),
        ("zip://a.wav::x.zip", True),
        ("simplecache::s3://bucket/a.wav", True),
        ("call::1.wav", False),
        ("talks/call::1.wav", False),
        ("/talks/what://is.wav", False),
        ("::", False),
        ("://", False),
        ("C:\\a.wav", False),
        ("é://a.wav", False),
    ],
)
def test_what_is_a_url(path: str, expected: bool) -> None:
    assert is_url(path) is expected


@posix
def test_names_of_files_that_look_like_urls_are_files(tmp_path: Path) -> None:
    for name in ("call::1.wav", "a:b.wav", "x::/y.wav"):
        write_wav(tmp_path / name)
    out = tmp_path / "out"
    run_batch(tmp_path, out, model=FakeModel())
    assert errors_of(out) == {"call::1.wav": None, "a:b.wav": None, "x::/y.wav": None}
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "path": "call::1.wav"}])
    assert run_batch(manifest, tmp_path / "other", model=FakeModel()).done == 1
    assert run_batch(tmp_path / "call::1.wav", tmp_path / "third", model=FakeModel()).done == 1


@posix
def test_names_that_are_not_utf8_never_share_an_id(tmp_path: Path) -> None:
    names = (b"caf\xe9.wav", b"caf\\udce9.wav", b"caf\\\\udce9.wav", "café.wav".encode(), b"\\.wav")
    wav = write_wav(tmp_path / "a.wav")
    for name in names:
        os.link(wav, os.fsencode(tmp_path) + b"/" + name)
    archive = read_archive(str(tmp_path))
    assert len({item.id for item in archive.items}) == len(names) + 1
    assert not archive.rejected
    assert {"caf\\udce9.wav", "café.wav", "\\.wav"} < {item.id for item in archive.items}
    assert run_batch(tmp_path, tmp_path / "out", model=FakeModel()).done == len(names) + 1
    assert utf8_id("caf\\udce9") == "caf\\\\udce9"


@pytest.mark.skipif(find_spec("ocifs") is not None, reason="ocifs is installed")
def test_a_url_whose_package_is_missing_is_an_error_of_its_row(tmp_path: Path) -> None:
    write_wav(tmp_path / "good.wav")
    rows = [
        {"id": "good", "path": "good.wav"},
        {"id": "missing", "path": "oci://bucket@space/a.wav"},
        {"id": "gopher", "path": "gopher://bucket/a.wav"},
        {"id": "chain", "path": "zip://a.wav::gopher://x"},
        {"id": "arguments", "path": "github://a.wav"},  # its class needs more than a path
        {"id": "bucket", "path": "http:///"},
        {"id": "host", "path": "http://[::1/a.wav"},
    ]
    out = tmp_path / "out"
    run_batch(write_jsonl(tmp_path / "m.jsonl", rows), out, model=FakeModel())
    found = errors_of(out)
    assert found.pop("good") is None
    assert found.pop("missing") == "MissingPackage"
    assert all(found.values())
    every = write_jsonl(tmp_path / "all.jsonl", rows[1:2])
    with pytest.raises(MissingPackage, match="ocifs"):
        run_batch(every, tmp_path / "other", model=FakeModel())
    assert not (tmp_path / "other").exists()


class OddStorage:
    """An open file of a storage package whose reads raise."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self, size: int = -1) -> bytes:
        raise self.error

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def tell(self) -> int:
        return 0


class ClientError(Exception):
    """As botocore's, which is neither an `OSError` nor a `ValueError`."""


def storage(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from whisper_flash_attention.batch import storage

    monkeypatch.setattr(storage, "_opened_by_fsspec", lambda path, stack: OddStorage(error))


def test_what_storage_raises_is_an_error_of_its_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with AudioOpener(DecoderPool(1)) as opener:
        (decoded,) = decode([Item("a", f"file://{tmp_path}/missing.wav")], opener)
    assert decoded.failure is not None and "missing.wav" in decoded.failure["error"]
    storage(ClientError("no such bucket"), monkeypatch)
    with opened("s3://bucket/a.wav") as file, pytest.raises(OSError, match="ClientError: no such"):
        file.read()


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError, AssertionError])
def test_a_bug_is_no_error_of_a_recording(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while it is read, nor while it is decoded, nor while it is transcribed."""
    storage(error("a bug"), monkeypatch)
    with opened("s3://bucket/a.wav") as file, pytest.raises(error, match="a bug"):
        file.read()
    item = Item("a", str(write_wav(tmp_path / f"{error.__name__}.wav")))
    decoded = Decoded(item, load_audio(item.path))

    def broken(*arguments: Any, **options: Any) -> Any:
        raise error("a bug")

    monkeypatch.setattr(FakeSpeech, "transcribe_each", broken)
    with pytest.raises(error, match="a bug"):
        TranscribeStage(FakeModel(), RunOptions()).rows([decoded])
    name = f"{faulty_decoders.__name__}:raise_bug"
    pool = DecoderPool(1, decode=name)
    with AudioOpener(pool) as opener, pytest.raises(error, match="a bug") as raised:
        list(decode([item], opener))
    assert any(f"{error.__name__}.wav was decoded" in note for note in raised.value.__notes__)


def test_a_bug_ends_the_run_and_what_is_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = write_archive(tmp_path / "archive", 6), tmp_path / "out"
    original = FakeSpeech.transcribe_each

    def broken(self: FakeSpeech, recordings: Any, **options: Any) -> Any:
        taken = list(recordings)
        if any(samples.size == 1_602 for samples in taken):
            raise TypeError("open() got an unexpected keyword argument")
        return original(self, taken, **options)

    monkeypatch.setattr(FakeSpeech, "transcribe_each", broken)
    with pytest.raises(TypeError) as raised:
        run_batch(archive, out, model=FakeModel(), group_files=1)
    assert any("what is done is kept" in note for note in raised.value.__notes__)
    assert errors_of(out) == {"005.wav": None, "004.wav": None, "003.wav": None}
    monkeypatch.undo()
    assert run_batch(archive, out, model=FakeModel(), group_files=1).done == 6


def test_an_option_that_one_row_cannot_have_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RunOptions, item: Item) -> RunOptions:
        if item.id == "odd":
            raise OptionError("this prompt is odd")
        return self

    monkeypatch.setattr(RunOptions, "of", refuse)
    import numpy as np

    samples = np.zeros(1_600, np.float32)
    group = [Decoded(Item(name, "a.wav"), samples) for name in ("a", "odd")]
    rows = TranscribeStage(FakeModel(), RunOptions()).rows(group)
    assert [row["error"] for row in rows] == [None, "this prompt is odd"]


@posix
def test_a_pipe_a_device_or_a_folder_in_a_row_is_its_error(tmp_path: Path) -> None:
    write_wav(tmp_path / "good.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "circle.wav").symlink_to("circle.wav")
    (tmp_path / "link.wav").symlink_to("pipe.wav")
    paths = (
        *("good.wav", "pipe.wav", "folder.wav", "circle.wav", "link.wav", "/dev/zero", "/dev/tty"),
        *(
            f"file://{tmp_path}/pipe.wav",
            "file:///dev/zero",
            f"simplecache::file://{tmp_path}/pipe.wav",
        ),
        *("x" * 5_000, "d/" * 2_500 + "a.wav"),
    )
    rows = [{"id": path, "path": path} for path in paths]
    out = tmp_path / "out"
    run_batch(write_jsonl(tmp_path / "m.jsonl", rows), out, model=FakeModel())
    found = errors_of(out)
    assert found.pop("good.wav") is None
    assert len(found) == len(paths) - 1
    assert all(found.values())
    assert "is a pipe" in all_rows(out)["pipe.wav"]["error"]
    # In a folder, too.
    run_batch(tmp_path, tmp_path / "other", model=FakeModel())
    found = errors_of(tmp_path / "other")
    assert found.pop("good.wav") is None
    assert sorted(found) == ["circle.wav", "link.wav", "pipe.wav"]
    assert all(found.values())


def test_ids_that_would_be_files_and_folders_of_one_another(tmp_path: Path) -> None:
    ids = (
        *("a", "a.srt/b", "a.srt.srt/b", "a.SRT/b", "a.vtt/x", "a/b", "A", "é", "e\u0301"),
        *("../../x", "/etc/x", "a//b", "..", ".", "a/", "CON", "con.txt/x", "nul", "a./b", "a /b"),
        *("d/" * 2_500 + "x", "d/" * 2_500 + "y", "x" * 5_000, "x" * 5_001, "é" * 300, "a\0b"),
        *("a\x1b]0;x\x07", "\u202ea", "a\nb", "%2E%2E", "%", "a%-b", "b.srt", "b.srt.srt", "b"),
    )
    sink = Sink(tmp_path, Finished(), subtitles=("srt", "vtt"), ids=ids)
    rows = sink.take([good("a") | {"id": name, "segments": [SEGMENT]} for name in ids])
    sink.flush()
    assert [row["error"] for row in rows] == [None] * len(ids)
    assert set(all_rows(tmp_path)) == set(ids)
    files = [path for path in (tmp_path / SUBTITLE_FOLDER).rglob("*") if path.is_file()]
    assert len(files) == 2 * len(ids)
    assert len({str(path).casefold() for path in files}) == len(files)
    assert not list(tmp_path.parent.glob("x*"))
    for path in files:
        assert all(part.rstrip(". ") == part for part in path.relative_to(tmp_path).parts)
        assert len(str(path.relative_to(tmp_path)).encode()) < 1_000


def test_only_ids_that_some_file_system_takes_for_one_are_set_apart() -> None:
    assert alike(["a", "A", "b", "é", "e\u0301", "x/y"]) == {"a", "A", "é", "e\u0301"}
    assert subtitle_path(Path("s"), "x/Talk.mp3", "srt") == Path("s/x/Talk.mp3.srt")
    apart = subtitle_path(Path("s"), "x/Talk.mp3", "srt", apart=True)
    assert apart.parent == Path("s/x")
    assert apart.name.startswith("Talk.mp3%-")


def test_subtitles_are_named_as_those_of_single_recordings() -> None:
    ids = ("one/talk.wav", "two/talk.wav", "two/talk.mp3", "x", "x.wav", "y.txt", ".wav", "z.b.wav")
    names = SubtitleNames(ids)
    found = {each: names.path(Path("s"), each, "srt").as_posix() for each in ids}
    # An earlier run may have written x.srt for x.wav alone.
    assert re.fullmatch(r"s/x%-[0-9a-f]{32}\.srt", found.pop("x"))
    assert found == {
        "one/talk.wav": "s/one/talk.srt",
        "two/talk.wav": "s/two/talk.wav.srt",
        "two/talk.mp3": "s/two/talk.mp3.srt",
        "x.wav": "s/x.wav.srt",
        "y.txt": "s/y.txt.srt",
        ".wav": "s/.wav.srt",
        "z.b.wav": "s/z.b.srt",
    }


NEARLY_EQUAL = [
    f"{name}{middle}{end}"
    for name in "aA"
    for middle in ("", ".wav", ".Mp3")
    for end in ("", ".wav", ".srt")
]


@given(ids=st.sets(st.sampled_from(NEARLY_EQUAL)))
def test_no_two_ids_have_one_file(ids: set[str]) -> None:
    names = SubtitleNames(ids)
    paths = {str(names.path(Path("s"), each, "srt")).casefold() for each in ids}
    assert len(paths) == len(ids)


def test_a_name_that_the_file_system_refuses_is_an_error_of_its_row(tmp_path: Path) -> None:
    (tmp_path / SUBTITLE_FOLDER / "taken.srt").mkdir(parents=True)  # by hand
    sink = Sink(tmp_path, Finished(), subtitles=("srt",))
    rows = sink.take([good("taken"), good("other")])
    assert [row["error_kind"] for row in rows] == ["IsADirectoryError", None]
    assert rows[0]["text"] == "a"
    sink.flush()
    assert errors_of(tmp_path) == {"taken": "IsADirectoryError", "other": None}


def test_two_files_of_an_archive_in_a_file_with_one_id(tmp_path: Path) -> None:
    packed = tmp_path / "talks.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("x//a.wav", "x/a.wav", "b.wav"):
            file.writestr(name, write_wav(tmp_path / "a.wav").read_bytes())
        file.writestr("../../evil.wav", b"x")
        file.writestr("call::1.wav", b"x")
    archive = read_archive(f"zip://::file://{packed}")
    ids = [item.id for item in archive.items]
    assert len(set(ids)) == len(ids)
    run_batch(f"zip://::file://{packed}", tmp_path / "out", model=FakeModel())
    found = errors_of(tmp_path / "out")
    assert set(found) == set(ids)
    assert found["b.wav"] is None


@posix
def test_a_folder_that_is_too_deep_costs_no_other(tmp_path: Path) -> None:
    base = tmp_path / "archive"
    write_wav(base / "good.wav")
    here = os.open(base, os.O_RDONLY)
    for _ in range(2_500):
        os.mkdir("dd", dir_fd=here)
        below = os.open("dd", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        run_batch(base, tmp_path / "out", model=FakeModel(), subtitles=("srt",))
        found = errors_of(tmp_path / "out")
        assert found.pop("good.wav") is None
        (kind,) = found.values()
        assert kind is not None
    finally:
        # `rmtree` cannot go as deep: bring what is deep up, step by step.
        while any(path.name == "dd" for path in base.iterdir()):
            deep = base / Path(*["dd"] * 500)
            if deep.exists():
                deep.rename(base / "ee")
                _remove(base / "dd")
                (base / "ee").rename(base / "dd")
            else:
                _remove(base / "dd")


def _remove(folder: Path) -> None:
    for place, _, _ in os.walk(folder, topdown=False):
        os.rmdir(place)


def test_what_a_run_wrote_is_whole_after_all_this(tmp_path: Path) -> None:
    write_archive(tmp_path / "archive", 3)
    run_batch(tmp_path / "archive", tmp_path / "out", model=FakeModel(), subtitles=("srt",))
    assert len(shards_in(tmp_path / "out")) == 1
