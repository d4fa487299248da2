"""The TL;DR reproduction's 25 details (2403.17031), one named test each: an option of ours, or what holds anyway."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.async_online_dpo import get_config as online_dpo_config
from configs.tldr import get_config as tldr_config
from rljax.algos import dpo, reward_model
from rljax.algos.scores import ScoreConfig, scores_of
from rljax.config import make_config
from rljax.data.arithmetic import make_comparisons, make_rows
from rljax.data.batches import DataPosition, PromptSource, SupervisedSource, draw
from rljax.data.preferences import PreferenceSource
from rljax.data.rows import DataError
from rljax.data.tldr import completion, main, query, to_row
from rljax.data.tokenizer import character_tokenizer
from rljax.evaluate_preferences import calibration_error, comparison_metrics
from rljax.forward import last_scores
from rljax.losses.masked import masked_mean, masked_var, whiten
from rljax.losses.reward_models import reward_bias
from rljax.models.params import init_params, init_scalar_head
from rljax.rewards.base import Sample, as_reward
from rljax.types import FINISH_END, FINISH_LENGTH, Experience, Outputs, Rollout
from tests.models.tiny import layout, tiny_model
from tests.truths import tiny_forward

POST = {"subreddit": "books", "title": "A title", "post": "one\ntwo\nthree", "summary": "short"}
TOKENIZER = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")


@cache
def recipe() -> Any:
    return make_config(tldr_config())


def scalar_model() -> Any:
    return tiny_model()._replace(scores=1)


def padded_rows(side: str) -> dict[str, np.ndarray]:
    """The same three rows of 3 to 7 tokens, padded to 9 on one side."""
    rng = np.random.default_rng(0)
    lengths, tokens, valid = (3, 7, 5), np.zeros((3, 9), np.int32), np.zeros((3, 9), bool)
    for row, length in enumerate(lengths):
        at = slice(9 - length, 9) if side == "left" else slice(0, length)
        tokens[row, at], valid[row, at] = rng.integers(3, 80, length), True
    return {"tokens": tokens, "valid": valid}


@cache
def scores(side: str) -> np.ndarray:
    forward = tiny_forward(scalar_model(), layout())
    params = init_params(scalar_model(), layout(), 0)
    rows = padded_rows(side)
    return np.asarray(last_scores(forward.scores(params, rows), jnp.asarray(rows["valid"])))


def test_detail_01_columns_of_a_post() -> None:
    with pytest.raises(DataError, match="has no 'title'"):
        query({"subreddit": "a", "post": "b"}, len)


def test_detail_02_the_query_is_cut_at_a_line_break() -> None:
    text = "SUBREDDIT: r/books\n\nTITLE: A title\n\nPOST: one\ntwo\nthree\n\nTL;DR:"
    assert query(POST, len, limit=len(text)) == text
    assert query(POST, len, limit=len(text) - 1) == text.replace("\nthree", "")
    with pytest.raises(DataError, match="no line break"):
        query(POST, len, limit=20)


def test_detail_03_a_completion_has_a_space_before_and_an_end_token_behind_that_is_trained() -> None:
    ids, mask = TOKENIZER.render_with_completion("TL;DR:", completion("short"))
    assert completion("short") == completion(" short") == " short"
    assert ids[-1] in TOKENIZER.end_ids and mask[-1] and sum(mask) == len(" short") + 1
    assert TOKENIZER.pad_id not in TOKENIZER.end_ids  # and were it: masks never come from ids
    source = SupervisedSource([{"prompt": "TL;DR:", "solution": " short"}], TOKENIZER, 20, 0)
    batch = source.take(DataPosition(), 1)[1]
    assert batch.loss_mask.sum() == len(" short") + 1 and not (batch.loss_mask & ~batch.valid).any()


def test_detail_04_lengths_of_summaries(tmp_path: Path) -> None:
    assert to_row({**POST, "summary": "x" * 51}, len) is not None  # with the space and the end token 53
    assert to_row({**POST, "summary": "x" * 52}, len) is None
    compared = {**POST, "summaries": [{"text": "y" * 167}, {"text": "z"}], "choice": 1}
    found = to_row(compared, len)
    assert found is not None and found["chosen"] == " z"
    assert to_row({**compared, "summaries": ["y" * 168, "z"]}, len) is None
    assert recipe().rollout.max_new_tokens == 53
    TOKENIZER.hf.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({**POST, "summary": "x" * n}) + "\n" for n in (5, 90)))
    places = [f"--{name}={tmp_path / file}" for name, file in (("input", "raw.jsonl"), ("output", "out/train.jsonl"))]
    assert main([*places, f"--tokenizer={tmp_path / 'tokenizer'}"]) == 0
    (row,) = map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())
    assert row == {"prompt": query(POST, len), "solution": " xxxxx"}


def test_detail_05_fixed_shapes() -> None:
    config = recipe()
    sft, pairs = config.stage("sft").data.row_length, config.stage("reward_model").data.row_length
    tokenizer = character_tokenizer("0123456789+-=;#")
    text = SupervisedSource(make_rows(split="train", count=8), tokenizer, sft, 0).take(DataPosition(), 4)[1]
    source = PreferenceSource(make_comparisons(split="train", count=8), tokenizer, pairs, 0, kind="pairs", unit=2)
    compared = source.take(DataPosition(), 4)[1]
    prompts = PromptSource(make_rows(split="train", count=8), tokenizer, config.data.prompt_lengths, 0)
    asked = prompts.take(DataPosition(), 4)[1]
    assert (text.tokens.shape, compared.tokens.shape, asked.tokens.shape) == ((4, 562), (8, 638), (4, 512))
    assert text.valid[:, 0].all() and compared.valid[:, 0].all()  # right-padded
    assert asked.valid[:, -1].all() and not asked.valid[:, 0].any()  # left-padded


def test_detail_06_comparisons_are_other_data_and_validated_on_articles_too() -> None:
    """CNN/DM's rows have an article; they are 1919 tokens and an answer of 102 at most: 2021 (detail 5)."""
    config = recipe()
    assert config.stage("reward_model").data.train != config.stage("sft").data.train
    row = {"article": "one\ntwo", "summaries": ["a b", "c"], "choice": 0}
    prompt = "Article:\n\none\ntwo\n\nTL;DR:"
    assert to_row(row, len) == {"prompt": prompt, "chosen": " a b", "rejected": " c"}
    assert query(row, len, limit=len(prompt) - 1) == prompt.replace("\ntwo", "")
    long = {"article": "x" * 1000 + "\n" + "y" * 1000}
    assert len(query(long, len)) <= 1919 and "y" not in query(long, len)
    rows = [{"prompt": "1" * 1919, "chosen": "2" * 100, "rejected": "3"}]
    tokenizer = character_tokenizer("0123456789+-=;#")
    source = PreferenceSource(rows, tokenizer, 2021, 0, kind="pairs", unit=2)
    assert source.take(DataPosition(), 1)[1].tokens.shape == (2, 2021)


def test_detail_07_nothing_is_dropped_out() -> None:
    """Two passes are equal to the bit; a pass takes no random key at all."""
    forward, params = tiny_forward(scalar_model(), layout()), init_params(scalar_model(), layout(), 0)
    passes = [np.asarray(forward.scores(params, padded_rows("left"))) for _ in range(2)]
    np.testing.assert_array_equal(*passes)


def test_detail_08_bfloat16_and_weights_in_shards() -> None:
    assert recipe().compute_dtype == "bfloat16" and recipe().mesh == "1,-1,1"  # fsdp takes all devices: ZeRO


def test_detail_09_sft_settings() -> None:
    sft = recipe().stage("sft")
    assert (sft.batch.rows, sft.batch.epochs, sft.steps) == (128, 1, 116_722 // 128)
    assert (sft.optim.name, sft.optim.learning_rate, sft.optim.eps, sft.optim.schedule) == (
        "adamw",
        3e-6,
        1e-5,
        "cosine",
    )


def test_detail_10_reward_model_settings() -> None:
    stage = recipe().stage("reward_model")
    assert (stage.batch.rows, stage.batch.epochs, stage.steps) == (64, 1, 92_858 // 64)
    assert stage.optim == recipe().stage("sft").optim


def test_detail_11_the_head_starts_normal_with_deviation_one_over_root_d_plus_one() -> None:
    """2,048 draws: their deviation is within 5 % of 1/sqrt(2049), 3 of its own standard errors of 1.6 %."""
    model = tiny_model(hidden_size=2048, num_hidden_layers=1, intermediate_size=8)._replace(scores=1)
    head = init_scalar_head(model, layout(), 0)
    weights = np.concatenate([np.ravel(x) for name, x in head.items() if "bias" not in name])
    assert weights.std() == pytest.approx(2049**-0.5, rel=0.05) and abs(weights.mean()) < 4 * 2049**-0.5 / 2048**0.5
    assert not np.asarray(head["score_bias"]).any()


def test_detail_12_the_score_is_read_at_the_end_token() -> None:
    values, valid = jnp.arange(8.0).reshape(2, 4), jnp.array([[True, True, False, False], [False, True, True, True]])
    assert last_scores(values, valid).tolist() == [1.0, 7.0]


def test_detail_13_other_positions_mean_nothing() -> None:
    algorithm = reward_model.make(reward_model.Config(loss="bradley_terry"), group_size=1, max_new_tokens=1)
    mask = jnp.array([[False, True, True], [False, True, False]])
    batch = {"loss_mask": mask, "scores": jnp.array([1.0, 0.0]), "answer_valid": jnp.array([True, True])}
    given = jnp.array([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    other = jnp.array([[9.0, -9.0, 2.0], [5.0, 1.0, 7.0]])
    losses = [algorithm.loss(Outputs(scores=x), batch)["preference"].numerator for x in (given, other)]
    np.testing.assert_allclose(losses, np.log1p(np.exp(-1.0)), rtol=1e-6)  # -log sigmoid(2 - 1)


def test_detail_14_padding_on_either_side_gives_one_score() -> None:
    """The authors see -5.4e-4 on average at 6.9B; positions here count real tokens, so only rounding is left."""
    np.testing.assert_allclose(scores("left"), scores("right"), atol=1e-5)


def test_detail_15_the_bias_makes_the_references_mean_0() -> None:
    assert recipe().stage("reward_model").critic.center_on  # a run does it at the end of the stage
    found = scores("right")
    bias = reward_bias(jnp.asarray(found), jnp.ones(3, bool))
    assert abs(np.mean(found + np.asarray(bias))) <= 1e-5


def test_detail_16_accuracy_by_batch_and_by_confidence() -> None:
    """Rewards 3 - 1, 0 - 2 and 1 - 0: two of three right; confidence, sigmoid |gap|: .8808, .8808 and .7311."""
    algorithm = reward_model.make(reward_model.Config(loss="bradley_terry"), group_size=1, max_new_tokens=1)
    rewards = jnp.array([[3.0], [1.0], [0.0], [2.0], [1.0], [0.0]])
    batch = {"loss_mask": jnp.ones((6, 1), bool), "scores": jnp.tile(jnp.array([1.0, 0.0]), 3)}
    terms = algorithm.loss(Outputs(scores=rewards), {**batch, "answer_valid": jnp.ones(6, bool)})
    np.testing.assert_allclose(terms["accuracy"].numerator, 2)
    np.testing.assert_allclose(terms["confidence"].numerator, 0.8808 + 0.8808 + 0.7311, atol=1e-4)


def test_detail_17_a_judge_sees_whole_groups() -> None:
    """Agreement with a judge: a reward with ``batch`` gets all samples of a call and can compare them."""

    class Judge:
        def batch(self, samples: list[Sample]) -> list[float]:
            best = max(samples, key=lambda sample: len(sample.completion))
            return [float(sample is best) for sample in samples]

    judged = as_reward(Judge())([Sample("p", text) for text in ("a", "abc", "ab")])
    assert [score.value for score in judged] == [0, 1, 0]


def test_detail_18_calibration_is_measured() -> None:
    """A model that is sure (gap 4, says .982) and right three times in four is off by .232."""
    assert calibration_error(np.full(4, 4.0), np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(0.982 - 0.75, abs=1e-3)


def test_detail_19_the_implicit_reward_of_dpo_is_validated_the_same_way() -> None:
    """β((l_w - ref_w) - (l_l - ref_l)) by hand: .1 · ((-1 + 2) - (-3 + 2)) = .2, and one pair of one right."""
    algorithm = dpo.make(dpo.Config(beta=0.1), group_size=1, max_new_tokens=1)
    batch = {"loss_mask": jnp.ones((2, 1), bool), "ref_logprobs": jnp.array([[-2.0], [-2.0]])}
    terms = algorithm.loss(Outputs(logprobs=jnp.array([[-1.0], [-3.0]])), batch)
    np.testing.assert_allclose([terms["margin"].numerator, terms["accuracy"].numerator], [0.2, 1.0], rtol=1e-6)
    rewards, better = np.array([[0.1, -0.1]]), np.array([[[False, True], [False, False]]])
    assert comparison_metrics(rewards, np.ones((1, 2)), better)["accuracy"] == 1


def test_detail_20_ppo_settings() -> None:
    c = recipe()
    assert (c.rollout.prompts_per_step, c.batch.epochs, c.batch.minibatches, c.steps) == (512, 4, 1, 1953)
    assert (c.algo.kl_coef, c.algo.gamma, c.algo.lam, c.algo.value_coef) == (0.05, 1.0, 0.95, 0.1)
    assert (c.optim.learning_rate, c.optim.schedule, c.optim.final_learning_rate) == (3e-6, "linear", 0.0)
    assert (c.rollout.temperature, c.eval.temperature) == (0.7, 0.01)


def test_detail_21_prompts_are_those_of_the_summaries_reshuffled() -> None:
    config = recipe()
    assert config.data.train == config.stage("sft").data.train
    assert config.steps * 512 / 116_722 == pytest.approx(8.56, abs=0.01)
    first, position = draw(DataPosition(), 50, size=50, seed=0)
    second, _ = draw(position, 50, size=50, seed=0)
    assert sorted(first) == sorted(second) == list(range(50)) and first.tolist() != second.tolist()


def test_detail_22_the_critic_starts_from_the_reward_model_and_the_policy_from_sft() -> None:
    config = recipe()
    assert (config.critic.init_from, config.init_from, config.reference_from) == ("reward_model", "sft", "start")


def test_detail_23_no_end_token_within_the_budget_scores_minus_1() -> None:
    nothing = np.zeros((2, 1))
    rollout = Rollout(*(nothing,) * 5, jnp.array([FINISH_END, FINISH_LENGTH]), *(nothing,) * 4)  # type: ignore[arg-type]
    experience = Experience(rollout, jnp.array([3.0, 5.0]), jnp.array([True, True]))
    config = ScoreConfig(missing_end="replace", missing_end_value=-1.0)
    np.testing.assert_array_equal(scores_of(config, experience), [3.0, -1.0])
    assert (recipe().algo.missing_end, recipe().algo.missing_end_value) == ("replace", -1.0)
    assert make_config(online_dpo_config()).algo.missing_end_value == -1.0


def test_detail_24_rewards_can_be_whitened_with_their_mean_kept() -> None:
    """[1, 2, 6]: mean 3, unbiased variance 7; (x - 3)/sqrt(7) + 3."""
    x, mask = jnp.array([1.0, 2.0, 6.0]), jnp.ones(3, bool)
    np.testing.assert_allclose(whiten(x, mask, shift_mean=False), (np.asarray(x) - 3) / 7**0.5 + 3, rtol=1e-6)
    assert recipe().algo.whiten_rewards is False


def test_detail_25_advantages_are_whitened() -> None:
    x, mask = jnp.array([1.0, 2.0, 6.0, 99.0]), jnp.array([True, True, True, False])
    whitened = whiten(x, mask)
    np.testing.assert_allclose([masked_mean(whitened, mask), masked_var(whitened, mask, ddof=1)], [0, 1], atol=1e-6)
    assert recipe().algo.whiten_advantages == "rollout"
    assert jax.tree.leaves(whitened)[0][3] == 0
