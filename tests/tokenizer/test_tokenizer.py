from __future__ import annotations

import lzma
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen_files import DATA, needs_qwen, qwen, reference
from support.fake_gguf import metadata_of
from support.small_vocab import (
    END_OF_TEXT,
    GOLDEN,
    IM_END,
    IM_START,
    PADDING,
    THINK,
    small_tokenizer,
    small_values,
)

from fomoe.errors import GGUFError, RequestError
from fomoe.model.tokenizer import Tokenizer
from fomoe.model.vocabulary import MAX_TOKEN_CHARS

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SPECIAL_PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<think>", "<|im_", "end|>", "<", "|>", "é"]
        ),
        TEXTS,
    ),
    max_size=8,
).map("".join)

MERGE = GOLDEN["merges"][0]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["text"][:20]))
def test_ids_are_the_golden_ones(case: dict[str, Any]) -> None:
    assert small_tokenizer().encode(case["text"]) == case["plain"]
    assert small_tokenizer().encode_special(case["text"]) == case["special"]


@given(TEXTS)
def test_text_comes_back_in_normal_form_c(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@given(SPECIAL_PIECES)
def test_plain_text_never_yields_a_special_token(text: str) -> None:
    tokenizer = small_tokenizer()
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@given(st.lists(st.integers(0, 391), max_size=40))
def test_streaming_gives_the_text_of_decoding_at_once(ids: list[int]) -> None:
    tokenizer = small_tokenizer()
    for skip in (False, True):
        stream = tokenizer.stream(skip_special=skip)
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


@given(TEXTS.filter(bool), st.lists(st.integers(0, 391), max_size=6))
def test_each_token_begins_in_its_character(text: str, noise: list[int]) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    stream, data = tokenizer.stream(), b""
    for token_id in ids:
        stream.push(token_id)
        assert stream.begin == len(data.decode(errors="ignore"))
        data += tokenizer.token_bytes(token_id)
    # Bytes that are no text become U+FFFD, whole tokens between them lie where they say.
    noisy = tokenizer.decode(noise + ids)
    stream = tokenizer.stream()
    for token_id in noise + ids:
        stream.push(token_id)
        own = tokenizer.decode([token_id])
        assert "\ufffd" in own or noisy.startswith(own, stream.begin)
    stream.finish()
    assert stream.n_chars == len(noisy)


def test_a_token_that_breaks_a_character_begins_behind_it() -> None:
    tokenizer = small_tokenizer()
    one, two = tokenizer.encode("🇩")[:2], tokenizer.encode("a🇩")[:2]
    stream = tokenizer.stream()
    begins = []
    for token_id in one + two + tokenizer.encode("b"):
        stream.push(token_id)
        begins.append(stream.begin)
    assert tokenizer.decode(one + two + tokenizer.encode("b")) == "\ufffda\ufffdb"
    assert begins == [0, 0, 1, 2, 3]


def test_a_split_character_comes_with_its_last_token() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode("🇩")
    assert len(ids) == 4
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "🇩"]
    assert stream.finish() == ""
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_only_control_tokens_are_skipped() -> None:
    ids = [IM_START, THINK, *small_tokenizer().encode("a"), IM_END]
    assert small_tokenizer().decode(ids) == "<|im_start|><think>a<|im_end|>"
    assert small_tokenizer().decode(ids, skip_special=True) == "<think>a"


def test_a_shield_keeps_special_text_plain() -> None:
    tokenizer = small_tokenizer()
    plain = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.encode_special("a<X|im_end|>b", shield="X") == plain
    assert tokenizer.encode_special("a<|im_end|>Xb", shield="X") == plain
    assert tokenizer.encode_special("aX<|im_end|>bX", shield="X") == [
        *tokenizer.encode("a"),
        IM_END,
        *tokenizer.encode("b"),
    ]


def test_the_longest_special_text_wins() -> None:
    tokens = [*GOLDEN["tokens"], "<|im_end|>>", "<|im"]
    types = [*GOLDEN["token_type"], 4, 4]
    tokenizer = Tokenizer.from_gguf(metadata_of(small_values(tokens=tokens, token_type=types)))
    assert tokenizer.encode_special("<|im_end|>>") == [392]
    assert tokenizer.encode_special("<|im_end|>") == [IM_END]
    assert tokenizer.encode_special("<|im_end") == [393, *tokenizer.encode("_end")]


def test_ends_and_beginnings() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.n_vocab == 392
    assert tokenizer.eos_ids == {IM_END, END_OF_TEXT}
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (IM_END, END_OF_TEXT, False)
    other = Tokenizer.from_gguf(
        metadata_of(
            small_values(eos_token_id=7, eot_token_id=9, bos_token_id=None, add_bos_token=None)
        )
    )
    assert other.eos_ids == {7, 9, IM_END, END_OF_TEXT}
    assert other.bos_id is None
    assert other.token_id("<|im_end|>") == IM_END
    assert other.token_id("a") is None
    assert other.special_text(IM_END) == "<|im_end|>"
    assert other.special_text(None) == other.special_text(64) == ""


def test_token_bytes() -> None:
    tokenizer = small_tokenizer()
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("é ok"))) == "é ok".encode()
    assert tokenizer.token_bytes(IM_END) == b"<|im_end|>"
    assert tokenizer.token_bytes(PADDING) == b"[PAD391]"
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([i]) for i in range(256)}


@pytest.mark.parametrize("token_id", [-1, 392, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match=f"token id {token_id} is outside 0 to 391"):
        small_tokenizer().decode([token_id])


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match=r"U\+D800.*character 2"):
        small_tokenizer().encode("ab\ud800c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model.*'llama' is not supported"),
        ({"pre": "gpt-2"}, "tokenizer.ggml.pre.*known are qwen2, qwen35"),
        ({"tokens": None}, "tokenizer.ggml.tokens.*missing"),
        ({"tokens": ["a"] * 392}, "tokens 0 and 1 are both 'a'"),
        ({"tokens": [*GOLDEN["tokens"][:391], ""]}, "token 391 has 0 characters"),
        (
            {"tokens": [*GOLDEN["tokens"][:391], "x" * (MAX_TOKEN_CHARS + 1)]},
            "token 391 has 4,097 characters, 1 to 4,096",
        ),
        ({"tokens": [*GOLDEN["tokens"][:385], *["<|im_end|>"] * 7]}, "are both '<|im_end|>'"),
        ({"tokens": GOLDEN["tokens"][:391]}, "392 types for 391 tokens"),
        ({"token_type": [1] * 391}, "391 types for 392 tokens"),
        ({"token_type": [5, *GOLDEN["token_type"][1:]]}, "1 of the 256 byte tokens are missing"),
        ({"merges": [MERGE, "ab"]}, "merge 1 is 'ab', not two tokens"),
        ({"merges": [MERGE, "t h e"]}, "merge 1 is 't h e', not two tokens"),
        ({"merges": [MERGE, "q x"]}, "merge 1 needs 'qx', which is no plain token"),
        ({"merges": ["a <|im_end|>"]}, "merge 0 needs '<|im_end|>', which is no plain token"),
        ({"eos_token_id": 392}, "eos_token_id.*392 is outside 0 to 391"),
        ({"bos_token_id": 1 << 31}, "bos_token_id.*outside 0 to 391"),
        ({"eot_token_id": "x"}, "eot_token_id.*an integer was expected"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token.*names no BOS token"),
    ],
)
def test_a_damaged_vocabulary_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GGUFError, match=message.replace("|>", r"\|>").replace("<|", r"<\|")):
        Tokenizer.from_gguf(metadata_of(small_values(**changes)))


def test_qwen2_splits_marks_from_letters() -> None:
    text = "हिन्दी"
    older = Tokenizer.from_gguf(metadata_of(small_values(pre="qwen2")))
    assert older.decode(older.encode(text)) == text
    assert older.encode(text) != small_tokenizer().encode(text)
    assert older.encode("plain words, 123") == small_tokenizer().encode("plain words, 123")


NASTY = [
    "",
    "Hello, world! It's 2026; we'll see.",
    "def f(x):\n\treturn  x**2   \r\n\r\n  # done",
    "e\u0301 A\u030a \u1100\u1161 ﬁ ① Ⅳ ² ½",
    "हिन्दी की मात्रा, தமிழ், ไทยภาษา, עִבְרִית, العَرَبِيَّة",
    "日本語の文章、한국어 문장, русский текст",
    "👩‍👩‍👧‍👦 🇩🇪 🧑🏽‍🚀 \u200b\u2028\u3000\xa0\x00\x85",
    " " * 300 + "\n" * 300 + "=" * 300 + "a" * 300,
    "1234567890" * 30,
    "<|im_end|> <think> </tool_call> <|im_start|>user\nhi<|im_end|>\n<|endoftext|",
]


@needs_qwen
@pytest.mark.parametrize("text", NASTY, ids=lambda text: repr(text[:20]))
def test_qwen_ids_are_those_of_its_own_tokenizer(text: str) -> None:
    tokenizer, _ = qwen()
    expected = reference().encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_special(text) == expected
    if "<|" not in text:
        assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == unicodedata.normalize("NFC", text)


@needs_qwen
def test_qwen_ids_of_a_long_text() -> None:
    with lzma.open(DATA / "train_mix.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(400_000)
    tokenizer, _ = qwen()
    ids = tokenizer.encode_special(text)
    assert ids == reference().encode(text, add_special_tokens=False).ids
    assert len(ids) > 60_000


@needs_qwen
def test_qwen_special_ids() -> None:
    tokenizer, _ = qwen()
    assert tokenizer.n_vocab == 248320
    assert tokenizer.eos_ids == {248044, 248046}
    assert tokenizer.token_id("<think>") == 248068
    assert tokenizer.decode([248045, 248068, 248046], skip_special=True) == "<think>"
