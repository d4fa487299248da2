"""Reddit posts as prompts and summaries as completions (2403.17031, details 1 to 6).

    python -m rljax.data.tldr --input=RAW.jsonl --output=tldr/train.jsonl --tokenizer=FOLDER

Rows in have ``subreddit, title, post, summary``; rows out ``prompt, solution``. With ``summaries`` and ``choice``
instead of a summary they are comparisons: ``prompt, chosen, rejected``. A row with an ``article`` is CNN/DM's, on which
reward models are validated outside of their domain (detail 6).
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

from rljax.data.rows import DataError, Row, read_file
from rljax.data.tokenizer import load_tokenizer

QUERY_TOKENS = 512  # detail 2
ARTICLE_TOKENS = 1919  # detail 5: of rows of 2021
SUMMARY_TOKENS = 53  # detail 4, with the end token; those of comparisons have up to 169
COMPARED_TOKENS = 169

Count = Callable[[str], int]


def query(row: Row, count: Count, limit: int | None = None) -> str:
    """The prompt of a post or an article, at most 512 or 1919 tokens by ``count``: a longer one ends at a line break.

    Raises DataError for a row without one of the columns, and for a text that no line break makes short enough.
    """
    if row.get("article") is not None:
        head, text, limit = "Article:\n\n", row["article"], limit or ARTICLE_TOKENS
    else:
        for column in ("subreddit", "title", "post"):
            if row.get(column) is None:
                raise DataError(f"a post has no {column!r}; it has {', '.join(row)}")
        head, text = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: ", row["post"]
        limit = limit or QUERY_TOKENS
    while count(prompt := f"{head}{text}\n\nTL;DR:") > limit:
        shorter, line_break, _ = text.rpartition("\n")
        if not line_break:
            raise DataError(f"the text {text[:40]!r} has no line break that brings it under {limit} tokens")
        text = shorter
    return prompt


def completion(summary: str) -> str:
    """A summary as the model writes it: behind a space; its end token comes with the row's encoding (detail 3)."""
    return " " + summary.strip()


def to_row(row: Row, count: Count) -> Row | None:
    """A supervised row or a comparison; None where a summary is too long (detail 4)."""
    prompt = query(row, count)
    if row.get("summaries") is None:
        solution = completion(row["summary"])
        return {"prompt": prompt, "solution": solution} if count(solution) < SUMMARY_TOKENS else None
    texts = [completion(summary["text"] if isinstance(summary, dict) else summary) for summary in row["summaries"]]
    if any(count(text) >= COMPARED_TOKENS for text in texts):
        return None
    chosen = int(row["choice"])
    return {"prompt": prompt, "chosen": texts[chosen], "rejected": texts[1 - chosen]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m rljax.data.tldr", description=(__doc__ or "").split("\n")[0])
    for name in ("input", "output", "tokenizer"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args(argv)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        made, dropped = [], {"too long a summary": 0, "too long a post": 0}
        for row in read_file(options.input):
            try:
                new = to_row(row, lambda text: len(tokenizer.encode_continuation(text)))
            except DataError as error:
                if "line break" not in str(error):
                    raise
                dropped["too long a post"] += 1
                continue
            if new is None:
                dropped["too long a summary"] += 1
            else:
                made.append(new)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text("".join(json.dumps(row) + "\n" for row in made))
    print(f"{options.output}: {len(made)} rows; left out: {dropped}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
