"""The benchmark of products runs on the stand-in and finds its results right."""

import sys
from pathlib import Path

import pytest
from support.emulated_gpu import install_standin


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch):
    install_standin()
    folder = Path(__file__).parents[2] / "benchmarks" / "gpu"
    monkeypatch.syspath_prepend(str(folder))
    import products

    yield products
    for name in ("products", "product_cases", "weights", "bandwidth", "device_time"):
        sys.modules.pop(name, None)


def test_every_result_is_right(products):
    from product_cases import LayerSizes

    rows = products.main(
        ["--device", "hip:0", "--mib", "0.05", "--rounds", "1", "--cases", "Q6_K,experts+q5_k"],
        LayerSizes(256, 256, 256, 2),
    )
    assert len(rows) == 4
    assert all(row["error"] < 1e-5 and row["share"] > 0 for row in rows)


def test_a_wrong_result_is_seen(products, monkeypatch):
    import product_cases

    right = product_cases.values_of
    monkeypatch.setattr(product_cases, "values_of", lambda kind, rows: right(kind, rows) * 1.001)
    arguments = ["--device", "hip:0", "--mib", "0.05", "--rounds", "1", "--cases", "Q6_K"]
    (row,) = products.main(arguments, product_cases.LayerSizes(256, 256, 256, 2))
    assert row["error"] > products.TOLERANCE
