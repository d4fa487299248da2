"""A run's settings as frozen dataclasses. What a field means stands beside it; docs/config.md is made from that.

The top level of a config describes the main job. A stage that differs from it (a warm start, say) lists under
``stages`` only what differs.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from rljax.algos import ALGOS, Algorithm
from rljax.config.errors import nearest
from rljax.optim import OptimConfig


class Range(NamedTuple):
    """The numbers that a field takes."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Amount = Annotated[float, Range(0)]
Duration = Annotated[float, Range(0, open_low=True)]
Decay = Annotated[float, Range(0, 1, open_high=True)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Exactly one of ``path`` and ``architecture`` is set."""

    path: str = ""  # a Hugging Face folder, local or gs://, or a Hub name
    architecture: dict[str, Any] = field(default_factory=dict)  # a config.json as a dict: random weights
    init_seed: Count = 0  # of random weights
    remat: Literal["none", "dots", "block"] = (
        "none"  # what the backward pass keeps of a layer: all, products, its input
    )
    attention: Literal["auto", "xla", "cudnn", "flash"] = "auto"  # kernel of training and scoring; auto: by device
    logits_chunk: Positive = 1024  # tokens a device whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = ""  # default: the model's folder; "characters:<alphabet>" builds one on the spot
    template: str = ""  # "chat", a named plain template, a text with {prompt}, a .jinja file; default: text as it is
    system_prompt: str = ""  # stands before every conversation that has none
    end_tokens: tuple[str, ...] = ()  # default: the checkpoint's


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows for training, for choosing a checkpoint (dev) and for the final word (test).

    A source is a file, a folder with files named after their split, a Hub name, a generated task, or, for training,
    what earlier stages sampled: "rollouts:stage,stage", from which ``select`` makes rows.
    """

    train: str = ""  # source of the training rows
    dev: str = ""  # source of the dev rows; default: the last dev_rows of the training rows are held out
    test: str = ""  # source of the test rows; default: none
    train_rows: Count = 0  # how many to use; 0: all there are
    dev_rows: Count = 0  # how many to use, or to hold out of the training rows; 0: all there are, or none
    test_rows: Count = 0  # how many to use; 0: all there are
    columns: dict[str, str] = field(
        default_factory=dict
    )  # ours to its: max_new_tokens, prompt, answer, solution, messages, chosen, rejected, completions, scores, label
    options: dict[str, Any] = field(default_factory=dict)  # of a generated task or a Hub data set
    prompt_prefix: str = ""  # before every prompt that is completed, such as the label of a wanted return
    prompt_lengths: tuple[Positive, ...] = (256,)  # tokens; prompts are left-padded to the smallest that fits
    row_length: Positive = 512  # tokens of a supervised row: prompt and completion together
    seed: Count = 0  # of the order, and of splits_by_prompt
    splits_by_prompt: bool = False  # dev and test are tenths of the training source, by a hash of each row's prompt
    bad_rows: Literal["error", "drop"] = "error"  # preference rows that prefer nothing: a sentence, or left out


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """What becomes of the samples of earlier stages, for a stage with ``data.train = "rollouts:stage,stage"``."""

    rule: Literal["", "correct", "best", "returns", "pairs", "ranking", "verdicts"] = (
        ""  # text: right samples, a group's best, or all under labels; pairs; rankings; verdicts: labelled answers
    )
    distinct: Literal["none", "text", "equations"] = "none"  # what makes two samples of a prompt one
    per_prompt: Count = 0  # keep at most so many samples of a prompt; 0: all
    other: Literal["random", "worst"] = "random"  # what a group's best is paired with
    labels: tuple[str, ...] = ()  # before the prompt of a wrong and of a right sample, under the rule returns
    gap: Literal["", "easy", "difficult"] = ""  # keep pairs whose scores differ by more than gap_threshold, or the rest
    gap_threshold: float = 0.0  # of MPO's split (2403.19443)
    also: str = ""  # source of further rows of that kind, as data.train

    def __post_init__(self) -> None:
        if (self.rule == "returns") != bool(self.labels) or len(set(self.labels)) != len(self.labels):
            raise ValueError("select.labels takes two texts, of wrong and of right samples, under the rule returns")
        if len(self.labels) not in (0, 2):
            raise ValueError(f"select.labels has {len(self.labels)} texts; give that of wrong and of right samples")
        if self.gap and self.rule not in ("", "pairs"):
            raise ValueError(f"select.gap parts pairs, and the rule {self.rule} makes none")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts_per_step: Positive = 8  # each with group_size completions
    group_size: Positive = 8  # completions a prompt
    max_new_tokens: Positive = 128  # of a completion, end token included
    temperature: Amount = 1.0  # of sampling and, with it, of every log-prob that is trained on
    top_k: Count = 0  # sample among so many tokens; 0: all
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0  # among the likeliest with this mass together; 1: all
    min_p: Decay = 0.0  # among those at least this likely relative to the likeliest; 0: all
    unimix: Decay = 0.0  # share of the distribution that is even over the vocabulary, in sampling and log-probs alike
    keep_groups: Literal["all", "mixed"] = (
        "all"  # mixed: refill until prompts_per_step groups have both right and wrong
    )
    max_rounds: Positive = 1  # of refilling
    slots: Annotated[int, Range(-1)] = -1  # answers a data shard writes at once; 0: a fixed batch of all; -1: by device
    pieces: Positive = 1  # programs that a rollout is cut into; the rewards of one overlap with the next
    shrink_stages: Positive = 2  # loops, each with a quarter of the slots before; one on TPU
    prefill_chunk: Count = 0  # tokens of a prompt read between two decode steps; 0: the whole prompt
    uniform_steps: Literal["auto", "always", "never"] = "auto"  # data shards take equally many steps; auto: on TPU
    weights_dtype: Literal["compute", "int8"] = "compute"  # of the layers while sampling; int8 needs algo.correction
    cache_dtype: Literal["compute", "int8"] = "compute"  # of keys and values while sampling; int8 needs algo.correction
    lag: Count = 0  # sample with the policy of so many rollouts before: asynchronous training's staleness, on one mesh


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    names: tuple[str, ...] = ()  # rewards by name, or package.module:function
    weights: tuple[float, ...] = ()  # default: 1 each
    options: dict[str, Any] = field(
        default_factory=dict
    )  # by reward (of package.module:function by function), the keyword options that it is called with
    timeout_s: Duration = 10.0  # of one call
    workers: Positive = 4  # threads or processes
    processes: bool = False  # run rewards in processes, which a hanging one cannot hold up
    failed_value: float = 0.0  # what a sample gets whose reward raised or hung
    discard_failed: bool = False  # a sample whose reward raised or hung trains nothing
    permute: bool = False  # a control: rewards shuffled over the batch; nothing may be learnt

    def __post_init__(self) -> None:
        # In a config file a key has no dots: options of package.module:function stand under the function.
        keys = [name.rpartition(":")[2] for name in self.names]
        for key in self.options:
            if key not in (*keys, *self.names):
                raise ValueError(f"reward.options.{key}: no reward of reward.names{nearest(key, keys)}")
            if keys.count(key) > 1:
                raise ValueError(f"reward.options.{key}: two rewards of reward.names have that name")
        full = dict(zip(keys, self.names, strict=True))
        object.__setattr__(self, "options", {full.get(key, key): value for key, value in self.options.items()})


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """One rollout (or one draw of rows) is epochs x minibatches optimizer steps."""

    rows: Count = 0  # of data a draw, in supervised and preference stages (a pair is one); rollouts have their own
    epochs: Positive = 1  # passes over the rows
    minibatches: Positive = 1  # optimizer steps a pass
    micro_batch_rows: Count = 0  # sequences a forward and backward pass, over all devices; 0: the whole minibatch
    pack: bool = True  # let short sequences share a row, so that micro-batches get fewer; the numbers stay the same
    row_length: Count = 0  # tokens of such a row; 0: the longest that a sequence can be


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The model with a scalar head that a stage trains: PPO's critic, or a reward model."""

    init_from: str = "policy"  # body and head: "policy" (its body, a new head) | an earlier stage | a folder
    seed: Count = 0  # of a new head
    center_on: str = ""  # a reward model's mean score is 0 on: chosen (of its rows) | a source of text; default: as is
    center_rows: Count = 0  # how many of those rows; 0: all there are
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5))  # of a critic beside a policy


@dataclass(frozen=True, kw_only=True)
class TextMixConfig:
    """Plain text whose cross entropy is added to every optimizer step (PPO-ptx)."""

    coef: Amount = 0.0  # 0: none
    rows: Positive = 8  # an optimizer step
    train: str = ""  # source of the rows, as data.train
    train_rows: Count = 0  # how many to use; 0: all there are
    columns: dict[str, str] = field(default_factory=dict)  # as data.columns
    options: dict[str, Any] = field(default_factory=dict)  # as data.options
    row_length: Positive = 512  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_steps: Count = 0  # on dev; 0: before the first and after the last step only
    samples: Positive = 1  # completions a prompt; above 1 pass@k is reported too
    temperature: Amount = 0.0  # of the samples; 0 is greedy
    greedy: bool = False  # one more completion a prompt, a greedy one: the score is then its, pass@k the samples'
    prompts_per_batch: Positive = 64  # of one call of the sampler
    shown_prompts: Count = 4  # how many fixed prompts go to samples.jsonl

    @property
    def completions(self) -> int:
        """Of a prompt: the greedy one first, then the samples."""
        return self.samples + self.greedy

    @property
    def score_temperature(self) -> float:
        """Of the completions that the score is of."""
        return 0.0 if self.greedy else self.temperature


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: Count = 0  # 0: after the last step only
    keep: Positive = 2  # the newest
    keep_best: bool = True  # by the dev score, beside the newest
    export: bool = True  # write the trained policy as a Hugging Face folder


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """When to stop a run that has gone wrong; the reason is logged. 0 switches a rule off."""

    bad_steps: Count = 10  # steps skipped in a row because loss or gradient was not finite
    kl_per_completion: Amount = 0.0  # largest KL to the reference, nats
    min_completion_length: Amount = 0.0  # tokens, mean of a step
    max_completion_length: Amount = 0.0  # tokens, mean of a step
    perplexity: Amount = 0.0  # largest, of the completions under the policy


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = False  # also write events for TensorBoard
    wandb: bool = False  # also log to Weights & Biases
    samples_per_step: Count = 0  # best, worst and random completions of a step written to samples.jsonl
    peak_tflops: Amount = 0.0  # a chip's, for MFU; 0: from the table of known devices


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What one stage of a recipe trains on and how. Fields stand at the top level of a config for the main stage."""

    algo: Any = None  # the algorithm's own Config
    steps: Count = 1  # rollouts, or draws of supervised rows
    init_from: str = "previous"  # whose weights: base | previous | an earlier stage's name
    reference_from: str = "start"  # start (of this stage) | base | an earlier stage's name
    reference_reset_steps: Count = 0  # copy the policy into the reference every so many steps; 0: never
    reference_ema: Decay = 0.0  # decay of a reference that follows the policy; 0: it stays
    guide_from: str = ""  # another frozen policy that the algorithm scores with: a stage or a folder
    teacher_from: str = ""  # a frozen policy to learn from: a stage or a folder
    teacher_top_k: Positive = 64  # of its likeliest tokens at each position
    reward_model_from: str = ""  # a frozen reward model, a stage or a folder; its score is the reward "model"
    reward_model_weight: float = 1.0  # of that score in the reward
    reward_model_threshold: float | None = None  # the score adds 1 above it and -.5 below, to a positive reward only
    critic: CriticConfig = CriticConfig()
    text_mix: TextMixConfig = TextMixConfig()
    clip_scope: Literal["tree", "joint"] = "tree"  # gradients clipped by each tree's norm, or by that of all together
    offload_optimizer: bool = False  # its moments wait in the hosts' memory between updates; on accelerators
    offload_reference: bool = False  # the reference waits in the hosts' memory between its passes; on accelerators
    data: DataConfig = DataConfig()
    select: SelectConfig = SelectConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-6))

    @property
    def rollout_rows(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def longest_row(self) -> int:
        """Tokens that a sequence can have."""
        online = max(self.data.prompt_lengths) + self.rollout.max_new_tokens
        return online if self.is_online else self.data.row_length

    @property
    def rows_per_step(self) -> int:
        """Sequences of an update."""
        algorithm = self.algorithm()
        if algorithm.targets is None:
            return (self.batch.rows or self.rollout_rows) * algorithm.unit
        return self.rollout.prompts_per_step * (algorithm.rows_per_prompt or self.rollout.group_size)

    @property
    def passes(self) -> float:
        """How often a token of a step is trained on: in every epoch, if its row is among those of the update."""
        return self.batch.epochs * (self.rows_per_step / self.rollout_rows if self.is_online else 1.0)

    @property
    def optimizer_steps(self) -> int:
        """Over the whole stage: the horizon of its schedule."""
        return self.steps * self.batch.epochs * self.batch.minibatches

    def algorithm(self) -> Algorithm:
        module = next(module for module in ALGOS.values() if type(self.algo) is module.Config)
        return module.make(self.algo, group_size=self.rollout.group_size, max_new_tokens=self.rollout.max_new_tokens)

    @property
    def sampled_by(self) -> tuple[str, ...]:
        """The earlier stages whose samples this one trains on; () where it has a source of its own."""
        kind, colon, stages = self.data.train.partition("rollouts:")
        return tuple(name.strip() for name in stages.split(",")) if colon and not kind else ()

    @property
    def is_online(self) -> bool:
        """Trains on what the policy writes."""
        return self.algorithm().targets is not None


STAGE_FIELDS = tuple(f.name for f in dataclasses.fields(StageConfig))


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """A whole run."""

    name: str = "run"  # of the run, and of its folder
    output_dir: str = ""  # local or gs://; default: runs/<name>
    seed: Count = 0  # of everything random but the order of data
    recipe: tuple[str, ...] = ("main",)  # stage names in order; "main" is the top level itself
    stages: dict[str, StageConfig] = field(default_factory=dict)  # by name, what differs from the top level
    mesh: str = "1,-1,1"  # devices along replica, fsdp, tensor; -1 takes what is left; or "fsdp:-1,tensor:4"
    decode_mesh: str = ""  # the same devices cut otherwise for rollouts; default: the training mesh
    distributed: str = ""  # host:port,count,index; empty: automatic on TPU and Slurm, else a single process
    cpu_devices: Positive = 1  # simulated devices where there is no accelerator
    device_memory_gib: Amount = 0.0  # of one device, for the plan; 0: what the device says
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # parameters stay float32, or are float64
    compilation_cache: str = ""  # a folder; default: ~/.cache/rljax; "off"
    profile_steps: tuple[Positive, ...] = ()  # first and last step of a trace
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitConfig = LimitConfig()
    log: LogConfig = LogConfig()

    def stage(self, name: str) -> StageConfig:
        return self if name == "main" else self.stages[name]

    def key_of(self, name: str) -> str:
        """Where a stage stands in the config, for messages."""
        return "config" if name == "main" else f"config.stages.{name}"


# Changing these on a run that has begun would make it another run.
_RUN_IDENTITY = ("seed", "recipe", "compute_dtype", "model.path", "model.architecture", "model.init_seed", "tokenizer")
_STAGE_IDENTITY = (
    *("algo", "init_from", "reference_from", "reference_reset_steps", "reference_ema", "data", "select", "rollout"),
    *(
        "reward.names",
        "reward.weights",
        "reward.options",
        "reward.failed_value",
        "reward.discard_failed",
        "reward.permute",
    ),
    *("guide_from", "teacher_from", "teacher_top_k", "reward_model_from", "reward_model_weight"),
    "reward_model_threshold",
    *("critic.init_from", "critic.seed", "text_mix"),
    *("batch.rows", "batch.epochs", "batch.minibatches", "optim.name"),
)


def identity_keys(config: Config) -> tuple[str, ...]:
    """The dotted keys of ``resolved(config)`` that a resumed run may not change; a key stands for all below it.

    Free to change are the steps of the last stage, learning rates, how the work is cut (mesh, micro-batches, remat),
    and what only watches: evaluation, checkpoints, limits, logs.
    """
    prefixes = ["" if name == "main" else f"stages.{name}." for name in config.recipe]
    begun = [f"{prefix}steps" for prefix in prefixes[:-1]]
    return (*_RUN_IDENTITY, *(prefix + key for prefix in {"", *prefixes} for key in _STAGE_IDENTITY), *begun)
