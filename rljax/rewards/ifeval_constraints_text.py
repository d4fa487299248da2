"""Text processing for the instruction checkers: words, tokens, sentences, and language detection.

The published IFEval checker uses NLTK's Punkt and Treebank tokenizers here. These are short rules of our own, for
English, without data to download. On the 540 published GPT-4 responses they give the same number of sentences in 519
and the same words in capitals in all.
"""

import functools
import re
import string
from pathlib import Path
from typing import Any

# Lower case, without the last period. "e.g", "i.e" and "etc" are missing on purpose: Punkt ends a sentence after them.
_ABBREVIATION_LIST = """
    adm ariz aug ave bros calif co col colo corp ct dec dr feb fla fri ft gen inc jan jr kan ky lt ltd maj messrs mg
    mich minn mr mrs ms nev nov oct okla ore pa ph.d prof rep sen sept sr st tenn tues u.k u.n u.s u.s.a va vs vt wash
    wed wis yr a.m p.m n.y d.c l.a m.b.a
"""
# The only words that open a sentence after an abbreviation: "at 5 p.m. He left" against "Dr. Smith".
_STARTER_LIST = """
    according although among both but despite even he however i if in indeed instead it many meanwhile moreover most
    nevertheless nor since so some the there these they this though thus under we what when while yet you
"""
_ABBREVIATIONS, _STARTERS = frozenset(_ABBREVIATION_LIST.split()), frozenset(_STARTER_LIST.split())
_PUNCTUATION = string.punctuation + "“”‘’…–—"
_MARK = re.compile(r"""(?<![.?!])[.?!]++(?:["')\]}”’*]+|(?=\s|$))""")
_LONGEST_ABBREVIATION = 40  # looking no further back keeps the scan linear in a text of nothing but periods
_SPLIT_OFF = re.compile(
    r"""((?i:n't|'(?:s|m|d|ll|re|ve))\b|(?i:\b(?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)))"""
    r"""|\.{2,}|--|[:,](?!\d)|[;@#$%&?!*\[\](){}<>"“”„«»])"""
)


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores: ``don't`` is two words."""
    return re.findall(r"\w+", text)


def plain_words(text: str) -> list[str]:
    """What stands between white space, without punctuation at its ends, in lower case: ``don't`` is one word."""
    stripped = (word.strip(_PUNCTUATION).lower() for word in text.split())
    return [word for word in stripped if word]


def tokens(text: str) -> list[str]:
    """Penn Treebank tokens: cut at white space, punctuation and contractions; ``U.S.`` and ``1,000`` stay whole."""
    return _SPLIT_OFF.sub(r" \1 ", text).split()


def sentences(text: str) -> list[str]:
    """Cut after ``.``, ``?`` or ``!`` before white space, a closing quote or bracket; a line break alone cuts nothing.

    A period does not end a sentence after an abbreviation or an initial (unless a word such as "The" follows) nor,
    before a lower-case word, after a number or in an ellipsis. A piece without a letter or digit is no sentence.
    """
    pieces, start = [], 0
    for mark in _MARK.finditer(text):
        before = text[max(start, mark.start() - _LONGEST_ABBREVIATION) : mark.start()]
        if _ends_sentence(before, mark.group(), text[mark.end() : mark.end() + _LONGEST_ABBREVIATION]):
            pieces.append(text[start : mark.end()].strip())
            start = mark.end()
    return [piece for piece in [*pieces, text[start:].strip()] if re.search(r"\w", piece)]


def _ends_sentence(before: str, mark: str, after: str) -> bool:
    if "?" in mark or "!" in mark:
        return True
    last = re.findall(r"[\w.]*$", before)[0]
    following = re.findall(r"^\s*(\w*)", after)[0]
    is_initial = len(last) == 1 and last.isupper() and last != "I"
    if is_initial or last.lower() in _ABBREVIATIONS:
        return following[:1].isupper() and following.lower() in _STARTERS
    return not (following[:1].islower() and (last.isdigit() or mark.startswith("..")))


def language(text: str) -> str | None:
    """The ISO 639-1 code of a text, by langdetect with its seed fixed at 0; None where it finds no letters."""
    try:
        from langdetect.lang_detect_exception import LangDetectException
    except ImportError as error:
        raise ImportError(
            "language and letter-case constraints need langdetect: pip install 'rljax[rewards]'"
        ) from error
    detector = _language_detectors().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


@functools.cache
def _language_detectors() -> Any:
    """Our own factory, so that neither the seed nor the profile order is shared with another user of the package."""
    from langdetect import detector_factory

    factory = detector_factory.DetectorFactory()
    factory.set_seed(0)
    profiles = sorted(Path(detector_factory.PROFILES_DIRECTORY).iterdir())
    factory.load_json_profile([path.read_text(encoding="utf-8") for path in profiles])
    return factory
