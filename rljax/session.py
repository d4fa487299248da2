"""What stays fixed during a run: devices, mesh, model, tokenizer, folder, random seed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import PRNGKeyArray

from rljax.config import Config, ConfigError, StageConfig
from rljax.data.tokenizer import Tokenizer, character_tokenizer, load_tokenizer
from rljax.decoding import Sampling
from rljax.forward import Forward
from rljax.models import FAMILIES, ModelFolderError
from rljax.models.decoder import Model, Params, check_tensor_degree
from rljax.models.hf_import import find_params, load_config, load_params
from rljax.models.kernels import LANES
from rljax.models.params import abstract_params, init_params, init_scalar_head, param_shardings
from rljax.peers import join_peers
from rljax.refill_plan import RefillPlan, plan_refill
from rljax.sharding import DECODE_RULES, TRAIN_RULES, Layout, MeshError, make_mesh, refactor_mesh
from rljax.steps import copy_params

# One fold of the root key for each purpose: no key is ever stored, split in sequence or used twice.
ROLLOUT_KEY, SHUFFLE_KEY, EVAL_KEY, CONTROL_KEY = range(4)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclass(frozen=True)
class Session:
    config: Config
    model: Model
    tokenizer: Tokenizer
    train: Layout
    decode: Layout
    folder: epath.Path

    @property
    def dtype(self) -> Any:
        return DTYPES[self.config.compute_dtype]

    @property
    def param_dtype(self) -> Any:
        """Master weights: float32, and float64 in float64 runs."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def key(self, purpose: int, *numbers: int) -> PRNGKeyArray:
        """The run's random numbers for a purpose: a function of the seed and the numbers given, nothing else."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), purpose)
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    def sampling(self, stage: StageConfig) -> Sampling:
        r = stage.rollout
        return Sampling(
            max_new_tokens=r.max_new_tokens,
            end_ids=self.tokenizer.end_ids,
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            min_p=r.min_p,
        )

    def forward(self, sampling: Sampling | None, model: Model | None = None) -> Forward:
        """How training and scoring run rows: at the sampler's temperature, on its support."""
        return Forward(
            model=model or self.model,
            layout=self.train,
            dtype=self.dtype,
            remat=self.config.model.remat,
            logits_chunk=self.config.model.logits_chunk,
            temperature=sampling.scoring_temperature if sampling else 1.0,
            attention=self.config.model.attention,
            truncates=sampling.truncates if sampling else False,
            unimix=sampling.unimix if sampling else 0.0,
        )

    def abstract_tree(self, model: Model, dtype: Any = None) -> Params:
        return abstract_params(model, self.train, dtype or self.param_dtype)

    def abstract_policy(self, dtype: Any = None) -> Params:
        return self.abstract_tree(self.model, dtype)

    def model_from(self, source: str) -> Model:
        """The shape of a policy: that of the run, or of another folder with the same vocabulary."""
        if source in ("", "base", "policy", *self.config.recipe):
            return self.model
        model = load_config(source)
        if model.config.vocab_size != self.model.config.vocab_size:
            raise ModelFolderError(
                f"{source} has a vocabulary of {model.config.vocab_size} and the policy one of "
                f"{self.model.config.vocab_size}; models that score the same tokens share a tokenizer"
            )
        check_tensor_degree(model.config, self.train.tensor)
        return model.padded_for(self.train.tensor, self.decode.tensor)

    def scalar_model(self, source: str) -> Model:
        """The shape of a critic or reward model that starts as ``source``: policy, a stage or a folder."""
        while source in self.config.recipe:
            source = self.config.stage(source).critic.init_from
        return self.model_from(source)._replace(scores=1)

    def with_scalar_head(self, body: Params, model: Model, seed: int) -> Params:
        """A copy of a policy's body under a new scalar head."""
        names = ("embed", "layers", "final_norm")
        head = init_scalar_head(model, self.train, seed, self.param_dtype)
        body, places = ({name: tree[name] for name in names} for tree in (body, param_shardings(model, self.train)))
        return {**copy_params(body, places, self.param_dtype), **head}

    def refill(self, stage: StageConfig, rows: int, group: int) -> RefillPlan | None:
        """How ``rows`` requests in groups are worked off."""
        r = stage.rollout
        return plan_refill(
            self.decode,
            rows,
            group,
            slots=r.slots,
            loops=r.shrink_stages,
            prefill_chunk=r.prefill_chunk,
            uniform_steps=r.uniform_steps,
            ring_attention=r.ring_attention,
        )

    def check_weights(self) -> None:
        """That a checkpoint's files are there and whole. Raises ModelFolderError."""
        if self.config.model.path:
            find_params(self.config.model.path, self.model)

    def base_params(self) -> Params:
        """The policy's starting weights, sharded."""
        c = self.config.model
        if c.path:
            return load_params(c.path, self.model, self.train, dtype=self.param_dtype)
        return init_params(self.model, self.train, c.init_seed, self.param_dtype)


def start_devices(config: Config) -> None:
    """Everything that must be said before JAX touches a device."""
    if config.compute_dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    # On a GPU the same run gives the same bits only with deterministic kernels.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if config.compilation_cache != "off":
        cache = config.compilation_cache or str(Path.home() / ".cache" / "rljax")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    join_peers(config.distributed)


def open_session(config: Config, devices: Sequence[jax.Device] | None = None) -> Session:
    """Mesh (over all devices unless some are given), model shape and tokenizer, checked; no weights yet."""
    mesh = make_mesh(config.mesh, devices)
    train = Layout(mesh, TRAIN_RULES)
    decode = Layout(refactor_mesh(mesh, config.decode_mesh) if config.decode_mesh else mesh, DECODE_RULES)
    tokenizer = _tokenizer(config)
    model = _model(config, tokenizer)
    for layout in (train, decode):
        check_tensor_degree(model.config, layout.tensor)
    _check_attention(config, train)
    for name in config.recipe:
        _check_rows(config.stage(name), train, decode, config.key_of(name))
        _check_length(config.stage(name), model, config.key_of(name))
        _check_offload(config.stage(name), train, config.key_of(name))
        _check_ring(config.stage(name), decode, config.key_of(name))
    folder = epath.Path(config.output_dir or f"runs/{config.name}")
    return Session(config, model.padded_for(train.tensor, decode.tensor), tokenizer, train, decode, folder)


def _tokenizer(config: Config) -> Tokenizer:
    t = config.tokenizer
    kind, _, alphabet = t.path.partition("characters:")
    if alphabet and not kind:
        return character_tokenizer(alphabet)
    return load_tokenizer(
        t.path or config.model.path,
        end_tokens=t.end_tokens or None,
        template=t.template or None,
        system_prompt=t.system_prompt or None,
    )


def _model(config: Config, tokenizer: Tokenizer) -> Model:
    if config.model.path:
        model = load_config(config.model.path)
    else:
        architecture = {"vocab_size": tokenizer.vocab_size, **config.model.architecture}
        if architecture.get("model_type") not in FAMILIES:
            raise ModelFolderError(
                f"config.model.architecture.model_type is {architecture.get('model_type')!r}; "
                f"it is one of {', '.join(FAMILIES)}"
            )
        family = FAMILIES[architecture["model_type"]]
        model = Model(family, family.from_hf(architecture))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelFolderError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and the model's embedding "
            f"{model.config.vocab_size} rows; they do not belong together"
        )
    return model


def _check_attention(config: Config, layout: Layout) -> None:
    """A kernel that is asked for by name has to run on the devices."""
    asked, kind = config.model.attention, layout.mesh.devices.flat[0].device_kind
    if (asked == "flash" and not layout.on_tpu) or (asked == "cudnn" and not layout.on_nvidia):
        needs = {"flash": "a TPU", "cudnn": "an NVIDIA GPU"}[asked]
        raise ConfigError(
            f"config.model.attention is {asked!r}, which needs {needs}, and the mesh has {kind}; set auto"
        )
    if asked == "cudnn" and config.compute_dtype != "bfloat16":
        raise ConfigError(
            "config.model.attention is 'cudnn', which computes in bfloat16; set compute_dtype to it, or auto"
        )


def _check_offload(stage: StageConfig, layout: Layout, where: str) -> None:
    for key in ("offload_optimizer", "offload_reference"):
        if vars(stage)[key] and layout.on_cpu:
            raise ConfigError(f"{where}.{key} saves nothing where there is no accelerator; switch it off")


def _check_ring(stage: StageConfig, layout: Layout, where: str) -> None:
    """What the kernel over the ring can read."""
    r = stage.rollout
    if r.ring_attention == "pallas" and not (
        layout.on_tpu and r.slots and r.cache_dtype == "compute" and r.max_new_tokens % LANES == 0
    ):
        raise ConfigError(
            f"{where}.rollout.ring_attention is 'pallas', which needs a TPU, slots that refill, cache_dtype "
            f"compute and max_new_tokens a multiple of {LANES}; set xla"
        )


def _check_length(stage: StageConfig, model: Model, where: str) -> None:
    """Rows must fit the positions that the model knows."""
    if stage.is_online:
        length = max(stage.data.prompt_lengths) + stage.rollout.max_new_tokens
        parts = f"data.prompt_lengths {max(stage.data.prompt_lengths)} + rollout.max_new_tokens"
        parts = f"{parts} {stage.rollout.max_new_tokens}"
    else:
        length, parts = stage.data.row_length, "data.row_length"
    if length > model.config.max_positions:
        raise ConfigError(
            f"{where}: {parts} is {length}, and the model knows {model.config.max_positions} positions; shorten it"
        )


def _check_rows(stage: StageConfig, train: Layout, decode: Layout, where: str) -> None:
    """Rows must divide over data shards, and groups must not span them."""
    shards = max(train.data_shards, decode.data_shards)
    rows, unit = stage.rows_per_step, stage.algorithm().unit
    r = stage.rollout
    if stage.is_online and r.prompts_per_step % (shards * r.pieces):
        times = f" times rollout.pieces {r.pieces}" if r.pieces > 1 else ""
        raise MeshError(
            f"{where}.rollout.prompts_per_step {r.prompts_per_step} is not a multiple of the mesh's "
            f"{shards} data shards{times}"
        )
    micro = stage.batch.micro_batch_rows or rows // stage.batch.minibatches
    if micro % (train.data_shards * unit):
        kept = f" in units of {unit} that stay together" if unit > 1 else ""
        raise MeshError(
            f"{where}.batch: micro-batches of {micro} rows do not divide over {train.data_shards} data shards{kept}"
        )
