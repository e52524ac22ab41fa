"""Tokens with their router rows as records of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fomoe.traces.format import (
    DOMAIN_BYTES,
    LABEL_BYTES,
    PROMPT,
    TraceFacts,
    pack_name,
    record_crc,
    record_type,
)
from fomoe.traces.rows import RouterRows

Records = np.ndarray[Any, np.dtype[np.void]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Tokens of one text that went through the layers together.

    Attributes:
        sequence: the text's number, from `TraceWriter.new_sequence`.
        tokens: ids of the tokens.
        position: of the first of them in the text.
        label: name of the text; what does not fit 48 bytes of UTF-8 is cut off.
        domain: kind of the text, for scores by domain; 32 bytes.
        is_prompt: whether they went through in prefill.
        hash: the text's decision hash after the last of them, 0 if not known.
    """

    sequence: int
    tokens: Sequence[int]
    position: int
    label: str = ""
    domain: str = ""
    is_prompt: bool = False
    hash: int = 0

    def part(self, start: int, stop: int) -> Passage:
        """Return some of the tokens; the hash stays with the last one."""
        return replace(
            self, tokens=self.tokens[start:stop], position=self.position + start,
            hash=self.hash if stop == len(self.tokens) else 0,
        )  # fmt: skip


def pack_records(facts: TraceFacts, passage: Passage, rows: RouterRows) -> Records:
    """Return the records [T] of a passage and its rows [L, T, C]."""
    count = len(passage.tokens)
    records = np.zeros(count, record_type(facts))
    records["flags"] = PROMPT if passage.is_prompt else 0
    records["sequence"] = passage.sequence
    records["token"] = passage.tokens
    records["position"] = passage.position + np.arange(count)
    records["label"] = pack_name(passage.label, LABEL_BYTES)
    records["domain"] = pack_name(passage.domain, DOMAIN_BYTES)
    records["tail"] = rows.tail.T
    records["ids"] = rows.ids.swapaxes(0, 1)
    records["probabilities"] = rows.probabilities.swapaxes(0, 1)
    if count:
        records["hash"][-1] = passage.hash
    for i in range(count):
        records["crc"][i] = record_crc(records[i : i + 1])
    return records
