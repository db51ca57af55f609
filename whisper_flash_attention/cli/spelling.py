"""Options as other tools spell them, for those that mean the same here.

openai-whisper writes `--word_timestamps True` and `--fp16 False`, faster-whisper's command lines
`--vad_filter True` and `--compute_type float16`: underscores are dashes, and a flag may be followed
by True or False.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from whisper_flash_attention.options import GROUPS, VadOptions, declared, flags_of

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# What is taken for a flag's value as a word of its own; a file may well be called "1".
_WORDS = ("true", "false")
_OTHER_NAMES = {
    f"--{other.replace('_', '-')}": flags_of(each)[0].split("/")[0]
    for group in GROUPS
    for each, about in declared(group)
    for other in (each.name, *about.aliases)
}

# Options of other tools by name, each with what stands for its values in lower case; `None` is any
# other value, and for a flag no value.
_TRANSLATED: Mapping[str, Mapping[str | None, tuple[str, ...]]] = {
    "--fp16": {
        None: (),
        "true": ("--compute-type", "auto"),
        "false": ("--compute-type", "float32"),
    },
    "--batched": {None: ("--mode", "batched"), "true": ("--mode", "batched"), "false": ()},
    "--print-colors": {None: ("--colors",), "true": ("--colors",), "false": ()},
}
_CHUNKS = "the length of chunks is --mode batched --vad-parameters max-speech-duration-s=30"
_DETECTION = "--multilingual detects the language in every window, and --language gives it"
# Options of other tools that do not exist here, and what serves their purpose.
INSTEAD = {
    "--align-model": "words get their times from Whisper itself: --word-timestamps",
    "--chunk-length": _CHUNKS,
    "--chunk-size": _CHUNKS,
    "--device-index": "a GPU is chosen by --device cuda:N",
    "--diarize": "speakers are not distinguished; --channel each keeps channels apart",
    "--language-detection-segments": _DETECTION,
    "--language-detection-threshold": _DETECTION,
    "--prompt-reset-on-temperature": "it is fixed at 0.5; --no-condition-on-previous-text never "
    "gives previous text",
    "--vad-method": "the detector is Silero's: --vad",
    "--vad-onset": "the threshold is --vad --vad-parameters threshold=0.5",
} | {
    f"--vad-{each.name.replace('_', '-')}": f"it is --vad --vad-parameters {each.name}=VALUE"
    for each, _ in declared(VadOptions)
}
# What to do with an argument too many, by command.
TOO_MANY = {
    "batch": "give one folder, manifest or quoted pattern ('talks/*.mp3'), or several files to "
    "whisper-flash transcribe",
    "parity": "each recording or folder is given with --audio",
    "serve": "the model is given with --model",
}


def respelled(arguments: Sequence[str], options: Iterable[Any]) -> list[str]:
    """Return a command's arguments as its options are declared.

    Args:
        arguments: of the command.
        options: of Click, with their names and whether they are flags.
    """
    named = {name: each for each in options for name in (*each.opts, *each.secondary_opts)}
    waiting = list(arguments)[::-1]
    found: list[str] = []
    while waiting:
        word = waiting.pop()
        if word == "--":
            return [*found, word, *waiting[::-1]]
        if not word.startswith("--"):
            found.append(word)
            if word in named and not named[word].is_flag and waiting:
                found.append(waiting.pop())
            continue
        name, equals, value = word.partition("=")
        if name not in named:
            name = name.replace("_", "-")
            name = name if name in named else _OTHER_NAMES.get(name, name)
        option = named.get(name)
        if option is None and name in _TRANSLATED:
            found += _translated(name, value if equals else None, waiting)
        elif option is None:
            found.append(f"{name}{equals}{value}")
        elif not option.is_flag:
            found += [f"{name}={value}"] if equals else [name, *_taken(waiting)]
        elif equals or (waiting and waiting[-1].lower() in _WORDS):
            found += _flag(option, name, value if equals else waiting.pop())
        else:
            found.append(name)
    return found


def _taken(waiting: list[str]) -> list[str]:
    return [waiting.pop()] if waiting else []


def _flag(option: Any, name: str, value: str) -> list[str]:
    """The flag, or its opposite; a flag that has none is left out."""
    if value.lower() in _TRUE:
        return [name]
    if value.lower() not in _FALSE:
        return [f"{name}={value}"]  # Click reports it
    return list((option.secondary_opts if name in option.opts else option.opts)[:1])


def _translated(name: str, value: str | None, waiting: list[str]) -> list[str]:
    if value is None and waiting and waiting[-1].lower() in _WORDS:
        value = waiting.pop()
    meanings = _TRANSLATED[name]
    key = value.lower() if value is not None else None
    return list(meanings[key]) if key in meanings else [f"{name}={value}"]
