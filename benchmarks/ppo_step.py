"""A PPO step: 64 prompts with one completion each; policy, reference, critic and reward model of one size.

python -m benchmarks.ppo_step --size s --dtype bfloat16
"""

import dataclasses

from benchmarks.common import Report, arguments
from benchmarks.online import measure_steps
from benchmarks.workload import (
    COMPLETION,
    GROUP,
    KL,
    MICRO,
    PROMPT,
    PROMPTS,
    endless_session,
    grpo_config,
    online_stage,
)
from rljax.config.build import algo_defaults
from rljax.models.params import init_params

PPO = {"kl_coef": KL, "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean", "value_coef": 0.1}
PPO |= {"value_clip": 0.2, "gamma": 1.0, "lam": 0.95, "whiten_advantages": "rollout"}


def main() -> None:
    a = arguments(__doc__, micro=MICRO)
    config = grpo_config(a.size, a.dtype, **{"batch.micro_batch_rows": a.micro})
    with config.unlocked():
        config.algo = algo_defaults("ppo")
    config.algo.update(PPO)
    config.rollout.prompts_per_step, config.rollout.group_size = PROMPTS * GROUP, 1
    session = endless_session(config)
    scored = dataclasses.replace(session.config, reward_model_from="start")
    session = dataclasses.replace(session, config=scored)
    stage = online_stage(session)
    stage.freeze("reward_model", init_params(stage.forwards["reward_model"].model, session.train, seed=9))
    report = Report("ppo_step", a.size, a.dtype, batch=PROMPTS * GROUP, prompt=PROMPT, completion=COMPLETION, kl=KL)
    # Rollout, reference, critic and reward model a pass each, two updates of three; scalar heads cost nothing.
    measure_steps(stage, report, a.repeats, passes=8)


if __name__ == "__main__":
    main()
