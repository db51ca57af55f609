"""Odd numbers, texts and names, and changes of any bytes or JSON."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import string
from collections.abc import Callable

# A case gives sizes in bytes of its input and its result, or what it came to.
Case = Callable[[random.Random], tuple[int, int] | str]

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e]")
ODD_NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 256, 32767, 65535, 1 << 16, (1 << 31) - 1),
    *(1 << 31, (1 << 32) - 1, 1 << 32, (1 << 62), (1 << 63) - 1, (1 << 64) - 1, 10**9, 10**40),
)
ODD_TEXTS = (
    *("", " ", ".", "..", "/", "~", "~nobody", "-", "--", "nan", "inf", "-1", "0", "1e400", "None"),
    *("a\0b", "\x1b[2Jx", "a\nb\r\n", "\ud800", "\udce9x", "\u202egpj.wav", "\u2028", "CON", "NUL"),
    *("[b]x[/b]", "[/]", "{0}", "%s%n", "$(id)", "a" * 300, "ü" * 5000, "call::1.wav", "a/../b"),
    *(
        "file:///etc/passwd",
        "http://[::1",
        "s3://b",
        "zip://a::b",
        "../../x",
        "a" * 70_000,
        "9" * 5000,
    ),
    *("package:tiny.en/..", "\u0661\u0662", "\U000e0041", "e\u0301", "concat:a|b", "*[", "**/*"),
)
ODD_VALUES = (
    *(None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], "x", b"x"),
    *([0] * 40, {"a": {"b": []}}, [None], ["x"], {"": 0}, [1e9, -1], [[0, 0]], [[1, 2, 3]]),
)
JSON_KEYS = (
    *("quantization_config", "dtype", "torch_dtype", "auto_map", "model_type", "architectures"),
    *("attn_implementation", "_attn_implementation", "num_labels", "id2label", "label2id", "rope"),
    *("problem_type", "tie_word_embeddings", "pruned_heads", "forced_decoder_ids", "lang_to_id"),
    *("alignment_heads", "cache_implementation", "watermarking_config", "compile_config", "cls"),
    *("task_to_id", "suppress_tokens", "begin_suppress_tokens", "activation_function", "num_beams"),
    *("scale_embedding", "is_encoder_decoder", "use_cache", "tokenizer_class", "processor_class"),
    *(
        "feature_extractor_type",
        "mel_filters",
        "hop_length",
        "n_fft",
        "sampling_rate",
        "normalizer",
    ),
    *("pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "chat_template"),
    *("model_max_length", "added_tokens_decoder", "metadata", "weight_map", "generation_config"),
)


def any_value(rng: random.Random) -> object:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(ODD_NUMBERS)
    if kind == 1:
        return rng.choice(ODD_TEXTS)
    if kind == 2:
        value: object = rng.choice(ODD_VALUES)
        for _ in range(rng.choice((1, 3, 60))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(ODD_VALUES)


def mutate_bytes(rng: random.Random, data: bytes, head: int | None = None) -> bytes:
    """Flip, cut, insert, repeat, move, or overwrite a number; near the head if there is one."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        size = len(found) or 1
        near = min(size, head) if head and rng.random() < 0.8 else size
        at, kind = rng.randrange(near), rng.randrange(7)
        part = found[at : at + rng.choice((1, 4, 16, 300))]
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(ODD_NUMBERS) % (1 << 8 * width)
            found[at : at + width] = number.to_bytes(width, order)
        elif kind == 2 and rng.random() < 0.5:
            del found[at:]
        elif kind == 3:
            del found[at : at + len(part)]
        elif kind == 4:
            found[at:at] = part * rng.choice((1, 2, 50))
        elif kind == 5:
            other = rng.randrange(size)
            found[other : other + len(part)] = part
        else:
            found[at:at] = rng.randbytes(rng.choice((1, 3, 40)))
    return bytes(found)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Change values, keys and levels of JSON; or now and then its bytes."""
    if rng.random() < 0.15:
        text = data.decode("utf-8")
        return rng.choice(
            (
                lambda: mutate_bytes(rng, data),
                lambda: text.encode("utf-16"),
                lambda: b"\xef\xbb\xbf" + data,
                lambda: b"[" * rng.choice((10, 2000, 200_000)),
                lambda: text.replace(":", ":" * 2, 1).encode(),
                lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
                lambda: text[:-1].encode() + b',"x":' + b"9" * rng.choice((400, 5000)) + b"}",
            )
        )()
    root = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node = root
        while True:  # a random place
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            kind = rng.randrange(6)
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[rng.choice((*JSON_KEYS, *map(str, keys)))] = any_value(rng)
            elif kind == 2 and isinstance(node, dict):
                node[rng.choice(ODD_TEXTS)] = node.pop(key)
            elif kind == 3:
                node[key] = copy.deepcopy(node[rng.choice(keys)])
            elif kind == 4 and type(node[key]) is int:
                node[key] += rng.choice((-1, 1, 7, 1 << 20))
            else:
                node[key] = any_value(rng)
            break
    with contextlib.suppress(TypeError):  # of bytes among the values
        return json.dumps(root).encode("utf-8", "surrogatepass")
    return json.dumps(root, default=str).encode("utf-8", "surrogatepass")


def any_name(rng: random.Random) -> str:
    letters = string.ascii_letters + string.digits + "._- /\\:'\"*?[]{}~$%&;|<>\n\r\t\x1b\x07\x9b"
    letters += "äß漢\u0301\u202e\u2028\u200b\udcff\udc80\ufeff😀"
    kind, name = rng.randrange(6), rng.choice(ODD_TEXTS)
    if kind == 0:
        name = "".join(rng.choices(letters, k=rng.choice((1, 4, 20, 120))))
    elif kind == 1:
        name = "/".join(rng.choices((*ODD_TEXTS[:30], "a", "b.srt"), k=rng.choice((2, 5, 40))))
    elif kind == 2:
        name = rng.choice(("s3", "http", "file", "zip", "memory", "data", "x", "")) + ":" + name
    elif kind == 3:
        name = rng.choice(("-", "--", "@", "~", "package:", "hf://")) + name
    return name + rng.choice(("", ".wav", ".srt", "/", "."))


def run_command(arguments: list[str]) -> str:
    """Run the command line; its exit code must be one of the promised, its output printable."""
    from typer.testing import CliRunner

    from whisper_flash_attention.cli import app

    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2, 130), result.exit_code
    shown = result.stderr.replace("\n", "")
    assert shown.isprintable() or not UNPRINTABLE.search(shown), repr(shown[:500])
    if result.exit_code == 2 and "error:" in shown:
        assert result.stderr.count("\n") < 12, result.stderr
    return f"exit code {result.exit_code}"
