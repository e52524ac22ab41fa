"""Cuts generated text where it must be cut, although it arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

THINK = "<think>"
END_THINK = "</think>"


class Finder:
    """Looks for the first of several strings in a stream of text.

    Text that may be the beginning of one of them is held back until that is settled, so what
    `push` returns can be shown at once.

    Attributes:
        match: The string that was found, empty before.
        rest: What follows it.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = tuple(wanted)
        self._held = ""
        self.match = ""
        self.rest = ""

    @property
    def n_held(self) -> int:
        """Number of characters held back."""
        return len(self._held)

    def push(self, text: str) -> str:
        """Return the text that precedes any match."""
        text = self._held + text
        hits = [(at, -len(one), one) for one in self._wanted if (at := text.find(one)) >= 0]
        if hits:
            at, _, one = min(hits)
            self.match, self.rest, self._held = one, text[at + len(one) :], ""
            return text[:at]
        keep = max((_overlap(text, one) for one in self._wanted), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what is held back; nothing more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, wanted: str) -> int:
    """Return the length of the longest end of `text` that `wanted` begins with."""
    for size in range(min(len(text), len(wanted) - 1), 0, -1):
        if text.endswith(wanted[:size]):
            return size
    return 0


class ThinkSplitter:
    """Separates `<think>...</think>` at the beginning of an answer from what follows.

    Blank lines around the thinking belong to neither part.
    """

    def __init__(self, *, inside: bool) -> None:
        """Begin inside the thinking when the prompt has opened it already."""
        self.inside = inside
        self._opening = not inside
        self._finder = Finder([END_THINK])
        self._start = ""
        self._blank = ""  # line ends that are thinking only if more of it follows
        self._trim = inside

    @property
    def n_held(self) -> int:
        """Number of characters held back."""
        return len(self._start) + len(self._blank) + self._finder.n_held

    def push(self, text: str) -> tuple[str, str]:
        """Return (thinking, content) that is settled."""
        if self._opening:
            text = self._start + text
            begun = text.lstrip()
            if THINK.startswith(begun) and begun != THINK:
                self._start = text
                return "", ""
            self._start, self._opening = "", False
            if begun.startswith(THINK):
                self.inside = self._trim = True
                text = begun[len(THINK) :]
        if not self.inside:
            return "", self._trimmed(text)
        thinking = self._thinking(self._finder.push(text))
        if not self._finder.match:
            return thinking, ""
        self.inside, self._trim, self._blank = False, True, ""
        return thinking, self._trimmed(self._finder.rest)

    def finish(self) -> tuple[str, str]:
        """Return the rest of (thinking, content)."""
        if self._opening:
            return "", self._start
        return (self._thinking(self._finder.finish()), "") if self.inside else ("", "")

    def _thinking(self, text: str) -> str:
        text = self._blank + self._trimmed(text)
        solid = text.rstrip("\n")
        self._blank = text[len(solid) :]
        return solid

    def _trimmed(self, text: str) -> str:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text
