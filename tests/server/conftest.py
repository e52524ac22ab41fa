from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from server_harness import THINKING_TEMPLATE, Server, saying
from support.fake_gguf import metadata_of
from support.small_vocab import small_tokenizer, small_values

from fomoe.model.chat import ChatTemplate


def template_of(source: str) -> ChatTemplate:
    values = small_values() | {"tokenizer.chat_template": source}
    return ChatTemplate.from_gguf(metadata_of(values), small_tokenizer())


@pytest.fixture(scope="session")
def template() -> Iterator[ChatTemplate]:
    chat = template_of(THINKING_TEMPLATE)
    yield chat
    chat.close()


@pytest.fixture(scope="session")
def tool_template() -> Iterator[ChatTemplate]:
    chat = template_of(THINKING_TEMPLATE + "{# writes <tool_call> #}")
    yield chat
    chat.close()


@pytest.fixture
def serve(template: ChatTemplate) -> Callable[..., Server]:
    def make(said: Any = "Hello there", engine: FakeEngine | None = None, **info: Any) -> Server:
        script = saying(said) if isinstance(said, str) else said
        chat = info.pop("template", template)
        return Server(engine or FakeEngine(script), chat, **info)

    return make
