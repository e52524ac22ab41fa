from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError
from fomoe.evaluation.texts import document, of_part, split_documents, windows

WIKI = (
    " \n = First = \n\n Some text .\n = = Section = = \n\n More . \n \n = Second = \n\n"
    " Text with a = b = c in it .\n = Third Article = \n End .\n"
)


def test_articles_begin_at_their_titles() -> None:
    texts = [each.text for each in split_documents(WIKI)]
    assert [text.splitlines()[0].strip() for text in texts] == [
        "= First =",
        "= Second =",
        "= Third Article =",
    ]
    assert "= = Section = =" in texts[0]


def test_separators_go_before_titles_and_gaps() -> None:
    assert [d.text for d in split_documents("a\n\n\nb<|endoftext|> = T = \n<|endoftext|>\n")] == [
        "a\n\n\nb",
        "= T =",
    ]
    assert [d.text for d in split_documents("a\n\nb\n \n\t\nc\n")] == ["a\n\nb", "c"]
    assert split_documents(" \n") == []


def test_a_document_counts_once() -> None:
    assert [d.text for d in split_documents("x<|endoftext|>y<|endoftext|> x ")] == ["x", "y"]


@given(st.text(min_size=1).filter(lambda text: bool(text.strip())))
def test_the_split_is_the_documented_hash(text: str) -> None:
    digest = hashlib.sha256(text.strip().encode()).hexdigest()
    found = document(f"\n {text} ")
    assert (found.name, found.is_tuning) == (digest[:12], int(digest[:2], 16) < 64)


def test_the_split_of_known_texts_never_changes() -> None:
    parts = "".join("t" if document(f"document {i}").is_tuning else "s" for i in range(32))
    assert parts == "tsstststttsstssssssssttsssssstts"


def test_a_quarter_tunes_and_nothing_is_in_both_parts() -> None:
    every = [document(str(i)) for i in range(4000)]
    tune, score = of_part(every, "tune"), of_part(every, "score")
    assert len(tune) / 4000 == pytest.approx(0.25, abs=0.03)
    assert {d.name for d in tune}.isdisjoint(d.name for d in score)
    assert of_part(every, "all") == every
    assert len(tune) + len(score) == 4000


def test_windows_are_the_beginnings_of_documents_that_are_long_enough() -> None:
    documents = [document(text) for text in ("abcdefgh", "abc", "uvwxyz", "ABCDEFGHIJ")]

    def encode(text: str) -> list[int]:
        return list(text.encode())

    found = windows(documents, encode, prefix=2, scored=3)
    assert [(bytes(w.prefix), bytes(w.forced)) for w in found] == [
        (b"ab", b"cdef"),
        (b"uv", b"wxyz"),
        (b"AB", b"CDEF"),
    ]
    assert found[1].document == documents[2].name
    assert windows(documents, encode, prefix=2, scored=3, limit=2) == found[:2]
    with pytest.raises(ConfigError, match="1 of 4 documents have 9 tokens"):
        windows(documents, encode, prefix=4, scored=4)
    with pytest.raises(ConfigError, match="give 1 and more"):
        windows(documents, encode, prefix=0, scored=4)
