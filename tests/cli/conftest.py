"""A model that answers from a script, in the place of `fomoe.llm.LLM`."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.tiny_gguf import write_tiny
from typer.testing import CliRunner, Result

from fomoe import config
from fomoe.cli import make_app
from fomoe.engine.requests import (
    EngineStatus,
    Event,
    Finished,
    GenerateRequest,
    PromptProgress,
    Receipt,
    TokenEvent,
)

VOCAB = 256


class ByteTokenizer:
    """Token i is byte i; token 0 ends a turn."""

    eos_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def stream(self, *, skip_special: bool = False) -> Any:
        from fomoe.model.tokenizer import TokenStream

        return TokenStream(self.token_bytes, frozenset({0}) if skip_special else frozenset())


class ScriptedChat:
    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return list("|".join(f"{m['role']}:{m['content']}" for m in messages).encode())


class ScriptedEngine:
    """Says `reply` and records what it was asked; fails or is cut short where told to."""

    def __init__(self, reply: bytes = b"h\xc3\xb6", ctx_size: int = 64) -> None:
        self.reply = reply
        self.ctx_size = ctx_size
        self.asked: list[GenerateRequest] = []
        self.closed = 0
        self.failure = ""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        name = request.request_id
        try:
            yield PromptProgress(request_id=name, total=4, processed=4, cached=0, time_ms=1.0)
            for token in self.reply[: request.max_tokens]:
                yield TokenEvent(request_id=name, token=token)
            if self.failure:
                yield Finished(request_id=name, reason="error", error=self.failure)
            else:
                receipt = Receipt(generated_tokens=len(self.reply), generated_ms=100.0)
                yield Finished(request_id=name, reason="stop", stop_id=0, receipt=receipt)
        finally:
            self.closed += 1

    def status(self) -> EngineStatus:
        return EngineStatus(state="ready")


class ScriptedLLM:
    """Records how it was opened; `last` is the latest one."""

    last: ScriptedLLM
    prepare: Callable[[ScriptedLLM], None]

    def __init__(
        self, path: Path, *, on_progress: Callable[[float, str], None], **arguments: Any
    ) -> None:
        on_progress(0.5, "reading")
        self.path = path
        self.arguments = arguments
        self.engine = ScriptedEngine()
        self.tokenizer = ByteTokenizer()
        self.chat = ScriptedChat()
        self.is_open = True
        type(self).last = self
        type(self).prepare(self)

    def __enter__(self) -> ScriptedLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """The next byte is always the likelier: e against 1."""
        values = np.zeros((len(ids), VOCAB), np.float32)
        values[np.arange(len(ids)), (np.array(ids) + 1) % VOCAB] = 1.0
        return values


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(config.os.environ):
        if name.startswith("FOMOE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedLLM]:
    module = ModuleType("fomoe.llm")
    ScriptedLLM.prepare = lambda self: None
    module.LLM = ScriptedLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fomoe.llm", module)
    return ScriptedLLM


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model.gguf")


@pytest.fixture
def model(tmp_path: Path, tiny: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.symlink_to(tiny)
    return path


@pytest.fixture
def fomoe() -> Callable[..., Result]:
    """Runs the command line in this process."""
    runner = CliRunner()
    app = make_app()

    def call(*arguments: object, **options: Any) -> Result:
        return runner.invoke(app, [str(each) for each in arguments], **options)

    return call
