"""Questions that are fed to a cache which evicts while decoding, in as many pieces as it takes."""

from experiments.core import engine as engines
from experiments.core.options import Slots, parse_policy
from experiments.core.plans import make_plan
from restkv_jax.decode import CachePlan, Full, generate
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
