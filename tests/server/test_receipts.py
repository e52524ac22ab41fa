from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.engine.requests import PromptProgress, Receipt
from fomoe.server.receipts import combined, percentages, prompt_line, tier_line, timings


@pytest.mark.parametrize(
    ("receipt", "line"),
    [
        (
            Receipt(
                generated_tokens=380,
                generated_ms=10_000.0,
                hits_device=61,
                hits_ram=12,
                reads_nvme=27,
                devices="device (emulated)",
            ),
            "38 tok/s | device (emulated) 61 %  ram 12 %  nvme 27 % | exact",
        ),
        (
            Receipt(
                generated_tokens=88,
                generated_ms=10_000.0,
                hits_device=61,
                hits_ram=9,
                reads_nvme=9,
                substituted=21,
                mode="car=0.6",
            ),
            "8.8 tok/s | device 61 %  ram 9 %  nvme 9 % | car=0.6, 21 % substituted, "
            "router mass lost 0 a token | read 0 MB on demand",
        ),
        (
            Receipt(generated_tokens=2, generated_ms=40_000.0, hits_ram=1, mode="car=0.1"),
            "0.05 tok/s | device 0 %  ram 100 %  nvme 0 % | car=0.1, 0 % substituted, "
            "router mass lost 0 a token | read 0 MB on demand",
        ),
        (
            Receipt(
                generated_tokens=101,
                generated_ms=10_000.0,
                hits_device=3,
                substituted=1,
                lost_mass=84.0,
                shadow_steps=12,
                shadow_kl=0.0996,
                price=0.0413,
                nvme_bytes=12_400_000,
                prefetch_bytes=2_000_000,
                shadow_bytes=1_300_000,
                mode="kl=0.01",
            ),
            "10 tok/s | device 75 %  ram 0 %  nvme 0 % | kl=0.01, 25 % substituted, "
            "router mass lost 0.84 a token, KL 0.0083 nats (12 steps), price 0.041 | "
            "read 9.1 MB on demand, 2 prefetch, 1.3 shadow",
        ),
        (
            Receipt(hits_device=1, hits_ram=1, reads_nvme=1),
            "- tok/s | device 34 %  ram 33 %  nvme 33 % | exact",
        ),
        (
            Receipt(
                generated_tokens=1, generated_ms=0.1, prompt_hits_device=1, prompt_reads_nvme=3
            ),
            "- tok/s | device 25 %  ram 0 %  nvme 75 % of the prompt | exact",
        ),
        (Receipt(), "- tok/s | device 0 %  ram 0 %  nvme 0 % of the prompt | exact"),
        (
            Receipt(generated_tokens=3, generated_ms=100.0, mode="not measured"),
            "30 tok/s | experts not measured",
        ),
    ],
)
def test_the_tier_line_says_what_an_answer_cost(receipt: Receipt, line: str) -> None:
    assert tier_line(receipt) == line


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=6).filter(any))
def test_percentages_add_up_and_are_never_off_by_one(counts: list[int]) -> None:
    shares = percentages(counts)
    assert sum(shares) == 100
    for share, count in zip(shares, counts, strict=True):
        assert abs(share * sum(counts) - 100 * count) < sum(counts)


def test_receipts_of_several_answers_are_summed() -> None:
    one = Receipt(prompt_tokens=3, generated_tokens=2, nvme_bytes=7, mode="exact")
    two = Receipt(prompt_tokens=3, generated_tokens=5, nvme_bytes=1, mode="car=0.5")
    both = combined([one, two])
    assert (both.prompt_tokens, both.generated_tokens, both.nvme_bytes) == (6, 7, 8)
    assert both.mode == "car=0.5"
    assert combined([]) == Receipt()


def test_timings_hold_the_fields_of_llama_cpp_and_ours() -> None:
    values = timings(
        Receipt(
            prompt_tokens=10,
            cached_tokens=6,
            prompt_ms=200.0,
            generated_tokens=5,
            generated_ms=250.0,
            hits_device=3,
            prompt_reads_nvme=9,
            substituted=4,
            lost_mass=0.5,
            nvme_bytes=100,
            prompt_bytes=50,
            shadow_bytes=20,
            shadow_steps=2,
            shadow_kl=0.5,
            price=0.25,
            stall_ms=12.0,
            logical_capacity=64,
            decision_hash="0f",
        )
    )
    ours = values.pop("fomoe")
    assert values == {
        "cache_n": 6,
        "prompt_n": 4,
        "prompt_ms": 200.0,
        "prompt_per_token_ms": 50.0,
        "prompt_per_second": 20.0,
        "predicted_n": 5,
        "predicted_ms": 250.0,
        "predicted_per_token_ms": 50.0,
        "predicted_per_second": 20.0,
    }
    assert ours["hit"] == {"device": 3, "ram": 0, "nvme": 0}
    assert ours["prompt_hit"]["nvme"] == 9
    assert (ours["substituted"], ours["router_mass_lost"], ours["stall_ms"]) == (4, 0.5, 12.0)
    assert ours["bytes"] == {
        "demand": 30, "prompt": 50, "prefetch": 0, "background": 0, "shadow": 20,
    }  # fmt: skip
    assert (ours["estimated_kl"], ours["shadow_steps"], ours["price"]) == (0.25, 2, 0.25)
    assert timings(Receipt())["fomoe"]["estimated_kl"] is None
    assert (ours["logical_capacity"], ours["decision_hash"]) == (64, "0f")
    assert timings(Receipt())["predicted_per_token_ms"] == 0.0


def news(**changes):
    fields = {"request_id": "a", "total": 1024, "processed": 320, "cached": 0, "time_ms": 26_000.0}
    return PromptProgress(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "prompt 320 of 1,024 tokens | 12 tok/s | 57 s left"),
        ({"cached": 256}, "prompt 320 of 1,024 tokens | 2.5 tok/s | 4 min 46 s left"),
        ({"processed": 1024}, "prompt 1,024 of 1,024 tokens | 39 tok/s | 0 s left"),
        ({"processed": 64, "cached": 64}, "prompt 64 of 1,024 tokens"),
        ({"processed": 0, "time_ms": 0.0}, "prompt 0 of 1,024 tokens"),
    ],
)
def test_a_prompt_under_way(changes, line):
    assert prompt_line(news(**changes)) == line
