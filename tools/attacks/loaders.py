"""Files of checkpoints of every kind, changed part by part, and what reads them."""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
from pathlib import Path

from attacks.values import ODD_NUMBERS, ODD_TEXTS, Case, any_value, mutate_bytes, mutate_json

SMALL = {
    "vocab_size": 400,
    "d_model": 64,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 1,
    "decoder_attention_heads": 1,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
}
STATED = ("endoftext", "startoftranscript", "en", "translate", "transcribe", "startoflm")
STATED += ("startofprev", "nospeech", "notimestamps")


def small_tokenizer() -> dict:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(dict.fromkeys(bytes_to_unicode().values()))
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {"th": 256, "in": 257}
    added = [
        {"id": 258 + index, "content": f"<|{name}|>", "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, name in enumerate(STATED)
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["t h", "i n"], "unk_token": None}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def transformers_folder(folder: Path) -> None:
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(0)
    ids = {f"<|{name}|>": 258 + index for index, name in enumerate(STATED)}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    starts = {"bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(**SMALL, **starts, pad_token_id=end, begin_suppress_tokens=[220, end])
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    GenerationConfig(
        **starts,
        max_length=32,
        is_multilingual=False,
        no_timestamps_token_id=end + 8,
        alignment_heads=[[0, 0]],
        suppress_tokens=[1, 2],
        max_initial_timestamp_index=50,
        begin_suppress_tokens=[220, end],
        prev_sot_token_id=end + 6,
    ).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    tokenizer = small_tokenizer()
    (folder / "tokenizer.json").write_bytes(json.dumps(tokenizer).encode())
    (folder / "vocab.json").write_bytes(json.dumps(tokenizer["model"]["vocab"]).encode())
    (folder / "merges.txt").write_bytes(b"#version: 0.2\nt h\ni n\n")
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False}
    kept = {"bos_token": token, "eos_token": token, "unk_token": token, "pad_token": token}
    (folder / "special_tokens_map.json").write_bytes(json.dumps(kept).encode())
    plain = dict.fromkeys(kept, "<|endoftext|>")
    plain |= {"tokenizer_class": "WhisperTokenizer", "model_max_length": 32, "errors": "replace"}
    (folder / "tokenizer_config.json").write_bytes(json.dumps(plain).encode())


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, 2000)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name, other = rng.choices([name for name in header if name != "__metadata__"], k=2)
    entry = header[name]
    match rng.randrange(9):
        case 0:
            entry["data_offsets"] = header[other]["data_offsets"]  # one inside another
        case 1:
            entry["data_offsets"][rng.randrange(2)] += rng.choice((-4, 4, 1, *ODD_NUMBERS))
        case 2:
            entry["dtype"] = rng.choice(
                ("F64", "BF16", "I8", "BOOL", "F4", "F8_E4M3", "C64", "", 3)
            )
        case 3:
            entry["shape"] = rng.choice(([], [-1], entry["shape"][::-1], [1 << 40, 1 << 40], "8"))
        case 4:
            header[rng.choice(ODD_TEXTS)] = header.pop(name)
        case 5:
            header["__metadata__"] = any_value(rng)
        case 6:
            del header[name]
        case 7:
            header[name + ".x"] = dict(entry)
        case _:
            entry[rng.choice(list(entry))] = any_value(rng)
    text = json.dumps(header, default=str)
    if rng.random() < 0.1:  # a key twice
        text = text[:-1] + "," + json.dumps({name: entry}, default=str)[1:]
    head = text.encode("utf-8", "surrogatepass") + b" " * rng.choice((0, 0, 7, 100_000))
    length = len(head) if rng.random() < 0.85 else rng.choice(ODD_NUMBERS) % (1 << 64)
    return (
        length.to_bytes(8, "little")
        + head
        + (body if rng.random() < 0.8 else body[: -rng.randrange(99)])
    )


def pickle_bomb(rng: random.Random) -> bytes:
    """Deep, shared, huge or forbidden objects, as opcodes."""
    deep = rng.choice((50, 5000, 300_000))
    number = struct.pack("<i", rng.choice((1 << 30, -1, 1 << 20, 24)))
    double = lambda op: b"".join(b"q%c0h%ch%c%b" % (i, i, i, op) for i in range(24))  # noqa: E731
    return (
        b"\x80\x02"
        + rng.choice(
            (
                b")" + b"\x85" * deep,
                b"]" + b"]a" * deep,
                b"]" * deep + b"a" * (deep - 1),
                b"(" * deep + b"t" * deep,
                b"}" + double(b"\x86") + b"K\x01s",
                b")" + double(b"\x86"),
                b"c__builtin__\nbytearray\nJ" + number + b"\x85R",
                b"c__builtin__\neval\nX\x03\0\0\x001+1\x85R",
                b"cos\nsystem\nX\x02\0\0\0id\x85R",
                b"ctorch._utils\n_rebuild_tensor_v2\n(NJ"
                + number
                + b"(J"
                + number
                + b"t(K\0t\x89NtR",
                b"ccollections\nOrderedDict\n)R}X\x04\0\0\0itemsK\x01s" + b"b",
                b"ctorch\nFloatStorage\n)R",
                b"X" + struct.pack("<I", 1 << 30) + b"a",
                b"\x8b" + number + b"\xff",
                b"\x95" + b"\xff" * 8,
                b"r" + b"\xff" * 4,
                b"N" + b"0N" * 100_000,
                b"Q(" * 50,
            )
        )
        + b"."
    )


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return pickle_bomb(rng)
    if kind < 0.4:
        return mutate_bytes(rng, data)
    places = [at for _, _, at in pickletools.genops(data)] + [len(data)]
    parts = [data[first:end] for first, end in itertools.pairwise(places)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(5):
            case 0:
                parts[at] = parts[other]
            case 1:
                parts.insert(at, parts[other])
            case 2:
                del parts[at]
            case 3:
                parts[at], parts[other] = parts[other], parts[at]
            case _ if parts[at][:1] in b"KMJ\x8a" and len(parts[at]) > 1:
                parts[at] = b"J" + struct.pack("<I", rng.choice(ODD_NUMBERS) % (1 << 32))
            case _:
                parts.insert(
                    at, rng.choice((b"N", b")", b"\x88", b"]", b"K\x00", b"0", b"2", b"("))
                )
    return b"".join(parts)


def mutate_torch(rng: random.Random, data: bytes) -> bytes:
    """Change the pickle, the records or the directory of what `torch.save` wrote."""
    if rng.random() < 0.25:
        tail = data[-3000:]
        return rng.choice(
            (
                lambda: data[:-3000] + mutate_bytes(rng, tail),
                lambda: mutate_bytes(rng, data, 400),
                lambda: rng.randbytes(rng.randrange(1, 500)) + data,
                lambda: data + rng.choice((b"\0" * 99, tail, data)),
                lambda: mutate_pickle(rng, pickle.dumps({"dims": SMALL}, 2)),
            )
        )()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    at = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    name, content = records[at]
    which = rng.randrange(len(records))
    match rng.randrange(9):
        case 0 | 1 | 2 | 3:
            records[at] = name, mutate_pickle(rng, content)
        case 4:
            records[which] = rng.choice((*ODD_TEXTS[:20], records[0][0], name)), records[which][1]
        case 5:
            records.append((records[which][0], mutate_bytes(rng, records[which][1])))
        case 6:
            del records[which]
        case 7:
            records[which] = records[which][0], mutate_bytes(rng, records[which][1])
        case _:
            records.append(("archive/nested.zip", data[:2000]))
    target = io.BytesIO()
    method = zipfile.ZIP_STORED if rng.random() < 0.85 else zipfile.ZIP_DEFLATED
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in records:
            archive.writestr(name.encode("utf-8", "replace").decode()[:60_000] or "x", content)
    return target.getvalue()


def openai_file(path: Path) -> None:
    """Write an OpenAI checkpoint of 64 columns; some of its tensors share a storage."""
    import torch

    from whisper_flash_attention.weights.checkpoint import make_dimensions, parameter_shapes
    from whisper_flash_attention.weights.openai_reader import openai_name

    theirs = ("n_vocab", "n_audio_state", "n_mels", "n_audio_ctx", "n_text_ctx", "n_audio_layer")
    theirs += ("n_text_layer", "n_audio_head", "n_text_head")
    dims = dict(zip(theirs, list(SMALL.values())[:9], strict=True)) | {"n_vocab": 51864}
    dims |= {"n_text_state": 64}
    ours = SMALL | {"vocab_size": 51864, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    shapes = parameter_shapes(make_dimensions("", **ours)[0])
    shared = torch.zeros(64)
    state = {
        openai_name(name): torch.zeros(shape, dtype=torch.float16)
        if shape != (64,)
        else shared.half()
        for name, shape in shapes.items()
    }
    torch.save({"dims": dims, "model_state_dict": state}, path)


def ctranslate2_parts() -> list[list]:
    """Variables of a small `model.bin`: name, shape, kind, size, data."""

    from whisper_flash_attention.weights.checkpoint import make_dimensions, parameter_shapes
    from whisper_flash_attention.weights.ctranslate2_reader import _plan, _stacked_shape

    config = make_dimensions("", **SMALL | {"vocab_size": 51864})[0]
    shapes, found = parameter_shapes(config), []
    for name, targets in _plan(config).items():
        shape = _stacked_shape(targets, shapes)
        size = 2 * math.prod(shape)
        found.append([name, list(shape), 4, size, bytes(size)])
    for side in ("encoder", "decoder"):
        found.append([f"{side}/num_heads", [], 2, 2, struct.pack("<h", 2)])
    return found


def ctranslate2_bytes(parts: list[list], count: int | None = None, aliases: int = 0) -> bytes:
    def text(name):
        return struct.pack("<H", len(name.encode("utf-8", "replace")[:65534]) + 1) + (
            name.encode("utf-8", "replace")[:65534] + b"\0"
        )

    wide = lambda number: struct.pack("<I", number % (1 << 32))  # noqa: E731
    found = [wide(6), text("WhisperSpec"), wide(3), wide(len(parts) if count is None else count)]
    for name, shape, kind, size, data in parts:
        found += [text(name), bytes([len(shape) % 256]), *map(wide, shape), bytes([kind % 256])]
        found += [wide(size), data]
    found += [
        wide(aliases),
        *(text(f"alias{i}") + text(parts[0][0]) for i in range(min(aliases, 9))),
    ]
    return b"".join(found)


def mutate_ctranslate2(rng: random.Random, parts: list[list]) -> bytes:
    parts = [[*part[:1], list(part[1]), *part[2:]] for part in parts]
    if rng.random() < 0.3:
        data = ctranslate2_bytes(parts[1:] + parts[:1])  # the large one last
        return mutate_bytes(rng, data, 60_000)
    for _ in range(rng.choice((1, 1, 2))):
        part, other = rng.choice(parts), rng.choice(parts)
        match rng.randrange(8):
            case 0 if part[1]:
                part[1][rng.randrange(len(part[1]))] = rng.choice(ODD_NUMBERS)
            case 1:
                part[2] = rng.choice((0, 1, 2, 3, 4, 5, 6, 255))
            case 2:
                part[3] = rng.choice((*ODD_NUMBERS, part[3] + 1, part[3] - 2))
            case 3:
                part[0] = rng.choice((*ODD_TEXTS, other[0], part[0] + "_scale"))
            case 4:
                parts.remove(part) if len(parts) > 2 else None
            case 5:
                parts.append([rng.choice(ODD_TEXTS), [], 3, 4, bytes(4)])
            case 6:  # quantised
                part[2], part[3], part[4] = 1, part[3] // 2, part[4][: part[3] // 2]
                parts.append(
                    [part[0] + "_scale", part[1][:1], 0, 4 * sum(part[1][:1]), b"\x7f" * 8]
                )
            case _:
                part[1] = rng.choice(([], [1] * rng.choice((4, 255)), part[1][::-1], [0]))
    count = None if rng.random() < 0.9 else rng.choice(ODD_NUMBERS)
    return ctranslate2_bytes(parts, count, rng.choice((0, 0, 0, 2, 10**9)))


def loaders(folder: Path) -> dict[str, Case]:
    """What each kind of file is made from, and what reads it."""
    import torch
    from safetensors.torch import load as reference

    from whisper_flash_attention.transcribe.loading import EngineModel, Source, load, load_model
    from whisper_flash_attention.weights import load_processor, read_checkpoint
    from whisper_flash_attention.weights.hub import Hub
    from whisper_flash_attention.weights.model_files import read_model

    whole, openai, converted = folder / "whole", folder / "whisper.pt", folder / "converted"
    transformers_folder(whole)
    openai_file(openai)
    converted.mkdir()
    parts = ctranslate2_parts()
    ids = {"lang_ids": [1], "suppress_ids": [1, 2], "suppress_ids_begin": [220]}
    ids["alignment_heads"] = [[0, 0]]
    (converted / "config.json").write_text(json.dumps(ids))
    (converted / "model.bin").write_bytes(ctranslate2_bytes(parts))
    state = torch.load(openai, weights_only=True)["model_state_dict"]
    bare, split, old = folder / "bare", folder / "split", folder / "old"
    for other in (bare, split, old):
        other.mkdir()
        for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
            (other / name).write_bytes((whole / name).read_bytes())
        (other / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    tensors = reference((whole / "model.safetensors").read_bytes())
    torch.save(tensors, old / "pytorch_model.bin")
    (split / "shard.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    index = {
        "metadata": {"total_size": 9},
        "weight_map": dict.fromkeys(tensors, "shard.safetensors"),
    }
    (split / "model.safetensors.index.json").write_bytes(json.dumps(index).encode())

    def changed(where, names, mutate, read):
        def case(rng: random.Random) -> tuple[int, int]:
            path = where / rng.choice(names)
            kept = path.read_bytes()
            data = mutate(rng, kept)
            try:
                path.write_bytes(data)
                result = read(where)
                return len(data), result or 0
            finally:
                path.write_bytes(kept)

        return case

    def parameters(where: Path) -> dict[str, torch.Tensor]:
        """Open a folder as the command does, and return the weights by name."""
        model, processor = load(str(where), device="cpu", compute_type="float32")
        tokenizer = model.tokenizer if isinstance(model, EngineModel) else processor.tokenizer
        assert isinstance(tokenizer.decode([0, 1]), str)
        if not isinstance(model, EngineModel):
            return dict(model.state_dict())
        files = read_model(str(where), lambda tensor: tensor.float())
        assert not isinstance(files, str)
        return dict(files.checkpoint.state_dict)

    def open_all(where: Path) -> int:
        return sum(each.nbytes for each in parameters(where).values())

    def open_class(where: Path) -> int:
        chosen = {"device": "cpu", "compute_type": "float32", "attention": "auto", "quiet": True}
        model = load_model(Source.of(str(where), **chosen, hub=Hub()))
        assert model.config.d_model == model.model.decoder.embed_tokens.weight.shape[1]
        return sum(each.nbytes for each in model.parameters())

    def open_weights(where: Path) -> int:
        found = parameters(where)
        path = where / "model.safetensors"
        if path.exists():
            for name, tensor in reference(path.read_bytes()).items():
                if name in found:
                    ours = found[name].nan_to_num()
                    assert torch.equal(ours, tensor.float().nan_to_num()), name
        return sum(each.nbytes for each in found.values())

    def open_processor(where: Path) -> int:
        processor = load_processor(str(where))
        return len(processor.tokenizer.decode(processor.tokenizer.encode("thin")))

    def open_openai(_: Path) -> int:
        checkpoint = read_checkpoint(str(openai))
        assert checkpoint is not None and checkpoint.config.d_model
        return sum(each.nbytes for each in checkpoint.state_dict.values())

    def open_converted(_: Path) -> int:
        checkpoint = read_checkpoint(converted)
        assert checkpoint is not None
        for name, tensor in checkpoint.state_dict.items():
            assert tensor.dtype in (torch.float16, torch.float32, torch.bfloat16), name
        return sum(each.nbytes for each in checkpoint.state_dict.values())

    del state
    words = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]

    def mutate_words(rng: random.Random, data: bytes) -> bytes:
        return (mutate_json if data[:1] == b"{" else mutate_bytes)(rng, data)

    return {
        "config.json": changed(whole, ["config.json"], mutate_json, open_all),
        "config.json of the class": changed(whole, ["config.json"], mutate_json, open_class),
        "generation_config.json": changed(whole, ["generation_config.json"], mutate_json, open_all),
        "preprocessor_config.json": changed(
            whole, ["preprocessor_config.json"], mutate_json, open_processor
        ),
        "tokenizer": changed(whole, [*words, "merges.txt"], mutate_words, open_processor),
        "tokenizer of the engine": changed(whole, [*words, "merges.txt"], mutate_words, open_all),
        "tokenizer.json alone": changed(bare, ["tokenizer.json"], mutate_json, open_processor),
        "features of the engine": changed(
            whole, ["preprocessor_config.json"], mutate_json, open_all
        ),
        "safetensors": changed(whole, ["model.safetensors"], mutate_safetensors, open_weights),
        "safetensors of the class": changed(
            whole, ["model.safetensors"], mutate_safetensors, open_class
        ),
        "index": changed(split, ["model.safetensors.index.json"], mutate_json, open_weights),
        "pytorch_model.bin": changed(old, ["pytorch_model.bin"], mutate_torch, open_weights),
        "openai .pt": changed(folder, ["whisper.pt"], mutate_torch, open_openai),
        "ctranslate2 model.bin": changed(
            converted, ["model.bin"], lambda rng, _: mutate_ctranslate2(rng, parts), open_converted
        ),
        "ctranslate2 config.json": changed(converted, ["config.json"], mutate_json, open_converted),
    }
