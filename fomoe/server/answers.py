"""What both kinds of answer have in common: made at once or as a stream of frames."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fomoe.engine.requests import PromptProgress
from fomoe.server.running import Indexed, Item, Run
from fomoe.server.schemas import GenerationBody
from fomoe.server.services import Services, fingerprint, ping, progress, totals
from fomoe.server.streaming import DONE, frame


class Answer(ABC):
    """Writes the response to one request; either `whole` or `frames` is used, once."""

    def __init__(self, services: Services, body: GenerationBody, run: Run, request_id: str) -> None:
        self.services = services
        self.run = run
        self._body = body
        self.head = {
            "id": request_id,
            "object": "",
            "created": int(time.time()),
            "model": services.info.model_id,
            "system_fingerprint": fingerprint(),
        }

    @abstractmethod
    def take(self, item: Item) -> None:
        """Gather an item for `body`."""

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """Return the `choices` of what was gathered."""

    @abstractmethod
    def openings(self) -> list[bytes]:
        """Return the first frames of a stream."""

    @abstractmethod
    def shown(self, item: Item) -> bytes | None:
        """Return the frame for an item, None when the client gets none."""

    async def whole(self) -> dict[str, Any]:
        """Return the response's body once everything is there."""
        async with aclosing(self.run.items()) as items:
            async for item in items:
                if item is not None:
                    self.take(item)
        return self.head | {"choices": self.choices(), **self._totals()}

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the frames of a stream."""
        last: PromptProgress | None = None
        begun = False
        async with aclosing(self.run.items()) as items:
            async for item in items:
                if not begun:
                    begun = True
                    for opening in self.openings():
                        yield opening
                if isinstance(item, Indexed) and isinstance(item.event, PromptProgress):
                    last = item.event
                one = ping(last) if item is None else self.shown(item)
                if one is not None:
                    yield one
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield frame(self.head | {"choices": [], **self._totals()})
        yield DONE

    def progress(self, item: Indexed) -> dict[str, Any] | None:
        """Return the `prompt_progress` to show for an item, None when there is none."""
        if self._body.return_progress and isinstance(item.event, PromptProgress):
            return {"prompt_progress": progress(item.event)}
        return None

    def _totals(self) -> dict[str, Any]:
        return totals(self.run, self._body.n or 1)
