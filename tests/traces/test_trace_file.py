"""Trace files: what is written is read, and what is no good says so."""

import errno
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.errors import ConfigError, TraceError
from fomoe.traces import Passage, RouterRows, Trace, TraceFacts, TraceWriter, cut_rows
from fomoe.traces.format import PREFIX, read_header, record_type

FACTS = TraceFacts(model="tiny", n_layers=3, n_experts=10, top_k=2, expert_bytes=(100, 100, 140))


def rows_for(facts, n_tokens, seed=0):
    rng = np.random.default_rng(seed)
    return cut_rows(rng.normal(size=(facts.n_layers, n_tokens, facts.n_experts)))


def write(path, facts=FACTS, tokens=(5, 6, 7), **more):
    with TraceWriter(path, facts) as writer:
        passage = Passage(sequence=writer.new_sequence(), tokens=list(tokens), position=0, **more)
        writer.append(passage, rows_for(facts, len(tokens)))
    return path


@st.composite
def texts(draw):
    n_layers = draw(st.integers(1, 4))
    n_experts = draw(st.sampled_from([1, 2, 63, 64, 65, 512]))
    facts = TraceFacts(
        model=draw(st.text(max_size=20)), n_layers=n_layers, n_experts=n_experts,
        top_k=draw(st.integers(1, min(n_experts, 10))), expert_bytes=(7,) * n_layers,
    )  # fmt: skip
    passages = st.builds(
        Passage, sequence=st.integers(0, 2), position=st.integers(0, 1 << 20),
        tokens=st.lists(st.integers(0, 1 << 18), max_size=70), label=st.text(max_size=60),
        domain=st.sampled_from(["", "prose", "codé"]), is_prompt=st.booleans(),
        hash=st.integers(0, (1 << 64) - 1),
    )  # fmt: skip
    return facts, draw(st.lists(passages, max_size=4))


@given(texts())
@settings(deadline=None)
def test_what_is_written_is_read(tmp_path_factory, content):
    facts, passages = content
    path = tmp_path_factory.mktemp("trace") / "t"
    rows = [rows_for(facts, len(p.tokens), seed) for seed, p in enumerate(passages)]
    for passage, part in zip(passages, rows, strict=True):  # a writer each: files are continued
        with TraceWriter(path, facts) as writer:
            writer.append(passage, part)
    if not passages:
        TraceWriter(path, facts).close()
    trace = Trace.open(path)
    trace.verify()
    assert trace.facts == facts
    assert trace.torn_bytes == 0
    in_memory = Trace.of(facts, zip(passages, rows, strict=True))
    assert trace.records.tobytes() == in_memory.records.tobytes()
    start = 0
    for passage, part in zip(passages, rows, strict=True):
        stop = start + len(passage.tokens)
        np.testing.assert_array_equal(trace.ids[start:stop], part.ids.swapaxes(0, 1))
        np.testing.assert_array_equal(
            trace.probabilities[start:stop], part.probabilities.swapaxes(0, 1).astype(np.float16)
        )
        np.testing.assert_array_equal(trace.tail[start:stop], part.tail.T)
        assert trace.records["token"][start:stop].tolist() == list(passage.tokens)
        assert (trace.is_prompt[start:stop] == passage.is_prompt).all()
        if stop > start:
            assert trace.records["hash"][stop - 1] == passage.hash
            assert not trace.records["hash"][start : stop - 1].any()
        start = stop
    by_number = {}
    for passage in passages:
        by_number.setdefault(passage.sequence, []).extend(passage.tokens)
    found = {s.number: trace.records["token"][s.rows].tolist() for s in trace.sequences}
    assert found == {number: tokens for number, tokens in by_number.items() if tokens}


def test_names_are_cut_between_characters(tmp_path):
    path = write(tmp_path / "t", label="ä" * 40, domain="a\0b" + "é" * 40)
    (text,) = Trace.open(path).sequences
    assert text.label == "ä" * 24
    assert text.domain == "ab" + "é" * 15


def test_arrays_are_mapped_and_aligned(tmp_path):
    trace = Trace.open(write(tmp_path / "t"))
    for array in (trace.ids, trace.probabilities, trace.tail):
        assert not array.flags.owndata
        assert array.flags.aligned
    assert trace.ids.shape == (3, 3, 10)


@pytest.mark.parametrize("n_bytes", range(0, 900, 7))
def test_every_prefix_is_read_or_refused(tmp_path, n_bytes):
    whole = write(tmp_path / "whole").read_bytes()
    path = tmp_path / "t"
    path.write_bytes(whole[:n_bytes])
    header = read_header(tmp_path / "whole")[1]
    if n_bytes < header:
        with pytest.raises(TraceError, match=r"ends after|begins with"):
            Trace.open(path)
        return
    size = record_type(FACTS).itemsize
    trace = Trace.open(path)
    trace.verify()
    assert (len(trace), trace.torn_bytes) == divmod(min(n_bytes, len(whole)) - header, size)
    write(path)  # continued after the last whole record
    assert len(Trace.open(path)) == len(trace) + 3
    Trace.open(path).verify()


def test_every_damaged_byte_is_noticed(tmp_path):
    whole = write(tmp_path / "whole").read_bytes()
    path = tmp_path / "t"
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        path.write_bytes(damaged)
        facts_end = PREFIX.size + PREFIX.unpack(whole[: PREFIX.size])[5]
        if facts_end <= at < read_header(tmp_path / "whole")[1]:
            continue  # the zeros behind the facts mean nothing
        with pytest.raises(TraceError, match=str(path)):
            Trace.open(path).verify()


def header_of(facts_text, version=1, record_bytes=None):
    text = facts_text if isinstance(facts_text, bytes) else json.dumps(facts_text).encode()
    size = -(-(PREFIX.size + len(text)) // 64) * 64
    record_bytes = record_type(FACTS).itemsize if record_bytes is None else record_bytes
    start = PREFIX.pack(b"FOMOETRC", version, size, record_bytes, zlib.crc32(text), len(text))
    return (start + text).ljust(size, b"\0")


GOOD = asdict(FACTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends after 0|begins with"),
        (b"GGUF" + bytes(100), "it is no trace"),
        (header_of(GOOD, version=2), "version 2, this fomoe reads version 1"),
        (header_of(GOOD, record_bytes=8), "records of 8 bytes"),
        (header_of(b"{"), "makes no sense"),
        (header_of([1]), "the facts must be"),
        (header_of(GOOD | {"more": 1}), "the facts must be"),
        (header_of(GOOD | {"n_layers": 1 << 40}), "n_layers is"),
        (header_of(GOOD | {"n_layers": True}), "n_layers is True"),
        (header_of(GOOD | {"n_experts": 0}), "n_experts is 0"),
        (header_of(GOOD | {"top_k": 11}), "11 experts per token of 10"),
        (header_of(GOOD | {"expert_bytes": [1, 2]}), "2 sizes of experts for 3 layers"),
        (header_of(GOOD | {"expert_bytes": 5}), "makes no sense"),
        (header_of(GOOD | {"expert_bytes": [1, -2, 3]}), "whole number"),
        (header_of(GOOD | {"model": 5}), "model is 5"),
        (PREFIX.pack(b"FOMOETRC", 1, 1 << 31, 8, 0, 8), "header of 2,147,483,648 bytes"),
        (PREFIX.pack(b"FOMOETRC", 1, 64, 8, 0, 1 << 31), "header of 64 bytes"),
    ],
)
def test_foreign_and_malformed_files_are_refused(tmp_path, content, message):
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        Trace.open(path)
    assert str(path) in str(caught.value)


def test_an_error_survives_the_way_between_processes():
    error = TraceError("/x/t", "is no trace", "name another")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "/x/t: is no trace; name another"
    assert copy.path == error.path


def test_what_is_not_there_or_a_directory_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(TraceError, match="cannot be read"):
            Trace.open(path)
    with pytest.raises(TraceError, match="cannot be written"):
        TraceWriter(tmp_path / "none" / "t", FACTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("ids", 10), ("ids", 1), ("probabilities", np.nan), ("probabilities", -1.0),
     ("probabilities", 2.0), ("tail", np.nan), ("tail", -0.5), ("tail", 2.0)],
)  # fmt: skip
def test_records_that_no_router_gives_are_refused(field, value):
    trace = Trace.of(FACTS, [(Passage(sequence=0, tokens=[1, 2], position=0), rows_for(FACTS, 2))])
    trace.verify()
    row = trace.records[field][1, 2]
    trace.records[field][1, 2] = value if field == "tail" else [*row[:-1], value]
    if field == "ids" and value == 1:
        trace.records[field][1, 2, 0] = 1
    with pytest.raises(TraceError, match="record 1 of 2 is damaged; the 1 before it"):
        trace.verify()


def test_another_model_or_writer_is_refused(tmp_path):
    path = write(tmp_path / "t")
    with pytest.raises(TraceError, match="name another file"):
        TraceWriter(path, replace(FACTS, top_k=3))
    with TraceWriter(path, FACTS), pytest.raises(TraceError, match="cannot be written"):
        TraceWriter(path, FACTS)
    (tmp_path / "foreign").write_bytes(b"something that somebody needs")
    with pytest.raises(TraceError, match="it is no trace"):
        TraceWriter(tmp_path / "foreign", FACTS)
    assert (tmp_path / "foreign").read_bytes() == b"something that somebody needs"


def test_a_full_disk_is_told():
    with pytest.raises(TraceError, match="make room"):
        TraceWriter("/dev/full", FACTS)


def test_rows_of_another_shape_are_refused(tmp_path):
    passage = Passage(sequence=0, tokens=[1, 2], position=0)
    with TraceWriter(tmp_path / "t", FACTS) as writer, pytest.raises(ValueError, match="shape"):
        writer.append(passage, RouterRows.empty(3, 3, 10))


def test_numbers_go_on_where_a_file_is_continued(tmp_path):
    path = tmp_path / "t"
    write(path, label="one")
    with TraceWriter(path, FACTS) as writer:  # an older text may have the last word
        late = Passage(sequence=writer.new_sequence(), tokens=[1], position=0, label="two")
        for passage in (late, Passage(sequence=0, tokens=[1], position=3)):
            writer.append(passage, rows_for(FACTS, 1))
    with TraceWriter(path, FACTS) as writer:
        assert writer.new_sequence() == 2
    assert [(s.number, s.label) for s in Trace.open(path).sequences] == [(0, "one"), (1, "two")]


def test_a_failed_write_leaves_whole_records(tmp_path, monkeypatch):
    """A disk that is full in the middle of a record and has room again later."""
    real, room = os.write, 100

    def full(file, data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(file, data[:room])
        room -= done
        return done

    path = write(tmp_path / "t")
    with TraceWriter(path, FACTS) as writer:
        passage = Passage(sequence=writer.new_sequence(), tokens=[1, 2], position=0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(TraceError, match="No space left"):
                writer.append(passage, rows_for(FACTS, 2))
        writer.append(passage, rows_for(FACTS, 2))
    trace = Trace.open(path)
    trace.verify()
    assert (trace.torn_bytes, trace.records["token"].tolist()) == (0, [5, 6, 7, 1, 2])


def test_a_killed_writer_leaves_whole_records(tmp_path):
    """One process writes until another kills it, which may be in the middle of a record."""
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from test_trace_file import *
with TraceWriter({str(tmp_path / "t")!r}, FACTS) as writer:
    rows = rows_for(FACTS, 3)
    while True:
        writer.append(Passage(sequence=writer.new_sequence(), tokens=[1, 2, 3], position=0), rows)
        print(flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    ) as child:
        for _ in range(50):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
    trace = Trace.open(tmp_path / "t")
    trace.verify()
    assert len(trace) >= 150


@pytest.mark.parametrize(
    "wrong",
    [{"top_k": 0}, {"top_k": 65, "n_experts": 512}, {"n_layers": 2}, {"n_experts": 1 << 17}],
)
def test_facts_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError):
        replace(FACTS, **wrong)


def test_the_layout_is_the_documented_one(tmp_path):
    """Reads a file with struct alone, by the tables of `fomoe.traces.format`."""
    path = write(tmp_path / "t", label="text", domain="prose", is_prompt=True, hash=99)
    data = path.read_bytes()
    magic, version, header, size, crc, length = struct.unpack_from("<8s5I", data)
    assert (magic, version, header % 64) == (b"FOMOETRC", 1, 0)
    assert crc == zlib.crc32(data[28 : 28 + length])
    assert json.loads(data[28 : 28 + length])["n_experts"] == 10
    at = header + 2 * size
    crc, flags, sequence, token, position, zero, decision, label, domain = struct.unpack_from(
        "<IIIiiiQ48s32s", data, at
    )
    assert crc == zlib.crc32(data[at + 4 : at + size])
    assert (flags, sequence, token, position, zero, decision) == (1, 0, 7, 2, 0, 99)
    assert (label.rstrip(b"\0"), domain.rstrip(b"\0")) == (b"text", b"prose")
    rows = rows_for(FACTS, 3)
    tail = struct.unpack_from("<3f", data, at + 112)
    ids = struct.unpack_from("<30H", data, at + 124)
    probabilities = struct.unpack_from("<30e", data, at + 184)
    np.testing.assert_array_equal(tail, rows.tail[:, 2])
    np.testing.assert_array_equal(ids, rows.ids[:, 2].ravel())
    np.testing.assert_array_equal(
        np.float16(probabilities), rows.probabilities[:, 2].ravel().astype(np.float16)
    )
    assert size == -(-(184 + 60) // 8) * 8
