"""Names and codes of the languages that Whisper knows."""

from __future__ import annotations

import difflib
from unicodedata import normalize

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError

AUTO = "auto"

# Codes in the order of their tokens, with names (OpenAI's `whisper/tokenizer.py`). The last one
# came with large-v3.
# fmt: off
LANGUAGES = {
    "en": "english", "zh": "chinese", "de": "german", "es": "spanish", "ru": "russian",
    "ko": "korean", "fr": "french", "ja": "japanese", "pt": "portuguese", "tr": "turkish",
    "pl": "polish", "ca": "catalan", "nl": "dutch", "ar": "arabic", "sv": "swedish",
    "it": "italian", "id": "indonesian", "hi": "hindi", "fi": "finnish", "vi": "vietnamese",
    "he": "hebrew", "uk": "ukrainian", "el": "greek", "ms": "malay", "cs": "czech",
    "ro": "romanian", "da": "danish", "hu": "hungarian", "ta": "tamil", "no": "norwegian",
    "th": "thai", "ur": "urdu", "hr": "croatian", "bg": "bulgarian", "lt": "lithuanian",
    "la": "latin", "mi": "maori", "ml": "malayalam", "cy": "welsh", "sk": "slovak", "te": "telugu",
    "fa": "persian", "lv": "latvian", "bn": "bengali", "sr": "serbian", "az": "azerbaijani",
    "sl": "slovenian", "kn": "kannada", "et": "estonian", "mk": "macedonian", "br": "breton",
    "eu": "basque", "is": "icelandic", "hy": "armenian", "ne": "nepali", "mn": "mongolian",
    "bs": "bosnian", "kk": "kazakh", "sq": "albanian", "sw": "swahili", "gl": "galician",
    "mr": "marathi", "pa": "punjabi", "si": "sinhala", "km": "khmer", "sn": "shona", "yo": "yoruba",
    "so": "somali", "af": "afrikaans", "oc": "occitan", "ka": "georgian", "be": "belarusian",
    "tg": "tajik", "sd": "sindhi", "gu": "gujarati", "am": "amharic", "yi": "yiddish", "lo": "lao",
    "uz": "uzbek", "fo": "faroese", "ht": "haitian creole", "ps": "pashto", "tk": "turkmen",
    "nn": "nynorsk", "mt": "maltese", "sa": "sanskrit", "lb": "luxembourgish", "my": "myanmar",
    "bo": "tibetan", "tl": "tagalog", "mg": "malagasy", "as": "assamese", "tt": "tatar",
    "haw": "hawaiian", "ln": "lingala", "ha": "hausa", "ba": "bashkir", "jw": "javanese",
    "su": "sundanese", "yue": "cantonese",
}
# fmt: on
_OTHER_NAMES = {
    "burmese": "my",
    "castilian": "es",
    "flemish": "nl",
    "haitian": "ht",
    "letzeburgesch": "lb",
    "mandarin": "zh",
    "moldavian": "ro",
    "moldovan": "ro",
    "panjabi": "pa",
    "pushto": "ps",
    "sinhalese": "si",
    "valencian": "ca",
}
CODES_BY_NAME = {name: code for code, name in LANGUAGES.items()} | _OTHER_NAMES

# As each language calls itself (Unicode's CLDR), in lower case, without what is a name above.
# fmt: off
NATIVE_NAMES = {
    "中文": "zh", "普通话": "zh", "deutsch": "de", "español": "es", "castellano": "es",
    "русский": "ru", "한국어": "ko", "français": "fr", "日本語": "ja", "português": "pt",
    "türkçe": "tr", "polski": "pl", "català": "ca", "nederlands": "nl", "vlaams": "nl",
    "العربية": "ar", "svenska": "sv", "italiano": "it", "bahasa indonesia": "id",
    "indonesia": "id", "हिन्दी": "hi", "suomi": "fi", "tiếng việt": "vi", "עברית": "he",
    "українська": "uk", "ελληνικά": "el", "bahasa melayu": "ms", "melayu": "ms", "čeština": "cs",
    "română": "ro", "dansk": "da", "magyar": "hu", "தமிழ்": "ta", "norsk": "no",
    "norsk bokmål": "no", "bokmål": "no", "ไทย": "th", "اردو": "ur", "hrvatski": "hr",
    "български": "bg", "lietuvių": "lt", "latina": "la", "māori": "mi", "മലയാളം": "ml",
    "cymraeg": "cy", "slovenčina": "sk", "తెలుగు": "te", "فارسی": "fa", "farsi": "fa",
    "latviešu": "lv", "বাংলা": "bn", "bangla": "bn", "српски": "sr", "srpski": "sr",
    "azərbaycan": "az", "slovenščina": "sl", "ಕನ್ನಡ": "kn", "eesti": "et", "македонски": "mk",
    "brezhoneg": "br", "euskara": "eu", "íslenska": "is", "հայերեն": "hy", "नेपाली": "ne",
    "монгол": "mn", "bosanski": "bs", "қазақ": "kk", "қазақ тілі": "kk", "shqip": "sq",
    "kiswahili": "sw", "galego": "gl", "मराठी": "mr", "ਪੰਜਾਬੀ": "pa", "සිංහල": "si",
    "ខ្មែរ": "km", "cambodian": "km", "chishona": "sn", "yorùbá": "yo", "soomaali": "so",
    "ქართული": "ka", "беларуская": "be", "тоҷикӣ": "tg", "سنڌي": "sd", "ગુજરાતી": "gu",
    "አማርኛ": "am", "ייִדיש": "yi", "ລາວ": "lo", "o'zbek": "uz",
    "føroyskt": "fo", "kreyòl ayisyen": "ht", "پښتو": "ps", "türkmen": "tk",
    "norsk nynorsk": "nn", "malti": "mt", "संस्कृत": "sa", "lëtzebuergesch": "lb", "မြန်မာ": "my",
    "བོད་སྐད་": "bo", "filipino": "tl", "অসমীয়া": "as", "татар": "tt", "'ōlelo hawai'i": "haw",
    "lingála": "ln", "башҡорт": "ba", "basa jawa": "jw", "basa sunda": "su", "粵語": "yue",
    "粤语": "yue",
}
# ISO 639: codes that replaced Whisper's or that it replaced, and those of three letters.
_OTHER_CODES = {
    "jv": "jw", "nb": "no", "iw": "he", "in": "id", "ji": "yi", "mo": "ro", "fil": "tl",
    "cmn": "zh", "ary": "ar", "arb": "ar", "arz": "ar", "zsm": "ms", "pes": "fa", "prs": "fa",
    "swh": "sw", "nob": "no", "nno": "nn", "eng": "en", "zho": "zh", "chi": "zh", "deu": "de",
    "ger": "de", "spa": "es", "rus": "ru", "kor": "ko", "fra": "fr", "fre": "fr", "jpn": "ja",
    "por": "pt", "tur": "tr", "pol": "pl", "cat": "ca", "nld": "nl", "dut": "nl", "ara": "ar",
    "swe": "sv", "ita": "it", "ind": "id", "hin": "hi", "fin": "fi", "vie": "vi", "heb": "he",
    "ukr": "uk", "ell": "el", "gre": "el", "msa": "ms", "may": "ms", "ces": "cs", "cze": "cs",
    "ron": "ro", "rum": "ro", "dan": "da", "hun": "hu", "tam": "ta", "nor": "no", "tha": "th",
    "urd": "ur", "hrv": "hr", "bul": "bg", "lit": "lt", "lat": "la", "mri": "mi", "mao": "mi",
    "mal": "ml", "cym": "cy", "wel": "cy", "slk": "sk", "slo": "sk", "tel": "te", "fas": "fa",
    "per": "fa", "lav": "lv", "ben": "bn", "srp": "sr", "aze": "az", "slv": "sl", "kan": "kn",
    "est": "et", "mkd": "mk", "mac": "mk", "bre": "br", "eus": "eu", "baq": "eu", "isl": "is",
    "ice": "is", "hye": "hy", "arm": "hy", "nep": "ne", "mon": "mn", "bos": "bs", "kaz": "kk",
    "sqi": "sq", "alb": "sq", "swa": "sw", "glg": "gl", "mar": "mr", "pan": "pa", "sin": "si",
    "khm": "km", "sna": "sn", "yor": "yo", "som": "so", "afr": "af", "oci": "oc", "kat": "ka",
    "geo": "ka", "bel": "be", "tgk": "tg", "snd": "sd", "guj": "gu", "amh": "am", "yid": "yi",
    "lao": "lo", "uzb": "uz", "fao": "fo", "hat": "ht", "pus": "ps", "tuk": "tk", "mlt": "mt",
    "san": "sa", "ltz": "lb", "mya": "my", "bur": "my", "bod": "bo", "tib": "bo", "tgl": "tl",
    "mlg": "mg", "asm": "as", "tat": "tt", "lin": "ln", "hau": "ha", "bak": "ba", "jav": "jw",
    "sun": "su",
}
# fmt: on
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bb\u02bc"), "'")
# How near a misspelling must be to a name: "klingon" is not near "lingala".
_NEAR = 0.75


def language_code(language: str) -> str:
    """Return Whisper's code of a language that is given by name or code, in any case.

    Names are English or the language's own (`german`, `deutsch`). Codes are ISO 639 (`de`, `deu`),
    and may have a script and a region (`de-AT`, `zh_Hant_TW`), of which Whisper knows nothing.

    Raises `OptionError`, with the nearest name, if Whisper does not know it.
    """
    plain = " ".join(check.text("language", language).lower().split())
    wanted = normalize("NFC", plain.translate(_APOSTROPHES))
    found = _known(wanted)
    tag = wanted.replace("_", "-").split("-")
    if found is None and len(tag) > 1 and len(tag[0]) <= 3:
        # Cantonese has a code of its own, and one as an extension of Chinese.
        found = _known("yue" if tag[:2] == ["zh", "yue"] else tag[0])
    if found is not None:
        return found
    known = [*CODES_BY_NAME, *NATIVE_NAMES]
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=_NEAR)
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(
        f"language is {check.shown(language)}: {hint}"
        f"Whisper knows {len(LANGUAGES)}, by name ('german', 'deutsch') or code ('de', 'de-AT')"
    )


def language_or_auto(language: str) -> str | None:
    """Return a language's code as `language_code`, or None for "auto", which detects it."""
    wanted = check.text("language", language).strip().lower()
    return None if wanted == AUTO else language_code(language)


def _known(name: str) -> str | None:
    if name in LANGUAGES:
        return name
    return CODES_BY_NAME.get(name) or NATIVE_NAMES.get(name) or _OTHER_CODES.get(name)
