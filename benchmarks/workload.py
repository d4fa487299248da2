"""The common workload: Llama shapes, random weights, random prompts, completions that never end, random rewards."""

import dataclasses
import os
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.common import check
from rljax.config import default_config, make_config
from rljax.data.batches import PromptSource
from rljax.forward import make_score
from rljax.models.decoder import DecoderConfig
from rljax.rewards.runner import RewardRunner
from rljax.session import Session, open_session, start_devices
from rljax.stages import Stage, build_stage
from rljax.types import Rollout

# width, layers, heads, kv heads, head width, feed-forward, vocabulary, tied. From 0.5b on: for accelerators.
SIZES = {
    "xs": (64, 2, 2, 2, 32, 128, 2048, True),
    "s": (288, 6, 6, 6, 48, 768, 32000, True),
    "m": (768, 12, 12, 12, 64, 2048, 32000, True),
    "0.5b": (896, 24, 14, 2, 64, 4864, 151936, True),
    "1b": (2048, 16, 32, 8, 64, 8192, 128256, True),
    "3b": (3072, 28, 24, 8, 128, 8192, 128256, True),
    "8b": (4096, 36, 32, 8, 128, 12288, 151936, False),
}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
FIELDS = (*FIELDS, "intermediate_size", "vocab_size", "tie_word_embeddings")
FIRST_CHARACTER = 0x10000  # of an alphabet with one character a token
SPECIAL_TOKENS = 3

PROMPTS, GROUP, PROMPT, COMPLETION = 8, 8, 64, 128
LEARNING_RATE, WEIGHT_DECAY, KL = 1e-5, 0.01, 0.04
MICRO = 16  # rows of a micro-batch that a CPU's caches hold
# A CPU computes a block again faster than it reads back what a block would keep.
CPU_SHAPE = {"batch.micro_batch_rows": MICRO, "model.remat": "block", "model.logits_chunk": 512}


def architecture(size: str) -> dict[str, Any]:
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 32768, "initializer_range": 0.02}
    return {"model_type": "llama", **dict(zip(FIELDS, SIZES[size], strict=True)), **rest}


def alphabet(size: str) -> str:
    count = SIZES[size][FIELDS.index("vocab_size")] - SPECIAL_TOKENS
    return "".join(map(chr, range(FIRST_CHARACTER, FIRST_CHARACTER + count)))


def random_reward(prompt: str, completion: str) -> float:
    return random.random()


def grpo_config(size: str, dtype: str, **overrides: Any) -> ConfigDict:
    """A step on 8 prompts x 8 samples, 64 + 128 tokens, one optimizer step, AdamW, KL to a reference."""
    config = default_config("grpo")
    config.compute_dtype = dtype
    config.tokenizer.path = f"characters:{alphabet(size)}"
    with config.unlocked():
        config.model.architecture = ConfigDict(architecture(size))
    config.update_from_flattened_dict(
        {
            "compilation_cache": "off",
            "cpu_devices": os.cpu_count() or 1,  # the body of a loop runs on one core
            "algo.kl_coef": KL,
            "algo.clip_low": 0.2,
            "algo.clip_high": 0.2,
            "algo.advantage_mean": "group",
            "algo.advantage_std": "group",
            "algo.aggregation": "token_mean",
            "steps": 1000,
            "rollout.prompts_per_step": PROMPTS,
            "rollout.group_size": GROUP,
            "rollout.max_new_tokens": COMPLETION,
            "data.prompt_lengths": (PROMPT,),
            "reward.names": ("benchmarks.workload:random_reward",),
            "optim.learning_rate": LEARNING_RATE,
            "optim.weight_decay": WEIGHT_DECAY,
            **CPU_SHAPE,
            **overrides,
        }
    )
    return config


def endless_session(config: ConfigDict, devices: int | None = None) -> Session:
    """All devices, or so many, and a tokenizer without end tokens: every completion has full length."""
    checked = make_config(config)
    start_devices(checked)
    session = open_session(checked, jax.devices()[:devices])
    return dataclasses.replace(session, tokenizer=dataclasses.replace(session.tokenizer, end_ids=()))


def random_text(rng: np.random.Generator, session: Session, length: int) -> str:
    """``length`` tokens when it is encoded, the first token BOS."""
    count = session.model.config.vocab_size - SPECIAL_TOKENS
    return "".join(chr(FIRST_CHARACTER + i) for i in rng.integers(0, count, length - 1))


def online_stage(session: Session, rows: int = 64) -> Stage:
    """The main stage with random prompts, its reference frozen."""
    rng, config = np.random.default_rng(0), session.config
    texts = [random_text(rng, session, max(config.data.prompt_lengths)) for _ in range(rows)]
    source = PromptSource([{"prompt": t} for t in texts], session.tokenizer, config.data.prompt_lengths, seed=0)
    stage = build_stage(session, config, 0, source, RewardRunner([("random", random_reward, 1.0)], workers=1))
    if "ref_logprobs" in stage.algorithm.needs:
        stage.freeze("reference", session.base_params())
    return stage


def log_normal_lengths(rng: np.random.Generator, rows: int, mean: float, longest: int) -> np.ndarray:
    """Tokens of completions as answers have them: log-normal, the logarithm's deviation 1, cut at ``longest``."""
    return np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, rows), 1, longest).astype(np.int32)


# |log-prob that the sampler stored - that of scoring the same token|, of any token.
LARGEST_GAP = {"float32": 1e-4, "bfloat16": 0.2}


def check_rollout(session: Session, params: Any, rollout: Rollout, prompt: int) -> float:
    """The largest gap between the log-probs that a rollout stores and those of scoring its tokens, checked."""
    pieces = max(len(rollout.tokens) // 64, 1)
    score = make_score(session.forward(session.sampling(session.config)), prompt, pieces)
    scored = score(params, {"tokens": rollout.tokens, "valid": rollout.valid})
    gap = jnp.max(jnp.abs(jnp.where(rollout.loss_mask, scored - rollout.behavior_logprobs, 0)))
    return check("log-probs of sampler and trainer", float(gap), LARGEST_GAP[session.config.compute_dtype])


def different_rows(mine: Rollout, other: Rollout, dtype: str) -> float:
    """The share of rows whose tokens differ, by the same draws: rounding turns one of them now and then.

    In float32 it is checked. In bfloat16 a row may part from its twin anywhere; what has to hold is that up to there,
    and so in rows that never do, both store the same log-probs.
    """
    equal = np.asarray((mine.tokens == other.tokens).all(axis=1))
    gaps = np.abs(np.asarray(mine.behavior_logprobs - other.behavior_logprobs))
    alike = np.asarray(mine.loss_mask & (jnp.cumprod(mine.tokens == other.tokens, axis=1) > 0))
    check("log-probs of tokens that two paths have in common", float(gaps[alike].max(initial=0)), LARGEST_GAP[dtype])
    check("first tokens that two paths have in common: none", float(not alike.any()), 0)
    share = 1 - float(equal.mean())
    return check("rows that differ from the plain path", share, 0.05) if dtype == "float32" else share


def decode_bytes(session: Session, rows: int, prompt: int, completion: int, group: int = 1) -> float:
    """What writing whole completions has to read: the weights at every step, and the keys and values of each token's
    past, a prompt's once a group. The prompts' own pass is left out.
    """
    c, item = session.model.config, jnp.dtype(session.dtype).itemsize
    params = session.abstract_policy()
    read = {name: tree for name, tree in params.items() if name != "embed" or "lm_head" not in params}
    weights = item * sum(x.size for x in jax.tree.leaves(read))
    a_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * (4 if session.decode.on_cpu else item)
    past = prompt / group + (completion + 1) / 2
    return float(completion * (weights + rows * past * a_token))


def forward_flops(c: DecoderConfig, rows: int, length: int, head_tokens: int) -> float:
    """Of matrix products alone, 2 a multiply-add, causal attention as half; the head on ``head_tokens`` a row."""
    qo, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    body = c.num_layers * c.width * (2 * qo + 2 * kv + 3 * c.ffn_width)
    attention = c.num_layers * 2 * qo * length**2
    return rows * (2 * length * body + attention + 2 * head_tokens * c.vocab_size * c.width)


def rows_flops(c: DecoderConfig, valid: np.ndarray, head_tokens: np.ndarray) -> float:
    """The same of rows of different lengths, padding left out; both masks are [rows, columns]."""
    lengths, heads = valid.sum(axis=1).tolist(), head_tokens.sum(axis=1).tolist()
    return sum(forward_flops(c, 1, length, head) for length, head in zip(lengths, heads, strict=True))
