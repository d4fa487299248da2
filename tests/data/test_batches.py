"""Shapes, order, position, masks: what a run reads from its data."""

import dataclasses

import numpy as np
import pytest

from rljax.data import arithmetic
from rljax.data.batches import NO_LIMIT, DataPosition, Kept, PromptSource, SupervisedSource, draw, repeat_prompts
from rljax.data.rows import DataError, load_rows
from rljax.data.tokenizer import character_tokenizer, load_tokenizer

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def digits():
    return character_tokenizer(arithmetic.ALPHABET)


def prompts_of_lengths(*lengths):
    return [{"prompt": "1" * length} for length in lengths]


def test_an_epoch_is_a_permutation_and_a_batch_may_cross_it():
    position, seen = DataPosition(), []
    for _ in range(7):
        picked, position = draw(position, 3, size=10, seed=5)
        seen += list(picked)
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20] and position == DataPosition(2, 1)


def test_order_is_a_function_of_seed_and_epoch():
    whole, end = draw(DataPosition(3, 0), 10, size=10, seed=7)
    tail, end_of_tail = draw(DataPosition(3, 4), 6, size=10, seed=7)
    assert list(tail) == list(whole[4:]) and end == end_of_tail == DataPosition(4, 0)
    assert list(draw(DataPosition(3, 0), 10, size=10, seed=8)[0]) != list(whole)


def test_a_batch_larger_than_the_data():
    picked, position = draw(DataPosition(0, 2), 8, size=3, seed=0)
    assert len(picked) == 8 and position == DataPosition(3, 1)


def test_prompts_are_left_padded_to_the_smallest_length_that_fits(digits):
    rows = prompts_of_lengths(2, 3, 7)  # BOS makes them 3, 4, 8 tokens
    source = PromptSource(rows, digits, (8, 4), seed=0, shuffle=False)
    picked, batch, position = source.take(DataPosition(), 2)
    assert picked == rows[:2] and position == DataPosition(0, 2)
    one = digits.encode("1")[1]
    np.testing.assert_array_equal(batch.tokens, [[0, 1, one, one], [1, one, one, one]])
    np.testing.assert_array_equal(batch.valid, [[False, True, True, True], [True] * 4])
    assert source.take(position, 1)[1].tokens.shape == (1, 8)


def test_the_first_token_is_not_trained_where_no_bos_stands_before_it(digits):
    """Nothing predicts it, so it must not count among the tokens of the loss. Here: 1 2 3 <eos>."""
    plain = dataclasses.replace(digits, add_bos=False)
    source = SupervisedSource([{"text": "123"}], plain, 6, seed=0)
    batch = source.take(DataPosition(), 1)[1]
    np.testing.assert_array_equal(batch.valid, [[True] * 4 + [False] * 2])
    np.testing.assert_array_equal(batch.loss_mask, [[False, True, True, True, False, False]])
    with_bos = SupervisedSource([{"text": "123"}], digits, 6, seed=0).take(DataPosition(), 1)[1]
    np.testing.assert_array_equal(with_bos.loss_mask, [[False, True, True, True, True, False]])


def test_a_prompt_without_a_token_is_refused(digits):
    """It would be taken for padding, and nobody would complete it."""
    rows = [{"prompt": "1"}, {"prompt": ""}]
    assert len(PromptSource(rows, digits, (4,), seed=0)) == 2  # BOS
    with pytest.raises(DataError, match=r"the prompt of row 1 has no token"):
        PromptSource(rows, dataclasses.replace(digits, add_bos=False), (4,), seed=0)


def test_masks_do_not_come_from_ids(data_dir):
    tokenizer = load_tokenizer(str(data_dir / "models/stories260K-hf"))  # pad 0 is <unk>
    source = PromptSource([{"prompt": "<unk> a"}, {"prompt": "Once upon a time"}], tokenizer, (16,), 0, shuffle=False)
    batch = source.take(DataPosition(), 2)[1]
    assert batch.valid[0].sum() == len(tokenizer.encode("<unk> a")) > (batch.tokens[0] != tokenizer.pad_id).sum()


def test_long_prompts_are_counted_and_never_cut(digits):
    rows = prompts_of_lengths(2, 30, 3, 40)
    source = PromptSource(rows, digits, (4, 8), seed=0, shuffle=False)
    assert source.rows == [rows[0], rows[2]] and list(source.prompt_ids) == [0, 2]
    assert source.kept == Kept(rows=2, dropped=2, longest=41, limit=8)
    assert str(source.kept) == "2 rows kept, 2 dropped as longer than 8 tokens (longest 41)"
    with pytest.raises(DataError, match=r"row 1 has 31 tokens, the limit is 8"):
        PromptSource(rows, digits, (4, 8), seed=0, too_long="error")
    with pytest.raises(DataError, match=r"none of 4 rows fits 2 tokens, the longest has 41"):
        PromptSource(rows, digits, (2,), seed=0)


def test_rows_may_bring_their_own_budget(digits):
    rows = [{"prompt": "1" * 30}, {"prompt": "1", "max_new_tokens": 7}, {"prompt": "2"}]  # the first is dropped
    source = PromptSource(rows, digits, (8,), seed=0, shuffle=False)
    batch = source.take(DataPosition(), 2)[1]
    np.testing.assert_array_equal(batch.max_new_tokens, [7, NO_LIMIT])
    np.testing.assert_array_equal(repeat_prompts(batch, 2).max_new_tokens, [7, 7, NO_LIMIT, NO_LIMIT])
    assert PromptSource(rows[2:], digits, (8,), seed=0).take(DataPosition(), 1)[1].max_new_tokens is None
    for wrong in (0, 1.5, "many"):
        with pytest.raises(DataError, match="max_new_tokens of row 1 is"):
            PromptSource([{"prompt": "1"}, {"prompt": "1", "max_new_tokens": wrong}], digits, (8,), seed=0)


def test_prompt_id_names_the_row_wherever_it_stands(digits):
    rows = arithmetic.make_rows(split="train", count=40)
    source = PromptSource(rows, digits, (16,), seed=1)
    picked, batch, _ = source.take(DataPosition(0, 30), 20)
    assert [rows[i] for i in batch.prompt_id] == picked


def test_copies_of_a_prompt_in_one_batch_have_other_samples(digits):
    source = PromptSource(prompts_of_lengths(1, 2), digits, (4,), seed=0)
    batch = source.take(DataPosition(), 4)[1]
    group = repeat_prompts(batch, 3)
    assert group.tokens.shape == (12, 4) and list(group.prompt_id[:3]) == [batch.prompt_id[0]] * 3
    identities = list(zip(group.prompt_id, group.sample_id, strict=True))
    assert len(set(identities)) == 12
    assert list(group.sample_id[:3]) == [0, 1, 2]


def test_rows_without_a_prompt_or_with_its_answer_are_named(digits):
    with pytest.raises(DataError, match="row 1 has neither 'prompt' nor 'messages'; it has question"):
        PromptSource([{"prompt": "1"}, {"question": "1"}], digits, (4,), seed=0)
    answered = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}]
    with pytest.raises(DataError, match="the prompt of row 0 has to end with a turn that the assistant answers"):
        PromptSource(answered, digits, (4,), seed=0)
    with pytest.raises(DataError, match="row 1 cannot be encoded: the tokenizer cannot encode 'x'"):
        PromptSource([{"prompt": "1"}, {"prompt": "x"}], digits, (4,), seed=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 7}, "prompt of row 1 is 7; it is a text, or a list of messages, each with 'role' and 'content'"),
        ({"messages": 7}, "messages of row 1 is 7; it is"),
        ({"messages": [{"content": "1"}]}, "messages of row 1 is .*'role' and 'content'"),
        ({"prompt": ["1"] * 40}, r"prompt of row 1 is \['1', .*\.\.\.; it is"),
    ],
)
def test_a_prompt_that_is_no_text_is_named(digits, row, message):
    with pytest.raises(DataError, match=message):
        PromptSource([{"prompt": "1"}, row], digits, (4,), seed=0)


def test_supervised_batch_by_hand(digits):
    rows = [{"prompt": "1+1=", "solution": "#2"}, {"prompt": "1+1+1=", "solution": "1+1=2;2+1=3;#3"}]
    source = SupervisedSource(rows, digits, 10, seed=0)
    assert source.kept == Kept(rows=1, dropped=1, longest=22, limit=10)
    picked, batch, position = source.take(DataPosition(), 2)  # one row: the second epoch starts in the batch
    assert picked == [rows[0]] * 2 and position == DataPosition(2, 0)
    ids = [1, *digits.encode("1+1=#2")[1:], 2]  # BOS, text, end token
    np.testing.assert_array_equal(batch.tokens[0], [*ids, 0, 0])
    np.testing.assert_array_equal(batch.valid[0], [True] * 8 + [False] * 2)
    np.testing.assert_array_equal(batch.loss_mask[0], [False] * 5 + [True] * 3 + [False] * 2)
    assert batch.tokens.dtype == np.int32 and batch.loss_mask.dtype == bool and list(batch.row_id) == [0, 0]


def test_whole_texts_are_trained_but_for_bos(digits):
    source = SupervisedSource([{"text": "1+1=2"}], digits, 8, seed=0)
    batch = source.take(DataPosition(), 1)[1]
    np.testing.assert_array_equal(batch.loss_mask[0], [False] + [True] * 6 + [False])


def test_supervised_conversations_train_every_assistant_turn(data_dir):
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/qwen2"))
    rows = [row for row in load_rows(str(data_dir / "datasets/prefs/kto_en_demo.json")) if len(row["messages"]) > 1]
    source = SupervisedSource(rows, tokenizer, 256, seed=0)
    assert source.kept.rows + source.kept.dropped == len(rows) and source.kept.dropped > 0
    picked, batch, _ = source.take(DataPosition(), 16)
    for row, tokens, mask in zip(picked, batch.tokens, batch.loss_mask, strict=True):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert tokenizer.hf.decode(tokens[mask]) == "".join(answer + "<|im_end|>" for answer in answers)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1"}, "row 0 has neither 'prompt' with 'solution', nor 'messages', nor 'text'"),
        ({"prompt": "1", "solution": 2}, "solution of row 0 is 2; it is a text"),
        ({"messages": [{"role": "user"}]}, r"messages of row 0 is \[{'role': 'user'}\]; it is a text"),
        ({"text": 1}, "text of row 0 is 1; it is a text"),
    ],
)
def test_a_supervised_row_without_text_to_learn_is_named(digits, row, message):
    with pytest.raises(DataError, match=message):
        SupervisedSource([row], digits, 4, seed=0)


def test_real_prompts_with_a_chat_template(data_dir):
    rows = load_rows(str(data_dir / "datasets/gsm8k"), "test", columns={"prompt": "question"})
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/qwen2"), template="chat")
    source = PromptSource(rows, tokenizer, (96, 160), seed=0)
    assert source.kept.rows + source.kept.dropped == 1319
    picked, batch, _ = source.take(DataPosition(), 32)
    assert batch.tokens.shape in ((32, 96), (32, 160))
    for row, tokens, valid in zip(picked, batch.tokens, batch.valid, strict=True):
        assert tokenizer.decode(tokens[valid]).endswith(f"{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        assert valid[-1] and (np.diff(valid.astype(int)) >= 0).all()
