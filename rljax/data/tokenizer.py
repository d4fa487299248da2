"""Text to token ids and back: end tokens, exactly one BOS, prompts and conversations with their training masks."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rljax.data import chat

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A Hugging Face tokenizer with every choice that a trainer depends on made once and written down."""

    hf: Any
    end_ids: tuple[int, ...]  # each one ends a completion; the first is appended to supervised text
    pad_id: int  # any id: masks never come from ids
    bos_id: int | None
    add_bos: bool  # the tokenizer puts BOS before plain text
    dummy_prefix: bool  # SentencePiece style: encoding puts a space before the text and decoding strips it
    vocab_size: int  # largest id + 1, added tokens included
    template: chat.Template

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning, BOS exactly once, no end token."""
        return self._bos_once(self._ids(text))

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that stands behind other tokens: no BOS, no invented space."""
        if not self.dummy_prefix:
            return self._ids(text)
        return self._ids("\n" + text)[len(self._ids("\n")) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without a leading BOS and without end tokens at the end.

        Ids that do not start with BOS are a continuation: SentencePiece would drop their first space, it is kept.
        """
        ids = [int(i) for i in ids]
        continuation = self.dummy_prefix and ids[:1] != [self.bos_id]
        if ids and ids[0] == self.bos_id:
            ids = ids[1:]
        while ids and ids[-1] in self.end_ids:
            ids.pop()
        if continuation:
            anchor = self._ids("a")
            return self.hf.decode(anchor + ids, clean_up_tokenization_spaces=False)[1:]
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)

    def render(self, prompt: str | Messages) -> list[int]:
        """Ids of a prompt, a text or messages, up to the place where the completion starts."""
        if not self.template.is_chat(prompt):
            return self.encode(self.template.plain_text(prompt))
        return self._bos_once(self._ids(chat.render(self.hf, self.template, _as_messages(prompt))))

    def render_with_completion(self, prompt: str | Messages, completion: str) -> tuple[list[int], list[bool]]:
        """Ids of prompt + completion + end token, and the mask of what is trained: completion and end token."""
        if self.template.is_chat(prompt):
            messages = [*_as_messages(prompt), {"role": "assistant", "content": completion}]
            return self.render_conversation(messages, last_only=True)
        text = self.template.plain_text(prompt)
        prompt_ids, whole = self.encode(text), self.encode(text + completion)
        if whole[: len(prompt_ids)] == prompt_ids:
            completion_ids = whole[len(prompt_ids) :]
        else:  # a merge runs across the boundary; a rollout starts from the prompt's own ids
            completion_ids = self.encode_continuation(completion)
        completion_ids.append(self.end_ids[0])
        return prompt_ids + completion_ids, [False] * len(prompt_ids) + [True] * len(completion_ids)

    def render_conversation(self, messages: Messages, *, last_only: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a conversation and the mask of its assistant turns, each with the token that ends the turn."""
        ids: list[int] = []
        mask: list[bool] = []
        for text, trained in chat.segments(self.hf, self.template, messages, last_only=last_only):
            piece = self.encode_continuation(text) if ids else self._ids(text)
            ids += piece
            mask += self._trained_tokens(piece) if trained else [False] * len(piece)
        if messages[-1]["role"] == "assistant" and not any(i in self.end_ids for i in ids[_last_start(mask) :]):
            ids.append(self.end_ids[0])
            mask.append(True)
        head = self._leading_bos(ids)
        with_bos = self._bos_once(ids)
        return with_bos, [False] * (len(with_bos) - len(ids) + head) + mask[head:]

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self.hf(text, add_special_tokens=False).input_ids)
        except Exception as error:  # the Rust tokenizers raise plain Exception
            raise ValueError(f"the tokenizer cannot encode {text[:60]!r}: {error}") from error

    def _leading_bos(self, ids: list[int]) -> int:
        count = 0
        while count < len(ids) and ids[count] == self.bos_id:
            count += 1
        return count

    def _bos_once(self, ids: list[int]) -> list[int]:
        found = self._leading_bos(ids)
        if self.bos_id is None or not (found or self.add_bos):
            return ids
        return [self.bos_id, *ids[found:]]

    def _trained_tokens(self, piece: list[int]) -> list[bool]:
        """Everything up to the last end token of a turn; what a template writes behind it is never sampled."""
        ends = [k for k, i in enumerate(piece) if i in self.end_ids]
        stop = ends[-1] + 1 if ends else len(piece)
        return [k < stop for k in range(len(piece))]


def _as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _last_start(mask: list[bool]) -> int:
    """Where the last trained run of a mask starts; its length where nothing is trained."""
    stop = len(mask)
    while stop and not mask[stop - 1]:
        stop -= 1
    while stop and mask[stop - 1]:
        stop -= 1
    return stop if any(mask) else len(mask)


def load_tokenizer(
    path: str,
    *,
    embedding_size: int | None = None,
    end_tokens: Sequence[str | int] | None = None,
    template: str | None = None,
    system_prompt: str | None = None,
) -> Tokenizer:
    """The tokenizer of a local folder, a gs:// folder or a Hub name.

    End tokens are ``end_tokens``, or those of generation_config.json, or the tokenizer's own; without ``end_tokens``
    the token that ends a turn in the chat template joins them. ``template``: see ``chat.Template``.
    ``embedding_size`` is the number of rows of the model's embedding. Raises ValueError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _fetch(path, scratch)
        is_local = Path(folder).is_dir()
        if is_local and not any("token" in file.name or "vocab" in file.name for file in Path(folder).iterdir()):
            raise ValueError(f"{path} has no tokenizer.json; copy the model's tokenizer there or set tokenizer.path")
        try:
            hf = AutoTokenizer.from_pretrained(folder, local_files_only=is_local)  # a broken folder asks no network
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError by kind of damage
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if not is_local:
                reason = f"it is no local folder, and the Hub gives none of that name ({reason})"
            raise ValueError(f"no tokenizer can be read from {path}: {reason}") from error
        configured = list(end_tokens) if end_tokens is not None else _generation_end_ids(folder)
    return wrap_tokenizer(
        hf,
        name=path,
        embedding_size=embedding_size,
        end_tokens=configured,
        add_turn_end=end_tokens is None,
        template=template,
        system_prompt=system_prompt,
    )


def wrap_tokenizer(
    hf: Any,
    *,
    name: str,
    embedding_size: int | None = None,
    end_tokens: Sequence[str | int] = (),
    add_turn_end: bool = True,
    template: str | None = None,
    system_prompt: str | None = None,
) -> Tokenizer:
    """A ``Tokenizer`` around a loaded Hugging Face tokenizer; empty ``end_tokens`` means its own EOS."""
    vocab = hf.get_vocab()
    vocab_size = max(vocab.values()) + 1
    if embedding_size is not None and vocab_size > embedding_size:
        raise ValueError(
            f"the tokenizer {name} has ids up to {vocab_size - 1} but the model's embedding has {embedding_size} rows; "
            "use the tokenizer that belongs to the model"
        )
    chosen = chat.resolve_template(hf, template, system_prompt)
    end_ids = [_end_id(token, vocab, vocab_size, name) for token in end_tokens]
    if not end_ids and hf.eos_token_id is not None:
        end_ids = [hf.eos_token_id]
    turn_end = chat.turn_end_id(hf, chosen) if add_turn_end else None
    if turn_end is not None:
        end_ids.append(turn_end)
    if not end_ids:
        raise ValueError(f"the tokenizer {name} has no end token; name one with end_tokens")
    return Tokenizer(
        hf=hf,
        end_ids=tuple(dict.fromkeys(end_ids)),
        pad_id=hf.pad_token_id if hf.pad_token_id is not None else 0,
        bos_id=hf.bos_token_id,
        add_bos=hf.bos_token_id is not None and list(hf("").input_ids)[:1] == [hf.bos_token_id],
        dummy_prefix=_has_dummy_prefix(hf, vocab),
        vocab_size=vocab_size,
        template=chosen,
    )


def character_tokenizer(alphabet: str) -> Tokenizer:
    """One token a character of ``alphabet``, after ``<pad>`` 0, ``<bos>`` 1 and ``<eos>`` 2; made from nothing.

    ``.hf.save_pretrained(folder)`` writes it as ``load_tokenizer`` and ``transformers`` read it. A character outside
    the alphabet is a ValueError when it is encoded.
    """
    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"the alphabet {alphabet!r} has a character twice; name each once")
    special = ["<pad>", "<bos>", "<eos>"]
    backend = TokenizersTokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *alphabet])}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    return wrap_tokenizer(hf, name="of characters")


def _has_dummy_prefix(hf: Any, vocab: dict[str, int]) -> bool:
    if not any(token.startswith("▁") for token in vocab):
        return False
    first = hf("a", add_special_tokens=False).input_ids[0]
    return hf.convert_ids_to_tokens(first).startswith("▁")


def _end_id(token: str | int, vocab: dict[str, int], vocab_size: int, name: str) -> int:
    if isinstance(token, str) and token in vocab:
        return vocab[token]
    if isinstance(token, int) and 0 <= token < vocab_size:
        return token
    raise ValueError(f"end token {token!r} is not in the vocabulary of {name} ({vocab_size} ids); name one that is")


def _generation_end_ids(folder: str) -> list[int]:
    """``eos_token_id`` of generation_config.json, one or many; empty without the file."""
    if Path(folder).is_dir():
        file = Path(folder) / "generation_config.json"
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    else:
        try:
            ids = GenerationConfig.from_pretrained(folder).eos_token_id
        except OSError:  # the repository has no generation_config.json
            ids = None
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _fetch(path: str, scratch: str) -> str:
    """A remote folder's tokenizer files, copied to ``scratch``; local folders and Hub names as they are."""
    if "://" not in path:
        expanded = Path(path).expanduser()
        looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
        if looks_local and not expanded.is_dir():
            raise ValueError(f"tokenizer folder {path} does not exist")
        return str(expanded) if expanded.is_dir() else path
    source = epath.Path(path)
    if not source.is_dir():
        raise ValueError(f"tokenizer folder {path} does not exist")
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja"):
            file.copy(Path(scratch) / file.name)
    return scratch
