"""The comparison's own machinery: settings search, child processes, results and the table."""

import json
import sys

import pytest
import readme_table
from versus.duel import Outcome
from versus.engine import Engine, EngineError, Launch
from versus.items import ITEMS
from versus.report import result, text
from versus.settings import Settings, Trial, knobs, search

ECHO = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "die":
        sys.exit("gone for good")
    if request["op"] == "kill":
        os.kill(os.getpid(), 9)
    print(json.dumps({"error": "no"} if request["op"] == "refuse" else request), flush=True)
"""


def engine():
    return Engine(Launch((sys.executable, "-c", ECHO)))


def test_an_engine_answers_and_ends():
    with engine() as one:
        assert one.call("run", first=3) == {"op": "run", "first": 3}
        with pytest.raises(EngineError, match=r"^no$"):
            one.call("refuse")
        assert one.call("run") == {"op": "run"}


@pytest.mark.parametrize(
    ("op", "message"), [("die", "gone for good"), ("kill", "killed, most likely out of memory")]
)
def test_an_engine_that_dies_says_why(op, message):
    with engine() as one:
        with pytest.raises(EngineError, match=message):
            one.call(op)
        with pytest.raises(EngineError, match="died"):
            one.call("run")


def test_the_search_turns_one_knob_at_a_time_and_keeps_failures():
    def measure(settings):
        if settings.repack:
            raise EngineError("out of memory")
        return 100.0 - 30 * (settings.ubatch == 1024) + 5 * settings.flash

    best, trials = search(Settings(), knobs(1024, limited=False), measure)
    assert best == Settings(repack=False, flash=False, ubatch=1024)
    assert [t.failure for t in trials if t.settings.repack] == ["out of memory"]
    assert len({t.settings for t in trials}) == len(trials)


def test_a_gain_in_the_noise_turns_no_knob():
    best, _ = search(Settings(), knobs(0, limited=False), lambda s: 99.0 if not s.flash else 100.0)
    assert best == Settings()


def test_a_search_in_which_nothing_works_says_so():
    def measure(settings):
        raise EngineError("no such file")

    with pytest.raises(EngineError, match="no such file"):
        search(Settings(), knobs(0, limited=True), measure)


def test_no_text_needs_a_longer_context_than_it_gets():
    for item in ITEMS.values():
        assert item.prompt + item.decode < item.ctx <= item.prompt + item.decode + 258


def outcome(ours, theirs, limits=None):
    reads = {"bytes": 3e9, "demand_bytes": 2e9, "demand_open_s": 1.0, "prefetch_bytes": 1e9}
    fomoe = [{"decode_ms": ms, "reads": reads, "others_cores": 0.1} for ms in ours]
    llama = [{"decode_ms": ms, "others_cores": 0.3} for ms in theirs]
    info = {"version": "0.3.36", "system": "CPU"}
    trials = [Trial(Settings(), 1.0)]
    return Outcome(fomoe, llama, Settings(), trials, info, {}, limits or {})


def test_a_result_has_medians_ratio_and_the_drives_share():
    item = ITEMS["397b-decode-quarter"]
    limits = {"memory_bytes": 1 << 32, "expert_bytes": 1 << 34}
    limits |= {"direct": {"random": 2.2e9, "sequential": 2.5e9}}
    data = result(item, outcome([640, 6400, 1280], [1600, 2560, 6400], limits), {}, 2)
    assert data["ratio"] == 2.5
    assert data["fomoe"]["ms_per_token"] == 20.0
    assert data["llama"]["tokens_per_s"] == 25.0
    assert data["pair_ratios"] == [2.5, 0.4, 5.0]
    assert data["drive"]["demand_bytes_per_s"] == 2_000_000_000
    assert data["drive"]["demand_share"] == 0.8
    assert data["drive"]["prefetch_bytes_per_run"] == 1_000_000_000
    assert data["others_cores"] == 0.3
    assert "2.50 (bar 2.5)" in text(data)
    json.dumps(data)


def test_the_table_goes_between_the_lines_and_stays(tmp_path, monkeypatch):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(f"a\n{readme_table.BEGIN}\nold\n{readme_table.END}\nb\n")
    for name, scale in (("35b-decode", 1), ("demo-decode", 2)):
        data = result(ITEMS[name], outcome([10 * scale], [15 * scale]), {}, 2)
        (results / f"{name}.json").write_text(json.dumps(data))
    arguments = ["x", "--results", str(results), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        readme_table.main()
    monkeypatch.setattr(sys, "argv", arguments)
    readme_table.main()
    once = readme.read_text()
    assert once.startswith("a\n")
    assert once.endswith("\nb\n")
    assert "old" not in once
    rows = [line for line in once.splitlines() if line.startswith("| decode")]
    assert ["bundled" in row for row in rows] == [True, False]  # the order of the items
    assert "| 1.50 |" in rows[0]
    readme_table.main()
    assert readme.read_text() == once
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    readme_table.main()


def test_a_readme_without_the_lines_is_refused():
    with pytest.raises(ValueError, match="has no lines"):
        readme_table.insert("text", "table")


def test_items_say_what_they_time():
    assert ITEMS["35b-decode"].unit_tokens == 64
    assert ITEMS["35b-prefill-512"].unit_tokens == 512
