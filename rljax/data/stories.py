"""Prompts cut from TinyStories: an opening, and words that the completion has to use."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from etils import epath

from rljax.data.splits import SPLITS, split_of

END_OF_STORY = "<|endoftext|>"
# Words of four letters or more that are too common, or too empty, to ask for.
STOP_WORDS = """
    about after again also always another around asked away back became because been before began best both came
    come could does done down each even ever every everyone feel feels felt find found from gave going good have hear
    heard help here into just keep kept knew know lets like liked little long look looked lots made make many more most
    much must named need needed never next once only other over ready really right said says seen some something soon
    started still such take than thank that their them then there these they thing things think this those thought time
    together told took tried upon used very want wanted wants went were what when where which while will with would
    your
""".split()  # noqa: SIM905 - a list literal would take a page


def split_stories(text: str) -> list[str]:
    """The stories of a TinyStories file, the unfinished last one left out.

    They are separated by ``<|endoftext|>``, or, in files without it, by one line break where paragraphs have two.
    """
    pieces = text.split(END_OF_STORY) if END_OF_STORY in text else re.split(r"(?<!\n)\n(?!\n)", text.strip())
    return [piece.strip() for piece in pieces[:-1] if piece.strip()]


def make_rows(
    *,
    split: str,
    path: str,
    count: int | None = None,
    seed: int = 0,
    words: int = 2,
    opening_sentences: int = 1,
    max_prompt_chars: int = 200,
    min_occurrences: int = 20,
    words_from: str = "continuation",
    min_sentences: int = 0,
    keep_space: bool = True,
) -> list[dict[str, Any]]:
    """Rows ``prompt`` (a story's opening), ``words`` and ``sentences`` (required), ``continuation``, ``corpus`` (path).

    ``path`` is one TinyStories file, or several with commas. The words stand in the real continuation and at least
    ``min_occurrences`` times in the files; with ``words_from`` "continuation" they are new there, with "opening" they
    are the opening's own that it uses most, which a story that keeps to its subject takes up again, with "hero" its
    names, which a story that keeps its hero says again. With ``keep_space`` the white space behind the opening is part
    of the prompt: tinystories656K has tokens that end in a space and takes an opening without it for a finished story.
    A story's first sentence decides its split, so no story and no prompt is in two. ``count`` rows in an order of the
    seed, or all. Raises ValueError.
    """
    if split not in SPLITS:
        raise ValueError(f"stories have no split {split!r}; they have {', '.join(SPLITS)}")
    if words_from not in ("continuation", "opening", "hero"):
        raise ValueError(f"stories take words_from the continuation, the opening or the hero, not {words_from!r}")
    stories = _read_stories(path)
    words_in = names_finder(stories) if words_from == "hero" else content_words
    occurrences = Counter(word for story in stories for word in words_in(story))
    known = {word for word, n in occurrences.items() if n >= min_occurrences}
    rows: dict[str, dict[str, Any]] = {}
    for story in stories:
        cut = sentence_ends(story)
        if len(cut) < opening_sentences or split_of("story:" + story[: cut[0]]) != split:
            continue
        end = cut[opening_sentences - 1]
        prompt, continuation = story[:end], story[end:]
        opening, told = set(words_in(prompt)), Counter(words_in(continuation))
        candidates = [w for w in told if w in known and (w in opening) == (words_from != "continuation")]
        if prompt in rows or len(prompt) > max_prompt_chars or len(candidates) < words:
            continue  # many stories open alike: a prompt is asked once
        if words_from == "continuation":
            required = _some_of(candidates, words, [seed, len(story), len(rows)])
        else:
            required = sorted(candidates, key=lambda word: -told[word])[:words]  # the story's subject first
        if keep_space:
            end += len(continuation) - len(continuation.lstrip())
        rows[prompt] = {
            "prompt": story[:end],
            "words": required,
            "sentences": min_sentences,
            "corpus": path,
            "continuation": story[end:],
            "dataset": "stories",
        }
    if count is not None and count > len(rows):
        raise ValueError(f"{path} gives {len(rows)} story prompts in split {split!r}, not {count}; ask for fewer")
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    values = list(rows.values())
    return [values[i] for i in order]


def _read_stories(path: str) -> list[str]:
    """The different stories of one file or of several."""
    stories: dict[str, None] = {}
    for file in (epath.Path(name).expanduser() for name in path.split(",")):
        if not file.exists():
            raise ValueError(f"story file {file} does not exist; give the path of a TinyStories text")
        stories |= dict.fromkeys(split_stories(file.read_text()))
    return list(stories)


def _some_of(candidates: list[str], count: int, seed: list[int]) -> list[str]:
    """``count`` of them at random, in their order."""
    chosen = np.random.default_rng(seed).choice(len(candidates), count, replace=False)
    return [candidates[i] for i in sorted(chosen)]


def sentence_ends(text: str) -> list[int]:
    """Where each sentence ends, closing quotes included; the last one only if something follows."""
    return [match.end() for match in re.finditer(r"[.!?][\"”]?(?=\s)", text)]


def content_words(text: str) -> list[str]:
    """The lower-case words of four letters or more that mean something, in order; capitalised names are left out."""
    return [word for word in re.findall(r"(?<![\w'’])[a-z]{4,}(?![\w'’])", text) if word not in STOP_WORDS]


def names_finder(stories: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that gives the proper names of a text in order.

    Names are learnt from the stories: capitalised within a sentence, and hardly ever (one time in 20) written small.
    """
    capitalised, small = Counter[str](), Counter[str]()
    for story in stories:
        capitalised.update(re.findall(r"(?<=[\w,;] )[A-Z][a-z]{2,}", story))
        small.update(re.findall(r"(?<![\w'’])[a-z]{3,}", story))
    names = {word for word, n in capitalised.items() if 20 * small[word.lower()] < n}
    return lambda text: [word for word in re.findall(r"(?<![\w'’])[A-Z][a-z]{2,}", text) if word in names]
