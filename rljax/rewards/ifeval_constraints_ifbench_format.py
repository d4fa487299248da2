"""IFBench (arXiv 2507.02833), the groups "format", "sentence" and "ratio": how lines and sentences are built.

Written from the sentence of each constraint and **not verified against a reference**.
"""

import itertools
import re
from collections.abc import Callable, Mapping

from rljax.rewards import ifeval_constraints_text as text

_EMOJI = (
    r"[©®‼⁉™ℹ↔-↪⌚-⏿▪-➿⤴-⭕〰〽㊗㊙\U0001f000-\U0001faff]"
    r"[\ufe0f\u200d\U0001f3fb-\U0001f3ff]*"
)
_MINOR_WORD_LIST = (
    "a an the and but for nor or so yet as at by from in into of off on onto out over per to up via with vs"
)
_MINOR_WORDS = frozenset(_MINOR_WORD_LIST.split())
# The usual function words of English, cut as ``words`` cuts: "don't" is "don" and "t".
_STOP_WORD_LIST = """
    a about above after again against ain all am an and any are aren as at be because been before being below between
    both but by can couldn d did didn do does doesn doing don down during each few for from further had hadn has hasn
    have haven having he her here hers herself him himself his how i if in into is isn it its itself just ll m ma me
    mightn more most mustn my myself needn no nor not now o of off on once only or other our ours ourselves out over own
    re s same shan she should shouldn so some such t than that the their theirs them themselves then there these they
    this those through to too under until up ve very was wasn we were weren what when where which while who whom why
    will with won wouldn y you your yours yourself yourselves
"""
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())


def emoji(response: str) -> bool:
    """Every sentence ends with an emoji, before or after its mark."""
    inside = re.sub(rf"(?<![.?!])([.?!]++)\s*((?:{_EMOJI})+)", r" \2\1 ", response)
    found = text.sentences(inside)
    return bool(found) and all(re.search(rf"{_EMOJI}[\s\W]*$", sentence[-20:]) for sentence in found)


def line_indent(response: str) -> bool:
    """Every line is indented further than the line before it; at least two lines."""
    indents = [len(line) - len(line.lstrip()) for line in response.split("\n") if line.strip()]
    return len(indents) > 1 and all(a < b for a, b in itertools.pairwise(indents))


def marked_list(response: str, sep: str) -> bool:
    """At least two lines start with the marker that stands for a bullet."""
    return sum(line.lstrip().startswith(sep) for line in response.split("\n")) >= 2


def newline(response: str) -> bool:
    """One word on each line."""
    return all(len(line.split()) <= 1 for line in response.split("\n"))


def no_bullets_bullets(response: str) -> bool:
    """At least two sentences that end in a period, then at least two lines that start with ``*``."""
    lines = [line.strip() for line in response.split("\n") if line.strip()]
    prose = list(itertools.takewhile(lambda line: not line.startswith("*"), lines))
    bullets = [line for line in lines[len(prose) :] if line.startswith("*")]
    return len(bullets) >= 2 and sum(sentence.endswith(".") for sentence in text.sentences("\n".join(prose))) >= 2


def no_whitespace(response: str) -> bool:
    """No white space, at the ends neither."""
    return not re.search(r"\s", response)


def options(response: str, options: str) -> bool:
    """The response is one of the options, which "/", " or " or a comma separate; case and punctuation do not matter."""
    separator = next(mark for mark in ("/", " or ", ",") if mark in options or mark == ",")
    return text.plain_words(response) in [text.plain_words(option) for option in options.split(separator)]


def output_template(response: str) -> bool:
    """``My Answer:``, ``My Conclusion:``, ``Future Outlook:`` in this order, with text after each and none before."""
    labels = ["My Answer:", "My Conclusion:", "Future Outlook:"]
    before, *after = [piece.strip() for piece in re.split("|".join(labels), response)]
    return re.findall("|".join(labels), response) == labels and not before and all(after)


def parentheses(response: str) -> bool:
    """Brackets of any of three kinds, correctly closed and nested at least five deep."""
    return _nesting(response, {"(": ")", "[": "]", "{": "}"}) >= 5


def quotes(response: str) -> bool:
    """Double and single quotation marks in turns, nested at least three deep; an apostrophe in a word is no mark."""
    plain = re.sub(r"[“”]", '"', re.sub(r"[‘’]", "'", response))
    return _nesting(re.sub(r"(?<=\w)'(?=\w)", "", plain), {'"': '"', "'": "'"}) >= 3


def _nesting(response: str, closes: Mapping[str, str]) -> int:
    """How many levels the deepest closed group has; a mark that closes nothing drops all that is open."""
    deepest = 0
    open_groups: list[tuple[str, int]] = []  # the mark that closes it, the levels inside it
    for mark in response:
        if open_groups and mark == open_groups[-1][0]:
            levels = open_groups.pop()[1] + 1
            deepest = max(deepest, levels)
            if open_groups:
                open_groups[-1] = (open_groups[-1][0], max(open_groups[-1][1], levels))
        elif mark in closes:
            open_groups.append((closes[mark], 0))
        elif mark in closes.values():
            open_groups.clear()
    return deepest


def quote_unquote(response: str) -> bool:
    """Words without quotation marks follow every quoted phrase."""
    pieces = re.split('["“”]', response)
    return len(pieces) % 2 == 1 and all(re.search(r"\w", piece) for piece in pieces[2::2])


def sub_bullets(response: str) -> bool:
    """Lines that start with ``*``, and after each at least one line that starts with ``-`` before the next."""
    marks = "".join(line.lstrip()[:1] for line in response.split("\n"))
    _, *after = re.sub(r"[^*-]", "", marks).split("*")
    return bool(after) and all(after)


def thesis(response: str) -> bool:
    """A statement in HTML italics (``<i>`` or ``<em>``), and text after it."""
    for tag in ("i", "em"):
        _, opened, rest = response.partition(f"<{tag}>")
        statement, closed, body = rest.partition(f"</{tag}>")
        if opened and closed and statement.strip() and body.strip():
            return True
    return False


def title_case(response: str) -> bool:
    """Every word starts with a capital, save articles, conjunctions and short prepositions inside the text."""
    found = re.findall(r"[^\W\d_][\w'’]*", response)
    return all(word[0].isupper() or (place and word in _MINOR_WORDS) for place, word in enumerate(found))


def sentence_keyword(response: str, word: str, N: int) -> bool:
    """The Nth sentence has a keyword, also inside a longer word, in any case."""
    return any(word.lower() in sentence.lower() for sentence in text.sentences(response)[N - 1 : N])


def increment(response: str, small_n: int) -> bool:
    """Each sentence has exactly so many words more than the one before."""
    counts = [len(text.plain_words(sentence)) for sentence in text.sentences(response)]
    return all(b - a == small_n for a, b in itertools.pairwise(counts))


def alliteration_increment(response: str) -> bool:
    """The longest run of words with one first letter is longer in each sentence than in the one before."""
    runs = []
    for sentence in text.sentences(response):
        letters = [word[0] for word in text.plain_words(sentence)]
        runs.append(max((len(list(run)) for _, run in itertools.groupby(letters)), default=0))
    return all(a < b for a, b in itertools.pairwise(runs))


def overlap(response: str, reference_text: str, percentage: int) -> bool:
    """The share of the response's different character trigrams that the reference has, within 2 points."""
    ours, theirs = ({piece[i : i + 3] for i in range(len(piece) - 2)} for piece in (response, reference_text))
    return bool(ours) and abs(100 * len(ours & theirs) / len(ours) - percentage) <= 2


def sentence_type(response: str) -> bool:
    """Two declarative sentences for each interrogative one, of which there are some."""
    declarative, interrogative, _ = _sentence_types(response)
    return declarative == 2 * interrogative > 0


def sentence_balance(response: str) -> bool:
    """As many declarative as interrogative as exclamatory sentences, of which there are some."""
    declarative, interrogative, exclamatory = _sentence_types(response)
    return declarative == interrogative == exclamatory > 0


def _sentence_types(response: str) -> tuple[int, int, int]:
    marks = [re.sub(r"[^.?!]", "", sentence[-5:])[-1:] for sentence in text.sentences(response)]
    return marks.count("."), marks.count("?"), marks.count("!")


def sentence_words(response: str) -> bool:
    """Three sentences with the same number of characters and no word twice."""
    found = text.sentences(response)
    used = text.plain_words(response)
    return len(found) == 3 and len(set(map(len, found))) == 1 and len(set(used)) == len(used)


def stop_words(response: str, percentage: int) -> bool:
    """At most so many percent of the words are stop words."""
    found = text.words(response.lower())
    return bool(found) and 100 * sum(word in _STOP_WORDS for word in found) <= percentage * len(found)


IFBENCH_FORMAT: dict[str, Callable[..., bool]] = {
    "format:emoji": emoji,
    "format:line_indent": line_indent,
    "format:list": marked_list,
    "format:newline": newline,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:no_whitespace": no_whitespace,
    "format:options": options,
    "format:output_template": output_template,
    "format:parentheses": parentheses,
    "format:quote_unquote": quote_unquote,
    "format:quotes": quotes,
    "format:sub-bullets": sub_bullets,
    "format:thesis": thesis,
    "format:title_case": title_case,
    "sentence:keyword": sentence_keyword,
    "sentence:increment": increment,
    "sentence:alliteration_increment": alliteration_increment,
    "ratio:overlap": overlap,
    "ratio:sentence_type": sentence_type,
    "ratio:sentence_balance": sentence_balance,
    "ratio:sentence_words": sentence_words,
    "ratio:stop_words": stop_words,
}
