"""The texts of contracts: one canonical form each, and clear refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.config import default_model
from fomoe.errors import ConfigError
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.quality import (
    Quality,
    car_quality,
    parse_quality,
    profile_beside,
    read_sensitivities,
)
from fomoe.units import exact_bytes, parse_bytes

TEXTS = {
    "exact": ("exact", 0.0, "exact"),
    "kl=0.01": ("kl", 0.01, "kl=0.01"),
    " kl=1e-2 ": ("kl", 0.01, "kl=0.01"),
    "kl=2": ("kl", 2.0, "kl=2"),
    "bytes=0.5GB/token": ("bytes", 5e8, "bytes=500MB/token"),
    "bytes=1.5GiB": ("bytes", 1.5 * 2**30, "bytes=1536MiB/token"),
    "bytes=1048577": ("bytes", 1048577.0, "bytes=1048577B/token"),
    "bytes=1MiB/token": ("bytes", 1048576.0, "bytes=1MiB/token"),
    "car=0.35": ("car", 0.35, "car=0.35"),
    "car=.6": ("car", 0.6, "car=0.6"),
    "price=0.05": ("price", 0.05, "price=0.05"),
}

REFUSED = {
    "": "not understood",
    "Exact": "not understood",
    "exact=1": "not understood",
    "exact=": "not understood",
    "kl": "not understood",
    "ppl=3": "not understood",
    "kl=": "not a number",
    "kl=nan": "not a number",
    "kl=inf": "not a number",
    "kl=-1": "not a number",
    "kl=1_0": "not a number",
    "kl=٣": "not a number",
    "kl=0": "1e-06 to 10",
    "kl=11": "1e-06 to 10",
    "car=0": "above 0 and up to 1",
    "car=1.01": "above 0 and up to 1",
    "price=0": "above 0 and up to 1",
    "price=1.5": "above 0 and up to 1",
    "bytes=0": "from 1 to",
    "bytes=2000TB/token": "from 1 to",
    "bytes=1GB/s": "not a size",
    "bytes=/token": "not a size",
    "kl=0.01,car=0.3": "not a number",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_parsed_and_printed_canonically(text):
    kind, value, canonical = TEXTS[text]
    quality = parse_quality(text)
    assert (quality.kind, quality.value, str(quality)) == (kind, value, canonical)
    assert parse_quality(str(quality)) == quality


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_with_what_is_allowed(text):
    with pytest.raises(ConfigError, match=REFUSED[text]):
        parse_quality(text)


@given(st.sampled_from(["kl", "car", "price"]), st.floats(1e-6, 1.0))
def test_every_figure_survives_its_text(kind, value):
    assert parse_quality(str(Quality(kind, value))) == Quality(kind, value)


@given(st.integers(1, 2**50))
def test_every_size_survives_its_text(n_bytes):
    assert parse_bytes(exact_bytes(n_bytes)) == n_bytes
    quality = Quality("bytes", float(n_bytes))
    assert parse_quality(str(quality)) == quality


@given(st.text(max_size=20))
def test_garbage_is_understood_or_refused(text):
    try:
        quality = parse_quality(text)
    except ConfigError:
        return
    assert parse_quality(str(quality)) == quality


def test_objects_are_checked_like_texts():
    assert Quality() == parse_quality("exact")
    assert Quality().is_exact
    for kind, value in (("exact", 1.0), ("ppl", 1.0), ("kl", float("nan")), ("bytes", 1.5)):
        with pytest.raises(ConfigError):
            Quality(kind, value)


def test_a_threshold_is_short_for_a_contract():
    assert car_quality(0) == Quality()
    assert car_quality(0.35) == parse_quality("car=0.35")
    for wrong in (-0.1, 1.1, float("nan"), "0.3"):
        with pytest.raises(ConfigError, match="between 0"):
            car_quality(wrong)


def test_a_loss_profile_lies_beside_its_model(tmp_path):
    model = tmp_path / "some-Q4.gguf"
    assert profile_beside(model) is None
    (tmp_path / "some-Q4.loss.json").write_text('{"model": "x", "sensitivities": [0.5, 2]}')
    found = profile_beside(model)
    assert found is not None
    assert read_sensitivities(found) == (0.5, 2.0)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"sensitivities": 3}', '{"sensitivities": "12"}', "\xff"],
)
def test_other_files_are_no_loss_profiles(tmp_path, content):
    path = tmp_path / "x.loss.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="not a loss profile"):
        read_sensitivities(path)


def test_the_bundled_model_has_a_profile_of_its_layers():
    path = default_model()
    profile = profile_beside(path)
    assert profile is not None
    assert len(read_sensitivities(profile)) == read_spec(open_gguf(path)).n_layers
