"""The routes beside generation: models, tokens, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from fomoe.errors import RequestError
from fomoe.model.chat_messages import normalise_options
from fomoe.server.errors import ApiError, JsonResponse
from fomoe.server.logprobs import token_text
from fomoe.server.schemas import DetokenizeBody, TokenizeBody
from fomoe.server.services import Services


def health_router(services: Services) -> APIRouter:
    """Return the routes that say how the server is."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """Say whether requests are answered; needs no key, so it says nothing else."""
        status = services.engine.status()
        body: dict[str, Any] = {"status": status.state, "progress": status.load_progress}
        if status.state in ("ready", "degraded"):  # whoever restarts what is unwell must not now
            return JsonResponse(body | {"status": "ok"})
        message = "Loading model" if status.state == "loading" else "the engine has stopped"
        return JsonResponse(ApiError(503, message).body | body, 503)

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> Response:
        """Say whether everything works; 503 while loading or while a part is being restarted."""
        status = services.engine.status()
        body = {
            "status": status.state,
            "progress": status.load_progress,
            "running": status.running,
            "queued": status.queued,
            "detail": status.detail,
        }
        return JsonResponse(body, 200 if status.state == "ready" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Show all counters in Prometheus's text format."""
        return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


def model_router(services: Services) -> APIRouter:
    """Return the routes that describe the model."""
    router = APIRouter()
    info = services.info

    def entry() -> dict[str, Any]:
        return {
            "id": info.model_id,
            "object": "model",
            "created": info.created,
            "owned_by": "fomoe",
            "max_model_len": services.engine.ctx_size,
            "meta": {
                "n_params": info.n_params,
                "size": info.size_bytes,
                "n_ctx": services.engine.ctx_size,
                "n_ctx_train": info.n_ctx_train,
                "n_vocab": services.tokenizer.n_vocab,
            },
        }

    @router.get("/v1/models")
    async def models() -> Response:
        """List the one model that is served."""
        return JsonResponse({"object": "list", "data": [entry()]})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """Describe the model."""
        if model_id != info.model_id:
            raise ApiError(404, f"there is no model {model_id!r}, only {info.model_id!r}")
        return JsonResponse(entry())

    @router.post("/v1/embeddings")
    async def embeddings() -> Response:
        """Refuse: generation models give no useful embeddings."""
        raise ApiError(501, "embeddings are not supported; fomoe generates text only")

    @router.post("/v1/responses")
    async def responses() -> Response:
        """Refuse: it keeps conversations, and nothing is kept here."""
        raise ApiError(501, "/v1/responses is not supported; use /v1/chat/completions")

    return router


def token_router(services: Services) -> APIRouter:
    """Return the routes that turn text into tokens and back."""
    router = APIRouter()
    tokenizer = services.tokenizer

    def ids_of(body: TokenizeBody) -> list[int]:
        if body.messages is not None:
            return services.chat.prompt_ids(
                body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                **normalise_options(body.chat_template_kwargs or {}),
            )
        text = body.content if body.content is not None else body.prompt
        if text is None:
            raise RequestError("send content, prompt or messages", "content")
        return tokenizer.encode_special(text) if body.parse_special else tokenizer.encode(text)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        """Return token ids; special strings in plain text count with `parse_special` only."""
        ids = await asyncio.to_thread(ids_of, body)
        tokens: list[Any] = ids
        if body.with_pieces:
            tokens = [{"id": one, "piece": token_text(tokenizer, one)} for one in ids]
        count = {"count": len(ids), "max_model_len": services.engine.ctx_size}
        return JsonResponse({"tokens": tokens} | count)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        """Return the text of token ids, under llama.cpp's name and vLLM's."""
        text = await asyncio.to_thread(tokenizer.decode, body.tokens)
        return JsonResponse({"content": text, "prompt": text})

    return router
