"""Combinations of settings that cannot work, rejected before anything is loaded."""

from rljax.algos import Algorithm
from rljax.config.errors import ConfigError
from rljax.config.fields import Config, RewardConfig, StageConfig
from rljax.optim import make_schedule

FROZEN = {"guide_from": "guide_logprobs", "teacher_from": "teacher_topk"}


def check(config: Config) -> None:
    """Raises ConfigError, in one sentence that names the key."""
    _check_recipe(config)
    if bool(config.model.path) == bool(config.model.architecture):
        raise ConfigError("config.model: set exactly one of path (a checkpoint) and architecture (random weights)")
    if not (config.tokenizer.path or config.model.path):
        raise ConfigError("config.tokenizer.path is not set; a model with random weights needs a tokenizer")
    written = [key for key in ("template", "system_prompt", "end_tokens") if vars(config.tokenizer)[key]]
    if written and config.tokenizer.path.startswith("characters:"):
        raise ConfigError(f"config.tokenizer.{written[0]} does nothing: a tokenizer of characters has its own")
    total = sum(config.stage(name).steps for name in config.recipe)
    if any(step > total for step in config.profile_steps):
        raise ConfigError(f"config.profile_steps {config.profile_steps} go past the {total} steps of the run")
    if config.profile_steps and (len(config.profile_steps) != 2 or config.profile_steps[0] > config.profile_steps[1]):
        raise ConfigError("config.profile_steps takes the first and the last step of the trace, such as 10,12")
    if config.eval.samples > 1 and not config.eval.temperature:
        raise ConfigError(
            f"config.eval.samples is {config.eval.samples} and eval.temperature 0, which makes them all alike; "
            "set one of them"
        )
    if config.eval.greedy and not config.eval.temperature:
        raise ConfigError(
            "config.eval.greedy does nothing at eval.temperature 0, where samples are greedy; set one of them"
        )
    _check_rewards(config.reward)
    for number, name in enumerate(config.recipe):
        _check_stage(config.stage(name), config.key_of(name))
        _check_select(config, number)
        _check_critic(config, number)
        _check_shared(config, name)
    _check_limits(config)
    stages = [config.stage(name) for name in config.recipe]
    for key, need in FROZEN.items():
        if any(vars(stage)[key] for stage in stages) and not any(need in stage.algorithm().needs for stage in stages):
            raise ConfigError(f"config.{key} does nothing: no algorithm of the recipe reads it")
    if any(stage.reward_model_from for stage in stages) and not any(stage.is_online for stage in stages):
        raise ConfigError("config.reward_model_from scores completions, and no stage of the recipe samples any")
    if not any("ref_logprobs" in stage.algorithm().needs for stage in stages):
        for key in ("reference_reset_steps", "reference_ema"):
            if any(vars(stage)[key] for stage in stages):
                raise ConfigError(f"config.{key} does nothing: no algorithm of the recipe reads a reference")


def _check_recipe(config: Config) -> None:
    known = {"main", *config.stages}
    if not config.recipe or len(set(config.recipe)) < len(config.recipe):
        raise ConfigError(f"config.recipe is {config.recipe}; it names one stage or more, each once")
    for number, name in enumerate(config.recipe):
        if name not in known:
            raise ConfigError(
                f"config.recipe names the stage {name!r}, which is not under config.stages; "
                f"there are {', '.join(sorted(known))}"
            )
        stage, earlier = config.stage(name), config.recipe[:number]
        for key, value, others in (
            ("init_from", stage.init_from, ("base", "previous")),
            ("reference_from", stage.reference_from, ("base", "start")),
        ):
            if value not in (*others, *earlier):
                raise ConfigError(
                    f"{config.key_of(name)}.{key} is {value!r}; it is one of {', '.join((*others, *earlier))}: "
                    "a stage can only take over from one that the recipe runs before it"
                )


# What each rule of select makes, as algorithms name it.
MAKES = {
    "correct": "text",
    "best": "text",
    "returns": "text",
    "pairs": "pairs",
    "ranking": "ranked",
    "verdicts": "labelled",
}


def _check_select(config: Config, number: int) -> None:
    """A stage on what earlier stages sampled."""
    name = config.recipe[number]
    stage, where, earlier = config.stage(name), config.key_of(name), config.recipe[:number]
    if not stage.sampled_by:
        if stage.select.rule:
            raise ConfigError(f"{where}.select.rule is not read: {where}.data.train is not rollouts:<stage>")
        return
    for other in stage.sampled_by:
        if other not in earlier or not config.stage(other).is_online:
            raise ConfigError(
                f"{where}.data.train: {other!r} is no stage before this one that samples; there are "
                f"{', '.join(n for n in earlier if config.stage(n).is_online) or 'none'}"
            )
    made, wanted = MAKES.get(stage.select.rule, "nothing"), stage.algorithm().rows
    if made != wanted and not (stage.is_online and stage.select.rule):
        raise ConfigError(f"{where}.select.rule {stage.select.rule!r} makes {made}, and {where}.algo takes {wanted}")
    if stage.data.splits_by_prompt or (name == "main" and stage.data.dev_rows and not stage.data.dev):
        raise ConfigError(f"{where}.data: nothing is held out of what a stage samples; name data.dev and data.test")


def _check_critic(config: Config, number: int) -> None:
    """A scalar head comes from the policy, from an earlier stage that has one, or from a folder."""
    where, stage = config.key_of(config.recipe[number]), config.stage(config.recipe[number])
    source, earlier = stage.critic.init_from, config.recipe[:number]
    if not set(stage.algorithm().trains) - {"policy"} or source not in config.recipe:
        return
    if source not in earlier or not set(config.stage(source).algorithm().trains) - {"policy"}:
        raise ConfigError(
            f"{where}.critic.init_from is {source!r}; it is 'policy', a model folder, or a stage that trains a reward "
            "model or critic before this one"
        )


def _check_rewards(reward: RewardConfig) -> None:
    """The rewards of all stages, as far as their names say."""
    if reward.weights and len(reward.weights) != len(reward.names):
        raise ConfigError(f"config.reward: {len(reward.names)} names and {len(reward.weights)} weights")
    for key, options in reward.options.items():
        if not isinstance(options, dict):
            raise ConfigError(f"config.reward.options.{key} is {options!r}; it is a group of options")


def _check_limits(config: Config) -> None:
    """That each limit is on a number that the run will have."""
    limits, online = config.limits, [stage for stage in map(config.stage, config.recipe) if stage.is_online]
    for key in ("kl_per_completion", "min_completion_length", "max_completion_length", "perplexity"):
        if vars(limits)[key] and not online:
            raise ConfigError(f"config.limits.{key} is on completions, and no stage of config.recipe samples any")
    if limits.kl_per_completion and not any("ref_logprobs" in stage.algorithm().needs for stage in online):
        raise ConfigError(
            "config.limits.kl_per_completion is on the KL to a reference, and no stage that samples has one; "
            "set config.algo.kl_coef above 0, or leave the limit 0"
        )
    if limits.max_completion_length and limits.min_completion_length > limits.max_completion_length:
        raise ConfigError(
            f"config.limits.min_completion_length {limits.min_completion_length:g} is above "
            f"config.limits.max_completion_length {limits.max_completion_length:g}, so every step is past one"
        )


def _check_shared(config: Config, name: str) -> None:
    """What stands at the top level for all stages and for evaluation: a stage's own value would not be read."""
    stage = config.stage(name)
    for group, keys in (
        (
            "reward",
            ("names", "weights", "options", "timeout_s", "workers", "processes", "failed_value", "discard_failed"),
        ),
        ("data", ("test", "test_rows")),
    ):
        for key in keys:
            if vars(vars(stage)[group])[key] != vars(vars(config)[group])[key]:
                raise ConfigError(
                    f"{config.key_of(name)}.{group}.{key} is not read; set config.{group}.{key}, for all stages"
                )


def _check_stage(stage: StageConfig, where: str) -> None:
    b = stage.batch
    try:
        algorithm = stage.algorithm()
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{where}.algo: {error}") from error
    if algorithm.targets is not None:
        _check_online(stage, where)
    _check_models(stage, algorithm, where)
    if stage.rows_per_step % b.minibatches:
        raise ConfigError(
            f"{where}.batch.minibatches {b.minibatches} does not divide the {stage.rows_per_step} rows of a step"
        )
    rows = stage.rows_per_step // b.minibatches
    if rows % algorithm.unit or b.micro_batch_rows % algorithm.unit:
        raise ConfigError(
            f"{where}.batch: minibatches of {rows} and micro-batches of {b.micro_batch_rows or rows} rows do not hold "
            f"whole units of {algorithm.unit} that {where}.algo compares"
        )
    if b.micro_batch_rows and rows % b.micro_batch_rows:
        raise ConfigError(
            f"{where}.batch.micro_batch_rows {b.micro_batch_rows} does not divide a minibatch of {rows} rows"
        )
    if not stage.data.prompt_lengths:
        raise ConfigError(f"{where}.data.prompt_lengths is empty; give one length or more, in tokens")
    if b.row_length and b.row_length < stage.longest_row:
        raise ConfigError(
            f"{where}.batch.row_length {b.row_length} is shorter than the {stage.longest_row} tokens that a sequence "
            "can have; raise it, or leave it 0"
        )
    if b.row_length and not b.pack:
        raise ConfigError(f"{where}.batch.row_length is not read: {where}.batch.pack is off")
    try:
        make_schedule(stage.optim, max(stage.optimizer_steps, 1))
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from error


def _check_models(stage: StageConfig, algorithm: Algorithm, where: str) -> None:
    """Frozen models: named where they are read."""
    for key, need in FROZEN.items():
        if need in algorithm.needs and not vars(stage)[key]:
            raise ConfigError(
                f"{where}.{key} is not set, and the algorithm reads it; it names an earlier stage or a model folder"
            )
    moves = stage.reference_reset_steps or stage.reference_ema
    if stage.offload_reference and (moves or algorithm.rival_mixture):
        raise ConfigError(
            f"{where}.offload_reference is for a reference that stays and only scores; this stage "
            f"{'moves it' if moves else 'samples with it'}"
        )
    if algorithm.critic_outputs > 1 and stage.critic.init_from != "policy":
        raise ConfigError(
            f"{where}.critic.init_from: a reward model's head gives 1 number and this critic's "
            f"{algorithm.critic_outputs}; start it from 'policy'"
        )
    if stage.text_mix.coef and not stage.text_mix.train:
        raise ConfigError(f"{where}.text_mix.train is not set; name the text that text_mix.coef mixes in")
    if stage.data.splits_by_prompt and (stage.data.dev or stage.data.test):
        raise ConfigError(f"{where}.data.splits_by_prompt takes dev and test from data.train; leave both empty")
    if stage.critic.center_on and "reward_model" not in algorithm.trains:
        raise ConfigError(f"{where}.critic.center_on sets a reward model's bias, and this stage trains none")
    if stage.text_mix.coef and "policy" not in algorithm.trains:
        raise ConfigError(f"{where}.text_mix.coef: this stage trains no policy")


def _check_online(stage: StageConfig, where: str) -> None:
    """A stage that trains on what it samples."""
    r = stage.rollout
    if not r.temperature:
        raise ConfigError(f"{where}.rollout.temperature is 0; greedy completions of one prompt are all alike")
    if stage.algorithm().rewarded and not (stage.reward.names or stage.reward_model_from):
        raise ConfigError(f"{where}.reward.names is empty; name a reward, such as gsm8k or package.module:function")
    if stage.batch.rows:
        raise ConfigError(f"{where}.batch.rows is for supervised stages; rollouts have prompts_per_step x group_size")
    algo = vars(stage.algo)
    truncated = r.top_k > 0 or r.top_p < 1 or r.min_p > 0
    if truncated and algo.get("kl_in") == "reward" and algo["kl_coef"] and not algo["kl_of_truncated"]:
        raise ConfigError(
            f"{where}.algo.kl_in is 'reward' and rollout truncates the vocabulary, so that the KL would compare a part "
            f"with a whole; sample from all of it, or set {where}.algo.kl_of_truncated"
        )
    if truncated and r.unimix:
        raise ConfigError(
            f"{where}.rollout.unimix gives every token a share, and top_k, top_p or min_p cut some off; use one of them"
        )
    if r.prefill_chunk and not r.slots:
        raise ConfigError(f"{where}.rollout.prefill_chunk does nothing while rollout.slots is 0: a fixed batch")
    for length in stage.data.prompt_lengths:
        if r.prefill_chunk and length > r.prefill_chunk and length % r.prefill_chunk:
            raise ConfigError(
                f"{where}.rollout.prefill_chunk {r.prefill_chunk} does not divide the {length} of "
                f"{where}.data.prompt_lengths"
            )
    rounded = [key for key in ("weights_dtype", "cache_dtype") if vars(r)[key] == "int8"]
    if rounded and "correction" in algo and "proximal_logprobs" not in stage.algorithm().needs:
        raise ConfigError(
            f"{where}.rollout.{rounded[0]} is int8, so another policy samples than the one that is trained; set "
            f"{where}.algo.correction, such as to 'truncated'"
        )
    if r.keep_groups == "all" and r.max_rounds > 1:
        raise ConfigError(f"{where}.rollout.max_rounds does nothing while keep_groups is 'all'; choose another")
    if r.group_size == 1 and r.keep_groups != "all":
        raise ConfigError(f"{where}.rollout.group_size is 1, and keep_groups compares a prompt's; use 2 or more")
    if len(r.keep_between) != 2 or not 0 <= r.keep_between[0] < r.keep_between[1] <= 1:
        raise ConfigError(f"{where}.rollout.keep_between is {r.keep_between}; give two shares, such as (0.1, 0.95)")
    if r.keep_between != (0.0, 1.0) and r.keep_groups != "mixed":
        raise ConfigError(f"{where}.rollout.keep_between does nothing unless keep_groups is 'mixed'; set it to that")
