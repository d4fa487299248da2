"""Names become rewards, rows choose their verifiers, and a wrong name is one sentence."""

import functools

import pytest

from rljax.rewards import REWARDS, VERIFIERS, RewardRunner, Sample, as_reward, load_reward
from rljax.rewards.verifiers import verify

pytestmark = pytest.mark.fast

OPTIONS = {"overlong": {"max_new_tokens": 8, "buffer_tokens": 2}, "length_cost": {"per_token": 0.1}}


def test_every_registered_reward_has_a_form_and_a_docstring():
    for name in REWARDS:
        reward = load_reward(name, **OPTIONS.get(name, {}))
        as_reward(reward)
        assert (reward.func if isinstance(reward, functools.partial) else reward).__doc__


def test_registered_rewards_go_to_processes():
    rewards = [(name, load_reward(name, **OPTIONS.get(name, {})), 1.0) for name in REWARDS if name != "ifeval"]
    row = {"dataset": "gsm8k", "answer": "4", "numbers": [4], "target": 4, "words": ["so"], "corpus": __file__}
    samples = [Sample("", "so #### 4", token_ids=range(4), row=row)]
    with RewardRunner(rewards, workers=1, timeout_s=60, processes=True) as runner:
        scored = runner.score(samples)
    with RewardRunner(rewards, workers=1, timeout_s=60) as runner:
        assert runner.score(samples) == scored
    assert scored.failures == []
    assert scored.parts[0]["gsm8k"] == scored.parts[0]["verify/gsm8k"] == 1.0


def test_package_module_function():
    assert load_reward("rljax.rewards.math:gsm8k") is REWARDS["gsm8k"]
    size = load_reward("tests.rewards.hostile:GroupSize")
    assert [score.value for score in as_reward(size)([Sample("", ""), Sample("", "")])] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gms8k", {}, "there is no reward 'gms8k'; the nearest is 'gsm8k'"),
        ("", {}, "there is no reward ''; the nearest is "),
        ("rljax.rewards.math:gsm8", {}, "there is no reward in rljax.rewards.math 'gsm8'; the nearest is 'gsm8k'"),
        ("no.such.module:f", {}, "reward 'no.such.module:f': cannot import 'no.such.module' .ModuleNotFoundError"),
        ("overlong", {"max_new_token": 8}, "no option of overlong 'max_new_token'; the nearest is 'max_new_tokens'"),
        ("finished", {"sample": 1}, "there is no option of finished 'sample'; it has none"),
        ("overlong", {"max_new_tokens": 8}, "reward overlong needs the option 'buffer_tokens'"),
        ("rljax.rewards.math:last_number", {}, None),
        ("rljax.rewards.latex:same_answer", {}, "same_answer.* has a form that is not known"),
    ],
)
def test_wrong_names_are_one_sentence(name, options, message):
    if message is None:
        load_reward(name, **options)  # any function of one argument has the form f(sample)
        return
    with pytest.raises(ValueError, match=message) as error:
        load_reward(name, **options)
    assert "\n" not in str(error.value)


def test_a_row_chooses_its_verifier():
    rows = {
        "gsm8k": ({"answer": "7 #### 18"}, "so 18", "so 17"),
        "math": ({"answer": r"\frac12"}, r"\boxed{0.5}", r"\boxed{2}"),
        "arithmetic": ({"answer": "5"}, "2+3=5", "2+3=6"),
        "countdown": ({"numbers": [2, 3], "target": 5}, "2+3", "2*3"),
        "stories": ({"words": ["cat"]}, "A cat sat.", "A dog sat."),
    }
    for name, (row, right, wrong) in rows.items():
        row = {"dataset": name, **row}
        assert verify(Sample("", right, row=row))[:2] == (1.0, True), name
        assert verify(Sample("", wrong, row=row))[:2] == (0.0, False), name
    assert {"gsm8k", "math500", "aime24", "amc23", "svamp", "ifeval"} < set(VERIFIERS)


def test_several_verifiers_are_a_weighted_sum():
    row = {"dataset": ["gsm8k", "stories"], "weight": [2.0, 0.5], "answer": 3, "words": ["cat", "moon"]}
    score = verify(Sample("", "One cat, 3 dogs.", row=row))
    # gsm8k 1, story words 1/2 of (finished 1 + unrepeated 1) / 2: 2·1 + 0.5·0.5
    assert (score.value, score.correct, score.answer) == (2.25, False, "3")
    assert score.parts["gsm8k"] == 1.0 and score.parts["stories"] == 0.5 and score.parts["stories/words"] == 0.5
    assert verify(Sample("", "3", row={"dataset": "gsm8k", "answer": 3, "weight": 10})).value == 10.0


def test_verifiers_do_not_read_thoughts():
    row = {"dataset": "gsm8k", "answer": "4"}
    assert verify(Sample("", "<think>4</think> It is 5.", row=row)).value == 0.0
    assert verify(Sample("", "<think>5</think> <answer>4</answer>", row=row)).value == 1.0
    assert verify(Sample("Q <think>", "is it 4", row=row)).value == 0.0


def test_verifier_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="there is no verifier 'gsm8'; the nearest is 'gsm8k'"):
        verify(Sample("", "", row={"dataset": "gsm8"}))
    with pytest.raises(ValueError, match="verify needs the column 'dataset'"):
        verify(Sample("", ""))
    with pytest.raises(ValueError, match=r"names 2 verifiers .gsm8k, math. and 1 weights"):
        verify(Sample("", "", row={"dataset": ["gsm8k", "math"], "weight": [1.0]}))
    with pytest.raises(ValueError, match="needs the column 'answer'"):
        verify(Sample("", "", row={"dataset": "gsm8k"}))


def test_importing_rewards_imports_no_jax():
    import subprocess
    import sys

    program = "import sys, rljax.rewards, rljax.rewards.estimates; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
