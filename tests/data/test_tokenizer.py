"""Ids, ends, BOS and masks on real tokenizers, against what transformers itself renders."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from rljax.data.arithmetic import ALPHABET
from rljax.data.tokenizer import character_tokenizer, load_tokenizer

pytestmark = pytest.mark.fast

STORIES = "models/stories260K-hf"
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
CONFIGS_OF_TOKENIZERS = {
    "qwen2": "Qwen--Qwen2-0.5B",
    "qwen3": "Qwen--Qwen3-8B",
    "olmo2-dolma2": "allenai--OLMo-2-1124-7B",
    "pythia": "EleutherAI--pythia-160m",
    "gpt2": "openai-community--gpt2",
}


def trained(tokenizer, ids, mask):
    return [tokenizer.hf.decode([i]) for i, m in zip(ids, mask, strict=True) if m]


@pytest.mark.parametrize(
    ("folder", "end_ids"),
    [
        (STORIES, (1, 2)),  # generation_config.json lists both
        ("models/babyllama361-hf", (1, 2)),
        ("models/tinystories656K-hf", (2,)),
        ("tokenizers/qwen3", (151645,)),
        ("tokenizers/mistral-v1-chatml", (32000,)),
        ("tokenizers/gpt2", (50256,)),
        ("tokenizers/pythia", (0,)),
    ],
)
def test_end_tokens_of_real_tokenizers(data_dir, folder, end_ids):
    assert load_tokenizer(str(data_dir / folder)).end_ids == end_ids


def test_end_tokens_by_config_win_over_the_files(data_dir):
    folder = str(data_dir / "tokenizers/qwen3")
    assert load_tokenizer(folder, end_tokens=["<|endoftext|>", 151645]).end_ids == (151643, 151645)
    with pytest.raises(ValueError, match=r"end token '<nope>' is not in the vocabulary"):
        load_tokenizer(folder, end_tokens=["<nope>"])


def test_turn_end_of_the_chat_template_stops_even_where_the_files_forget_it(data_dir, tmp_path):
    folder = tmp_path / "qwen"
    shutil.copytree(data_dir / "tokenizers/qwen3", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 151643}))
    assert load_tokenizer(str(folder)).end_ids == (151643, 151645)


@pytest.mark.parametrize("name", CONFIGS_OF_TOKENIZERS)
def test_vocabulary_fits_the_embedding_of_its_model(data_dir, name):
    config = json.loads((data_dir / "configs" / CONFIGS_OF_TOKENIZERS[name] / "config.json").read_text())
    tokenizer = load_tokenizer(str(data_dir / "tokenizers" / name), embedding_size=config["vocab_size"])
    with pytest.raises(ValueError, match=r"ids up to \d+ but the model's embedding has"):
        load_tokenizer(str(data_dir / "tokenizers" / name), embedding_size=tokenizer.vocab_size - 1)


def test_no_end_token_is_said(data_dir, tmp_path):
    folder = tmp_path / "endless"
    shutil.copytree(data_dir / STORIES, folder)
    (folder / "generation_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no end token; name one with end_tokens"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), end_tokens=["</s>"]).end_ids == (2,)


def test_missing_and_broken_folders_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^tokenizer folder /nowhere does not exist$"):
        load_tokenizer("/nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer.json; copy the model's tokenizer there or set tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no tokenizer can be read from") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_local", [True, False])
def test_a_local_folder_asks_no_network(tmp_path, monkeypatch, is_local):
    asked = []

    def refuse(folder, **options):
        asked.append(options["local_files_only"])
        raise ValueError("broken")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="broken"):
        load_tokenizer(str(tmp_path) if is_local else "somebody/model", embedding_size=10)
    assert asked == [is_local]


@pytest.mark.parametrize("folder", [STORIES, "models/tinystories656K-hf", "tokenizers/gpt2", "tokenizers/olmo2-dolma2"])
def test_prompt_and_completion_come_back_as_they_were(data_dir, folder):
    tokenizer = load_tokenizer(str(data_dir / folder))
    prompt, completion = "Once upon a time, there was", " a cat.\nShe sat"
    ids, mask = tokenizer.render_with_completion(prompt, completion)
    prompt_ids = tokenizer.render(prompt)
    assert ids[: len(prompt_ids)] == prompt_ids and not any(mask[: len(prompt_ids)]) and all(mask[len(prompt_ids) :])
    assert ids[-1] == tokenizer.end_ids[0]
    assert tokenizer.decode(prompt_ids) == prompt
    assert tokenizer.decode(ids[len(prompt_ids) :]) == completion


@pytest.mark.parametrize("folder", [STORIES, "tokenizers/gpt2"])
def test_a_merge_across_the_boundary_keeps_the_prompt_a_rollout_sees(data_dir, folder):
    tokenizer = load_tokenizer(str(data_dir / folder))
    prompt, completion = "Once upon a ti", "me"
    assert tokenizer.encode(prompt + completion)[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)
    ids, mask = tokenizer.render_with_completion(prompt, completion)
    assert ids[: len(ids) - sum(mask)] == tokenizer.render(prompt)
    assert tokenizer.decode(ids) == prompt + completion


def test_bos_is_there_exactly_once(data_dir):
    tokenizer = load_tokenizer(str(data_dir / STORIES))
    assert tokenizer.encode("Once").count(1) == 1
    assert tokenizer.encode("<s>Once") == tokenizer.encode("<s><s>Once")
    assert tokenizer.encode("<s>Once").count(1) == 1
    template = str(data_dir / "tokenizers/chat_templates/trl/llama3.jinja")  # writes bos_token itself
    chat = load_tokenizer(str(data_dir / STORIES), template=template)
    assert chat.render("Hi").count(1) == 1
    ids, mask = chat.render_conversation(TALK)
    assert ids[0] == 1 and ids[1:-1].count(1) == 0 and len(ids) == len(mask)  # the last one ends the last turn
    no_bos = load_tokenizer(str(data_dir / STORIES), template=str(data_dir / "tokenizers/chat_templates/tulu.jinja"))
    assert no_bos.render("Hi")[0] == 1  # the template does not write it, the tokenizer's own rule adds it


def test_tokenizers_without_bos_get_none(data_dir):
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/qwen3"))
    assert tokenizer.bos_id is None and tokenizer.encode("Hi") == tokenizer.hf("Hi").input_ids


def test_end_tokens_are_decoded_away_at_the_end_only(data_dir):
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/qwen3"))
    inside, end = tokenizer.encode("a<|im_end|>b"), 151645
    assert tokenizer.decode([*inside, end]) == "a<|im_end|>b"


@pytest.mark.parametrize("name", ["qwen2", "mistral-v1-chatml", "olmo2-dolma2"])
def test_assistant_mask_covers_every_turn_and_its_end(data_dir, name):
    tokenizer = load_tokenizer(str(data_dir / "tokenizers" / name))
    ids, mask = tokenizer.render_conversation(TALK)
    assert ids == list(tokenizer.hf.apply_chat_template(TALK, tokenize=True, return_dict=False))
    end = tokenizer.hf.decode([tokenizer.end_ids[-1]])
    assert trained(tokenizer, ids, mask) == ["Hello", ".", end, "4", end]
    prompt = tokenizer.render(TALK[:3])
    ids, mask = tokenizer.render_conversation(TALK, last_only=True)
    assert ids[: len(prompt)] == prompt and trained(tokenizer, ids, mask) == ["4", end]


def test_template_that_rewrites_history_is_refused(data_dir):
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/qwen3"))
    with pytest.raises(ValueError, match="rewrites message 1 when later ones follow"):
        tokenizer.render_conversation(TALK)
    ids, mask = tokenizer.render_conversation(TALK, last_only=True)
    assert trained(tokenizer, ids, mask)[-2:] == ["4", "<|im_end|>"]
    fixed = str(data_dir / "tokenizers/chat_templates/trl/qwen3_training.jinja")
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/qwen3"), template=fixed)
    ids, mask = tokenizer.render_conversation(TALK)
    assert trained(tokenizer, ids, mask).count("<|im_end|>") == 2


def test_template_without_turn_end_gets_the_end_token(data_dir):
    template = str(data_dir / "tokenizers/chat_templates/trl/gemma.jinja")
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/gpt2"), template=template)
    ids, mask = tokenizer.render_conversation(TALK)
    assert ids[-1] == 50256 and mask[-1]


def test_system_prompt_and_chat_for_plain_texts(data_dir):
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/qwen2"), system_prompt="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer.render("Hi") == list(expected)
    own = tokenizer.hf.decode(tokenizer.render([{"role": "system", "content": "Be long."}, messages[1]]))
    assert "Be long." in own and "Be brief." not in own  # a row's own system turn goes before the config's


def test_plain_templates(data_dir):
    folder = str(data_dir / STORIES)
    tokenizer = load_tokenizer(folder, template="Q: {prompt}\nA: \\boxed{}")
    assert tokenizer.decode(tokenizer.render("1+1")) == "Q: 1+1\nA: \\boxed{}"
    assert tokenizer.render([{"role": "user", "content": "1+1"}]) == tokenizer.render("1+1")
    assert "<think>" in load_tokenizer(folder, template="reasoning").template.plain_text("1+1")
    for wrong, message in [
        ("nope", "is none of 'chat', 'question', 'reasoning'"),
        ("chat", "the tokenizer has no chat template"),
        ("missing.jinja", "or an existing .jinja file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(folder, template=wrong)
    with pytest.raises(ValueError, match="no place for system_prompt"):
        load_tokenizer(folder, template="question", system_prompt="Be brief.")


def test_pad_may_be_absent(data_dir):
    tokenizer = load_tokenizer(str(data_dir / STORIES))
    assert tokenizer.hf.pad_token_id is None and 0 <= tokenizer.pad_id < tokenizer.vocab_size


def test_character_tokenizer_is_one_id_a_character_and_survives_saving(tmp_path):
    tokenizer = character_tokenizer(ALPHABET + "\n ")
    text = "12+3=\n #"
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and len(ids) == len(text) + 1 and tokenizer.decode(ids) == text
    assert tokenizer.end_ids == (2,) and tokenizer.vocab_size == 3 + len(ALPHABET) + 2
    tokenizer.hf.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode(text) == ids and again.end_ids == (2,) and again.add_bos and again.decode([*ids, 2]) == text
    with pytest.raises(ValueError, match=r"cannot encode '1x2'"):
        tokenizer.encode("1x2")
    with pytest.raises(ValueError, match="has a character twice"):
        character_tokenizer("aba")
