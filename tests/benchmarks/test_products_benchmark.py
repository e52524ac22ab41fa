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
    made = ("products", "product_cases", "product_tuning", "decode_layer")
    for name in (*made, "weights", "bandwidth", "device_time"):
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


def test_the_tuner_prints_lines_for_the_table(products, monkeypatch, capsys):
    import product_tuning as tuning
    from decode_layer import Model, Types

    model = Model("small", 256, (96, 8), 256, 16, 256, 256, 3)
    types = Types(tuning.Q8_0, tuning.Q4_K, tuning.Q6_K)
    monkeypatch.setattr(tuning, "CASES", [tuning.Case(model, types, tuning.PARTS, whole=True)])
    monkeypatch.setattr(tuning, "SHAPES", ((2, 1, 3, 2304), (1, 2, 2, 1152), (64, 1, 3, 2304)))
    monkeypatch.setattr(tuning, "AHEADS", (0, 512))
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    assert not products.main(["--device", "hip:0", "--mib", "0.2", "--tune"])
    lines = capsys.readouterr().out.splitlines()
    layers = [line for line in lines if "Q6_K whole layer" in line]
    assert len(layers) == 3 * 2 * 2  # groups of 64 waves do not fit
    table = [line for line in lines if line.startswith('    ("')]
    kernels = [line.split("): ")[0].strip() for line in table]
    assert kernels == [
        '("project", GGMLType.Q8_0', '("project", GGMLType.F32', '("experts_in", GGMLType.Q4_K',
        '("experts_out", GGMLType.Q6_K',
    ]  # fmt: skip
    assert all(line.endswith("),") and "Tuning(waves=" in line for line in table)
