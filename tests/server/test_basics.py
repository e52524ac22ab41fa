from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import TIERS
from prometheus_client.parser import text_string_to_metric_families
from server_harness import Server, frames
from support.small_vocab import IM_START, small_tokenizer

from fomoe.engine.requests import EngineStatus
from fomoe.telemetry import METRICS

Serve = Callable[..., Server]


def test_the_model_is_described(serve: Serve) -> None:
    server = serve("a", model_id="org/tiny", n_params=7, size_bytes=9, n_ctx_train=11, created=5)
    entry = server.call("GET", "/v1/models").json()["data"]
    assert entry == [server.call("GET", "/v1/models/org/tiny").json()]
    assert entry[0]["id"] == "org/tiny"
    assert entry[0]["created"] == 5
    assert entry[0]["meta"] == {
        "n_params": 7,
        "size": 9,
        "n_ctx": 2048,
        "n_ctx_train": 11,
        "n_vocab": 392,
    }
    response = server.call("GET", "/v1/models/other")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


def test_tokens_and_text(serve: Serve) -> None:
    server = serve("a")
    ids = small_tokenizer().encode("Hello <|im_end|>")
    for name in ("content", "prompt"):
        body = server.post("/tokenize", {name: "Hello <|im_end|>"}).json()
        assert body == {"tokens": ids, "count": len(ids), "max_model_len": 2048}
    parsed = server.post("/tokenize", {"content": "Hello <|im_end|>", "parse_special": True})
    assert parsed.json()["tokens"] == small_tokenizer().encode_special("Hello <|im_end|>")
    pieces = server.post("/tokenize", {"content": "Hé", "with_pieces": True}).json()["tokens"]
    assert [p["piece"] for p in pieces] == ["H", "é"]
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert chat["tokens"][0] == IM_START
    text = server.post("/detokenize", {"tokens": ids}).json()
    assert text == {"content": "Hello <|im_end|>", "prompt": "Hello <|im_end|>"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"content": 5}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [], "chat_template_kwargs": {"tools": 1}}),
        ("/detokenize", {"tokens": [392]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {"tokens": [True]}),
    ],
)
def test_other_tokens_and_texts_are_refused(serve: Serve, path: str, body: Any) -> None:
    response = serve("a").post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/embeddings", "embeddings are not supported; fomoe generates text only"),
        ("/v1/responses", "/v1/responses is not supported; use /v1/chat/completions"),
    ],
)
def test_what_is_not_there_is_refused_clearly(serve: Serve, path: str, message: str) -> None:
    response = serve("a").post(path, {"input": "a", "model": "tiny"})
    assert response.status_code == 501
    assert response.json()["error"] == {
        "message": message,
        "type": "not_supported_error",
        "param": None,
        "code": 501,
    }


def metrics_of(server: Server) -> dict[str, float]:
    text = server.call("GET", "/metrics").text
    return {
        sample.name + "".join(f"[{v}]" for v in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(serve: Serve) -> None:
    server = serve("Hello there")
    before = metrics_of(server)
    series = {s for metric in METRICS for s in metric.series()}
    assert len(series) <= len(before)
    assert {v for k, v in before.items() if k.startswith("fomoe_expert")} == {0.0}
    server.chat()
    frames(server.chat(stream=True, car=0.5))
    server.chat(temperature=-1)
    server.call("GET", "/made/up/path")
    after = metrics_of(server)
    n = len(small_tokenizer().encode("Hello there"))
    assert after["fomoe_requests_total[stop]"] == 2
    assert after["fomoe_generated_tokens_total"] == 2 * n
    assert after["fomoe_prompt_cached_tokens_total"] == 2
    assert after["fomoe_expert_lookups_total[device]"] == 2 * TIERS["hits_device"]
    assert after["fomoe_expert_lookups_total[nvme]"] == 2
    assert after["fomoe_substitutions_total"] == 2
    shares = [after[f"fomoe_expert_share[{o}]"] for o in ("device", "ram", "nvme", "substituted")]
    assert shares == pytest.approx([6 / 12, 3 / 12, 1 / 12, 2 / 12])  # of the last answer
    assert after["fomoe_expert_stall_seconds_total"] == pytest.approx(0.004)
    assert after["fomoe_http_requests_total[200][/v1/chat/completions]"] == 2
    assert after["fomoe_http_requests_total[400][/v1/chat/completions]"] == 1
    assert after["fomoe_http_requests_total[404][other]"] == 1
    assert after["fomoe_time_to_first_token_seconds_count"] == 2
    assert after["fomoe_inter_token_seconds_count"] == 2 * (n - 1)
    assert (after["fomoe_ready"], after["fomoe_load_progress"]) == (1, 1)


def test_the_engine_knows_its_figures_better(serve: Serve) -> None:
    server = serve("a")
    server.chat()
    server.engine.state = EngineStatus(
        state="loading",
        load_progress=0.5,
        running=1,
        queued=3,
        counters={
            "fomoe_generated_tokens_total": 77.0,
            'fomoe_expert_lookups_total{tier="ram"}': 5.0,
            "fomoe_not_in_the_table": 1.0,
        },
    )
    values = metrics_of(server)
    assert values["fomoe_generated_tokens_total"] == 77
    assert values["fomoe_expert_lookups_total[ram]"] == 5
    assert (values["fomoe_requests_running"], values["fomoe_requests_queued"]) == (1, 3)
    assert (values["fomoe_ready"], values["fomoe_load_progress"]) == (0, 0.5)
    assert "fomoe_not_in_the_table" not in values


def test_two_servers_do_not_share_their_counts(serve: Serve) -> None:
    one, two = serve("a"), serve("a")
    one.chat()
    assert metrics_of(one)["fomoe_requests_total[stop]"] == 1
    assert metrics_of(two)["fomoe_requests_total[stop]"] == 0
