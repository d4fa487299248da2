"""The 25 instructions of IFEval (arXiv 2311.07911, table 4), each a pure function of the response and its arguments.

The functions ask what the published checker asks, quirks included, so that scores compare; where a regular expression
of the obvious form would take quadratic time on a hostile response, the same question is asked in linear time.
A registry maps instruction ids to them. Names of arguments are those of the public data.
"""

import json
import re
from collections.abc import Callable, Sequence

from rljax.rewards import ifeval_constraints_text as text

Checker = Callable[..., bool]


def compare(count: int, relation: str, threshold: int) -> bool:
    """``count`` against a threshold in IFEval's two relations; raises ValueError for any other."""
    if relation == "at least":
        return count >= threshold
    if relation == "less than":
        return count < threshold
    raise ValueError(f"relation {relation!r} is not known: write 'at least' or 'less than'")


# Keywords


def keywords_existence(response: str, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, also inside a longer word, in any case."""
    return all(keyword.lower() in response.lower() for keyword in keywords)


def keywords_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs so often, also inside longer words, in any case."""
    return compare(response.lower().count(keyword.lower()), relation, frequency)


def forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter (or any one character) occurs so often, in any case."""
    return compare(response.lower().count(letter.lower()), let_relation, let_frequency)


# Language and case


def response_language(response: str, language: str) -> bool:
    """The response is in a language (ISO 639-1); a response without letters passes, as in the published checker."""
    return text.language(response) in (None, language)


def english_capital(response: str) -> bool:
    """English, and no lower-case letter."""
    return response.isupper() and response_language(response, "en")


def english_lowercase(response: str) -> bool:
    """English, and no capital letter."""
    return response.islower() and response_language(response, "en")


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    """So many words are all in capitals ("I" and "U.S." are)."""
    return compare(sum(token.isupper() for token in text.tokens(response)), capital_relation, capital_frequency)


# Length


def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    """So many sentences."""
    return compare(len(text.sentences(response)), relation, num_sentences)


def number_words(response: str, num_words: int, relation: str) -> bool:
    """So many words."""
    return compare(len(text.words(response)), relation, num_words)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs, separated by ``***``; none but the first and the last piece may be empty."""
    pieces = [piece.strip() for piece in response.split("***")]
    return all(pieces[1:-1]) and sum(map(bool, pieces)) == num_paragraphs


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs, separated by empty lines, of which the nth starts with a word, in any case."""
    pieces = response.split("\n\n")
    count = sum(bool(piece.strip()) for piece in pieces)
    if nth_paragraph > count or not (found := pieces[nth_paragraph - 1].split()):
        return False
    word = re.match(r"'*\"*([^.,?!'\"]*)", found[0].lower())
    return count == num_paragraphs and word is not None and word[1] == first_word.lower()


# Detectable content


def number_placeholders(response: str, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets, such as ``[address]``."""
    closed = (piece for line in response.split("\n") for piece in line.split("]")[:-1])
    return sum("[" in piece for piece in closed) >= num_placeholders


def postscript(response: str, postscript_marker: str) -> bool:
    """A postscript marker occurs, in any case; P.S. and P.P.S may be written with spaces between their letters."""
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, response.lower()) is not None


# Detectable format


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Exactly so many lines that start with ``*`` or ``-``; ``**`` starts no bullet."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(response: str) -> bool:
    """One of the three permitted answers occurs."""
    return any(f"My answer is {answer}." in response for answer in ("yes", "no", "maybe"))


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """At least so many spans of one line in ``*single*`` or ``**double**`` stars."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(span.strip()) for span in single + double) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many section headings: the word, then a number."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """The whole response is JSON, with or without a code fence around it."""
    body = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """A line holds a title in double angular brackets, ``<<such as this>>``."""
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end >= start + 3 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


# Combination


def two_responses(response: str) -> bool:
    """Exactly two different responses, separated by six stars."""
    pieces = [piece.strip() for piece in response.split("******")]
    found = [piece for piece in pieces if piece]
    return all(pieces[1:-1]) and len(found) == 2 and found[0] != found[1]


def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The response starts with the request, word for word, in any case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


# Start, end and punctuation


def end_checker(response: str, end_phrase: str) -> bool:
    """The response ends with a phrase, in any case; a closing quotation mark may follow."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """The whole response stands in double quotation marks."""
    body = response.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


def no_comma(response: str) -> bool:
    """No comma."""
    return "," not in response


IFEVAL: dict[str, Checker] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
