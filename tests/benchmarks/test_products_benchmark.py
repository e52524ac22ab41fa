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
    made = ("products", "product_cases", "product_tuning", "decode_layer", "side_by_side")
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

    from fomoe.model.spec import DeltaSpec

    delta = DeltaSpec(n_k_heads=2, n_v_heads=8, key_dim=16, value_dim=32, conv_width=4)
    model = Model("small", 256, delta, 16, 256, 256, 3)
    types = Types(tuning.Q8_0, tuning.Q4_K, tuning.Q6_K)
    monkeypatch.setattr(tuning, "LAYERS", [(model, types)])
    monkeypatch.setattr(tuning, "LAYER", tuning.LayerSizes(256, 256, 256, 2))
    monkeypatch.setattr(tuning, "EXPERTS", [(tuning.Q4_K, tuning.Q5_K)])
    monkeypatch.setattr(tuning, "MATRICES", [tuning.Q6_K])
    monkeypatch.setattr(tuning, "SMALL_SHAPES", ((2, 1, 2, 1280), (64, 1, 2, 1280)))
    monkeypatch.setattr(tuning, "HELD", (96,))
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    assert not products.main(["--device", "hip:0", "--mib", "0.1", "--tune"])
    lines = capsys.readouterr().out.splitlines()
    variants = [line for line in lines if " us, " in line]
    assert len(variants) == (2 + 5 + 1) * 2  # groups of 64 waves do not fit
    table = [line for line in lines if line.startswith('    ("')]
    kernels = [line.split("): ")[0].strip() for line in table]
    assert kernels == [
        '("experts_out", GGMLType.Q5_K', '("experts_in", GGMLType.Q4_K',
        '("project", GGMLType.Q8_0', '("project_rows", GGMLType.Q8_0',
        '("project", GGMLType.F32', '("experts_in", GGMLType.Q4_K', '("experts_out", GGMLType.Q6_K',
        '("project_rows", GGMLType.Q6_K',
    ]  # fmt: skip
    assert all("Tuning(waves=" in line for line in table)
