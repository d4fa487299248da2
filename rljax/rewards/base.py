"""The reward interface: one finished text in, one number out. Host Python, no arrays."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Columns = Mapping[str, Any]
_EMPTY: Mapping[str, Any] = {}  # a shared default that nobody writes to


class Sample(NamedTuple):
    """One completion and everything a reward may want to know of it."""

    prompt: str  # as the model read it, chat template included
    completion: str  # decoded without end tokens
    messages: Sequence[Columns] | None = None  # the conversation before the template; None for a plain prompt
    token_ids: Sequence[int] = ()  # the completion's tokens, the end token included
    finished: bool = True  # an end token was sampled within the budget
    group_id: int = 0  # samples of one prompt share it
    row: Columns = _EMPTY  # the data set's row


class Span(NamedTuple):
    """Part of a score that belongs to ``completion[start:end]``."""

    start: int
    end: int
    value: float


class Score(NamedTuple):
    """What a reward says of one sample. Only ``value`` trains; the rest is measured, logged or voted on."""

    value: float
    correct: bool | None = None  # None: this reward does not judge right and wrong
    answer: str | None = None  # in normal form, so that equal answers are equal strings; None: nothing to parse
    parts: Mapping[str, float] = _EMPTY
    spans: tuple[Span, ...] = ()


BatchReward = Callable[[Sequence[Sample]], list[Score]]


def reward_name(reward: Any) -> str:
    """The name that messages give a reward."""
    inner = reward.func if isinstance(reward, functools.partial) else reward
    return getattr(inner, "__name__", type(inner).__name__)


def takes_batch(reward: Any) -> bool:
    """Whether a reward has the form ``reward.batch(samples)`` and wants all samples of a call at once."""
    return callable(getattr(reward, "batch", None))


def as_reward(reward: Any) -> BatchReward:
    """Any form of a reward as ``list[Sample] -> list[Score]``.

    The forms: ``f(prompt, completion, **columns)``, which is passed the columns of the row that it names, or all of
    them if it ends in ``**columns``; ``f(sample)``; an object with ``batch(samples)``. Each answers with a number or a
    ``Score``. An argument bound by ``functools.partial`` stands before a column of the same name. A value that is not
    finite (None becomes NaN) passes through: the runner decides what it costs. Raises ValueError for any other form
    and for an option that is still open; on calling, when the row lacks a column that has no default.
    """
    if takes_batch(reward):
        return functools.partial(_score_batch, reward)
    call = _per_sample(reward)
    return lambda samples: [to_score(call(sample)) for sample in samples]


def to_score(result: Any) -> Score:
    """A reward's answer as a ``Score`` whose value is a float; None is NaN."""
    score = result if isinstance(result, Score) else Score(result)
    if score.value is None:
        return score._replace(value=float("nan"))
    if isinstance(score.value, str):
        raise TypeError(f"a reward answers with a number or a Score, not with the text {score.value!r}")
    return score._replace(value=float(score.value))


def one_line(error: BaseException) -> str:
    """An exception in one line, as a failure's reason."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def score_or_reason(reward: BatchReward, samples: Sequence[Sample]) -> list[Score] | str:
    """What the reward says, or why it said nothing. SystemExit counts as well."""
    try:
        return reward(samples)
    except BaseException as error:
        return one_line(error)


def weighted_sum(names: Sequence[str], weights: Sequence[float], scores: Sequence[Score]) -> Score:
    """Several rewards of one sample as one score.

    Right if all that judge say so; the first answer given; parts are each value before its weight, by name, and its own
    parts as name/part; spans carry the weight.
    """
    value, parts, spans = 0.0, {}, []
    for name, weight, score in zip(names, weights, scores, strict=True):
        value += weight * score.value
        parts[name] = score.value
        parts |= {f"{name}/{part}": float(number) for part, number in score.parts.items()}
        spans += [span._replace(value=weight * span.value) for span in score.spans]
    verdicts = [score.correct for score in scores if score.correct is not None]
    answers = [score.answer for score in scores if score.answer is not None]
    return Score(value, all(verdicts) if verdicts else None, next(iter(answers), None), parts, tuple(spans))


def _score_batch(reward: Any, samples: Sequence[Sample]) -> list[Score]:
    results = [to_score(result) for result in reward.batch(samples)]
    if len(results) != len(samples):
        raise ValueError(f"{reward_name(reward)}.batch gave {len(results)} scores for {len(samples)} samples")
    return results


def _per_sample(reward: Any) -> Callable[[Sample], Any]:
    parameters = list(inspect.signature(reward).parameters.values())
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    if [p.name for p in positional[:2]] == ["prompt", "completion"]:
        return _with_columns(reward, positional[2:] + [p for p in parameters if p.kind == kinds.KEYWORD_ONLY])
    if sum(p.default is kinds.empty for p in positional) == 1:
        for option in (p.name for p in parameters if p.kind == kinds.KEYWORD_ONLY and p.default is kinds.empty):
            raise ValueError(
                f"reward {reward_name(reward)} needs the option {option!r}; give it in reward.options or to load_reward"
            )
        return reward
    raise ValueError(
        f"reward {reward_name(reward)}{inspect.signature(reward)} has a form that is not known: "
        "write f(prompt, completion, column, ...) or f(sample), or give it a method batch(samples)"
    )


def _with_columns(reward: Any, named: list[inspect.Parameter]) -> Callable[[Sample], Any]:
    bound = set(reward.keywords) if isinstance(reward, functools.partial) else set()
    wanted = {p.name for p in named} - bound
    required = [p.name for p in named if p.default is inspect.Parameter.empty and p.name not in bound]
    takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in inspect.signature(reward).parameters.values())

    def call(sample: Sample) -> Any:
        for column in required:
            if column not in sample.row:
                raise ValueError(
                    f"reward {reward_name(reward)} needs the column {column!r}, which the row does not have; "
                    f"it has {', '.join(map(repr, sample.row)) or 'none'}"
                )
        # A row may have a column "prompt" of its own: what the model read stands before it.
        skip = bound | {"prompt", "completion"}
        columns = {key: value for key, value in sample.row.items() if key in wanted or (takes_all and key not in skip)}
        return reward(sample.prompt, sample.completion, **columns)

    return call
