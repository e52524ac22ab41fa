"""The official Python client against a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest
from server_harness import Server, listening
from support.small_vocab import small_tokenizer

Serve = Callable[..., Server]
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve("Hello there", api_key="k", engine=None)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with (
        listening(server.app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as one,
    ):
        yield one


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(small_tokenizer().encode("Hello there"))
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "H"


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens > 0


def test_completions_with_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="m", prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=1
    )
    choice = answer.choices[0]
    assert choice.text == small_tokenizer().decode([5, 6, 7]) + "H"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[1:3] == [-0.006, -0.007]
    text = "".join(
        c.choices[0].text for c in client.completions.create(model="m", prompt="a", stream=True)
    )
    assert text == "Hello there"


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fomoe"


def test_errors_have_the_types_that_the_client_knows(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="only system messages") as caught:
        client.chat.completions.create(model="m", messages=[{"role": "system", "content": "a"}])
    assert caught.value.param == "messages"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.InternalServerError, match="not supported"):
        client.embeddings.create(model="m", input="a")
    server.engine.fail_after = 3
    with pytest.raises(openai.APIError, match="the disk is on fire"):
        list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))


def test_a_contract_goes_in_an_extra_field(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, extra_body={"quality": "bytes=0.5GB/token"}
    )
    assert server.engine.asked[-1].quality == "bytes=500MB/token"
    assert answer.model_extra is not None
    assert answer.model_extra["timings"]["fomoe"]["mode"] == "bytes=500MB/token"
    client.completions.create(model="m", prompt="a", max_tokens=1, extra_body={"quality": "exact"})
    assert server.engine.asked[-1].quality == "exact"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="m", messages=MESSAGES, extra_body={"quality": "good"})
    assert refused.value.param == "quality"
    assert "kl=0.01" in refused.value.message
