"""Generated prompts with keyword and length constraints, for training on ``ifeval`` without a data set."""

import itertools
import random
from typing import Any

_NOUNS = """
    apple arrow bell bird boat book bread bridge candle castle chair cloud coin corn crown desk door drum
    eagle field fire fish flag flower forest garden gate ghost gold grass hammer hill horse island jar key
    king lake lamp leaf letter map mirror moon mountain night ocean owl paper pearl piano queen rain ring
    river road rock rope rose salt sand ship silver sky snow song star stone storm sugar sun sword table tower
    tree trumpet valley village wall water wheel whistle wind wolf
"""
_WORDS = _NOUNS.split()
_SPARE_WORDS = 9  # a limit leaves room for 1 to 9 words beside the keywords


def make_constraint_rows(seed: int, n: int, *, split: str = "train", num_keywords: int = 2) -> list[dict[str, Any]]:
    """n distinct rows (prompt, instruction_id_list, kwargs) that ask for keywords in fewer words than a limit.

    Splits "train" and "test" never share a set of keywords: a set belongs to "test" if its word numbers add up to a
    multiple of 5. ``response`` is a shortest one that follows both constraints, for a supervised start. The same seed
    gives the same rows. Raises ValueError for another split and where fewer than n rows exist.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not known: write 'train' or 'test'")
    sets = itertools.combinations(range(len(_WORDS)), num_keywords)
    own = [numbers for numbers in sets if (sum(numbers) % 5 == 0) == (split == "test")]
    if not 0 <= n <= len(own) * _SPARE_WORDS:
        raise ValueError(
            f"there are {len(own) * _SPARE_WORDS} {split} rows of {num_keywords} keywords: ask for 0 to that, not {n}"
        )
    rng = random.Random(seed)
    rows = []
    for drawn in rng.sample(range(len(own) * _SPARE_WORDS), n):
        numbers, spare = own[drawn // _SPARE_WORDS], 1 + drawn % _SPARE_WORDS
        keywords = [_WORDS[number] for number in rng.sample(numbers, num_keywords)]
        rows.append(_row(keywords, limit=num_keywords + spare))
    return rows


def _row(keywords: list[str], limit: int) -> dict[str, Any]:
    return {
        "prompt": f"Write less than {limit} words. Use: {', '.join(keywords)}.",
        "instruction_id_list": ["keywords:existence", "length_constraints:number_words"],
        "kwargs": [{"keywords": keywords}, {"relation": "less than", "num_words": limit}],
        "response": " ".join(keywords),
    }
