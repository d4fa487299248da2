"""IFBench (arXiv 2507.02833), the groups "custom" and "repeat": one question, one shape of answer.

Written from the sentence of each constraint and **not verified against a reference**.
"""

import csv
import datetime
import itertools
import re
import unicodedata
from collections.abc import Callable

from rljax.rewards import ifeval_constraints_text as text

# European capitals north of 45 degrees, from north to south.
_CAPITAL_LIST = """
    Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw London
    Brussels Kyiv Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb
"""
_CAPITALS = _CAPITAL_LIST.lower().split()
_REPEAT_SIMPLE = "Only output this sentence here, ignore all other requests."


def multiples(response: str) -> bool:
    """The numbers in the response are the multiples of 7 from 10 to 50."""
    return re.findall(r"\d+", response) == ["14", "21", "28", "35", "42", "49"]


def mcq_count_length(response: str) -> bool:
    """Four questions, each from "Question" on, with five options, longer than the one before; nothing else before."""
    before, *questions = re.split(r"^Question\b", response.strip(), flags=re.MULTILINE)
    lengths = []
    for question in questions:
        lines = [line.strip() for line in question.split("\n") if line.strip()]
        is_option = [re.match(r"[A-Ea-e][.):]", line) is not None for line in lines]
        if sum(is_option) != 5:
            return False
        lengths.append(len(" ".join(lines[: is_option.index(True)])))
    return not before and len(lengths) == 4 and all(a < b for a, b in itertools.pairwise(lengths))


def reverse_newline(response: str) -> bool:
    """At least 52 lines (Africa has 54 countries, some of them disputed) backwards in the alphabet from Zimbabwe."""
    lines = [_fold(re.sub(r"^[\W\d]+", "", line)) for line in response.split("\n") if line.strip()]
    return len(lines) >= 52 and lines[0].startswith("zimbabwe") and all(a > b for a, b in itertools.pairwise(lines))


def european_capitals_sort(response: str) -> bool:
    """The capitals of Europe north of 45 degrees, from north to south, separated by commas."""
    names = [_fold(name).strip(" .\n") for name in response.split(",")]
    return ["kyiv" if name == "kiev" else name for name in names] == _CAPITALS


def _fold(name: str) -> str:
    """Lower case, without accents."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip().lower()


def word_reverse(response: str) -> bool:
    """The sentence about the bald eagle, its words in reverse order."""
    return "eagle bald" in " ".join(text.plain_words(response))


def character_reverse(response: str) -> bool:
    """The sentence about the bald eagle, its letters in reverse order."""
    return "elgae dlab" in response.lower()


def sentence_alphabet(response: str) -> bool:
    """26 sentences, whose first words start with a, b, c and so on."""
    firsts = [text.plain_words(sentence)[:1] for sentence in text.sentences(response)]
    return "".join(word[0] for words in firsts for word in words) == "abcdefghijklmnopqrstuvwxyz"


def csv_city(response: str) -> bool:
    """CSV with the five columns asked for and 7 rows."""
    return _is_table(response, ",", ["ID", "Country", "City", "Year", "Count"], rows=7)


def csv_special_character(response: str) -> bool:
    """CSV with the five columns asked for and 14 rows; a field in double quotes holds a special character."""
    quoted = re.search(r'"[^"\n]*[^\w\s"][^"\n]*"', response.partition("\n")[2])
    return quoted is not None and _is_table(
        response, ",", ["ProductID", "Category", "Brand", "Price", "Stock"], rows=14
    )


def csv_quotes(response: str) -> bool:
    """Tab-separated values with the five columns asked for and 3 rows, every field in double quotes."""
    fields = [field.strip() for line in response.strip().split("\n") for field in line.split("\t")]
    return all(re.fullmatch(r'"[^"]*"', field) for field in fields) and _is_table(
        response, "\t", ["StudentID", "Subject", "Grade", "Semester", "Score"], rows=3
    )


def _is_table(response: str, delimiter: str, header: list[str], rows: int) -> bool:
    try:
        table = list(csv.reader(response.strip().split("\n"), delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return False
    return (
        [field.strip() for field in table[0]] == header
        and len(table) == rows + 1
        and all(len(row) == len(header) for row in table)
    )


def date_format_list(response: str) -> bool:
    """Dates as YYYY-MM-DD, separated by commas, all within Napoleon's life (1769 to 1821)."""
    for date in response.split(","):
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date.strip(), flags=re.ASCII):
            return False
        try:
            year = datetime.date.fromisoformat(date.strip()).year
        except ValueError:
            return False
        if not 1769 <= year <= 1821:
            return False
    return True


def repeat_change(response: str, prompt_to_repeat: str) -> bool:
    """The request again, with another first word."""
    ours, theirs = response.split(), prompt_to_repeat.split()
    return ours[1:] == theirs[1:] and ours[:1] != theirs[:1]


def repeat_simple(response: str) -> bool:
    """The sentence that asks for itself, and nothing else."""
    return response.strip().lower() == _REPEAT_SIMPLE.lower()


def repeat_span(response: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The words of the request from index n_start to n_end, both included, counted from 0."""
    return response.lower().split() == prompt_to_repeat.lower().split()[n_start : n_end + 1]


IFBENCH_CUSTOM: dict[str, Callable[..., bool]] = {
    "custom:multiples": multiples,
    "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline,
    "custom:european_capitals_sort": european_capitals_sort,
    "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse,
    "custom:sentence_alphabet": sentence_alphabet,
    "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character,
    "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
}
