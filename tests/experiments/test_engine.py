"""The engine: questions fed by pieces, and caches decoded together."""

import numpy as np
import pytest

from experiments.core import engine as engines
from experiments.core.errors import UserError
from experiments.core.options import Slots, parse_policy
from experiments.core.plans import make_plan
from restkv_jax.decode import CachePlan, Full, generate, pad_prompts, prefill
from tests.restkv_jax import tiny


def test_a_question_goes_in_by_pieces_where_room_is_small(monkeypatch):
    # Room for 64 + 8 tokens, 68 in all: nothing is ever evicted, so the full cache is the oracle.
    model = tiny.make(layers=1)
    plan = make_plan(
        parse_policy("streaming:decode_budget=64,evict_every=8"), Slots(64), headroom=8
    )
    engine = engines.EvictionEngine(model, {"x": plan}, longest_prompt=64, weights_bytes=0)
    fed, extend = [], engines.extend

    def watched(model, cache, tokens, valid):
        fed.append((tokens.shape[1], int(valid.sum())))
        return extend(model, cache, tokens, valid)

    monkeypatch.setattr(engines, "extend", watched)
    prompt = [3 + i * i % 40 for i in range(50)] + [9, 8, 7] * 4
    answer = engine.answer(
        prompt, policies=["x"], max_new_tokens=6, stop_ids=(), seed=0, context_tokens=50
    )["x"]
    assert fed == [(8, 8), (8, 4)]
    assert answer.kept_slots == 50
    full = CachePlan(policy=Full(), headroom=8)
    expected = generate(model, [prompt], plan=full, max_new_tokens=6, chunk=4).rows()[0]
    assert answer.token_ids == expected


@pytest.mark.parametrize("context_tokens", [None, 40])
def test_together_each_policy_draws_what_it_draws_alone(context_tokens):
    model = tiny.make()
    policies = (
        "full",
        "streaming",
        "streaming:budget=16",
        *(f"{name}:window=4" for name in ("snapkv", "restkv", "h2o")),
    )
    plans = {text: make_plan(parse_policy(text), Slots(24), headroom=72) for text in policies}
    prompt = [3 + i * i % 40 for i in range(50)]

    def ask(together):
        engine = engines.EvictionEngine(
            model, plans, longest_prompt=64, weights_bytes=0, temperature=0.7, together=together
        )
        return engine.answer(
            prompt,
            policies=list(plans),
            max_new_tokens=7,
            stop_ids=(5,),
            seed=11,
            context_tokens=context_tokens,
        )

    alone, together = ask(False), ask(True)
    assert set(together) == set(alone)
    for label, answer in alone.items():
        assert answer.decoded_with == 1
        assert together[label].token_ids == answer.token_ids
        assert together[label].kept_slots == answer.kept_slots
        assert together[label].cache_bytes == answer.cache_bytes
    # Four caches of 24 slots are one batch; `full` and the one of 16 slots stay alone.
    sizes = {label: answer.decoded_with for label, answer in together.items()}
    assert sorted(sizes.values()) == [1, 1, 4, 4, 4, 4]
    assert sizes["full"] == sizes["streaming:budget=16"] == 1
    shared = [together[label] for label in sizes if sizes[label] == 4]
    per_token = [answer.decode_s / len(answer.token_ids) for answer in shared]
    np.testing.assert_allclose(per_token, per_token[0], rtol=1e-12)


def test_together_asks_for_the_memory_of_two_copies(monkeypatch):
    model = tiny.make()
    plan = make_plan(parse_policy("streaming"), Slots(24), headroom=8)
    tokens, valid = pad_prompts([[3, 4, 5]], columns=64)
    size = prefill(model, tokens, valid, plans=(plan,))[1][0].total_bytes

    def make(free, together):
        monkeypatch.setattr(engines, "device_memory", lambda: free)
        engines.EvictionEngine(
            model, {"x": plan}, longest_prompt=64, weights_bytes=100, together=together
        )

    make(size + 100, together=False)
    make(2 * size + 100, together=True)
    for free, together in ((size + 99, False), (2 * size + 99, True)):
        with pytest.raises(UserError, match="do not fit"):
            make(free, together)
