"""What the suite runs: a benchmark each, with the options that make it small."""

from __future__ import annotations

import dataclasses

from experiments.core.options import PolicyText, parse_policy

_POLICIES = ("full", "streaming", "h2o", "tova", "snapkv", "restkv", "restkv:preset=robust")
_CURVE_POLICIES = ("streaming", "snapkv", "restkv", "restkv:preset=robust")
_CURVE_BUDGETS = (64, 256)
# Each that evicts while decoding is a program of its own.
_PERPLEXITY_POLICIES = ("full", "streaming", "snapkv", "restkv")
_QUICK = ("full", "streaming", "restkv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One run of one benchmark.

    Attributes:
        benchmark: its name, as in `python -m experiments.NAME`.
        about: what it asks, for the report.
        options: its options, but for those that all parts share.
        policies: what is compared, as on the command line.
        figures: patterns of the pictures in its results folder that the report shows.
        curve: whether its policies have several budgets, so that scores are drawn over bytes.
        needs: a package of the extra `eval` without which it is left out.
    """

    benchmark: str
    about: str
    options: tuple[str, ...]
    policies: tuple[str, ...]
    figures: tuple[str, ...] = ()
    curve: bool = False
    needs: str | None = None

    @property
    def name(self) -> str:
        """Of its results folder, and for `--parts`: no benchmark is run twice."""
        return self.benchmark

    def families(self) -> dict[str, list[str]]:
        """Labels of the policies by what they are without their budget."""
        found: dict[str, list[str]] = {}
        for text in self.policies:
            policy = parse_policy(text)
            options = tuple(option for option in policy.options if option[0] != "budget")
            found.setdefault(PolicyText(policy.name, options).label, []).append(policy.label)
        return found


def _with_budgets(policies: tuple[str, ...], budgets: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(
        f"{policy}{',' if ':' in policy else ':'}budget={budget}"
        for policy in policies
        for budget in budgets
    )


_ABOUT = {
    "longbench": "The offline suite: prompts in LongBench's row format, made from the texts that "
    "every Python carries. It is not LongBench.",
    "ruler": "Some of RULER's tasks, the question in the prompt that is compressed, at several "
    "budgets: what a byte of cache is worth.",
    "needle": "One sentence at every depth of a text, and a question for it.",
    "infinitebench": "Tasks of InfiniteBench that are generated, at a length that small models "
    "hold.",
    "humaneval": "Small functions to complete behind other source code. Nothing is executed: the "
    "score is the share of completions that are Python at all.",
    "lm_eval": "Two tasks of ours in the lm-evaluation-harness, made from the texts that every "
    "Python carries: the last word of a passage, the next line of a source file.",
    "perplexity": "How well a text is predicted from a cache that is evicted while the text goes "
    "on (decode), or once before the rest of it (prefill). Lower is better.",
    "fidelity": "What eviction changes inside the model, all against the full cache of the same "
    "prefill: attention outputs, residual stream, next-token distributions (KL in nats), and "
    "overlap with brute-force leave-one-out.",
}
_FIGURES = {
    "needle": ("exact-*.png", "rouge-*.png"),
    "perplexity": ("perplexity-*.png",),
    "fidelity": ("attention.png", "residual.png", "overlap.png", "attention_heads-*.png"),
}
# Most of the time goes into compiling, once for each shape and set of policies. Prompts that are
# padded to the same number of columns, evicted to the same budget and followed by the same room
# share their program: those of longbench, needle and fidelity, of infinitebench and humaneval.
_OPTIONS = {
    "longbench": "--together --budget 128 --offline-length 1024 --offline-rows 3",
    "ruler": "--together --lengths 1024 --rows 2 --tasks niah_single_1,niah_multikey_1,vt",
    "needle": "--together --budget 128 --lengths 832,1024 --depths 0,25,50,75,100 --rows 1",
    "infinitebench": "--together --budget 128 --lengths 1024 --rows 2 --tasks passkey,kv_retrieval",
    "humaneval": "--together --budget 128 --lengths 1024 --max-new-tokens 80 --limit 4",
    "lm_eval": "--data offline --budget 64 --limit 4 --max-length 512",
    "perplexity": "--budget 64 --length 512 --rows 2",
    "fidelity": "--budget 128 --offline-length 1024 --offline-rows 1 --oracle-window 8 "
    "--sets kv_needle,quote_recall,few_shot --tokens 32",
}
_QUICK_OPTIONS = {
    "longbench": "--together --budget 64 --offline-length 512 --offline-rows 1 "
    "--sets kv_needle,few_shot",
    "ruler": "--together --lengths 1024 --rows 1 --tasks vt,fwe",
    "needle": "--together --budget 64 --lengths 320,384 --depths 0,100 --rows 1",
    "infinitebench": "--together --budget 64 --lengths 512 --rows 1 --tasks passkey",
    "humaneval": "--together --budget 64 --lengths 512 --max-new-tokens 16 --limit 1",
    "lm_eval": "--data offline --budget 64 --limit 1 --max-length 256",
    "perplexity": "--budget 64 --length 256 --rows 1 --bins 4 --modes decode",
    "fidelity": "--budget 64 --offline-length 512 --offline-rows 1 --oracle-window 8 "
    "--sets few_shot --tokens 8",
}
PARTS = tuple(_OPTIONS)


def parts_of(names: tuple[str, ...], *, quick: bool) -> list[Part]:
    """The parts of these names.

    Args:
        names: of `PARTS`.
        quick: the tiny selection.
    """
    return [_part(name, quick) for name in names]


def _part(name: str, quick: bool) -> Part:
    policies: tuple[str, ...] = _QUICK if quick else _POLICIES
    if name == "perplexity" and not quick:
        policies = _PERPLEXITY_POLICIES
    curve = name == "ruler"
    if curve:
        evicting = _QUICK[1:] if quick else _CURVE_POLICIES
        policies = ("full", *_with_budgets(evicting, _CURVE_BUDGETS))
    return Part(
        benchmark=name,
        about=_ABOUT[name],
        options=tuple((_QUICK_OPTIONS if quick else _OPTIONS)[name].split()),
        policies=policies,
        figures=_FIGURES.get(name, ()),
        curve=curve,
        needs="lm_eval" if name == "lm_eval" else None,
    )
