"""`python -m experiments.many_plans`: what many compressed caches cost in one prefill.

One prefill of a prompt fills a cache for every policy at every budget. The program times it
against the prefill that fills one cache, ReST-KV's at 128 slots, and against the one that evicts
nothing; with `--each` also every policy on its own. The programs take turns, so that whatever
else the machine does falls on all of them alike. Nothing but the prefill is timed.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments.core.environment import environment
from experiments.core.errors import UserError, run_main
from experiments.core.options import (
    Parser,
    PolicyText,
    Slots,
    chosen_policies,
    count_of,
    parse_policy,
)
from experiments.core.plans import make_plan
from experiments.core.storage import dump_json, write_atomic
from experiments.core.tasks import fill_prompt
from experiments.longbench.offline import OFFLINE_SETS, build_suite
from restkv_jax.decode import CachePlan, CausalLM, prefill, with_output_factors

POLICIES = (
    "streaming",
    "h2o",
    "tova",
    "snapkv",
    "lacache",
    "restkv",
    "restkv:preset=robust",
    "caote",
    "criticalkv",
    "expected_attention",
)
BUDGETS = (64, 128, 256, 512)
ONE = PolicyText("restkv"), Slots(128)
HEADROOM = 32  # slots for an answer, as a user would leave


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one program took.

    Attributes:
        compile_s: seconds to trace and compile it.
        compile_cpu_s: processor seconds of that.
        wall_s: seconds of each call.
        cpu_s: processor seconds of each call, all threads together.
    """

    compile_s: float
    compile_cpu_s: float
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Medians."""
        return {
            "wall_s": statistics.median(self.wall_s),
            "cpu_s": statistics.median(self.cpu_s),
            "compile_s": self.compile_s,
            "compile_cpu_s": self.compile_cpu_s,
        }


def measure(
    model: CausalLM,
    prompt: Sequence[int],
    programs: Mapping[str, tuple[CachePlan, ...]],
    *,
    repeats: int,
) -> dict[str, Timing]:
    """Times the prefills of several lists of plans, which take turns.

    Args:
        model: see `CausalLM`.
        prompt: its tokens; no padding is added.
        programs: the plans that each prefill serves.
        repeats: calls of each program, one more before them left out.
    """
    tokens = jnp.asarray(prompt, jnp.int32)[None]
    arguments = model, tokens, jnp.ones(tokens.shape, bool)
    compiled, compiling = {}, {}
    for name, plans in programs.items():
        start, spent = time.perf_counter(), time.process_time()
        compiled[name] = prefill.lower(*arguments, plans=plans).compile()
        compiling[name] = time.perf_counter() - start, time.process_time() - spent
        print(f"compiled {name} in {compiling[name][0]:.0f} s", file=sys.stderr, flush=True)
    wall: dict[str, list[float]] = {name: [] for name in programs}
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, program in compiled.items():
            start, spent = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*arguments))
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - spent)
    return {
        name: Timing(*compiling[name], tuple(wall[name][1:]), tuple(cpu[name][1:]))
        for name in programs
    }


def ratio(timings: Mapping[str, Timing], many: str, one: str, clock: str = "wall_s") -> float:
    """Median over the rounds of what `many` took as a multiple of what `one` took."""
    pairs = zip(getattr(timings[many], clock), getattr(timings[one], clock), strict=True)
    return float(np.median([a / b for a, b in pairs]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = _parse(argv)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed, too
    policies = chosen_policies(args.policy or [parse_policy(text) for text in POLICIES])
    budgets = [Slots(budget) for budget in args.budget or BUDGETS]
    try:
        loaded = models.load(args.model)
    except models.CheckpointError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    prompt = _prompt(loaded.tokenizer.encode, args.length)

    def plans_of(policy: PolicyText) -> tuple[CachePlan, ...]:
        return tuple(make_plan(policy, budget, headroom=HEADROOM) for budget in budgets)

    each = {policy.label: plans_of(policy) for policy in policies}
    programs = {
        "none": (),
        "one": (make_plan(*ONE, headroom=HEADROOM),),
        "many": tuple(plan for plans in each.values() for plan in plans),
        **(each if args.each else {}),
    }
    timings = measure(with_output_factors(loaded.model), prompt, programs, repeats=args.repeats)
    report = {
        "model": args.model,
        "tokens": len(prompt),
        "policies": [policy.label for policy in policies],
        "budgets": [budget.value for budget in budgets],
        "one": f"{ONE[0].label} at {ONE[1]}",
        "repeats": args.repeats,
        "many_to_one": {
            clock: ratio(timings, "many", "one", clock) for clock in ("wall_s", "cpu_s")
        },
        "programs": {name: timing.summary() for name, timing in timings.items()},
    }
    print(_text(report, timings))
    if args.out is not None:
        write_atomic(args.out, dump_json({**report, "environment": environment()}))
    return 0


def _parse(argv: Sequence[str] | None) -> Any:
    parser = Parser(prog="python -m experiments.many_plans", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="MODEL")
    parser.add_argument(
        "--length", type=count_of("--length", 256), default=2048, metavar="T", help="prompt tokens"
    )
    parser.add_argument(
        "--policy",
        action="append",
        type=parse_policy,
        metavar="POLICY",
        help=f"repeat it for several (default: {', '.join(POLICIES)})",
    )
    parser.add_argument(
        "--budget",
        action="append",
        type=count_of("--budget", 1),
        metavar="B",
        help=f"slots a head; repeat it for several (default: {', '.join(map(str, BUDGETS))})",
    )
    parser.add_argument(
        "--repeats", type=count_of("--repeats", 1), default=7, metavar="N", help="timed rounds"
    )
    parser.add_argument("--each", action="store_true", help="time every policy on its own, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(argv)


def _prompt(encode: Any, length: int) -> list[int]:
    """Exactly `length` tokens of the offline suite's prose."""
    (task,) = build_suite(
        [OFFLINE_SETS["quote_recall"]],
        count_tokens=lambda text: len(encode(text)),
        length=length + 128,  # prompts of the suite end a few tokens below what was asked for
        rows=1,
        seed=0,
    )
    tokens: list[int] = encode(fill_prompt(task.spec.prompt, task.rows[0]))
    return tokens[-length:]


def _text(report: Mapping[str, Any], timings: Mapping[str, Timing]) -> str:
    many = len(report["policies"]) * len(report["budgets"])
    lines = [
        f"{report['model']}, {report['tokens']} tokens, batch 1, {report['repeats']} rounds; "
        f"many: {many} caches, one: {report['one']}",
        "| prefill | wall s | CPU s | CPU beyond no eviction | compile s | compile CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, timing in timings.items():
        s = timing.summary()
        beyond = 100 * (ratio(timings, name, "none", "cpu_s") - 1)
        lines.append(
            f"| {name} | {s['wall_s']:.3f} | {s['cpu_s']:.3f} | {beyond:+.1f} % "
            f"| {s['compile_s']:.1f} | {s['compile_cpu_s']:.1f} |"
        )
    found = report["many_to_one"]
    lines.append(
        f"many / one: {found['wall_s']:.2f} by wall time, {found['cpu_s']:.2f} by CPU time"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
