"""Chat messages to prompt tokens, through the template that the model file brings along.

What the template writes may hold special tokens; what a client wrote never does. Before rendering,
a private-use character (the shield) goes behind every character of the client's strings that could
begin a special text, so that none can match; the tokenizer drops the shields again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fomoe.errors import RequestError
from fomoe.gguf.metadata import Metadata
from fomoe.model.chat_messages import (
    map_strings,
    normalise_messages,
    normalise_options,
    normalise_tools,
)
from fomoe.model.chat_render import RenderLimits, TemplateError, TemplateRenderer
from fomoe.model.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 1 << 20
MIN_OUTPUT_BYTES = 64 << 10
BYTES_PER_TOKEN = 8
DEFAULT_CTX_SIZE = 262144
SHIELDS = range(0xF0000, 0xFFFFE)

# For files without a template whose vocabulary has the ChatML marks.
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

_KEY = "tokenizer.chat_template"


class ChatTemplate:
    """A model's chat template; `source` is empty where the model has none."""

    def __init__(self, source: str, tokenizer: Tokenizer, limits: RenderLimits) -> None:
        self.source = source
        self._tokenizer = tokenizer
        self._renderer = TemplateRenderer(source, limits) if source else None
        first = {re.escape(text[0]) for text in tokenizer.special_ids}
        self._openers = re.compile("|".join(sorted(first)) or r"(?!)")
        self._source_chars = frozenset(source)

    @classmethod
    def from_gguf(
        cls, metadata: Metadata, tokenizer: Tokenizer, *, ctx_size: int = DEFAULT_CTX_SIZE
    ) -> ChatTemplate:
        """Take the template of a model file.

        Args:
            metadata: The file's key-value pairs.
            tokenizer: The tokenizer of the same file.
            ctx_size: Tokens of context; a prompt may render to 8 bytes for each.

        Raises:
            GGUFError: the template is too long or does not compile.
        """
        chatml = CHATML if "<|im_start|>" in tokenizer.special_ids else ""
        source = metadata.str(_KEY) if _KEY in metadata else chatml
        if len(source) > MAX_SOURCE_CHARS:
            metadata.refuse(_KEY, f"{len(source):,} characters, at most {MAX_SOURCE_CHARS:,}")
        limits = RenderLimits(max_bytes=max(MIN_OUTPUT_BYTES, BYTES_PER_TOKEN * ctx_size))
        try:
            return cls(source, tokenizer, limits)
        except TemplateError as error:
            metadata.refuse(_KEY, f"the template is broken: {error}")

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Return the prompt of a conversation.

        Args:
            messages: OpenAI-style messages.
            tools: OpenAI-style tools, shown to the model by the template.
            add_generation_prompt: End with the beginning of the assistant's turn.
            options: `enable_thinking`, `preserve_thinking` and `reasoning_effort`, for templates
                that know them.

        Raises:
            RequestError: the messages are malformed, or the template refuses them or is too slow.
        """
        if self._renderer is None:
            raise RequestError(
                "the model file has no chat template; use /v1/completions", "messages"
            )
        thinking = "</think>" in self.source
        variables: dict[str, Any] = {
            "messages": normalise_messages(messages, split_thinking=thinking),
            "tools": normalise_tools(tools),
            "documents": None,
            **normalise_options(options),
        }
        shield = self._free_shield(variables)
        variables = map_strings(variables, lambda text: self._openers.sub(rf"\g<0>{shield}", text))
        tokenizer = self._tokenizer
        variables["add_generation_prompt"] = add_generation_prompt
        variables["bos_token"] = tokenizer.special_text(tokenizer.bos_id)
        variables["eos_token"] = tokenizer.special_text(tokenizer.eos_id)
        try:
            rendered = self._renderer.render(variables)
        except RequestError as error:
            raise RequestError(str(error).replace(shield, ""), error.param) from None
        ids = tokenizer.encode_special(rendered, shield=shield)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def close(self) -> None:
        """End the rendering process."""
        if self._renderer is not None:
            self._renderer.close()

    def _free_shield(self, variables: dict[str, Any]) -> str:
        """Return a private-use character that occurs neither in the data nor in the template."""
        used = set(self._source_chars)

        def collect(text: str) -> str:
            used.update(text)
            return text

        map_strings(variables, collect)
        halves = [char for char in used if 0xD800 <= ord(char) <= 0xDFFF]
        if halves:
            raise RequestError(
                f"the messages hold U+{ord(halves[0]):04X}, half of a surrogate pair; send valid "
                "Unicode",
                "messages",
            )
        for code in SHIELDS:
            if chr(code) not in used:
                return chr(code)
        raise RequestError("the messages use every character of a private-use plane", "messages")
