"""The HTTP application: an engine behind OpenAI's API."""

from __future__ import annotations

from fastapi import FastAPI

import fomoe
from fomoe.engine.requests import Engine
from fomoe.model.chat import ChatTemplate
from fomoe.model.tokenizer import Tokenizer
from fomoe.server.basics import health_router, model_router, token_router
from fomoe.server.chat_api import chat_router
from fomoe.server.completions import completion_router
from fomoe.server.errors import install_handlers
from fomoe.server.guard import Guard
from fomoe.server.info import ServerInfo
from fomoe.server.metrics import ServerMetrics
from fomoe.server.services import Services


def create_app(
    engine: Engine, tokenizer: Tokenizer, chat: ChatTemplate, info: ServerInfo
) -> FastAPI:
    """Return the application; it owns none of its arguments and may be made while loading.

    Args:
        engine: What generates.
        tokenizer: The model's tokenizer.
        chat: The model's chat template.
        info: The model's name, the API key and the limits.
    """
    services = Services(
        engine=engine, tokenizer=tokenizer, chat=chat, info=info, metrics=ServerMetrics(engine)
    )
    app = FastAPI(
        title="fomoe",
        version=fomoe.__version__,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    for router in (chat_router, completion_router, model_router, token_router, health_router):
        app.include_router(router(services))
    app.add_middleware(Guard, services=services)
    return app
