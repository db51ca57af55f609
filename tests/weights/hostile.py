"""Every loader of `weights/` with an intact input and random damage to it."""

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests.weights.mutations import (
    damaged_bytes,
    damaged_json,
    damaged_pickle,
    instructions,
    packed,
)
from tests.weights.writers import model_bin, quantize, to_ctranslate2, to_openai
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import ctranslate2_reader, openai_reader
from whisper_flash_attention.weights.files import JoinedFiles, read_json
from whisper_flash_attention.weights.tokenizer import check_tokenizer_files
from whisper_flash_attention.weights.tokens import SpecialTokens, generation_values, timestamp_names
from whisper_flash_attention.weights.torch_archive import StoredTensor, TorchArchive, is_contiguous
from whisper_flash_attention.weights.transformers_folder import (
    check_config,
    check_feature_extractor,
    check_folder,
    check_generation_config,
    read_index,
    read_safetensors_header,
)


@dataclass(frozen=True)
class Loader:
    """A loader under attack.

    Args:
        intact: the content of an intact file.
        damage: makes a damaged content from the intact one.
        read: parses and checks what lies at a path.
    """

    file: str
    intact: bytes
    damage: Callable[[random.Random], bytes]
    read: Callable[[Path], object]


def attack(loader: Loader, folder: Path, seeds: range) -> Counter[str]:
    """Read damaged files, one per seed, and count what came of them.

    Whatever is raised beside `WeightsError` leaves the function, with a note that names the seed.
    """
    path = folder / loader.file
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        data = loader.damage(random.Random(seed))
        path.write_bytes(data)
        try:
            loader.read(path)
        except WeightsError as error:
            assert str(path) in str(error), error
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"{loader.file}, seed {seed}: {data[:200]!r}")
            raise
        else:
            outcomes["read"] += 1
    return outcomes


def loaders(model: WhisperForConditionalGeneration, folder: Path) -> dict[str, Loader]:
    """All loaders, with files written from a small model; `folder` is scratch space."""
    return {
        "OpenAI .pt, bytes": _openai_bytes(model, folder),
        "OpenAI .pt, instructions": _openai_instructions(model, folder),
        "pytorch_model.bin": _torch_weights(model, folder),
        "CTranslate2 model.bin": _ctranslate2(model),
        "CTranslate2 config.json": _ctranslate2_config(model),
        "tokenizer.json": _json(
            "tokenizer.json",
            small_tokenizer(timestamps=3),
            lambda path: check_tokenizer_files(path.parent),
        ),
        "tokenizer_config.json": _json(
            "tokenizer_config.json",
            TOKENIZER_CONFIG,
            lambda path: check_tokenizer_files(path.parent),
        ),
        "vocab.json": _json(
            "vocab.json",
            small_tokenizer(timestamps=3)["model"]["vocab"],
            lambda path: check_tokenizer_files(path.parent),
        ),
        "config.json": _json(
            "config.json",
            model.config.to_dict(),
            lambda path: check_config(str(path), read_json(path)),
        ),
        "generation_config.json": _json(
            "generation_config.json",
            generation_dict(51864),
            lambda path: check_generation_config(str(path), read_json(path)),
        ),
        "preprocessor_config.json": _json(
            "preprocessor_config.json",
            WhisperFeatureExtractor().to_dict() | {"mel_filters": None},
            lambda path: check_feature_extractor(str(path), read_json(path)),
        ),
        "safetensors": _safetensors(),
        "safetensors index": _json("model.safetensors.index.json", INDEX, _read_index),
    }


def _openai_archive(model: WhisperForConditionalGeneration, folder: Path) -> bytes:
    content: Any = to_openai(model)
    state = content["model_state_dict"]
    path = folder / "intact.pt"
    torch.save({**content, "model_state_dict": {name: t.half() for name, t in state.items()}}, path)
    return path.read_bytes()


def _openai_bytes(model: WhisperForConditionalGeneration, folder: Path) -> Loader:
    intact = _openai_archive(model, folder)
    # The pickle is at the beginning, the directory of the archive at the end.
    places = ((0, 6000), (len(intact) - 6000, len(intact)), (len(intact) - 100, len(intact)))
    return Loader(
        "model.pt",
        intact,
        lambda rng: damaged_bytes(rng, intact, places),
        openai_reader.read_openai,
    )


def _openai_instructions(model: WhisperForConditionalGeneration, folder: Path) -> Loader:
    content: Any = to_openai(model)
    state = content["model_state_dict"]
    del state["decoder.token_embedding.weight"]  # most of the file
    path = folder / "small.pt"
    torch.save(content, path)
    intact = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    steps = instructions(entries["small/data.pkl"])

    def read(path: Path) -> object:
        with TorchArchive(path) as archive:
            found = archive.content
            state = found.get("model_state_dict") if isinstance(found, dict) else None
            tensors = state.values() if isinstance(state, dict) else ()
            # Views that repeat elements are refused by the reader of the checkpoint.
            return [
                archive.read(tensor)
                for tensor in tensors
                if isinstance(tensor, StoredTensor) and is_contiguous(tensor.shape, tensor.strides)
            ]

    def damage(rng: random.Random) -> bytes:
        return packed(entries | {"small/data.pkl": damaged_pickle(rng, steps)})

    return Loader("model.pt", intact, damage, read)


def _torch_weights(model: WhisperForConditionalGeneration, folder: Path) -> Loader:
    norm = model.model.encoder.layer_norm
    path = folder / "weights.bin"
    torch.save({"weight": norm.weight.detach(), "bias": norm.bias.detach()}, path)
    intact = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    steps = instructions(entries["weights/data.pkl"])

    def damage(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return damaged_bytes(rng, intact)
        return packed(entries | {"weights/data.pkl": damaged_pickle(rng, steps)})

    return Loader(
        "pytorch_model.bin", intact, damage, lambda path: check_folder(path.parent, config=False)
    )


def _ctranslate2(model: WhisperForConditionalGeneration) -> Loader:
    variables = quantize(to_ctranslate2(model), "int8")
    # The largest matrix last, so that most positions are in headers.
    ordered = dict(sorted(variables.items(), key=lambda item: item[1].numel()))
    intact = model_bin(ordered)
    end = len(intact) - variables["decoder/embeddings/weight"].numel()
    places = ((0, 100), (0, end), (0, end))
    return Loader(
        "model.bin",
        intact,
        lambda rng: damaged_bytes(rng, intact, places),
        lambda path: ctranslate2_reader.read_ctranslate2(path.parent),
    )


def _ctranslate2_config(model: WhisperForConditionalGeneration) -> Loader:
    content = {
        "suppress_ids": [1, 2, 7],
        "suppress_ids_begin": [220],
        "alignment_heads": [[0, 0]],
        "lang_ids": [50259],
        "lang_to_id": {"<|en|>": 50259},
    }
    tokens = SpecialTokens.of_vocabulary(model.config.vocab_size)
    assert tokens is not None
    return _json(
        "config.json",
        content,
        lambda path: ctranslate2_reader.read_generation(path, model.config, tokens),
    )


def _json(file: str, content: Any, read: Callable[[Path], object]) -> Loader:
    return Loader(file, json.dumps(content).encode(), lambda rng: damaged_json(rng, content), read)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I8", "shape": [], "data_offsets": [32, 33]},
}


def _safetensors() -> Loader:
    def file(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + bytes(33)

    intact = file(json.dumps(HEADER).encode())

    def damage(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return damaged_bytes(rng, intact)
        return file(damaged_json(rng, HEADER))

    def read(path: Path) -> object:
        with JoinedFiles((path,)) as opened:
            return read_safetensors_header(opened)

    return Loader("model.safetensors", intact, damage, read)


INDEX = {
    "metadata": {"total_size": 2},
    "weight_map": {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    },
}


def _read_index(path: Path) -> object:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        path.with_name(name).touch()
    return read_index(path)


# A whole Transformers folder with a vocabulary of 1,901 tokens, which is quick to load.

TOKENIZER_CONFIG = {
    "tokenizer_class": "WhisperTokenizer",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"],
    "add_prefix_space": False,
    "errors": "replace",
    "language": None,
    "task": None,
    "model_max_length": 1024,
    "clean_up_tokenization_spaces": True,
    "added_tokens_decoder": {
        "258": {
            "content": "<|endoftext|>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    },
}


def small_tokenizer(timestamps: int = 1501) -> dict[str, Any]:
    """A `tokenizer.json` of bytes, two merges, Whisper's special tokens and some timestamps."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    vocabulary = {letter: index for index, letter in enumerate([*letters, "ab", "abc"])}
    names = special_names()
    specials = len(names) - 1501
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(vocabulary) + index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": index >= specials,
                "special": index < specials,
            }
            for index, name in enumerate(names[: specials + timestamps])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": ["a b", "ab c"],
        },
    }


def special_names() -> list[str]:
    tokens = SpecialTokens.of_vocabulary(51865)
    assert tokens is not None
    return [
        *("<|endoftext|>", "<|startoftranscript|>", *tokens.language_ids),
        *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"),
        *("<|notimestamps|>", *timestamp_names()),
    ]


SMALL_VOCABULARY = 258 + len(special_names())


def generation_dict(vocab_size: int) -> dict[str, Any]:
    tokens = SpecialTokens.of_vocabulary(vocab_size)
    assert tokens is not None
    made = GenerationConfig(**generation_values(tokens, max_length=448, alignment_heads=((0, 0),)))
    content: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    return content


def write_transformers_folder(folder: Path) -> None:
    """Write a model that loads and decodes in milliseconds, with all its files."""
    config = WhisperConfig(
        vocab_size=SMALL_VOCABULARY,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=32,
        bos_token_id=258,
        eos_token_id=258,
        pad_token_id=258,
        decoder_start_token_id=259,
        begin_suppress_tokens=[32, 258],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config)
    index = {name: 258 + place for place, name in enumerate(special_names())}
    languages = {
        name: index[name] for name in special_names()[2:] if index[name] < index["<|translate|>"]
    }
    model.generation_config = GenerationConfig(
        eos_token_id=258,
        bos_token_id=258,
        pad_token_id=258,
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id={"transcribe": index["<|transcribe|>"], "translate": index["<|translate|>"]},
        no_timestamps_token_id=index["<|notimestamps|>"],
        decoder_start_token_id=259,
        suppress_tokens=[1, 2],
        begin_suppress_tokens=[32, 258],
        max_length=32,
        alignment_heads=[[0, 0]],
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer()))
    decoder = {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in small_tokenizer()["added_tokens"]
    }
    content = TOKENIZER_CONFIG | {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": special_names()[1:-1501],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


def damaged_folder_file(rng: random.Random, name: str, intact: bytes) -> bytes:
    """Damage one file of a Transformers folder."""
    if name.endswith(".json"):
        return damaged_json(rng, json.loads(intact))
    length = int.from_bytes(intact[:8], "little")
    if rng.random() < 0.5:
        return damaged_bytes(rng, intact, ((0, 8 + length),))
    header = damaged_json(rng, json.loads(intact[8 : 8 + length]))
    return len(header).to_bytes(8, "little") + header + intact[8 + length :]


def main() -> None:
    """Attack every loader and print the counts as JSON: `python -m tests.weights.hostile 20000`."""
    import platform
    import sys
    import tempfile
    from importlib.metadata import version

    from tests.weights.writers import smallest_whisper

    count = int(sys.argv[1])
    report: dict[str, Any] = {
        "command": f"python -m tests.weights.hostile {count}",
        "rule": "the command fails if anything but a checkpoint or a WeightsError comes of a file",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        "damaged_files_per_loader": count,
        "loaders": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, loader in loaders(smallest_whisper(), Path(scratch)).items():
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            outcomes = attack(loader, folder, range(count))
            report["loaders"][name] = dict(outcomes)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
