"""Files of a checkpoint that an earlier run left: taken only if they are what is wanted."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from whisper_flash_attention.benchmark import peers
from whisper_flash_attention.benchmark.peer_index import INDEX, Origin, read_index, write_index
from whisper_flash_attention.benchmark.peer_systems import OPENAI, TRANSFORMERS, PeerCheckpoint
from whisper_flash_attention.benchmark.peers import SYSTEMS, PeersCase
from whisper_flash_attention.errors import BenchmarkError

TINY = Origin("tiny")
BOTH = (TRANSFORMERS, OPENAI)


HEADS = ((1, 0), (1, 3))


@pytest.fixture
def written(tmp_path: Path) -> PeerCheckpoint:
    """A folder and a file, with their index."""
    home = tmp_path / TRANSFORMERS
    home.mkdir()
    for name in ("config.json", "model.safetensors"):
        (home / name).write_text("some bytes")
    file = tmp_path / "openai.pt"
    file.write_text("more bytes")
    files = {TRANSFORMERS: str(home), OPENAI: str(file)}
    found = PeerCheckpoint(files, 50257, is_multilingual=True, alignment_heads=HEADS)
    write_index(tmp_path, TINY, found)
    return found


def test_what_is_as_wanted_is_taken(tmp_path: Path, written: PeerCheckpoint) -> None:
    assert read_index(tmp_path, TINY, BOTH) == written
    assert read_index(tmp_path, TINY, [OPENAI]) == PeerCheckpoint(
        {OPENAI: written.files[OPENAI]}, 50257, is_multilingual=True, alignment_heads=HEADS
    )
    write_index(tmp_path, TINY, replace(written, alignment_heads=None))
    without = read_index(tmp_path, TINY, BOTH)
    assert without is not None and without.alignment_heads is None
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    found = read_index(moved, TINY, [OPENAI])
    assert found is not None and found.files == {OPENAI: str(moved / "openai.pt")}
    moved.rename(tmp_path)


@pytest.mark.parametrize(
    "origin",
    [
        *(Origin("tiny", random_weights=True), Origin("base"), Origin("tiny", modified=1)),
        Origin("tiny", version="0.0.1"),
    ],
)
@pytest.mark.usefixtures("written")
def test_another_origin_is_not_taken_for_it(tmp_path: Path, origin: Origin) -> None:
    assert read_index(tmp_path, origin, BOTH) is None


@pytest.mark.parametrize("name", ["openai.pt", "transformers/model.safetensors"])
@pytest.mark.usefixtures("written")
def test_files_that_are_gone_or_torn_are_not_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("some")
    assert read_index(tmp_path, TINY, BOTH) is None
    (tmp_path / name).unlink()
    assert read_index(tmp_path, TINY, BOTH) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "5", "{}", '{"files": 5}', "[" * 100_000, "\udcff"),
        '{"files": {"transformers": "."}, "sizes": []}',
    ],
)
def test_a_torn_index_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text, errors="surrogateescape")
    assert read_index(tmp_path, TINY, [TRANSFORMERS]) is None


@pytest.mark.usefixtures("written")
def test_an_index_has_to_list_its_files(tmp_path: Path) -> None:
    found = json.loads((tmp_path / INDEX).read_text())
    for change in ({"sizes": {}}, {"files": {}}, {"end_of_text": None}):
        (tmp_path / INDEX).write_text(json.dumps(found | change))
        assert read_index(tmp_path, TINY, BOTH) is None


def test_every_source_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("tiny", "a/b", "a:b", "a-b", "..", "/", "x" * 500, "\udcff")
    origins = [Origin(name, is_random) for name in names for is_random in (False, True)]
    found = [origin.folder_name for origin in origins]
    assert len(set(found)) == len(found)
    assert all(os.sep not in name and len(name) < 120 and name[0].isalnum() for name in found[:8])
    assert Origin("tiny", random_weights=True).folder_name.startswith("random-tiny-")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.safetensors"
    file.touch()
    before = Origin.of("model", random_weights=False)
    assert before.source == str(tmp_path / "model") and before.modified
    os.utime(file, ns=(1, before.modified + 1))
    assert Origin.of("model", random_weights=False) != before
    assert Origin.of("model", random_weights=True) == Origin("model", random_weights=True)


class FakeWorkers:
    """Writes a checkpoint of a file, or tells why not."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem = problem
        self.calls = 0

    def call(
        self, function: Any, case: PeersCase, formats: Any, folder: Path, **options: Any
    ) -> Any:
        self.calls += 1
        if self.problem is not None:
            return self.problem
        assert not (folder / INDEX).exists()
        (folder / "model").write_text(case.source)
        return PeerCheckpoint(dict.fromkeys(formats, str(folder / "model")), 50257, True)


def test_random_weights_are_not_taken_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = FakeWorkers()
    monkeypatch.setattr(peers, "start_workers", lambda device: workers)
    common: tuple[Any, ...] = ("tiny", ("ours-batched",), "cpu", "float32", (1,), 1)
    random = PeersCase(*common, random_weights=True, new_tokens=4)
    systems = [SYSTEMS["ours-batched"]]
    first = peers._written(random, systems, tmp_path)
    assert peers._written(random, systems, tmp_path) == first and workers.calls == 1
    assert peers._written(PeersCase(*common), systems, tmp_path) != first and workers.calls == 2
    (Path(first.files[TRANSFORMERS]).parent / INDEX).write_text("{")
    assert peers._written(random, systems, tmp_path) == first and workers.calls == 3


def test_why_a_checkpoint_cannot_be_read_is_told_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = PeersCase(str(tmp_path / "x"), ("ours-batched",), "cpu", "float32", (1,), 1)
    reason = "no such model " + "x" * 500
    monkeypatch.setattr(peers, "start_workers", lambda device: FakeWorkers(reason))
    with pytest.raises(BenchmarkError, match=reason):
        peers._written(case, [SYSTEMS["ours-batched"]], tmp_path)
    empty = tmp_path / "x"
    empty.mkdir()
    found = peers._write(case, [TRANSFORMERS], tmp_path)
    assert isinstance(found, str) and str(empty) in found
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match=r"cannot be written to \(Not a directory"):
        peers._written(case, [SYSTEMS["ours-batched"]], tmp_path / "file")
