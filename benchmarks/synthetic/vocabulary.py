"""A byte-level vocabulary of any size: bytes, a few merges, numbered filler, three specials."""

from __future__ import annotations

import gguf

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "a n", "an d", "i n", "e r", "o n")
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def byte_letters() -> list[str]:
    """Return the printable stand-in of each byte 0..255 (GPT-2's byte-level alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Write the vocabulary, its special ids and a chat template into a GGUF header."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*byte_letters(), *merged]
    filler = size - len(tokens) - len(SPECIALS)
    if filler < 0:
        raise ValueError(f"a vocabulary of {size} ids is too small")
    tokens += [f"filler{i}" for i in range(filler)] + list(SPECIALS)
    kinds = [gguf.TokenType.NORMAL] * (size - len(SPECIALS))
    kinds += [gguf.TokenType.CONTROL] * len(SPECIALS)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(MERGES))
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
