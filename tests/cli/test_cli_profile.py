"""`fomoe profile`: what is asked of the engine, and the file that comes of it."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from fomoe.cli import profile as verb
from fomoe.engine.requests import Finished
from fomoe.errors import ConfigError
from fomoe.residency import parse_profile
from fomoe.traces import Passage, TraceFacts, TraceWriter, cut_rows

FACTS = TraceFacts(model="m", n_layers=2, n_experts=6, top_k=2, expert_bytes=(8, 8))


class Engine:
    """Records rows in which token i wants experts i and i + 1, modulo 6, in both layers."""

    def __init__(self, path):
        self.writer, self.asked = TraceWriter(path, FACTS), []

    def stream(self, request):
        self.asked.append(request)
        scores = np.zeros((len(request.prompt), 6), np.float32)
        for row, token in zip(scores, request.prompt, strict=True):
            row[token % 6], row[(token + 1) % 6] = 9, 8
        passage = Passage(
            sequence=self.writer.new_sequence(), tokens=request.prompt, position=0, is_prompt=True
        )
        self.writer.append(passage, cut_rows(np.stack([scores, scores])))
        yield Finished(request_id=request.request_id, reason="length")


@pytest.fixture
def engine(monkeypatch):
    made = []

    @contextmanager
    def opened(model, options, *, trace):
        engine = Engine(trace)
        made.append(engine)
        encode = SimpleNamespace(encode=lambda text: [ord(c) - ord("a") for c in text])
        yield SimpleNamespace(engine=engine, tokenizer=encode, config=SimpleNamespace(ctx_size=4))
        engine.writer.close()

    monkeypatch.setattr(verb, "opened", opened)
    return made


def test_frequencies_of_a_text(fomoe, engine, tmp_path):
    text, output = tmp_path / "text", tmp_path / "out.freq"
    text.write_text("aabbcdaaaa")
    result = fomoe(
        "profile", "--text", text, "-o", output, "--tokens", 8, "--json", "--quality", "car=0.5"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {"output": str(output), "tokens": 8, "experts": 10}
    got = parse_profile(output.read_bytes(), 2, 6)
    want = np.array([4, 6, 3, 2, 1, 0], np.float32) / 8  # a 4 times, b twice, c, d
    np.testing.assert_array_equal(got, [want, want])
    asked = engine[0].asked
    assert [len(request.prompt) for request in asked] == [4, 4]
    assert {(request.max_tokens, request.quality) for request in asked} == {(0, "exact")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.freq", "text"]


def test_what_cannot_be_read_or_written_is_named(fomoe, engine, tmp_path):
    text = tmp_path / "text"
    with pytest.raises(ConfigError, match="give a text"):
        raise fomoe("profile", "--text", text, "-o", tmp_path / "out").exception
    text.write_text("")
    with pytest.raises(ConfigError, match="no tokens"):
        raise fomoe("profile", "--text", text, "-o", tmp_path / "out").exception
    with pytest.raises(ConfigError, match="no directory"):
        raise fomoe("profile", "--text", text, "-o", tmp_path / "none" / "out").exception
    asked = len(engine)
    with pytest.raises(ConfigError, match="is a directory"):
        raise fomoe("profile", "--text", text, "-o", tmp_path).exception
    assert len(engine) == asked, "it is refused before anything runs"
