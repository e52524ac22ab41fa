"""A synthetic file opens in fomoe and in its shape, and its routing is as local as the recipe's."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic.locality import lfru_hits, measure, recency
from synthetic.mix import Mix
from synthetic.model_file import Recipe, write_model
from synthetic.routing import (
    Drift,
    embeddings,
    fitted_popularity,
    measured_popularity,
    router,
)
from synthetic.shapes import SHAPES
from synthetic.verify import trace

from fomoe.engine.local import local_logits
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.tokenizer import Tokenizer
from fomoe.residency import LFRU, Residency, Topology

SMALL = replace(SHAPES["tiny60"], name="small", experts=64, hidden=512, vocab=600)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "small.gguf"
    write_model(path, Recipe(shape=SMALL, layers=5))
    return path


def test_the_file_has_the_shape_that_was_asked_for(small):
    file = open_gguf(small)
    spec = read_spec(file)
    assert [kind == "attention" for kind in spec.layers] == [False, False, False, True, False]
    assert (spec.hidden, spec.vocab, spec.moe.n_experts, spec.moe.top_k) == (512, 600, 64, 4)
    assert Tokenizer.from_gguf(file.metadata).n_vocab == 600
    assert file.tensor("token_embd.weight").type.name == "Q4_K"
    assert file.tensor("output.weight").type.name == "Q6_K"


def test_the_true_shapes_have_experts_of_the_true_size():
    mix = Mix(SHAPES["397b-a17b"].full_layers)
    kinds = [mix.kind("ffn_down_exps.weight", layer, 1024) for layer in range(60)]
    assert kinds.count("Q6_K") == 30
    assert kinds[:7] == ["Q6_K"] * 7
    assert mix.kind("ffn_gate_exps.weight", 0, 4096) == "Q4_K"
    assert mix.kind("ffn_down_exps.weight", 0, 64) == "Q8_0"


def test_activations_stay_sane(small):
    logits = local_logits(small, list(range(40)))
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3.0  # the output's gain is one


def test_the_files_own_routers_choose_what_the_recipe_says(small):
    """The embedding dominates: a mixer's update leaves most of layer 0's choices as they are."""
    ids, foreseen = trace(small, list(range(128)), threads=1)
    assert ids.shape == (128, 5, 4)
    assert foreseen.shape == (128, 4, 4)
    recipe = Recipe(shape=SMALL, layers=5)
    text = embeddings(np.random.default_rng([0, 3]), 600, 512, recipe.drift)[:128]
    popularity = fitted_popularity(np.random.default_rng([0, 2]), 64)
    rng = np.random.default_rng([0, 1, 0])
    rng.normal(0, 0.5, (2 * 2 * 64 + 256, 4))
    rng.uniform(size=4), rng.uniform(size=4)
    scores = text @ router(rng, popularity, 512, recipe.drift).T
    want = np.argsort(-scores, axis=1)[:, :4]
    same = (ids[:, 0, :, None] == want[:, None, :]).any(axis=2).mean()
    assert same > 0.75  # of 6 % by chance; a mixer's update of a tenth and Q4_K are in between


def test_locality_of_the_default_drift_is_as_measured():
    """LRU 60, 72 and 81 % with 50, 86 and 128 of 512 slots; here without a model in between."""
    drift, rng = Drift(), np.random.default_rng(7)
    text = embeddings(rng, 768, 1536, drift)
    ids = np.empty((768, 4, 10), np.int32)
    for layer in range(4):
        scores = text @ router(rng, fitted_popularity(rng, 512), 1536, drift).T
        ids[:, layer] = np.argpartition(-scores, 9, axis=1)[:, :10]
    found = measure(ids, 512, (50, 86, 128), warmup=256)
    # Four layers and one stretch of text: each rate is known to about two percent.
    assert found.lru_hits[50] == pytest.approx(0.60, abs=0.04)
    assert found.lru_hits[86] == pytest.approx(0.72, abs=0.04)
    assert found.lru_hits[128] == pytest.approx(0.81, abs=0.04)
    assert found.distinct >= 250


def test_popularity_is_exactly_the_quantile_that_was_given():
    drift = replace(Drift(), popularity=1.0, topic_half_life=0.01, context_half_life=0.01)
    rng = np.random.default_rng(1)
    text = embeddings(rng, 6000, 768, drift)
    popularity = np.linspace(-2.0, -0.5, 40)
    scores = text @ router(rng, popularity, 768, drift).T
    # Drift without memory: each score is its quantile plus unit noise.
    assert scores.mean(axis=0) == pytest.approx(popularity, abs=0.1)
    assert scores.std(axis=0) == pytest.approx(np.ones(40), abs=0.1)


def test_recency_counts_as_an_lru_would():
    ids = np.array([[[0, 1]], [[2, 1]], [[0, 3]], [[1, 2]]], np.int32)
    ranks = recency(ids, experts=5)[:, 0]
    assert ranks[0].tolist() == [5, 5]
    assert ranks[1].tolist() == [5, 0]  # never used; the last one used
    assert ranks[2].tolist() == [2, 5]
    assert ranks[3].tolist() == [2, 3]


def test_a_frequency_file_sets_the_popularity(tmp_path):
    path = tmp_path / "a.freq"
    entries = [(0, 0, 0.5), (0, 1, 0.16), (1, 1, 0.5)]
    body = b"".join(struct.pack("<HHf", *entry) for entry in entries)
    path.write_bytes(struct.pack("<IIII", 0x46524551, 1, 2, 3) + body)
    found = measured_popularity(path, layers=2, experts=2)
    assert found[0] == pytest.approx([0.0, -0.994], abs=0.01)
    assert found[1] == pytest.approx([-2.878, 0.0], abs=0.01)
    with pytest.raises(ValueError, match="names expert 1"):
        measured_popularity(path, layers=2, experts=1)


def test_fewer_than_four_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give 4 or up"):
        write_model(tmp_path / "a.gguf", Recipe(shape=SMALL, layers=3))


def test_the_script_writes_file_and_recipe(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "synth.py"
    command = [sys.executable, str(script), "--shape", "tiny60", "--layers", "4"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=True, timeout=100
    )
    recipe = json.loads((tmp_path / "tiny60-4l.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == recipe
    assert recipe["locality"]["tokens"] == 512
    assert recipe["bytes"] == (tmp_path / "tiny60-4l.gguf").stat().st_size


def test_lfru_hits_are_those_of_the_residency():
    """Against fomoe's own tables: one device, no RAM, one layer at a time."""
    rng = np.random.default_rng(5)
    layers, experts, k, slots = 2, 24, 3, 8
    popular = rng.gumbel(size=(layers, experts)) * 2
    scores = popular + rng.gumbel(size=(120, layers, experts))
    ids = np.argsort(-scores, axis=2)[:, :, :k].astype(np.int32)
    hits = 0
    for layer in range(layers):
        zeros = np.zeros(1, np.int32)
        topology = Topology(
            n_layers=1, n_experts=experts, layer_device=zeros, layer_class=zeros,
            device_node=(0,), device_slots={(0, 0): slots}, ram_slots={(0, 0): 0},
        )  # fmt: skip
        residency = Residency(topology, LFRU())
        for token, chosen in enumerate(ids[:, layer]):
            plan = residency.plan(0, np.sort(chosen))
            residency.release(0)
            hits += len(plan.hits) if token >= 40 else 0
    assert lfru_hits(ids, experts, slots, 40) == hits / (80 * layers * k)
