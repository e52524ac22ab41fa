"""Several sequences in one pass, and states set aside: the bits of one at a time."""

import numpy as np
import pytest

from fomoe.model.state import Batch, DeltaState, KVCache, SequenceState
from fomoe.routing import CacheAwareRouting


def text(seed, count):
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


def feed(model, parts, step="step"):
    """Run one pass over (sequence, tokens) parts; returns each part's logits."""
    batch = Batch.of([(sequence.state, tokens) for sequence, tokens in parts])
    hidden = getattr(model.forward, step)(batch, tuple(sequence for sequence, _ in parts))
    rows = [model.forward.model.logits(hidden, np.array([r]))[0].copy() for r in range(batch.size)]
    out, start = [], 0
    for sequence, tokens in parts:
        sequence.tokens.extend(tokens)
        out.append(np.array(rows[start : start + len(tokens)]))
        start += len(tokens)
    return out


@pytest.fixture
def alone(model):
    """Logits of a text, one token at a time, and the sequence behind it."""

    def run(tokens):
        sequence = model.sequence()
        rows = [feed(model, [(sequence, [token])])[0][0] for token in tokens]
        return np.array(rows), sequence

    return run


def state_arrays(state, length):
    """What the next token depends on."""
    arrays = []
    for layer in state.layers:
        if isinstance(layer, DeltaState):
            arrays += [layer.conv, layer.memory]
        else:
            assert isinstance(layer, KVCache)
            arrays += [layer.k[:length], layer.v[:length]]
    return arrays


@pytest.mark.parametrize("step", ["step", "step_serial"])
def test_sequences_of_different_lengths_share_passes(model, alone, step):
    texts = [text(1, 14), text(2, 9), text(3, 5)]
    splits = [(6, 1, 7), (2, 6, 1), (1, 1, 3)]  # of 16 rows at most a pass
    sequences = [model.sequence() for _ in texts]
    got = [[], [], []]
    at = [0, 0, 0]
    for round_ in range(3):
        parts = []
        for i, tokens in enumerate(texts):
            parts.append((sequences[i], tokens[at[i] : at[i] + splits[i][round_]]))
            at[i] += splits[i][round_]
        for i, rows in enumerate(feed(model, parts, step)):
            got[i].append(rows)
    for i, tokens in enumerate(texts):
        want, twin = alone(tokens)
        assert np.array_equal(np.concatenate(got[i]), want)
        assert sequences[i].logical.hash == twin.logical.hash
        assert sequences[i].state.length == twin.state.length == len(tokens)
        pairs = zip(state_arrays(sequences[i].state, len(tokens)),
                    state_arrays(twin.state, len(tokens)), strict=True)  # fmt: skip
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_decode_batch_next_to_an_idle_sequence(model, alone):
    texts = [text(4, 10), text(5, 12)]
    first, second = model.sequence(), model.sequence()
    feed(model, [(first, texts[0][:5]), (second, texts[1][:9])])
    one = [feed(model, [(first, [t])])[0][0] for t in texts[0][5:7]]  # the second one waits
    both = [feed(model, [(second, [b]), (first, [a])])
            for a, b in zip(texts[0][7:], texts[1][9:], strict=True)]  # fmt: skip
    got_first = np.array(one + [pair[1][0] for pair in both])
    got_second = np.array([pair[0][0] for pair in both])
    assert np.array_equal(got_first, alone(texts[0])[0][5:])
    assert np.array_equal(got_second, alone(texts[1])[0][9:])


def test_a_batch_lays_sequences_one_behind_the_other(model):
    first, second = model.sequence().state, model.sequence().state
    first.length, second.length = 3, 7
    batch = Batch.of([(first, [5, 6]), (second, [9])])
    assert batch.size == 3
    assert batch.tokens.tolist() == [5, 6, 9]
    assert batch.positions.tolist() == [3, 4, 7]
    assert [(r.state, r.start, r.stop, r.position) for r in batch.runs] == [
        (first, 0, 2, 3), (second, 2, 3, 7)
    ]  # fmt: skip
    batch.advance()
    assert (first.length, second.length) == (5, 8)


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
def test_a_snapshot_taken_up_elsewhere_gives_the_same_continuation(model, kv_dtype):
    sequence = model.sequence()
    sequence.state = SequenceState(model.spec, 64, kv_dtype)
    tokens = text(6, 20)
    feed(model, [(sequence, tokens[:12])])
    state, logical = sequence.state.snapshot(), sequence.logical.snapshot()
    want = [feed(model, [(sequence, [t])])[0] for t in tokens[12:]]
    want_hash = sequence.logical.hash
    other = model.sequence()
    other.state = SequenceState(model.spec, 40, kv_dtype)
    feed(model, [(other, text(7, 15))])  # another text was here before
    other.state.restore(state)
    other.logical.restore(logical)
    assert other.state.length == 12
    got = [feed(model, [(other, [t])])[0] for t in tokens[12:]]
    assert np.array_equal(got, want)
    assert other.logical.hash == want_hash


def test_a_snapshot_owns_its_memory(model):
    sequence = model.sequence()
    tokens = text(8, 18)
    feed(model, [(sequence, tokens[:8])])
    snapshot = sequence.state.snapshot()
    want = feed(model, [(sequence, tokens[8:])])[0]
    for _ in range(2):  # the state has gone on in between
        sequence.state.restore(snapshot)
        assert np.array_equal(feed(model, [(sequence, tokens[8:])])[0], want)


def test_a_reset_sequence_is_as_new(model, alone):
    sequence = model.sequence()
    feed(model, [(sequence, text(9, 16))])
    sequence.lossy, sequence.decoding = True, True
    sequence.hold(CacheAwareRouting(0.5))
    sequence.reset()
    assert (sequence.lossy, sequence.exact, sequence.decoding) == (False, True, False)
    tokens = text(10, 6)
    want, twin = alone(tokens)
    assert np.array_equal(feed(model, [(sequence, tokens)])[0], want)
    assert sequence.logical.hash == twin.logical.hash


def test_state_bytes_are_what_is_reserved(model):
    state = SequenceState(model.spec, 50, "f16")
    arrays = state_arrays(state, 50)
    assert state.nbytes == sum(a.nbytes for a in arrays)
    kinds = [type(layer) for layer in state.layers]
    assert kinds == [
        KVCache if kind == "attention" else DeltaState for kind in model.spec.layers
    ]  # fmt: skip
    assert {KVCache, DeltaState} == set(kinds)
