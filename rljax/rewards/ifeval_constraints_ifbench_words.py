"""IFBench (arXiv 2507.02833), the groups "count" and "words": what the words of a response are and how many.

Written from the sentence of each constraint and **not verified against a reference**. Word classes are short lists and
syllables a rule of thumb, where the published checker asks a tagger and a dictionary.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable

from rljax.rewards import ifeval_constraints_text as text

_CONJUNCTIONS = {"for", "and", "nor", "but", "or", "yet", "so"}
_PRONOUN_LIST = """
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves
"""
_PRONOUNS = frozenset(_PRONOUN_LIST.split())
_NAME_LIST = """
    Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin Harper
    Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan Victoria Elijah Layla
    Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan
"""
_NAMES = frozenset(_NAME_LIST.split())  # the names that the constraint's sentence offers
_VERB_LIST = """
    accept achieve act add adjust advise agree aim allow am analyze answer apply are arrange ask assess assign assume
    avoid be become begin being believe break bring build buy calculate call can capture carry catch change check
    choose cite clarify clean close collect combine come compare complete compose compute conduct connect consider
    construct contact continue convert cook copy could count cover create cut debug decide define deliver demonstrate
    describe design determine develop did discover discuss display divide do does doing draft draw drink drive eat
    embrace enable encourage ensure enter establish estimate evaluate examine exercise expand expect explain explore
    express face fail feel fetch fight fill find finish fix focus follow forget form format gather generate get give
    go goes going grow guide had handle happen has have hear help hold identify illustrate imagine implement improve
    include increase indicate inspect install is introduce investigate join judge jump keep know lead learn leave let
    limit list listen live load locate look love make manage mark may measure meet mention might mix monitor move must
    name navigate need note observe obtain offer open organize outline pay perform picture pick place plan play
    practice predict prepare present prevent print proceed produce promote protect prove provide pull push put quote
    raise reach read realize recall receive recognize recommend reduce refer reflect remain remember remove repeat
    replace reply report represent request require resolve respond return review rewrite run save say search see seek
    select send separate serve set share should show sing sit sleep solve sort speak specify spend stand start state
    stay stop store study submit suggest summarize support suppose take talk teach tell test thank think transform
    translate travel treat try turn type understand unlock update use utilize verify visit visualize wait walk want
    was watch wear were will win work would write
"""
_VERBS = frozenset(_VERB_LIST.split())


def word_count_range(response: str, min_words: int, max_words: int) -> bool:
    """Between so many and so many words."""
    return min_words <= len(text.words(response)) <= max_words


def unique_word_count(response: str, N: int) -> bool:
    """At least N different words."""
    return len(set(text.plain_words(response))) >= N


def conjunctions(response: str, small_n: int) -> bool:
    """At least so many different coordinating conjunctions (for, and, nor, but, or, yet, so)."""
    return len(_CONJUNCTIONS.intersection(text.plain_words(response))) >= small_n


def person_names(response: str, N: int) -> bool:
    """At least N different names of the fifty on offer."""
    return len(_NAMES.intersection(text.words(response))) >= N


def numbers(response: str, N: int) -> bool:
    """Exactly N numbers in digits; 1,000.5 is one."""
    return len(re.findall(r"\d+(?:[.,]\d+)*", response)) == N


def pronouns(response: str, N: int) -> bool:
    """At least N pronouns, personal, possessive or reflexive, each use counted."""
    return sum(word in _PRONOUNS for word in text.words(response.lower())) >= N


def punctuation(response: str) -> bool:
    """Each of . , ! ? ; : at least once, and an interrobang."""
    rest = re.sub(r"\?!|!\?|‽", "", response, count=1)
    return rest != response and set(".,!?;:") <= set(rest)


def keywords_multiple(response: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    """Five keywords exactly 1, 2, 3, 5 and 7 times, also inside longer words, in any case."""
    keywords = (keyword1, keyword2, keyword3, keyword4, keyword5)
    return [response.lower().count(keyword.lower()) for keyword in keywords] == [1, 2, 3, 5, 7]


def words_japanese(response: str, N: int) -> bool:
    """Every Nth word has a Japanese character; a number may stand in its place."""
    every_nth = response.split()[N - 1 :: N]
    return bool(every_nth) and all(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]|^\W*\d+\W*$", word) for word in every_nth)


def alphabet(response: str) -> bool:
    """Each word starts with the letter after that of the word before; a follows z."""
    letters = [word[0] for word in text.plain_words(response)]
    return all("a" <= letter <= "z" for letter in letters) and all(
        (ord(b) - ord(a)) % 26 == 1 for a, b in itertools.pairwise(letters)
    )


def vowel(response: str) -> bool:
    """One paragraph with at most three of the five vowels."""
    return "\n" not in response.strip() and len(set("aeiou").intersection(response.lower())) <= 3


def consonants(response: str) -> bool:
    """Every word has two consonants in a row."""
    return all(re.search(r"[b-df-hj-np-tv-z]{2}", word) for word in text.plain_words(response))


def palindrome(response: str) -> bool:
    """At least ten palindromes of five letters or more, each use counted."""
    return sum(len(word) >= 5 and word == word[::-1] for word in text.plain_words(response)) >= 10


def prime_lengths(response: str) -> bool:
    """The number of letters of every word is prime."""
    lengths = {len(word) for word in text.plain_words(response)}
    return all(length > 1 and all(length % k for k in range(2, int(length**0.5) + 1)) for length in lengths)


def repeats(response: str, small_n: int) -> bool:
    """No word more than so many times."""
    return max(Counter(text.plain_words(response)).values(), default=0) <= small_n


def no_consecutive(response: str) -> bool:
    """No two words in a row start with the same letter."""
    return all(a[0] != b[0] for a, b in itertools.pairwise(text.plain_words(response)))


def last_first(response: str) -> bool:
    """The last word of each sentence is the first of the next."""
    cut = [text.plain_words(sentence) for sentence in text.sentences(response)]
    return all(a[-1] == b[0] for a, b in itertools.pairwise(words for words in cut if words))


def paragraph_last_first(response: str) -> bool:
    """Each line ends with the word it starts with."""
    cut = [text.plain_words(line) for line in response.split("\n")]
    return all(words[0] == words[-1] for words in cut if words)


def words_position(response: str, keyword: str) -> bool:
    """The second word and the last but one are the keyword."""
    words = text.plain_words(response)
    return len(words) > 2 and words[1] == words[-2] == keyword.lower()


def keywords_specific_position(response: str, keyword: str, n: int, m: int) -> bool:
    """The mth word of the nth sentence is the keyword."""
    words = [text.plain_words(sentence) for sentence in text.sentences(response)[n - 1 : n]]
    return bool(words) and words[0][m - 1 : m] == [keyword.lower()]


def start_verb(response: str) -> bool:
    """The first word is a verb of our list, in any of its regular forms."""
    word = next(iter(text.plain_words(response)), "")
    stem = re.sub(r"(?<=...)(?:es|s|ed|d|ing)$", "", word)
    forms = {
        word,
        stem,
        stem + "e",
        re.sub(r"(.)\1$", r"\1", stem),
        re.sub("i$", "y", stem),
    }  # explor|ing, runn|ing, tri|es
    return not _VERBS.isdisjoint(forms)


def odd_even_syllables(response: str) -> bool:
    """Words with an odd and an even number of syllables take turns."""
    odd = [_syllables(word) % 2 for word in text.plain_words(response)]
    return all(a != b for a, b in itertools.pairwise(odd))


def _syllables(word: str) -> int:
    """Groups of vowels, without a silent -e or -ed at the end: right for 96 % of the words of English texts."""
    spoken = re.sub(r"(?<![^aeiouy]l)e$|(?<![td])ed$", "", word)
    return max(1, len(re.findall(r"[aeiouy]+", spoken)))


IFBENCH_WORDS: dict[str, Callable[..., bool]] = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:person_names": person_names,
    "count:numbers": numbers,
    "count:pronouns": pronouns,
    "count:punctuation": punctuation,
    "count:keywords_multiple": keywords_multiple,
    "count:words_japanese": words_japanese,
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths,
    "words:repeats": repeats,
    "words:no_consecutive": no_consecutive,
    "words:last_first": last_first,
    "words:paragraph_last_first": paragraph_last_first,
    "words:words_position": words_position,
    "words:keywords_specific_position": keywords_specific_position,
    "words:start_verb": start_verb,
    "words:odd_even_syllables": odd_even_syllables,
}
