"""Any recipe as a run of two steps on a laptop: ``shrink(config)`` changes only sizes, data and model."""

import copy
from typing import Any

from ml_collections import ConfigDict

from rljax.config import Config, make_config
from rljax.config.build import as_dict
from rljax.data.arithmetic import ALPHABET
from rljax.rewards.base import Score

LABELS = "[]"  # two more letters, for what stands before a prompt

# One model, one shape of rows, one reward: recipes share their compiled programs.
EVERYWHERE: dict[str, Any] = {
    "model.path": "",
    "model.remat": "none",
    "tokenizer.path": f"characters:{ALPHABET}{LABELS}",
    "tokenizer.template": "",
    "tokenizer.system_prompt": "",
    "tokenizer.end_tokens": (),
    "mesh": "1,-1,1",
    "decode_mesh": "",
    "compute_dtype": "float32",
    "reward.names": ("rljax.shrink:digit_share",),
    "reward.weights": (),
    "reward.options": {},
    "checkpoint.every_steps": 0,
    "data.dev": "",
    "data.test": "",
    "data.dev_rows": 0,
    "data.test_rows": 0,
}
OF_A_STAGE: dict[str, Any] = {
    "steps": 2,
    "data.train_rows": 48,
    "data.columns": {},
    "data.options": {"difficulty": 1},
    "data.splits_by_prompt": False,
    "data.prompt_lengths": (8,),
    "data.row_length": 32,
    "rollout.max_new_tokens": 8,
}
ROWS = 8  # of a rollout or a draw, in sequences
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def digit_share(prompt: str, completion: str) -> Score:
    """A reward that random weights get a part of at once: the share of digits, right from a half on."""
    share = sum(c.isdigit() for c in completion) / max(len(completion), 1)
    return Score(share, correct=share >= 0.5)


def shrink(config: ConfigDict) -> tuple[ConfigDict, dict[str, tuple[Any, Any]]]:
    """A tiny run with the stages, algorithms and coefficients of ``config``; and what differs, by key: (was, is).

    A guide or teacher that lies in a folder becomes the run's own start, and a reward model one that a first stage
    trains. Raises ConfigError where ``config`` does not build.
    """
    original, small = make_config(config), copy.deepcopy(config)
    with small.unlocked():
        _train_reward_model(small, original)
        before = make_config(small)
        for key, value in EVERYWHERE.items():
            _set(small, key, value)
        small.model.architecture = ConfigDict(ARCHITECTURE)
        for name in before.recipe:
            place = small if name == "main" else small.stages[name]
            _shrink_stage(place, before, name)
    small.lock()
    return small, changes(original, make_config(small))


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The resolved keys of two configs that differ, over the stages that they run."""
    was, now = _flat(before), _flat(after)
    return {key: (was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)}


def _train_reward_model(small: ConfigDict, config: Config) -> None:
    """A stage for the reward models that the recipe takes from folders."""
    for name in config.recipe:
        if config.stage(name).reward_model_from not in ("", *config.recipe):
            _set(small if name == "main" else small.stages[name], "reward_model_from", "reward_model")
            small.recipe = ("reward_model", *config.recipe)
            small.stages.reward_model = ConfigDict(
                {
                    "algo": {"name": "reward_model", "loss": "bradley_terry"},
                    "batch": {"rows": ROWS, "epochs": 1, "minibatches": 1, "micro_batch_rows": 0},
                    "critic": {"init_from": "policy"},
                }
            )


def _shrink_stage(place: ConfigDict, config: Config, name: str) -> None:
    stage = config.stage(name)
    algorithm = stage.algorithm()
    settings = dict(OF_A_STAGE)
    if stage.sampled_by:
        settings |= {"data.options": {}, "data.train_rows": 0}
    else:
        pairs = algorithm.rows in ("pairs", "ranked") or stage.select.gap
        settings["data.train"] = "arithmetic_comparisons" if pairs else "arithmetic"
    if stage.is_online:
        size = min(stage.rollout.group_size, 2)
        settings |= {"rollout.group_size": size, "rollout.prompts_per_step": ROWS // size}
    else:
        settings["batch.rows"] = ROWS // algorithm.unit
    settings["batch.minibatches"] = min(stage.batch.minibatches, 2)
    is_cut = stage.batch.micro_batch_rows and settings["batch.minibatches"] == 1
    settings["batch.micro_batch_rows"] = ROWS // 2 if is_cut else 0
    for tree, optim in (("optim", stage.optim), ("critic.optim", stage.critic.optim)):
        settings[f"{tree}.warmup_steps"] = min(optim.warmup_steps, 1)
        settings[f"{tree}.freeze_steps"] = min(optim.freeze_steps, 1)
    if as_dict(stage.algo).get("overlong_buffer"):
        settings["algo.overlong_buffer"] = OF_A_STAGE["rollout.max_new_tokens"] // 2
    if stage.select.labels:
        settings["select.labels"] = tuple(LABELS)
    if stage.data.prompt_prefix:
        settings["data.prompt_prefix"] = LABELS[1]
    if stage.text_mix.coef:
        mix = {"train": "arithmetic", "train_rows": 48, "columns": {}, "options": {"difficulty": 1}}
        settings |= {f"text_mix.{key}": value for key, value in {**mix, "rows": 4, "row_length": 32}.items()}
    for key in ("guide_from", "teacher_from"):
        if vars(stage)[key] not in ("", *config.recipe):
            settings[key] = "base"
    if stage.critic.init_from not in ("policy", *config.recipe):
        settings["critic.init_from"] = "policy"
    if stage.critic.center_on not in ("", "chosen"):
        settings["critic.center_on"] = "chosen"
    for key, value in settings.items():
        _set(place, key, value)


def _set(place: ConfigDict, dotted: str, value: Any) -> None:
    """A key of a config, in a stage's also where the stage took it from the top level."""
    *groups, key = dotted.split(".")
    for group in groups:
        if group not in place:
            place[group] = ConfigDict()
        place = place[group]
    place[key] = ConfigDict(value) if isinstance(value, dict) else value


def _flat(config: Config) -> dict[str, Any]:
    """Leaves by dotted key; of the top level as a stage only if the recipe runs it."""
    values = as_dict(config)
    stages = {name: as_dict(config.stage(name)) for name in config.recipe if name != "main"}
    shared = {key: value for key, value in values.items() if key not in stages and key != "stages"}
    if "main" not in config.recipe and stages:
        kept = set(next(iter(stages.values()))) - {"reward"}
        shared = {key: value for key, value in shared.items() if key not in kept}

    def leaves(prefix: str, group: Any) -> dict[str, Any]:
        if not isinstance(group, dict):
            return {prefix: group}
        return {key: leaf for name, value in group.items() for key, leaf in leaves(f"{prefix}.{name}", value).items()}

    flat = {"config": shared, **{f"config.stages.{name}": value for name, value in stages.items()}}
    return {key: leaf for prefix, group in flat.items() for key, leaf in leaves(prefix, group).items()}
