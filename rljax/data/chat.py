"""Chat templates and plain prompt templates: how a prompt is rendered, and which parts of a text are trained."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jinja2
from etils import epath

# For models that never saw a chat format. "reasoning" is table 1 of DeepSeek-R1 (arXiv 2501.12948).
PLAIN_TEMPLATES = {
    "question": "Question: {prompt}\nAnswer:",
    "reasoning": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: {prompt}. Assistant:"
    ),
}


class Template(NamedTuple):
    """How a prompt becomes text. Empty: texts stay as they are and messages use the tokenizer's own template."""

    plain: str | None = None  # contains {prompt}
    jinja: str | None = None  # a chat template; texts become one user turn
    system_prompt: str | None = None

    def is_chat(self, prompt: str | list[dict[str, Any]]) -> bool:
        return self.plain is None and (self.jinja is not None or not isinstance(prompt, str))

    def plain_text(self, prompt: str | list[dict[str, Any]]) -> str:
        if isinstance(prompt, str):
            text = prompt
        elif [message["role"] for message in prompt] == ["user"]:
            text = prompt[0]["content"]
        else:
            raise ValueError("a plain template takes one user message; use template='chat' for conversations")
        return text if self.plain is None else self.plain.replace("{prompt}", text)


def resolve_template(hf: Any, template: str | None, system_prompt: str | None) -> Template:
    """The template that a config names.

    None (texts as they are, messages through the tokenizer's template), "chat" (the tokenizer's template for both), a
    key of ``PLAIN_TEMPLATES``, a text that contains ``{prompt}``, or the path of a .jinja file.
    """
    if template is None and system_prompt is not None:
        template = "chat"
    if template is None:
        return Template()
    plain = PLAIN_TEMPLATES.get(template, template if "{prompt}" in template else None)
    if plain is not None:
        if system_prompt is not None:
            raise ValueError("a plain template has no place for system_prompt; write it into the template")
        return Template(plain=plain)
    if template == "chat":
        return Template(jinja=_own_template(hf), system_prompt=system_prompt)
    file = epath.Path(template)
    if file.suffix == ".jinja" and file.is_file():
        return Template(jinja=file.read_text(), system_prompt=system_prompt)
    raise ValueError(
        f"template {template!r} is none of 'chat', {', '.join(map(repr, PLAIN_TEMPLATES))}, a text with {{prompt}}, "
        "or an existing .jinja file"
    )


def render(hf: Any, template: Template, messages: list[dict[str, Any]], *, for_completion: bool = True) -> str:
    """A conversation as text, up to where the assistant speaks when ``for_completion``."""
    if template.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": template.system_prompt}, *messages]
    try:
        return hf.apply_chat_template(
            messages,
            chat_template=template.jinja or _own_template(hf),
            add_generation_prompt=for_completion,
            tokenize=False,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses a conversation: {error}") from error


def segments(
    hf: Any, template: Template, messages: list[dict[str, Any]], *, last_only: bool = False
) -> Iterator[tuple[str, bool]]:
    """A conversation cut into (text, is an assistant turn), the turn from where a rollout would start it.

    Raises ValueError where the template writes earlier turns differently once later ones follow (Qwen3 drops old
    thinking): what would be trained is then not what is sampled.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("a conversation without an assistant turn has nothing to train on")
    whole = render(hf, template, messages, for_completion=False)
    done = 0
    for i in turns[-1:] if last_only else turns:
        before = render(hf, template, messages[:i])
        after = render(hf, template, messages[: i + 1], for_completion=False)
        after = after if whole.startswith(after) else after.rstrip()  # some end the last turn with a line break only
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) <= len(after)):
            raise ValueError(
                f"the chat template rewrites message {i} when later ones follow, so its mask is not defined; "
                "give a template that keeps every prefix"
            )
        yield whole[done : len(before)], False
        yield whole[len(before) : len(after)], True
        done = len(after)
    if whole[done:]:
        yield whole[done:], False


def turn_end_id(hf: Any, template: Template) -> int | None:
    """The special token that ends an assistant turn; None without a chat template or where plain text ends it."""
    if template.plain is not None or (template.jinja is None and not hf.chat_template):
        return None
    content = "rljax"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    text = render(hf, template, messages, for_completion=False)
    tail = hf(text[text.rindex(content) + len(content) :], add_special_tokens=False).input_ids
    return next((i for i in tail if i in hf.all_special_ids), None)


def _own_template(hf: Any) -> str:
    if not hf.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; name a .jinja file, 'question', 'reasoning' or a text with {prompt}"
        )
    return hf.chat_template
