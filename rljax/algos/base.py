"""The algorithm interface: pure functions of arrays in a NamedTuple, with no model, mesh or tokenizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rljax.types import Experience, Outputs, Rollout, Term

# Arrays of one leading row axis; ``tokens``, ``valid`` and ``loss_mask`` are always among them.
Batch = dict[str, Array]


class Algorithm(NamedTuple):
    """``targets`` and ``loss`` are the core; the trainer does the rest.

    needs: what the trainer computes once per rollout or asks of a pass: "ref_logprobs", "proximal_logprobs",
        "values", "guide_logprobs", "teacher_topk", "dense_rewards"; "entropy", "collision", "logit_means" (of
        ``mean_logprobs`` and ``log_normalizers``); "current_logprobs".
    init: the algorithm's own state, part of the checkpoint; () where it has none.
    targets: once on the whole global rollout; may return fewer rows. Offline algorithms have none: their rows are
        batches as they are.
    prepare: once per optimizer step on the whole minibatch, before the cut into micro-batches: any statistic that
        crosses rows, running state, draws from ``key``, the denominators that the terms name. It may drop rows. With
        "current_logprobs" in needs the batch holds the policy's log-probs before the step.
    loss: a micro-batch's terms; those with coefficient 0 are metrics.
    trains: the trained trees: "policy", "critic", "reward_model". The last two have a scalar head.
    rows: what offline rows are: text, pairs, ranked, labelled or steps.
    unit: consecutive rows that stay together through shuffles and cuts: a pair, a ranking.
    rows_per_prompt: rows that ``targets`` makes of a prompt; 0 is the whole group.
    rewarded: whether ``targets`` reads rewards.
    rival_mixture: m, where the second half of a prompt's completions come from ``π^{1-m} ref^m`` and not from the
        policy: 1 is the reference itself.
    greedy_samples: so many of a prompt's completions, its first, are decoded greedily.
    critic_outputs: numbers that a critic's head gives at a position.
    critic_ema: decay, an optimizer step, of a running mean of the critic's weights, which reads every rollout beside it
        (``ema_values``) and moves after its updates; 0 keeps none.
    """

    needs: frozenset[str]
    init: Callable[[], Any]
    targets: Callable[[Any, Experience], tuple[Any, Batch]] | None
    prepare: Callable[[Any, Batch, PRNGKeyArray], tuple[Any, Batch, dict[str, Float[Array, ""]]]]
    loss: Callable[[Outputs, Batch], dict[str, Term]]
    trains: tuple[str, ...] = ("policy",)
    rows: str = "text"
    unit: int = 1
    rows_per_prompt: int = 0
    rewarded: bool = True
    rival_mixture: float | None = None
    greedy_samples: int = 0
    critic_outputs: int = 1
    critic_ema: float = 0.0


def rollout_batch(rollout: Rollout) -> Batch:
    """What a batch has of the rollout that it is made of."""
    return {
        "tokens": rollout.tokens,
        "valid": rollout.valid,
        "loss_mask": rollout.loss_mask,
        "support": rollout.support,
        "behavior_logprobs": rollout.behavior_logprobs,
    }


def no_state() -> tuple[()]:
    return ()


def total(terms: dict[str, Term], denominators: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
    """The scalar that is differentiated: terms with a coefficient, each over its whole step's denominator."""
    return sum((t.coef * t.numerator / denominators[t.denominator] for t in terms.values() if t.coef), jnp.float32(0))
