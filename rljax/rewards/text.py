"""Rewards for prose: required words, an ending, no repetition, length."""

import functools
import re
from collections import Counter
from collections.abc import Sequence

from etils import epath

from rljax.rewards.base import Sample, Score

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’*)]*\s+|\n+")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def story(sample: Sample) -> Score:
    """words · told · (finished + unrepeated) / 2, in [0, 1]: uses ``row["words"]``, is long enough, ends, is no loop.

    ``words`` is ``required_words``; ``told`` is the share of ``row["sentences"]`` that it has, 1 at most and where the
    row asks for none; ``finished`` is 1 if the end token was sampled within the budget; ``unrepeated`` is the function
    of that name. The product gives nothing for an empty story. Right: all words, told, finished, and no sentence twice.
    On 1,728 real TinyStories ``unrepeated`` averages 0.99, so a good story is near 1 and not above.
    """
    words = required_words(sample.prompt, sample.completion, sample.row["words"])
    fresh = unrepeated(sample.prompt, sample.completion)
    told = min(len(sentences(sample.completion)) / max(sample.row.get("sentences", 0), 1), 1.0)
    parts = {"words": words.value, "told": told, "finished": float(sample.finished), "unrepeated": fresh.value}
    value = words.value * told * (parts["finished"] + fresh.value) / 2
    return Score(value, bool(words.correct and told == 1 and sample.finished and fresh.correct), None, parts)


def required_words(prompt: str, completion: str, words: Sequence[str] | str) -> Score:
    """The share of ``words`` (a list, or text with commas) that the completion has; 1 if there are none to have.

    A word counts where it stands alone, in any case, in its own form or a regular inflection of it: "stop" is in
    "stops", "stopped", "stopping" and "stop's", not in "nonstop" or "stopper"; "run" is not in "ran". Of a phrase the
    last word may be inflected. What the prompt says does not count.
    """
    required = [part for part in (words.split(",") if isinstance(words, str) else words) if part.strip()]
    said = [word.removesuffix("'s") for word in words_of(completion)]
    present = [_occurs(words_of(phrase), said) for phrase in required]
    return Score(sum(present) / len(present) if present else 1.0, all(present))


def unrepeated(prompt: str, completion: str) -> Score:
    """Share of sentences not said before, times the distinct share of 4-grams: 1 if nothing repeats, 0 without a word.

    Sentences are compared as lower-case words. Right: no sentence stands twice.
    """
    said = sentences(completion)
    if not said:
        return Score(0.0, False)
    fresh = len(set(said)) / len(said)
    grams = _ngrams(words_of(completion), 4)
    return Score(fresh * (len(set(grams)) / len(grams) if grams else 1.0), fresh == 1.0)


def real_words(prompt: str, completion: str, corpus: str) -> float:
    """1 if every word of the completion is one that ``corpus`` uses, falling to 0 where one in ten is not, or is empty.

    ``corpus`` is a text file, or several with commas; a word counts that stands there twice or more. Of 1,411 real
    TinyStories against the words of 1,412 others 98 % are such words.
    """
    said = words_of(completion)
    known = _words_of_files(corpus)
    strange = sum(word not in known for word in said) / max(len(said), 1)
    return max(0.0, 1.0 - 10.0 * strange) if said else 0.0


def finished(sample: Sample) -> float:
    """1 if the end token was sampled within the budget."""
    return float(sample.finished)


def overlong(sample: Sample, *, max_new_tokens: int, buffer_tokens: int, factor: float = 1.0) -> float:
    """DAPO's soft length penalty (arXiv 2503.14476): 0 up to the buffer before the budget, −factor at the budget.

    min(0, −factor · (n − (max_new_tokens − buffer_tokens)) / buffer_tokens) for n tokens, the end token included.
    """
    over = len(sample.token_ids) - (max_new_tokens - buffer_tokens)
    return min(0.0, -factor * over / buffer_tokens)


def length_cost(sample: Sample, *, per_token: float) -> float:
    """−per_token for every token of the completion, the end token included."""
    return -per_token * len(sample.token_ids)


def sentences(text: str) -> list[tuple[str, ...]]:
    """The words of each sentence; they end at . ! ? or a line break."""
    return [tuple(words) for part in _SENTENCE_END.split(text) if (words := words_of(part))]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all n-grams, pooled over the texts (arXiv 1510.03055); 0 if no text has n words.

    It falls as texts are added, so compare only equal numbers of them.
    """
    grams = [gram for text in texts for gram in _ngrams(words_of(text), n)]
    return len(set(grams)) / max(len(grams), 1)


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits; an apostrophe inside belongs to the word."""
    return _WORD.findall(text.lower().replace("’", "'"))


def inflections(word: str) -> set[str]:
    """A lower-case English word with its regular -s, -ed and -ing forms; a final consonant may be doubled."""
    if word.endswith("y") and word[-2:-1] not in ("", *"aeiou"):
        return {word, word[:-1] + "ies", word[:-1] + "ied", word + "ing"}
    if word.endswith("e"):
        return {word, word + "s", word + "d", word[:-1] + "ing", word + "ing"}
    forms = {word, word + "s", word + "ed", word + "ing"}
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        forms.add(word + "es")
    if re.search(r"[^aeiou][aeiou][bdgklmnprtv]$", word):
        forms |= {word + word[-1] + "ed", word + word[-1] + "ing"}
    return forms


@functools.cache
def _words_of_files(corpus: str) -> frozenset[str]:
    counts = Counter(word for name in corpus.split(",") for word in words_of(epath.Path(name).expanduser().read_text()))
    return frozenset(word for word, n in counts.items() if n >= 2)


def _occurs(phrase: list[str], said: list[str]) -> bool:
    if not phrase:
        return False
    *head, last = phrase
    forms, n = inflections(last), len(phrase)
    return any(said[i + n - 1] in forms and said[i : i + n - 1] == head for i in range(len(said) - n + 1))


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
