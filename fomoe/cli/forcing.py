"""A running model as the closed loop of `fomoe.evaluation` sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fomoe.engine.requests import Receipt, TokenEvent
from fomoe.evaluation.choices import Continuation, Said
from fomoe.evaluation.closed_loop import Cost, Mode
from fomoe.evaluation.divergence import negative_log_likelihoods
from fomoe.evaluation.texts import Window

if TYPE_CHECKING:
    from fomoe.llm import LLM


class ModelRunner:
    """Implements `Runner`: whole rows of logits come from the driver, so nothing is truncated.

    A row of float32 is 4 bytes per token of the vocabulary, 1 MB for 248,320 of them; sending it
    takes about a millisecond, and what is compared is what the sampler would have seen, to the bit.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        moe = llm.spec.moe
        self._activations = llm.spec.n_layers * moe.top_k

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self._llm.spec.vocab

    def force(
        self, window: Window, mode: Mode, on_row: Callable[[npt.NDArray[np.float32]], None]
    ) -> Cost:
        """Feed the window's forced tokens; `on_row` gets the logits [V] in place of each."""

        def take(event: TokenEvent) -> None:
            on_row(np.frombuffer(event.logits, "<f4"))

        receipt = self._llm.force(
            window.prefix, window.forced, take, quality=mode.spec, null_share=mode.null_share,
            logits=True,
        )  # fmt: skip
        return cost_of(receipt, self._activations)

    def say(self, row: Continuation, mode: Mode) -> Said:
        """Return what the mode thinks of a continuation's choice."""
        events: list[TokenEvent] = []
        self._llm.force(row.prefix, row.forced, events.append, quality=mode.spec, logprobs=1)
        scored = events[-row.scored :]
        return Said(
            logprob=sum(event.logprob or 0.0 for event in scored),
            is_greedy=all(event.top[0][0] == event.token for event in scored),
        )

    def free(self, prefix: list[int], tokens: int, mode: Mode) -> list[int]:
        """Return the greedy continuation of a prompt; nothing ends it early."""
        answer = self._llm.generate(
            prefix, max_tokens=tokens, temperature=0.0, quality=mode.spec, ignore_eos=True
        )
        return answer.token_ids

    def likelihood(self, prefix: list[int], text: list[int]) -> npt.NDArray[np.float64]:
        """Return -log p of each token of `text` after `prefix` in exact mode, float64."""
        rows = self._llm.logits(prefix + text)[len(prefix) - 1 : -1]
        return negative_log_likelihoods(rows, np.array(text, np.int64))


def cost_of(receipt: Receipt, activations_per_step: int) -> Cost:
    """Return what a request's decode steps ran and read; its last token is never fed."""
    steps = max(receipt.generated_tokens - 1, 0)
    causes = receipt.bytes_by_cause
    return Cost(
        steps=steps,
        activations=steps * activations_per_step,
        reads=receipt.reads_nvme,
        substituted=receipt.substituted,
        demand_bytes=causes["demand"],
        background_bytes=causes["background"],
        prefetch_bytes=causes["prefetch"],
        shadow_bytes=causes["shadow"],
        logical_bytes=receipt.logical_bytes,
    )
