"""The findings' samples, that marking entries empty is evicting them, and the tables."""

from __future__ import annotations

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core.errors import UserError
from experiments.findings import cells, measure, report, samples
from experiments.findings.__main__ import main
from experiments.longbench.stdlib_text import prose_sentences
from restkv_jax.decode import (
    AdaKV,
    CachePlan,
    Full,
    RestKV,
    SharedBudget,
    VNorm,
    calibrate_head_budgets,
    extend,
    prefill,
    with_output_factors,
)
from tests.restkv_jax import tiny

LENGTH = 400


def encode(text: str) -> list[int]:
    """A token a word or mark, with the space before it."""
    return [
        zlib.crc32(word.encode()) % 10_007 for word in re.findall(r"\s*\w+|\s*[^\w\s]|\s+$", text)
    ]


@pytest.mark.parametrize("task", samples.TASKS)
def test_samples_have_the_length_and_ask_the_same_either_way(task):
    start = [1]
    sample = samples.make_sample(task, 3, LENGTH, encode, start)
    assert len(sample.context) == LENGTH
    assert sample.context[0] == 1
    assert len(sample.counted) == len(sample.answer)
    assert any(sample.counted)
    assert sample == samples.make_sample(task, 3, LENGTH, encode, start)
    assert sample.answer != samples.make_sample(task, 4, LENGTH, encode, start).answer or (
        task == "few_shot"
    )
    inside = samples.make_sample(task, 3, LENGTH, encode, start, inside=True)
    assert len(inside.context) + len(inside.question) == LENGTH
    if task != "continuation":
        assert (inside.question, inside.answer) == (sample.question, sample.answer)


@pytest.mark.parametrize("task", ["sentence", "record"])
def test_the_answer_is_in_the_context(task):
    sample = samples.make_sample(task, 0, LENGTH, encode, [])
    answer, context = sample.answer, sample.context
    assert any(context[i : i + len(answer)] == answer for i in range(LENGTH))


def test_calibration_reads_what_no_sample_contains():
    text = samples.calibration_text(60, encode, [7])
    assert (len(text), text[0]) == (60, 7)
    sentences = set(prose_sentences()[samples.CALIBRATION_SENTENCES :])
    assert not sentences & set(prose_sentences()[: samples.CALIBRATION_SENTENCES])


def test_entries_that_are_marked_empty_are_as_good_as_evicted():
    """The measuring path gives the logits of the caches that the plans really build."""
    model = with_output_factors(tiny.with_windows(tiny.make(layers=4), (None, 6, None, None)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 48)))
    valid, new = jnp.ones(tokens.shape, bool), jnp.asarray([[3, 14, 15]])
    found = calibrate_head_budgets(model, tokens, budget=(10, 20), sinks=2, recent=3)
    calibrated = dict.fromkeys(("attention", "reconstruction", "random"), found)
    policies = {
        "vnorm": VNorm(sinks=2, recent=3),
        "restkv": RestKV(window=8, recent=3, sinks=2, spatial="avgpool"),
    }
    budget = 14
    plans = {
        "uniform": {},
        "pyramid": {"layers": "pyramid"},
        "adakv": {"heads": AdaKV()},
        "shared": {"heads": SharedBudget()},
        "frozen": {"heads": found.frozen(budget)},
        "layers": {"budget": found.layers(budget)},
    }
    pairs = [("vnorm", spread) for spread in ("uniform", "frozen", "layers")]
    pairs += [("restkv", spread) for spread in ("pyramid", "adakv", "shared")]
    listed = [
        CachePlan(policy=policies[name], **{"budget": budget, "headroom": 4, **plans[spread]})
        for name, spread in pairs
    ]
    full = CachePlan(policy=Full(), headroom=4)
    _, (cache, *compressed) = prefill(model, tokens, valid, plans=(full, *listed))
    scores = cells.importances(model, tokens, policies=tuple(policies.values()))
    masks = []
    for name, spread in pairs:
        importance = scores[list(policies).index(name)]
        shares = cells.counts(
            spread, importance, budget, protected=policies[name].protected, calibrated=calibrated
        )
        if spread == "pyramid":  # the model's layers are counted with those that slide
            slots = [listed[pairs.index((name, spread))].prompt_slots(48, i, 4) for i in (0, 2, 3)]
            shares = np.broadcast_to(np.asarray(slots)[:, None], shares.shape)
        masks.append(cells.kept(cells.ranks_of(importance), shares))
    rows = jnp.broadcast_to(new, (len(pairs), 3))
    ours, _ = jax.jit(lambda keep: extend(model, measure.masked(cache, keep), rows))(
        np.stack(masks)
    )
    for pair, mine, theirs in zip(pairs, ours, compressed, strict=True):
        np.testing.assert_allclose(mine, extend(model, theirs, new)[0][0], atol=5e-5, err_msg=pair)


def sample_row(seed, kl):
    names = ("vnorm", "streaming")
    found = [
        {"policy": name, "allocation": "uniform", "budget": 64, "accuracy": 0.5, "kl": x}
        for name, x in zip(names, kl, strict=True)
    ]
    full = {"policy": "full", "allocation": "uniform", "budget": 0, "accuracy": 1.0, "kl": 0.0}
    base = {"mode": "agnostic", "length": 512, "task": "record", "seed": seed}
    return {**base, "cells": [full, *found]}


def test_tables_show_means_errors_and_paired_differences():
    table, single = report.tables([sample_row(0, (1.0, 2.0)), sample_row(1, (3.0, 6.0))])
    assert "record n=2" in table.title
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["full / uniform"][0] == "100 ± 0 / 0.000 ± 0.000"
    assert rows["streaming / uniform"][0] == "50 ± 0 / 4.000 ± 2.000"
    assert rows["streaming / uniform"][1] == "+2.00 [+1.00, +3.00] 0/2"
    assert [row[:2] for row in table.rows] == list(single.rows)
    low, high = report.bootstrap([1.0, 1.0, 1.0])
    assert (low, high) == (1.0, 1.0)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="--tasks"):
        main(["--out", str(tmp_path), "--tasks", "riddle"])
    with pytest.raises(UserError, match="--modes"):
        main(["--out", str(tmp_path), "--modes", "both"])
