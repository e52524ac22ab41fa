"""Rows that stay in the file: the same bytes as a read of the whole tensor, and clear errors."""

import numpy as np
import pytest
from support.tiny_gguf import write_tiny

from fomoe.errors import GGUFError
from fomoe.gguf.reader import open_gguf


@pytest.fixture
def path(tmp_path):
    return write_tiny(tmp_path / "m.gguf", seed=1, quant="Q4_K_M", layers=2, vocab=300)


def test_rows_are_those_of_the_whole_tensor(path):
    file = open_gguf(path)
    whole = file.read("token_embd.weight")
    rows = file.rows("token_embd.weight", 5)
    assert (rows.rows, rows.row_bytes) == whole.shape
    for ids in ([0], [299, 0, 299], [7, 7, 7, 7, 8], []):
        wanted = np.array(ids, np.int32)
        np.testing.assert_array_equal(rows.read(wanted), whole[wanted])


@pytest.mark.parametrize("wrong", [-1, 300])
def test_an_id_that_is_no_row_is_refused(path, wrong):
    rows = open_gguf(path).rows("token_embd.weight", 2)
    with pytest.raises(IndexError, match=f"row {wrong} of 300"):
        rows.read(np.array([0, wrong], np.int32))


def test_a_file_cut_short_gives_an_error_with_the_place(path):
    file = open_gguf(path)
    rows = file.rows("token_embd.weight", 1)
    offset = file.tensors["token_embd.weight"].offset
    with path.open("r+b") as handle:
        handle.truncate(offset + 3)
    with pytest.raises(GGUFError, match=r"token_embd\.weight.*only 3 of"):
        rows.read(np.array([0], np.int32))
