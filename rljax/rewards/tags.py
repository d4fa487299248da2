"""Rewards for reasoning and answer tags, and the text without them."""

import re

from rljax.rewards.base import Score

_THINK_THEN_TEXT = re.compile(r"\s*<think>.*?</think>(.*)", re.DOTALL)
_ANSWER = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def think_format(prompt: str, completion: str) -> Score:
    """1 if the text is ``<think>...</think>`` and then an answer that is not empty, each tag exactly once.

    A ``<think>`` at the end of the prompt (reasoning templates) counts as the opening tag. The part ``tags`` is the
    share of tags that occur exactly once.
    """
    text = _with_open_tag(prompt, completion)
    match = _THINK_THEN_TEXT.fullmatch(text)
    once = _once(text, ("<think>", "</think>"))
    return Score(float(bool(match and match[1].strip()) and once == 1.0), parts={"tags": once})


def think_answer_format(prompt: str, completion: str) -> Score:
    """As ``think_format``, and what follows the thoughts is ``<answer>...</answer>`` alone, not empty."""
    text = _with_open_tag(prompt, completion)
    thoughts = _THINK_THEN_TEXT.fullmatch(text)
    answer = _ANSWER.fullmatch(thoughts[1]) if thoughts else None
    once = _once(text, ("<think>", "</think>", "<answer>", "</answer>"))
    return Score(float(bool(answer and answer[1].strip()) and once == 1.0), parts={"tags": once})


def strip_reasoning(prompt: str, completion: str) -> str:
    """What a verifier reads: the text behind the last ``</think>``, answer tags taken off.

    Thoughts that were opened, by the prompt or in the completion, and never closed leave no answer: the empty text.
    """
    text = _with_open_tag(prompt, completion)
    _, closed, after = text.rpartition("</think>")
    answer = after.partition("<think>")[0] if closed else text.partition("<think>")[0]
    return re.sub(r"</?answer>", "", answer).strip()


def _with_open_tag(prompt: str, completion: str) -> str:
    return "<think>" + completion if prompt.rstrip().endswith("<think>") else completion


def _once(text: str, tags: tuple[str, ...]) -> float:
    return sum(text.count(tag) == 1 for tag in tags) / len(tags)
