from __future__ import annotations

import pytest

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.languages import (
    CODES_BY_NAME,
    LANGUAGES,
    NATIVE_NAMES,
    language_code,
)
from whisper_flash_attention.options import TranscribeOptions


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("zh-TW", "zh"),
        ("zh_Hant_HK", "zh"),
        ("zh-yue", "yue"),
        ("pt-BR", "pt"),
        ("de_AT", "de"),
        ("jv", "jw"),
        ("nb", "no"),
        ("nb-NO", "no"),
        ("iw", "he"),
        ("deu", "de"),
        ("deutsch", "de"),
        (" Français ", "fr"),
        ("franc\u0327ais", "fr"),
        ("日本語", "ja"),
        ("Norsk  bokmål", "no"),
        ("O\u2018zbek", "uz"),
    ],
)
def test_tags_other_codes_and_native_names_are_languages(given: str, code: str) -> None:
    assert language_code(given) == code


def test_auto_detects_the_language() -> None:
    assert TranscribeOptions(language="auto").language is None
    assert TranscribeOptions(language=" Auto ").language is None


@pytest.mark.parametrize(
    ("misspelt", "near"),
    [("germn", "german"), ("deutch", "deutsch"), ("Englsh", "english"), ("spanisch", "spanish")],
)
def test_the_nearest_name_is_suggested(misspelt: str, near: str) -> None:
    with pytest.raises(OptionError, match=rf"did you mean {near}\?"):
        language_code(misspelt)


@pytest.mark.parametrize("unknown", ["klingon", "xx", "x", "dothraki", "", "en\ud800"])
def test_nothing_is_suggested_where_nothing_is_near(unknown: str) -> None:
    with pytest.raises(OptionError) as raised:
        language_code(unknown)
    assert "did you mean" not in str(raised.value)


def test_every_name_leads_to_a_code() -> None:
    assert set(CODES_BY_NAME.values()) | set(NATIVE_NAMES.values()) <= set(LANGUAGES)
    for name, code in {**CODES_BY_NAME, **NATIVE_NAMES}.items():
        assert language_code(name.upper()) == code or language_code(name) == code
    assert not CODES_BY_NAME.keys() & NATIVE_NAMES.keys()
