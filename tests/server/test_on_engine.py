"""The server on the real engine, whose actors are threads here, over a small random model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_harness import frames, listening, wait_until
from support.local_engine import local_engine
from support.tiny_gguf import write_tiny

from fomoe.engine.requests import Engine, Receipt
from fomoe.gguf.reader import open_gguf
from fomoe.model.chat import ChatTemplate
from fomoe.model.tokenizer import Tokenizer
from fomoe.server.app import create_app
from fomoe.server.info import ServerInfo
from fomoe.server.receipts import tier_line

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello <|im_end|>"}],
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
}


@dataclass
class Live:
    client: httpx.Client
    engine: Engine
    tokenizer: Tokenizer
    receipts: list[Receipt]

    def chat(self, **more: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=CHAT | more)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = write_tiny(Path(tmp_path_factory.mktemp("model")) / "tiny.gguf")
    file = open_gguf(path)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    chat = ChatTemplate.from_gguf(file.metadata, tokenizer)
    receipts: list[Receipt] = []
    with local_engine(path, ctx_size=512) as running:
        info = ServerInfo(model_id="tiny", on_answer=receipts.append)
        app = create_app(running.client, tokenizer, chat, info)
        with listening(app) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield Live(client, running.client, tokenizer, receipts)
    chat.close()


def text_of(response: httpx.Response) -> str:
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def test_a_stream_is_the_same_answer(live: Live) -> None:
    whole = live.chat()
    values = frames(live.chat(stream=True, stream_options={"include_usage": True}))
    streamed = "".join(
        choice["delta"].get("content", "") for v in values[:-1] for choice in v["choices"]
    )
    assert streamed == text_of(whole)
    assert values[-2]["usage"]["completion_tokens"] == 24
    activations = whole.json()["timings"]["fomoe"]["hit"]
    # 4 layers, top-4; the first token comes out of the prompt's own pass.
    assert sum(activations.values()) == 23 * 4 * 4
    assert "exact" in tier_line(live.receipts[-1])


def test_logprobs_of_an_answer_are_those_of_scoring_it(live: Live) -> None:
    prompt = live.tokenizer.encode("a short prompt")
    options = {"temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    body = {"prompt": prompt, "max_tokens": 6} | options
    said = live.client.post("/v1/completions", json=body).json()["choices"][0]
    body = {"prompt": prompt + said["token_ids"], "max_tokens": 0, "echo": True} | options
    scored = live.client.post("/v1/completions", json=body).json()["choices"][0]
    own = scored["logprobs"]["token_logprobs"][len(prompt) :]
    assert own == pytest.approx(said["logprobs"]["token_logprobs"], abs=1e-5)
    assert own == [max(best.values()) for best in scored["logprobs"]["top_logprobs"][len(prompt) :]]


def test_a_stop_string_ends_the_answer(live: Live) -> None:
    text = text_of(live.chat())
    stop = text[6:9]
    cut = live.chat(stop=stop)
    assert text_of(cut) == text[: text.index(stop)]
    assert cut.json()["choices"][0]["finish_reason"] == "stop"


def test_a_client_that_leaves_frees_the_engine(live: Live) -> None:
    before = text_of(live.chat())
    body = CHAT | {"stream": True, "max_tokens": 400}
    with live.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
    assert text_of(live.chat()) == before

    def spent_on_nobody() -> float:
        generated = live.engine.status().counters.get("fomoe_generated_tokens_total", 0.0)
        return generated - sum(receipt.generated_tokens for receipt in live.receipts)

    wait_until(lambda: spent_on_nobody() >= 0)
    assert spent_on_nobody() < 200


def test_a_prompt_that_is_too_long_is_refused(live: Live) -> None:
    error = live.chat(messages=[{"role": "user", "content": "x9" * 600}]).json()["error"]
    assert (error["type"], error["n_ctx"]) == ("exceed_context_size_error", 512)
