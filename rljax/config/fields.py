"""A run's settings as frozen dataclasses. The comments beside the fields become docs/config.md.

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

    path: str = ""  # Hugging Face model: a local or gs:// folder, or a Hub name
    architecture: dict[str, Any] = field(default_factory=dict)  # config.json as a dict: random weights
    init_seed: Count = 0  # seed of the random weights
    remat: Literal["none", "dots", "block"] = (
        "none"  # activations kept for the backward pass: all, products with weights, or only each layer's input
    )
    attention: Literal["auto", "xla", "cudnn", "flash"] = "auto"  # kernel for training and scoring; auto: by device
    logits_chunk: Positive = 1024  # tokens per device whose logits are held in memory at once


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = ""  # default: the model's folder; "characters:<alphabet>" builds a character tokenizer
    template: str = ""  # "chat", a named plain template, a text with {prompt}, or a .jinja file; default: none
    system_prompt: str = ""  # added to every conversation that has none
    end_tokens: tuple[str, ...] = ()  # tokens that end a completion; default: those of the checkpoint


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows for training, for choosing a checkpoint (dev) and for the final word (test).

    A source is a file, a folder with files named after their split, a Hub name, a generated task, or, for training,
    what earlier stages sampled: "rollouts:stage,stage", from which ``select`` makes rows.
    """

    train: str = ""  # source of the training rows
    dev: str = ""  # source of the dev rows; default: the last dev_rows training rows are held out
    test: str = ""  # source of the test rows; default: none
    train_rows: Count = 0  # number of rows to use; 0: all
    dev_rows: Count = 0  # number of rows to use, or to hold out of the training rows; 0: all, or none
    test_rows: Count = 0  # number of rows to use; 0: all
    columns: dict[str, str] = field(
        default_factory=dict
    )  # our names to theirs: prompt, answer, solution, messages, chosen, rejected, completions, scores, label, ...
    options: dict[str, Any] = field(default_factory=dict)  # options of a generated task or of a Hub dataset
    prompt_prefix: str = ""  # text before every prompt in a rollout, such as the label of a desired return
    prompt_lengths: tuple[Positive, ...] = (256,)  # tokens; prompts are left-padded to the smallest length that fits
    row_length: Positive = 512  # tokens of a supervised or preference row, prompt and completion together
    seed: Count = 0  # seed of the row order and of splits_by_prompt
    splits_by_prompt: bool = False  # take dev and test, a tenth each, from the training source, by a hash of the prompt
    bad_rows: Literal["error", "drop"] = "error"  # what to do with rows that express no preference


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """What becomes of the samples of earlier stages, for a stage with ``data.train = "rollouts:stage,stage"``."""

    rule: Literal["", "correct", "best", "returns", "pairs", "ranking", "verdicts"] = (
        ""  # what to make of the samples: correct, best or returns (text), pairs, ranking, verdicts (labelled answers)
    )
    distinct: Literal["none", "text", "equations"] = (
        "none"  # drop repeated samples of a prompt, compared by text or by their equations
    )
    per_prompt: Count = 0  # samples to keep per prompt; 0: all
    other: Literal["random", "worst"] = "random"  # what the best sample of a group is paired with
    labels: tuple[str, ...] = ()  # text before the prompt of a wrong and of a right sample (rule returns)
    gap: Literal["", "easy", "difficult"] = (
        ""  # keep pairs whose scores differ by more than gap_threshold (easy), or the others (difficult)
    )
    gap_threshold: float = 0.0  # threshold of MPO's split (2403.19443)
    also: str = ""  # source of additional rows of the same kind, as data.train

    def __post_init__(self) -> None:
        if (self.rule == "returns") != bool(self.labels) or len(set(self.labels)) != len(self.labels):
            raise ValueError("select.labels takes two texts, of wrong and of right samples, under the rule returns")
        if len(self.labels) not in (0, 2):
            raise ValueError(f"select.labels has {len(self.labels)} texts; give that of wrong and of right samples")
        if self.gap and self.rule not in ("", "pairs"):
            raise ValueError(f"select.gap parts pairs, and the rule {self.rule} makes none")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts_per_step: Positive = 8  # prompts per rollout, each with group_size completions
    group_size: Positive = 8  # completions per prompt
    max_new_tokens: Positive = 128  # token budget of a completion, including the end token
    temperature: Amount = 1.0  # sampling temperature; log-probs in training use the same one
    top_k: Count = 0  # sample from the k likeliest tokens; 0: off
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0  # nucleus sampling; 1: off
    min_p: Decay = 0.0  # sample from tokens at least this likely relative to the likeliest; 0: off
    unimix: Decay = 0.0  # share of uniform probability mixed into the policy, in sampling and log-probs alike
    keep_groups: Literal["all", "mixed", "unequal"] = (
        "all"  # mixed: only groups with right and wrong completions; unequal: with differing rewards; others again
    )
    keep_between: tuple[float, ...] = (0.0, 1.0)  # mixed: keep groups whose share of right ones lies between these
    max_rounds: Positive = 1  # most rounds of sampling until enough groups are kept
    slots: Annotated[int, Range(-1)] = -1  # completions decoded at once per data shard; 0: fixed batch; -1: auto
    pieces: Positive = 1  # parts of a rollout; the rewards of one are computed while the next is sampled
    shrink_stages: Positive = 2  # decode loops, each with a quarter of the slots of the one before; always 1 on TPU
    prefill_chunk: Count = 0  # prompt tokens processed between two decode steps; 0: the whole prompt
    uniform_steps: Literal["auto", "always", "never"] = "auto"  # equal decode steps on all data shards; auto: on TPU
    ring_attention: Literal["xla", "pallas"] = "xla"  # over completions in decoding; pallas: a TPU kernel, never timed
    weights_dtype: Literal["compute", "int8"] = "compute"  # of layer weights in rollouts; int8 needs algo.correction
    cache_dtype: Literal["compute", "int8"] = "compute"  # of the KV cache in rollouts; int8 needs algo.correction
    lag: Count = 0  # sample with the policy of this many rollouts ago, to simulate asynchronous training


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    names: tuple[str, ...] = ()  # rewards by name, or package.module:function
    weights: tuple[float, ...] = ()  # weight of each reward; default: 1
    options: dict[str, Any] = field(
        default_factory=dict
    )  # keyword arguments by reward name (by function for package.module:function)
    timeout_s: Duration = 10.0  # time limit of one call
    workers: Positive = 4  # number of threads or processes
    processes: bool = False  # run rewards in processes, so that one that hangs can be killed
    failed_value: float = 0.0  # reward of a sample whose reward function raised or timed out
    discard_failed: bool = False  # leave such samples out of the loss
    permute: bool = False  # control experiment: shuffle rewards over the batch, so that there is nothing to learn

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

    rows: Count = 0  # data rows per step in supervised and preference stages (a pair is one row)
    epochs: Positive = 1  # passes over the rows of a step
    minibatches: Positive = 1  # optimizer steps per pass
    micro_batch_rows: Count = 0  # sequences per forward and backward pass, over all devices; 0: the whole minibatch
    pack: bool = True  # pack short sequences together so that fewer micro-batches are needed; results are unchanged
    row_length: Count = 0  # tokens of a packed row; 0: the longest possible sequence


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The model with a scalar head that a stage trains: PPO's critic, or a reward model."""

    init_from: str = "policy"  # policy (its body, a new head), an earlier stage, or a folder (head included)
    seed: Count = 0  # seed of a new head
    center_on: str = ""  # shift a reward model's mean score to 0 on: chosen (of its rows), or a source; default: off
    center_rows: Count = 0  # number of those rows; 0: all
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5))  # of a critic beside a policy


@dataclass(frozen=True, kw_only=True)
class TextMixConfig:
    """Plain text whose cross entropy is added to every optimizer step (PPO-ptx)."""

    coef: Amount = 0.0  # weight of the added cross entropy; 0: off
    rows: Positive = 8  # rows per optimizer step
    train: str = ""  # source of the rows, as data.train
    train_rows: Count = 0  # number of rows to use; 0: all
    columns: dict[str, str] = field(default_factory=dict)  # as data.columns
    options: dict[str, Any] = field(default_factory=dict)  # as data.options
    row_length: Positive = 512  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_steps: Count = 0  # steps between dev evaluations; 0: only before the first step and after the last
    samples: Positive = 1  # completions per prompt; above 1, pass@k is reported too
    temperature: Amount = 0.0  # sampling temperature; 0 is greedy
    greedy: bool = False  # add one greedy completion per prompt; the score is then that of the greedy ones
    prompts_per_batch: Positive = 64  # prompts per call of the sampler
    shown_prompts: Count = 4  # number of fixed prompts whose completions go to samples.jsonl

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
    every_steps: Count = 0  # steps between checkpoints; 0: only at the end of each stage
    keep: Positive = 2  # number of latest checkpoints to keep
    keep_best: bool = True  # also keep the one with the best dev score
    export: bool = True  # write the trained model as a Hugging Face folder at the end


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """When to stop a run gone wrong: evaluated, saved, exported, it goes no further until that limit is moved. 0: off.

    The reason is said last, and the exit code is 3, also when it is started again with the same limit.
    """

    bad_steps: Count = 10  # consecutive steps skipped because loss or gradient was not finite
    kl_per_completion: Amount = 0.0  # largest KL to the reference, nats per completion
    min_completion_length: Amount = 0.0  # smallest mean completion length of a step, tokens
    max_completion_length: Amount = 0.0  # largest mean completion length of a step, tokens
    perplexity: Amount = 0.0  # largest perplexity of the completions under the policy


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = False  # also write TensorBoard event files
    wandb: bool = False  # also log to Weights & Biases
    samples_per_step: Count = 0  # completions per step written to samples.jsonl: the best, the worst, and random ones
    peak_tflops: Amount = 0.0  # peak of one chip, for MFU; 0: from the table of known devices


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What one stage of a recipe trains on and how. Fields stand at the top level of a config for the main stage."""

    algo: Any = None  # the algorithm's own settings
    steps: Count = 1  # rollouts, or draws of data rows
    init_from: str = "previous"  # starting weights: base, previous, or an earlier stage's name
    reference_from: str = "start"  # reference model: start (of this stage), base, or an earlier stage's name
    reference_reset_steps: Count = (
        0  # move the reference every this many steps; 0: never, with reference_ema every step
    )
    reference_ema: Decay = 0.0  # share the reference keeps as it moves (TR-DPO's 1 - α); 0: it becomes the policy
    guide_from: str = ""  # another frozen policy that the algorithm uses (RTO's DPO policy): a stage or a folder
    teacher_from: str = ""  # frozen teacher for distillation: a stage or a folder
    teacher_top_k: Positive = 64  # number of the teacher's likeliest tokens used at each position
    reward_model_from: str = ""  # frozen reward model, a stage or a folder; its score is logged as the reward "model"
    reward_model_weight: float = 1.0  # weight of that score in the reward
    reward_model_threshold: float | None = None  # to positive rewards, add 1 above it and -.5 below instead
    critic: CriticConfig = CriticConfig()
    text_mix: TextMixConfig = TextMixConfig()
    clip_scope: Literal["tree", "joint"] = "tree"  # clip each tree by its own norm, or all by the joint norm
    offload_optimizer: bool = False  # keep optimizer moments in host memory between updates (accelerators only)
    offload_reference: bool = False  # keep the reference in host memory between its passes (accelerators only)
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

    name: str = "run"  # name of the run and of its folder
    output_dir: str = ""  # run folder, local or gs://; default: runs/<name>
    seed: Count = 0  # seed of everything random except the data order
    recipe: tuple[str, ...] = ("main",)  # stage names in order; "main" is the top level itself
    stages: dict[str, StageConfig] = field(default_factory=dict)  # what differs from the top level, by name
    mesh: str = "1,-1,1"  # devices along replica, fsdp, tensor; -1 takes what is left; or "fsdp:-1,tensor:4"
    decode_mesh: str = ""  # another mesh over the same devices, for rollouts; default: the training mesh
    distributed: str = ""  # host:port,count,index; default: automatic on TPU and Slurm, otherwise one process
    cpu_devices: Positive = 1  # number of simulated devices where there is no accelerator
    device_memory_gib: Amount = 0.0  # memory of one device, for the memory plan; 0: as reported by the device
    compute_dtype: Literal["float32", "bfloat16", "float64"] = (
        "float32"  # parameters stay float32 (float64 with float64)
    )
    compilation_cache: str = ""  # folder of the persistent cache; default: ~/.cache/rljax; "off" disables it
    profile_steps: tuple[Positive, ...] = ()  # first and last step of a profiler trace
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
