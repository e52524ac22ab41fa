import pytest

from fomoe.errors import ConfigError
from fomoe.sim.calibration import calibrate, fit, read_calibration

# The twin's table, tokens per second: what a change of it must be looked at for.
GOLDEN = {
    "two GPUs, exact": 5.10,
    "two GPUs, CAR 0.35": 8.80,
    "one GPU, CAR 0.3, 32 GB cache": 7.41,
    "one GPU, CAR 0.3, 18 GB cache": 6.46,
    "one GPU, v1, CAR 0.5": 5.41,
}


@pytest.fixture(scope="module")
def results():
    return {result.row.name: result for result in calibrate()}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_table_is_as_it_was(results, name):
    assert results[name].predicted[1] == pytest.approx(GOLDEN[name], abs=0.02)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_was_measured_is_met_within_15_percent(results, name):
    result = results[name]
    low, high = result.row.measured
    for figure in result.predicted:
        assert 0.85 * low <= figure <= 1.15 * high
    assert abs(result.deviation) <= (0.005 if result.row.role == "fitted" else 0.15)


def test_foresight_on_misses_spreads_every_row(results):
    for result in results.values():
        little, much = result.guessed
        assert little < much


def test_own_rules_give_the_published_hit_rates(results):
    device, ram, nvme, _ = results["two GPUs, exact"].shares
    assert device == pytest.approx(0.60, abs=0.03)
    assert ram == pytest.approx(0.12, abs=0.03)
    assert nvme == pytest.approx(0.28, abs=0.03)
    assert results["two GPUs, CAR 0.35"].shares[2] == pytest.approx(0.06, abs=0.015)


def test_two_constants_are_fitted_and_frozen():
    calibration = read_calibration()
    again = fit(calibration)
    assert again.drive_share == pytest.approx(calibration.fitted.drive_share, rel=0.002)
    assert again.layer_s == pytest.approx(calibration.fitted.layer_s, rel=0.002)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('role = "fitted"', 'roll = "fitted"', "roll"),
        ("[fitted]", "extra = 1\n[fitted]", "extra"),
        ("drive_share = 0", "other = 0", "other"),
    ],
)
def test_refuses_a_file_with_something_unknown(tmp_path, old, new, said):
    from fomoe.sim import calibration

    text = calibration._FILE.read_text()
    assert old in text
    path = tmp_path / "calibration.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=said):
        read_calibration(path)
