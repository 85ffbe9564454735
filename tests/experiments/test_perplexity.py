"""Likelihoods against a plain forward pass, eviction one by one, and the whole program."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core.errors import UserError, run_main
from experiments.core.likelihood import follow
from experiments.core.options import Ratio, Slots, parse_policy
from experiments.core.results import ResultStore
from experiments.core.texts import Text
from experiments.perplexity import report
from experiments.perplexity.__main__ import likelihood_row, main
from experiments.perplexity.documents import build_sets, cut_documents
from experiments.perplexity.measure import Likelihoods, make_plans, mean_nll
from experiments.perplexity.report import perplexity_of, perplexity_ratios, stretches, write_report
from restkv_jax.decode import extend, pad_prompts, prefill
from tests.experiments.fakes import BOS, CharTokenizer
from tests.experiments.programs import assert_refused
from tests.restkv_jax import tiny
from tests.restkv_jax.dense import logits_of

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
LENGTH, PROMPT = 60, 25
TOKENS = [3 + i * i * i % 50 for i in range(LENGTH)]
# Log-probabilities in float32 by two orders of summation, in nats.
TOLERANCE = 2e-5


@dataclasses.dataclass
class Loaded:
    """What `Likelihoods` takes of a loaded model."""

    model: object
    weights_bytes: int = 0


def plain_nll(model, tokens):
    """From one forward pass of the whole text."""
    logits = np.asarray(logits_of(model, tokens), np.float64)
    top = logits.max(-1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -logprobs[np.arange(len(tokens) - 1), tokens[1:]]


def measured(model, policies, *, budget, mode, every=8, prompt=PROMPT):
    count = LENGTH - (1 if mode == "decode" else prompt)
    texts = [parse_policy(policy) for policy in policies]
    plans = make_plans(texts, budget, mode=mode, follow=count, evict_every=every)
    ask = Likelihoods(Loaded(model), {mode: plans}, prompt=prompt)
    (row,) = documents()
    (task,) = build_sets([row], [mode], length=LENGTH, prompt=prompt, source="")
    return {p: out.prediction for p, out in ask(task.spec, row, 0, list(plans)).items()}


def documents():
    text = "".join(chr(i - 3) for i in TOKENS[1:])
    (row,) = cut_documents([Text("t", text)], CharTokenizer(), length=LENGTH, rows=9)
    return [dataclasses.replace(row, others={"tokens": TOKENS})]


@pytest.fixture(scope="module")
def model():
    return tiny.with_windows(tiny.make(), (None, 9))


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_the_full_cache_is_a_plain_forward_pass(model, mode):
    found = measured(model, ["full"], budget=Slots(8), mode=mode)["full"]
    expected = plain_nll(model, TOKENS)[0 if mode == "decode" else PROMPT - 1 :]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert mean_nll(None, found, (), None) == pytest.approx(expected.mean(), abs=TOLERANCE)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_budgets_larger_than_the_text_change_nothing(model, mode):
    policies = ["full", "snapkv:window=4", "h2o:window=4"]
    found = measured(model, policies, budget=Slots(64), mode=mode)
    for policy in found:
        np.testing.assert_allclose(found[policy], found["full"], atol=TOLERANCE)


def test_small_budgets_evict_in_both_modes(model):
    for mode, first in (("decode", 8 + 5), ("prefill", 1)):
        found = measured(model, ["full", "streaming"], budget=Slots(8), mode=mode, every=5)
        gap = np.abs(np.subtract(found["streaming"], found["full"]))
        # Up to the first eviction the caches are the same.
        np.testing.assert_array_less(gap[:first], TOLERANCE)
        assert gap[first:].max() > 0.01


@pytest.mark.parametrize(
    ("policy", "every"), [("tova", 1), ("snapkv:window=4", 8), ("h2o:window=4", 5)]
)
def test_pieces_are_what_token_by_token_is(model, policy, every):
    plans = make_plans(
        [parse_policy(policy)], Slots(10), mode="decode", follow=LENGTH, evict_every=every
    )
    (plan,) = plans.values()
    logits, (cache,) = prefill(model, *pad_prompts([TOKENS[:1]], columns=1), plans=(plan,))
    found = follow(model, logits, cache, TOKENS[1:])
    for i, token in enumerate(TOKENS[1:]):
        row = np.asarray(logits[0], np.float64)
        expected = row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert found.logprobs[i] == pytest.approx(expected, abs=TOLERANCE)
        assert found.greedy[i] == (row.argmax() == token)
        after, cache = extend(model, cache, jnp.asarray([[token]]))
        logits = after[:, 0]
    for layer in range(2):
        np.testing.assert_array_equal(
            np.sort(found.cache.kept_positions(layer)), np.sort(cache.kept_positions(layer))
        )


def test_pieces_may_be_padded_and_short(model):
    (plan,) = make_plans(
        [parse_policy("full")], Slots(8), mode="prefill", follow=40, evict_every=8
    ).values()
    logits, (cache,) = prefill(model, *pad_prompts([TOKENS[:PROMPT]]), plans=(plan,))
    expected = -plain_nll(model, TOKENS)[PROMPT - 1 :]
    for count, piece, pieces in ((7, 4, 4), (35, 64, 1)):
        rest = TOKENS[PROMPT : PROMPT + count]
        found = follow(model, logits, cache, rest, piece=piece, pieces=pieces)
        np.testing.assert_allclose(found.logprobs, expected[:count], atol=TOLERANCE)
        assert int(found.cache.next_position[0]) == PROMPT + count


def test_documents_do_not_overlap_and_start_as_texts_do():
    texts = [Text("a", "abcdefghij"), Text("b", "klmnop"), Text("c", "q")]
    rows = cut_documents(texts, CharTokenizer(), length=4, rows=4)
    assert [row.context for row in rows] == ["abc", "klm", "def", "nop"]
    assert [row.row_id for row in rows] == ["a@0", "b@0", "a@3", "b@3"]
    assert rows[2].others["tokens"] == [BOS, *(ord(c) + 3 for c in "def")]
    without = cut_documents(texts, CharTokenizer(bos=False), length=5, rows=1)
    assert without[0].context == "abcde"
    with pytest.raises(UserError, match="the longest text has 11 tokens"):
        cut_documents(texts, CharTokenizer(), length=12, rows=1)


def test_plans_of_the_modes():
    def plan(policy, budget, mode="decode"):
        texts = [parse_policy(policy)]
        return make_plans(texts, budget, mode=mode, follow=9, evict_every=7)[texts[0].label]

    assert plan("full", Slots(40)).decode_budget is None
    evicting = plan("snapkv", Slots(40))
    assert (evicting.budget, evicting.decode_budget, evicting.evict_every) == (40, 40, 7)
    own = plan("snapkv:budget=50,evict_every=3", Slots(40))
    assert (own.budget, own.decode_budget, own.evict_every) == (50, 50, 3)
    assert plan("snapkv", Ratio(0.5), "prefill").decode_budget is None
    with pytest.raises(UserError, match=r"--budget 0.5 .*whole slots"):
        plan("snapkv", Ratio(0.5))
    with pytest.raises(UserError, match="decode_budget: expected equal budgets"):
        plan("snapkv:heads=adakv", Slots(40))


def test_stretches_cover_a_range():
    assert stretches(10, 4) == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert stretches(2, 5) == [(0, 1), (1, 2)]


def test_a_perplexity_lies_within_the_exponentials_of_an_error():
    # Mean 2 and standard error 1: the perplexity's own range is not symmetric.
    found = perplexity_of([1.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx(np.exp([2, 1, 3]))
    assert str(found) == "7.389 (2.718 to 20.086)"
    alone = perplexity_of([2.0])
    assert (alone.value, alone.low, alone.high) == (pytest.approx(np.exp(2)), None, None)
    assert str(alone) == "7.389"


def test_ratios_are_exponentials_of_paired_differences():
    texts = [1.0, 5.0, 2.0, 4.0, 3.0]
    scores = {
        "full": {"decode": texts, "prefill": texts[:4]},
        # Twice as perplexed by every text, however much these differ.
        "x": {"decode": [t + np.log(2) for t in texts], "prefill": [t + 1 for t in texts[:4]]},
        "y": {"decode": [9.0, 5.0, 2.0, 4.0, 3.0], "prefill": texts[:4]},
    }
    found = perplexity_ratios(scores)
    double = {"policy": "x", "against": "full", "ratio": 2.0, "low": 2.0, "high": 2.0, "n": 5}
    assert found["decode"][0] == double
    assert [(e["policy"], e["against"]) for e in found["decode"]] == [
        ("x", "full"),
        ("y", "full"),
        ("y", "x"),
    ]
    # One text of five differs, by 8 nats: none of it is drawn in a third of the draws.
    assert found["decode"][1]["ratio"] == pytest.approx(np.exp(8 / 5), abs=1e-3)
    assert found["decode"][1]["low"] == 1.0
    assert found["decode"][1]["high"] > np.exp(8 / 5)
    few = {"policy": "x", "against": "full", "ratio": 2.7183, "low": None, "high": None, "n": 4}
    assert found["prefill"][0] == few


def test_the_report_by_hand(tmp_path, monkeypatch):
    nll = {"full": [[0.0, 0.0, 1.0, 1.0], [0.0, 2.0, 1.0, 3.0]], "x": [[1.0] * 4, [1.0] * 4]}
    rows = [dataclasses.replace(row, length=5) for row in documents() * 2]
    sets = build_sets(rows, ["decode"], length=5, prompt=1, source="")
    drawn = {}
    monkeypatch.setattr(report, "lines", lambda path, series, **options: drawn.update(options))
    with ResultStore.open(tmp_path, {}, likelihood_row) as store:
        for policy, texts in nll.items():
            store.done(policy, "decode", rows)
            for row, values in zip(rows, texts, strict=True):
                store.append(policy, "decode", row, values, {})
        scores = {p: {"decode": [sum(t) / 4 for t in texts]} for p, texts in nll.items()}
        whole, parts, ratios = write_report(store, scores, sets, length=5, bins=2, plots=True)
    content = json.loads((tmp_path / "perplexity.json").read_text())["decode"]
    # Means of the texts 0.5 and 1.5, of their halves 0 and 1, 1 and 2: an error of 0.5 each time.
    assert content["perplexity"] == {"full": 2.7183, "x": 2.7183}
    assert content["standard_error"]["full"] == pytest.approx(np.exp([0.5, 1.5]), abs=1e-4)
    assert content["standard_error"]["x"] == [2.7183, 2.7183]
    assert content["perplexity_by_position"]["full"] == pytest.approx(np.exp([0.5, 1.5]), abs=1e-4)
    expected = np.exp([[0.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(content["standard_error_by_position"]["full"], expected, atol=1e-4)
    assert (content["texts"], content["tokens"]) == (2, 8)
    (ratio,) = content["ratios"]
    assert (ratio["policy"], ratio["ratio"], ratio["low"]) == ("x", 1.0, None)
    assert whole.rows == (("decode", "8", "2.718 (1.649 to 4.482)", "2.718 (2.718 to 2.718)"),)
    assert parts.rows[1][:2] == ("decode 3 to 4", "4.482 (2.718 to 7.389)")
    assert ratios.rows == (("decode", "x / full", "2", "1.0000", "-"),)
    middle = np.exp([0.5, 1.5])
    np.testing.assert_allclose(
        drawn["errors"]["full"], [middle - expected[:, 0], expected[:, 1] - middle]
    )


def run(out, *extra):
    arguments = ["--model", MODEL, "--out", str(out), "--budget", "40", "--length", "96"]
    arguments += ["--rows", "2", "--bins", "3", "--evict-every", "16"]
    return run_main(lambda: main([*arguments, "--policy", "full", "--policy", "streaming", *extra]))


def test_a_run_leaves_likelihoods_tables_and_plots(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out) == 0
    printed = capsys.readouterr().out
    for word in ("nats a token", "perplexity of all tokens", "decode 1 to 31", "prefill 48 to 63"):
        assert word in printed
    content = json.loads((out / "perplexity.json").read_text())
    for mode, tokens in (("decode", 95), ("prefill", 48)):
        rows = [json.loads(x) for x in (out / f"pred/full/{mode}.jsonl").read_text().splitlines()]
        assert [len(row["pred"]) for row in rows] == [tokens, tokens]
        assert content[mode]["tokens"] == 2 * tokens
        expected = np.exp(np.mean([row["pred"] for row in rows]))
        assert content[mode]["perplexity"]["full"] == pytest.approx(expected, rel=1e-4)
        low, high = content[mode]["standard_error"]["full"]
        assert low < expected < high
        assert content[mode]["positions"][-1][1] == 96
        parts = content[mode]["perplexity_by_position"]["full"]
        sizes = [b - a for a, b in content[mode]["positions"]]
        assert np.average(np.log(parts), weights=sizes) == pytest.approx(np.log(expected), abs=1e-4)
        head = (out / f"perplexity-{mode}.png").read_bytes()[:24]
        assert min(struct.unpack(">II", head[16:])) > 100
    result = json.loads((out / "result.json").read_text())
    assert result["score"]["full"]["decode"] == pytest.approx(
        np.log(content["decode"]["perplexity"]["full"]), abs=1e-4
    )
    before = (out / "perplexity.json").read_bytes()
    assert run(out) == 0  # finished: only reported again
    assert (out / "perplexity.json").read_bytes() == before
    assert run(out, "--prompt", "50") == 2
    assert "prompt" in capsys.readouterr().err


def test_of_many_policies_some_are_asked_before_others(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.perplexity.__main__._MOST_TOGETHER", 1)
    assert run(tmp_path / "run", "--modes", "decode") == 0
    meta = json.loads((tmp_path / "run/run_meta.json").read_text())
    assert [len(together) for together in meta["cohorts"]] == [1, 1]


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--modes", "both"], "unknown mode 'both'"),
        (["--prompt", "96"], "--prompt 96"),
        (["--length", "99999"], "the model holds 40960"),
        (["--budget", "0.5"], "whole slots"),
        (["--data", "/no/such"], "/no/such"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, extra, culprit):
    code = run(tmp_path / "run", *extra)
    assert_refused(code, capsys.readouterr().err, culprit, tmp_path / "run")
