"""Checkpoints as faster-whisper loads them."""

from __future__ import annotations

import json
from pathlib import Path

from whisper_flash_attention.weights.packaged import PREFIX, packaged_source
from whisper_flash_attention.weights.tokenizer import read_tokenizer


def ctranslate2_folder(model: str, folder: Path) -> str:
    """A folder that faster-whisper can load: the checkpoint itself, or what a package carries."""
    if not model.startswith(PREFIX):
        return model
    source = packaged_source(model)
    folder.mkdir()
    with (folder / "model.bin").open("wb") as joined:
        for part in source.model:
            joined.write(part.read_bytes())
    for path in source.folder.iterdir():
        if path.suffix in (".json", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    if not any(folder.glob("vocabulary.*")):
        tokenizer = read_tokenizer(source.folder, is_converted=True)
        assert tokenizer is not None
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        (folder / "vocabulary.json").write_text(json.dumps(names))
    return str(folder)
