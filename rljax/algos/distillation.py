"""On-policy distillation and GKD (2306.13649): a divergence from a teacher at every token of the policy's completions.

The teacher is known by its likeliest tokens (``teacher_top_k``) and the rest as one class; k as large as the vocabulary
is the whole divergence. No reward is read.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state, rollout_batch
from rljax.losses.distillation import append_rest, generalized_jsd
from rljax.losses.masked import count_tokens, masked_sum, zero_masked
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    beta: float  # 0: KL(teacher‖student); 1: KL(student‖teacher); between: generalised Jensen-Shannon


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError for a beta outside 0 to 1."""
    if not 0 <= config.beta <= 1:
        raise ValueError(f"beta is {config.beta}; it goes from 0, the teacher's side, to 1, the student's")
    divergence = partial(generalized_jsd, beta=config.beta)

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        assert experience.teacher_tokens is not None and experience.teacher_logprobs is not None  # it is in needs
        batch = {
            **rollout_batch(experience.rollout),
            "teacher_tokens": experience.teacher_tokens,
            "teacher_logprobs": experience.teacher_logprobs,
        }
        return state, jax.lax.stop_gradient(batch)

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        return state, batch, {"tokens": count_tokens(batch["loss_mask"])}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.topk_logprobs is not None  # it is in needs
        mask = batch["loss_mask"]
        student, teacher = zero_masked(mask[..., None], outputs.topk_logprobs, batch["teacher_logprobs"])
        student, teacher = (append_rest(side, floored=True) for side in (student, teacher))
        return {"distillation": Term(masked_sum(divergence(student, teacher), mask), "tokens")}

    return Algorithm(
        needs=frozenset({"teacher_topk"}),
        init=no_state,
        targets=targets,
        prepare=prepare,
        loss=loss,
        rewarded=False,
    )
