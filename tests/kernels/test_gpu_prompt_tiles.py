"""Which tiles the prompt's products take on devices of several sizes."""

import pytest

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.prompt_tiles import Room, Size, Tile, expert_tiles, float_tile, int8_tile

LARGE, SMALL = Room(132, 227 << 10), Room(32, 64 << 10)
Q4_K, Q6_K = (12, 12), (14, 14)


def shape_of(tile):
    return tile.rows, tile.tokens


@pytest.mark.parametrize(
    ("types", "rows", "tokens", "expected"),
    [
        (Q4_K, 8192, 512, Tile(128, 128, 512)),
        (Q4_K, 1024, 512, Tile(64, 64, 128)),  # 128 rows a tile would leave half of the cores idle
        (Q6_K, 4096, 2048, Tile(128, 128, 256)),
        (Q6_K, 2048, 512, Tile(64, 128, 256)),
        ((12, 14), 2048, 512, Tile(64, 128, 256)),
        (Q4_K, 12288, 64, Tile(64, 64, 128)),
        (Q4_K, 12288, 16, Tile(64, 16, 128, 3)),
        (Q4_K, 12288, 1, Tile(64, 16, 128, 3)),
    ],
)
def test_dense_tiles_fill_a_large_device(types, rows, tokens, expected):
    assert int8_tile(types, Size(rows, 4096, tokens), LARGE) == expected


@pytest.mark.parametrize("types", [Q4_K, Q6_K, (8, 23)])
@pytest.mark.parametrize("tokens", [1, 16, 40, 512, 2048])
def test_tiles_fit_a_device_with_64_kib(types, tokens):
    tile = int8_tile(types, Size(8192, 4096, tokens), SMALL)
    assert tile.shared_bytes(types, 4096) <= SMALL.shared_bytes
    into, out = expert_tiles((*types, types[1]), (4096, 1024), tokens, SMALL)
    assert into.tokens == out.tokens
    assert into.shared_bytes(types, 4096) <= SMALL.shared_bytes
    assert out.shared_bytes((types[1], types[1]), 1024) <= SMALL.shared_bytes
    float32 = float_tile(Size(512, 4096, tokens), SMALL.cores)
    assert float32.shared_bytes((0, 0), 4096) <= SMALL.shared_bytes


@pytest.mark.parametrize(
    ("types", "each", "expected"),
    [
        ((12, 12, 14), 40, ((128, 64), (64, 64))),
        ((12, 12, 12), 40, ((128, 64), (128, 64))),
        ((14, 12, 14), 64, ((64, 64), (64, 64))),
        ((12, 12, 14), 16, ((64, 32), (128, 32))),
        ((12, 12, 14), 10, ((64, 16), (64, 16))),
    ],
)
def test_expert_tiles_have_equally_many_tokens(types, each, expected):
    assert tuple(map(shape_of, expert_tiles(types, (4096, 1024), each, LARGE))) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size(512, 4096, 2048), (128, 64)),
        (Size(512, 4096, 512), (64, 32)),
        (Size(64, 4096, 2048, 2), (64, 32)),
        (Size(64, 4096, 512, 2), (16, 32)),
        (Size(32, 2048, 2048, 2), (32, 32)),
        (Size(1, 2048, 4), (16, 16)),
    ],
)
def test_float_tiles_fill_a_large_device(size, expected):
    assert shape_of(float_tile(size, LARGE.cores)) == expected


def test_a_tile_names_what_does_not_fit():
    with pytest.raises(DeviceError, match="1,000"):
        int8_tile((12, 12), Size(64, 256, 64), Room(1, 1000))
    with pytest.raises(DeviceError, match="1,000"):
        expert_tiles((12, 12, 14), (256, 256), 64, Room(1, 1000))
