"""What a run counts of its data before it starts, and warns of."""

from collections.abc import Mapping, Sequence
from typing import Any

from rljax.config import Config
from rljax.data.overlap import Overlap, duplicates, overlap_of, prompt_texts
from rljax.metrics import MetricsWriter


def report_data(
    writer: MetricsWriter, config: Config, sources: Sequence[Any], texts: Sequence[Any], held_out: Mapping[str, Any]
) -> None:
    """Count what training and evaluation share, dev and test too, what stands twice and what did not fit.

    ``sources`` and ``texts``, what is mixed in, are by stage, None where a stage has no rows of its own; rows that an
    earlier stage has too are compared once.
    """
    trained = {
        f"{kind} {name}": source
        for kind, by_stage in (("stage", sources), ("text_mix of", texts))
        for name, source in zip(config.recipe, by_stage, strict=True)
        if source is not None
    }
    prompts: dict[str, list[str]] = {}
    for name, source in trained.items():
        found = prompt_texts(source.rows)
        prompts |= {} if found in prompts.values() else {name: found}
    asked = {split: prompt_texts(source.rows) for split, source in held_out.items()}
    overlaps = [_compare(writer, f"{split} and training", found, prompts) for split, found in asked.items()]
    splits = _compare(writer, "test and dev", asked["test"], {"dev": asked["dev"]}) if len(asked) == 2 else None
    for name, source in {**trained, **held_out}.items():
        if source.kept.dropped or source.kept.bad:
            writer.say(f"{name}: {source.kept}")
    writer.write(
        0,
        "data",
        {
            "data/overlap_exact": sum(overlap.exact for overlap in overlaps),
            "data/overlap_8gram": sum(overlap.shared_ngrams for overlap in overlaps),
            "data/overlap_dev_test": splits.shared_ngrams if splits else 0,
            "data/duplicates": sum(duplicates(found) for found in prompts.values()),
            "data/too_long": sum(source.kept.dropped for source in trained.values()),
            "data/unusable": sum(source.kept.bad for source in trained.values()),
        },
    )


def _compare(writer: MetricsWriter, what: str, asked: list[str], others: Mapping[str, list[str]]) -> Overlap:
    """The prompts of a split beside all ``others``; what they share is said with the rows."""
    places = [f"{name} {row}" for name, texts in others.items() for row in range(len(texts))]
    overlap = overlap_of([text for texts in others.values() for text in texts], asked)
    if overlap.shared_ngrams:
        pairs = ", ".join(f"{row} ~ {places[match]}" for row, match in overlap.examples)
        writer.say(f"warning: {what}: {overlap} (rows {pairs})")
    return overlap
