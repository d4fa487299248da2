"""Types that cross module boundaries, the axis legend and the alignment rule.

Axes, one letter each, everywhere in the library:

    B sequences   T tokens      P prompt       C completion   V vocabulary   L layers
    D width       N query heads K kv heads     H head width   F feed-forward
    G group       R requests    S slots

Alignment. Entry ``t`` of every per-token array describes ``tokens[:, t]``: ``logprobs[:, t]`` is the log-probability of
``tokens[:, t]`` given what stands before it, ``values[:, t]`` is read at the position that predicts it. Column 0 is
predicted by nothing and is masked. Prompts are left-padded, completions stand to their right, so one column separates
the two in every row.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

PyTree = Any

FINISH_LENGTH = 0  # the budget ran out
FINISH_END = 1  # an end token was sampled; it is part of the completion


class Prompts(NamedTuple):
    """Requests for a rollout. A row's identity, not its place, decides its random numbers."""

    tokens: Int[Array, "b p"]  # left-padded
    valid: Bool[Array, "b p"]
    prompt_id: Int[Array, " b"]  # which prompt of the data set
    sample_id: Int[Array, " b"]  # which of the group's samples
    max_new_tokens: Int[Array, " b"] | None = None  # each row's own budget, 1 or more; None: the sampler's for all


class Rollout(NamedTuple):
    """What a sampler returns. ``behavior_logprobs`` is stored here once and never recomputed."""

    tokens: Int[Array, "b t"]
    valid: Bool[Array, "b t"]  # a real token, prompt or completion
    loss_mask: Bool[Array, "b t"]  # sampled by the policy, the end token included
    behavior_logprobs: Float[Array, "b t"]
    support: Float[Array, "b t"]  # the lowest scaled logit that truncated sampling kept; -inf: the whole vocabulary
    finish_reason: Int[Array, " b"]
    prompt_id: Int[Array, " b"]
    sample_id: Int[Array, " b"]
    group_id: Int[Array, " b"]  # rows of one prompt in this rollout share it
    step_version: Int[Array, " b"]  # the optimizer step whose parameters sampled the row
    decode_steps: Int[Array, " b"] | None = None  # that the row's data shard took
    slot_steps: Float[Array, " b"] | None = None  # slots times steps, idle ones included; summed over rows: of all


class Experience(NamedTuple):
    """A rollout after scoring: what an algorithm's ``targets`` reads. Unneeded entries are None."""

    rollout: Rollout
    rewards: Float[Array, " b"]
    correct: Bool[Array, " b"]
    ref_logprobs: Float[Array, "b t"] | None = None
    proximal_logprobs: Float[Array, "b t"] | None = None
    values: Float[Array, "b t"] | Float[Array, "b t n"] | None = None  # the critic's, before the first update
    final_values: Float[Array, " b"] | Float[Array, "b n"] | None = None  # read at the last token of the row
    ema_values: Float[Array, "b t"] | Float[Array, "b t n"] | None = None  # of the critic's running mean
    dense_rewards: Float[Array, "b t"] | None = None  # what rewards gave to single tokens (``Score.spans``)
    guide_logprobs: Float[Array, "b t"] | None = None  # of another frozen policy, such as RTO's
    teacher_tokens: Int[Array, "b t k"] | None = None  # a teacher's likeliest tokens at each position
    teacher_logprobs: Float[Array, "b t k"] | None = None  # and their log-probs


class Outputs(NamedTuple):
    """What one pass over a micro-batch gives an algorithm's ``loss``; entries it did not ask for are None."""

    logprobs: Float[Array, "b t"] | None = None  # on the support that was sampled from; None: no policy is trained
    entropy: Float[Array, "b t"] | None = None
    values: Float[Array, "b t"] | Float[Array, "b t n"] | None = None  # the critic's, read where a token is predicted
    full_logprobs: Float[Array, "b t"] | None = None  # of the whole vocabulary; None: ``logprobs`` are
    scores: Float[Array, "b t"] | None = None  # a reward model's, read at the token itself
    topk_logprobs: Float[Array, "b t k"] | None = None  # of the batch's ``teacher_tokens``
    collision: Float[Array, "b t"] | None = None  # log Σ_v π(v)²
    mean_logprobs: Float[Array, "b t"] | None = None  # mean log-prob of the vocabulary
    log_normalizers: Float[Array, "b t"] | None = None  # log Σ_v exp(logit_v)


class Term(NamedTuple):
    """One summand of a loss. The trainer divides, after summing over micro-batches and devices."""

    numerator: Float[Array, ""]  # a sum over this micro-batch
    denominator: str  # the name of a count that ``prepare`` made for the whole optimizer step; "" for none
    coef: float = 1.0  # 0 makes the term a metric
