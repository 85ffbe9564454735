"""`python -m experiments.precision`: what bfloat16 and int8 weights cost against float32.

Prints the differences of the next-token distributions over long prompts of the offline suite: the
largest and mean difference of logits, KL divergence and top-1 agreement.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

import models
from experiments.core.errors import UserError, run_main
from experiments.core.options import Parser, count_of
from experiments.core.tasks import fill_prompt
from experiments.longbench.offline import OFFLINE_SETS, build_suite
from restkv_jax.decode import (
    CachePlan,
    CausalLM,
    Full,
    kl_divergence,
    pad_prompts,
    prefill,
    same_top1,
)


def differences(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How far one set of logits is from another.

    Args:
        reference: float [R, V], rows of logits.
        other: the same shape.

    Returns:
        max and mean |difference|, mean KL(reference || other) in nats, and the share of rows
        whose most likely token is the same.
    """
    gap = np.abs(reference - other)
    pair = jnp.asarray(reference), jnp.asarray(other)
    return {
        "max": float(gap.max()),
        "mean": float(gap.mean()),
        "kl": float(jnp.mean(kl_divergence(*pair))),
        "top1": float(jnp.mean(same_top1(*pair))),
    }


def last_logits(model: CausalLM, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Float32 logits [R, V] of each prompt's last token."""
    plans = (CachePlan(policy=Full(), headroom=0),)
    rows = [prefill(model, *pad_prompts([prompt]), plans=plans)[0][0] for prompt in prompts]
    return np.stack([np.asarray(row) for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    parser = Parser(prog="python -m experiments.precision", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="MODEL")
    parser.add_argument(
        "--length", type=count_of("--length", 256), default=1024, metavar="T", help="prompt tokens"
    )
    parser.add_argument(
        "--rows", type=count_of("--rows", 1), default=4, metavar="N", help="rows of each set"
    )
    args = parser.parse_args(argv)
    try:
        exact = models.load(args.model)
    except models.CheckpointError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    encode = exact.tokenizer.encode
    sets = build_suite(
        [*OFFLINE_SETS.values()],
        count_tokens=lambda text: len(encode(text)),
        length=args.length,
        rows=args.rows,
        seed=0,
    )
    prompts = [encode(fill_prompt(task.spec.prompt, row)) for task in sets for row in task.rows]
    reference = last_logits(exact.model, prompts)
    for dtype in ("bfloat16", "int8"):
        coarse = models.load(args.model, dtype=dtype)
        found = differences(reference, last_logits(coarse.model, prompts))
        print(f"{args.model}, {len(prompts)} prompts of {args.length} tokens, {dtype} - float32:")
        print(f"  logits       max {found['max']:.3f}, mean {found['mean']:.4f}")
        print(f"  KL           {found['kl']:.5f} nats")
        print(f"  same top-1   {100 * found['top1']:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
