"""Losses and gradients of a whole model against torch on copied weights, leaf by leaf."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid

from rljax.algos import dpo, reward_model, sft
from rljax.algos.base import Algorithm, Batch, total
from rljax.forward import tree_outputs
from rljax.models.decoder import Model, Params
from rljax.models.hf import load_config, load_params
from tests.models.tiny import layout
from tests.truths import grpo_algorithm, random_batch, tiny_forward

HEAD_FROM, BUDGET, VOCAB = 5, 6, 83
LENGTHS = [(3, 4), (1, 2), (5, 6), (2, 6)]  # of prompts and completions: two pairs
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "num_labels": 1,
}
KL_COEF, BETA = 0.3, 0.5

Torch = dict[str, torch.Tensor]


def torch_logprobs(model: Any, batch: Torch) -> torch.Tensor:
    """Entry t is of token t; column 0 is 0."""
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["valid"], "position_ids": batch["positions"]}
    logprobs = model(**inputs).logits.log_softmax(-1)[:, :-1]
    chosen = logprobs.gather(2, batch["tokens"][:, 1:, None])[..., 0]
    return torch.nn.functional.pad(chosen, (1, 0))


def torch_sft(model: Any, batch: Torch) -> torch.Tensor:
    return -torch_logprobs(model, batch)[batch["loss_mask"]].mean()


def torch_dpo(model: Any, batch: Torch) -> torch.Tensor:
    gaps = ((torch_logprobs(model, batch) - batch["ref_logprobs"]) * batch["loss_mask"]).sum(1)
    return -logsigmoid(BETA * (gaps[0::2] - gaps[1::2])).mean()


def torch_grpo(model: Any, batch: Torch) -> torch.Tensor:
    """Clipped at 0.2, with k3 in the loss, a mean over tokens."""
    logprobs = torch_logprobs(model, batch)
    ratio, advantages = torch.exp(logprobs - batch["behavior_logprobs"]), batch["advantages"]
    surrogate = -torch.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
    behind = batch["ref_logprobs"] - logprobs
    return (surrogate + KL_COEF * (behind.exp() - behind - 1))[batch["loss_mask"]].mean()


def torch_reward_model(model: Any, batch: Torch) -> torch.Tensor:
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["valid"], "position_ids": batch["positions"]}
    scores = model.score(model.model(**inputs).last_hidden_state)[..., 0]
    rewards = torch.stack([scores[i, HEAD_FROM + completion - 1] for i, (_, completion) in enumerate(LENGTHS)])
    return -logsigmoid(rewards[0::2] - rewards[1::2]).mean()


NUMBERS = {"group_size": 2, "max_new_tokens": BUDGET}
CASES: dict[str, tuple[Algorithm, Callable[[Any, Torch], torch.Tensor]]] = {
    "sft": (sft.make(sft.Config(), **NUMBERS), torch_sft),
    "dpo": (dpo.make(dpo.Config(beta=BETA), **NUMBERS), torch_dpo),
    "grpo": (grpo_algorithm(kl_coef=KL_COEF, max_new_tokens=BUDGET), torch_grpo),
    "reward_model": (reward_model.make(reward_model.Config(loss="bradley_terry"), **NUMBERS), torch_reward_model),
}


def torch_model(scalar: bool) -> Any:
    kind = transformers.LlamaForSequenceClassification if scalar else transformers.LlamaForCausalLM
    torch.manual_seed(0)
    return kind(transformers.LlamaConfig(**SHAPE)).eval()


def imported(model: Any, folder: Path, scalar: bool, gradients: bool = False) -> tuple[Model, Params]:
    """A torch model's weights, or its gradients, under our names."""
    model.save_pretrained(folder / "model")
    if gradients:
        shutil.copytree(folder / "model", folder / "gradients")
        found = {name: weight.grad.float().contiguous() for name, weight in model.named_parameters()}
        save_file(found, folder / "gradients" / "model.safetensors")
    ours = load_config(folder / "model")._replace(scores=int(scalar))
    return ours, load_params(folder / ("gradients" if gradients else "model"), ours, layout())


def make_batch(model: Any, scalar: bool) -> tuple[Batch, Torch]:
    """For us in float32, for torch the same numbers in float64. Old policies are near: some ratios are clipped."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, VOCAB, LENGTHS, HEAD_FROM, BUDGET)
    batch |= {"scores": np.zeros(len(LENGTHS)), "answer_valid": np.ones(len(LENGTHS), bool)}
    batch["positions"] = np.maximum(np.cumsum(batch["valid"], axis=1) - 1, 0)
    if not scalar:
        with torch.no_grad():
            now = torch_logprobs(model, as_torch(batch)).numpy()
        for name in ("behavior_logprobs", "ref_logprobs"):
            batch[name] = now + rng.normal(0, 0.3, now.shape)
    batch = {name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in batch.items()}
    return batch, as_torch(batch)


def as_torch(batch: Batch) -> Torch:
    wide = {"f": np.float64, "i": np.int64, "b": bool}
    return {name: torch.from_numpy(x.astype(wide[x.dtype.kind])) for name, x in batch.items()}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_torch(name: str, tmp_path: Path) -> None:
    algorithm, theirs = CASES[name]
    (tree,) = algorithm.trains
    scalar = tree == "reward_model"
    reference = torch_model(scalar)
    model, params = imported(reference, tmp_path / "in", scalar)
    batch, wide = make_batch(reference.double(), scalar)

    def loss(params: Params, batch: Batch) -> jax.Array:
        outputs = tree_outputs({tree: tiny_forward(model, layout())}, algorithm, {tree: params}, batch, HEAD_FROM)
        _, prepared, denominators = algorithm.prepare(algorithm.init(), batch, jax.random.key(0))
        return total(algorithm.loss(outputs, prepared), denominators)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    expected = theirs(reference, wide)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    _, gradients = imported(reference.float(), tmp_path / "out", scalar, gradients=True)
    pairs = jax.tree.map(lambda a, b: (float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(b))), gradient, gradients)
    for path, (error, norm) in jax.tree.leaves_with_path(pairs, is_leaf=lambda x: isinstance(x, tuple)):
        assert error <= 1e-5 * norm, (jax.tree_util.keystr(path), error, norm)
        assert norm > 1e-4 or "score_bias" in jax.tree_util.keystr(path)  # which a difference of scores has not
