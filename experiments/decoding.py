"""`python -m experiments.decoding`: long generation from a cache of fixed size.

Generates many tokens with eviction while decoding and prints, for each stretch of them, the time a
token and the bytes of the cache; both stay where they are however long it runs. Stop tokens are
barred, so that every policy generates as many.

Examples:
  python -m experiments.decoding --tokens 4096 --budget 256
  python -m experiments.decoding --policy snapkv --policy tova:evict_every=1 --tokens 1024
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments.core.errors import UserError, run_main
from experiments.core.options import DTYPES, Parser, PolicyText, Slots, count_of, parse_policy
from experiments.core.plans import make_plan
from experiments.core.storage import dump_json, write_atomic
from experiments.longbench.stdlib_text import prose_sentences
from restkv_jax.decode import (
    CachePlan,
    CausalLM,
    decode_chunk,
    init_decode,
    pad_prompts,
    prefill,
    row_keys,
    with_output_factors,
)

_CHUNK = 64


def stretches(
    model: CausalLM, prompt: Sequence[int], plan: CachePlan, tokens: int, stretch: int
) -> list[dict[str, float]]:
    """Generates from one prompt, timed stretch by stretch.

    Args:
        model: with factors of its output projections.
        prompt: token ids.
        plan: one that evicts while decoding.
        tokens: how many to generate.
        stretch: tokens of one measurement, a multiple of the steps between two looks.

    Returns:
        For each stretch its last token's number, median milliseconds a token, bytes of the
        cache, and the process's peak memory in bytes.
    """
    logits, (cache,) = prefill(model, *pad_prompts([prompt]), plans=(plan,))
    never = jnp.asarray([-1])
    state = init_decode(logits, cache, row_keys(0, 1), jnp.asarray([tokens + _CHUNK]), never)
    # Compiles, and is not measured.
    state, *_ = decode_chunk(model, state, never, steps=_CHUNK)
    found = []
    for first in range(0, tokens, stretch):
        times = []
        for _ in range(0, min(stretch, tokens - first), _CHUNK):
            start = time.perf_counter()
            state, drawn, _ = decode_chunk(model, state, never, steps=_CHUNK)
            jax.block_until_ready(drawn)
            times.append(1000 * (time.perf_counter() - start) / _CHUNK)
        found.append(
            {
                "tokens": min(first + stretch, tokens),
                "ms_per_token": float(np.median(times)),
                "cache_bytes": state.cache.total_bytes,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    return found


def build_parser() -> Parser:
    """The program's command line."""
    parser = Parser(
        prog="python -m experiments.decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="MODEL")
    parser.add_argument(
        "--policy",
        action="append",
        type=parse_policy,
        metavar="POLICY",
        help="NAME:key=value,...; repeat it for several (default: streaming, tova, h2o, snapkv, "
        "restkv with carry_over)",
    )
    parser.add_argument(
        "--budget",
        type=count_of("--budget", 8),
        default=256,
        metavar="B",
        help="slots a head, of the prompt and while decoding (default: 256)",
    )
    parser.add_argument("--evict-every", type=count_of("--evict-every", 1), default=64, metavar="E")
    parser.add_argument("--prompt-tokens", type=count_of("--prompt-tokens", 8), default=512)
    parser.add_argument("--tokens", type=count_of("--tokens", _CHUNK), default=4096, metavar="N")
    parser.add_argument(
        "--stretch", type=count_of("--stretch", _CHUNK), default=1024, help="tokens a line"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=Path, metavar="FILE", help="writes the figures as JSON")
    return parser


def _plan(text: PolicyText, args: argparse.Namespace) -> CachePlan:
    own = dict(text.options)
    own.setdefault("decode_budget", str(args.budget))
    own.setdefault("evict_every", str(args.evict_every))
    options = tuple(sorted(own.items()))
    return make_plan(PolicyText(text.name, options), Slots(args.budget), headroom=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    names = ("streaming", "tova", "h2o", "snapkv", "restkv:carry_over=true")
    policies = args.policy or [parse_policy(name) for name in names]
    plans = {text.label: _plan(text, args) for text in policies}
    try:
        lm = models.load(args.model, dtype=args.dtype)
    except models.CheckpointError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    text = " ".join(prose_sentences())
    prompt = lm.tokenizer.encode(text[: 12 * args.prompt_tokens])[: args.prompt_tokens]
    model = with_output_factors(lm.model)
    results: dict[str, Any] = {}
    for label, plan in plans.items():
        results[label] = stretches(model, prompt, plan, args.tokens, args.stretch)
        print(f"{label}, budget {args.budget}, evicting every {plan.evict_every} tokens")
        for line in results[label]:
            print(
                f"  to {line['tokens']:>6} tokens: {line['ms_per_token']:7.2f} ms a token, cache "
                f"{line['cache_bytes'] / 2**20:6.2f} MiB, peak memory "
                f"{line['peak_rss_bytes'] / 2**20:7.0f} MiB"
            )
    if args.out is not None:
        write_atomic(args.out, dump_json(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
