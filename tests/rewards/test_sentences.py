"""ARES: sentences, a teacher's scores for them, and the tokens that the scores fall on."""

import json
from pathlib import Path

import numpy as np
import pytest

from rljax.data.tokenizer import character_tokenizer
from rljax.rewards.base import Sample, Span
from rljax.rewards.sentences import SentenceFeedback, sentences
from rljax.rollouts import rewards_of_spans, verified_bonus

pytestmark = pytest.mark.fast


def test_sentences_are_places_in_the_text() -> None:
    text = " One. Two!  Three\nfour? "
    assert [text[start:end] for start, end in sentences(text)] == [" One.", "Two!", "Three", "four?"]
    assert sentences("3.5 is no end") == [(0, 13)] and sentences(" \n ") == []


def test_a_teachers_scores_fall_on_the_sentences(tmp_path: Path) -> None:
    file = tmp_path / "feedback.jsonl"
    line = {"prompt": "p", "completion": "a. b.", "scores": [1.0, 0.25]}
    file.write_text(json.dumps(line) + "\n" + json.dumps({**line, "completion": "a.", "scores": [1, 1]}))
    feedback = SentenceFeedback(str(file))
    score = feedback(Sample("p", "a. b.", row={"prompt": "p"}))
    assert score.value == 0 and score.spans == (Span(0, 2, 0.5), Span(3, 5, -0.25))
    assert score.parts == {"sentences": 0.25}
    with pytest.raises(ValueError, match="2 scores for the 1 sentences"):
        feedback(Sample("p", "a."))
    with pytest.raises(ValueError, match="has no scores for this completion"):
        feedback(Sample("p", "b."))


def test_spans_fall_on_the_token_of_their_last_character() -> None:
    """One token a character: a(0) b(1) c(2) d(3) and the end token, which has no text."""
    tokenizer = character_tokenizer("abcd")
    ids = [*tokenizer.encode_continuation("abcd"), tokenizer.end_ids[0]]
    spans = [Span(0, 2, 0.5), Span(2, 4, -0.25), Span(4, 9, 1.0), Span(1, 1, 2.0)]
    found = rewards_of_spans(tokenizer, ids, spans)
    np.testing.assert_allclose(found, [0, 0.5, 0, -0.25, 3.0])
    np.testing.assert_allclose(found.sum(), sum(span.value for span in spans))
    assert not rewards_of_spans(tokenizer, ids, ()).any()


def test_a_reward_model_beside_a_verifier() -> None:
    """V + 1, V - .5, V: the rule of IF-RLVR; a score of exactly the threshold is not above it."""
    verified, scores = np.array([10.0, 10.0, 0.0, 10.0, -1.0]), np.array([8.0, 6.0, 9.0, 7.0, 9.0])
    np.testing.assert_allclose(verified + verified_bonus(verified, scores, 7.0), [11, 9.5, 0, 9.5, -1])
