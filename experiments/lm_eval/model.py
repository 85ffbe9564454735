"""The harness's model class: one policy of a `Scorer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows

from experiments.core.errors import UserError
from experiments.lm_eval.scoring import Scorer, stop_tokens

_MOST_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a whole text after it was scored.

    Attributes:
        logprob: summed log-probability of the tokens that count, in nats.
        kept: filled slots at its end, mean over layers and heads.
        cache_bytes: size of the cache.
    """

    logprob: float
    kept: float
    cache_bytes: int


# (tokens of a window, how many of its last ones count) -> what they come to.
RollingScore = Callable[[Sequence[int], int], Window]


@register_model("restkv_jax")
class EvictedLM(TemplateLM):
    """A model under one policy, as the harness calls it.

    Continuations are scored after their context was evicted, see `Scorer`. Contexts that are too
    long lose their beginning. A whole text (`loglikelihood_rolling`) has no context to evict: its
    cache is evicted while it goes on, as in `experiments.perplexity`.

    Args:
        scorer: answers for all policies.
        label: which of them this is.
        rolling: scores the windows of a whole text.
        max_length: most tokens of context and continuation.
    """

    def __init__(
        self, scorer: Scorer, label: str, *, rolling: RollingScore, max_length: int
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._label = label
        self._rolling = rolling
        self._tokenizer = scorer.language_model.tokenizer
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._scorer.language_model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: its beginning, or the end of another."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The model's name."""
        return self._scorer.language_model.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; a chat's text may have begun with the beginning of text already."""
        del kwargs
        ids = self._tokenizer.encode(string, add_bos=False)
        wanted = self._tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        bos = self._tokenizer.bos_id
        return [bos, *ids] if wanted and bos is not None and ids[:1] != [bos] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's chat format."""
        try:
            return self._tokenizer.apply_chat(
                chat_history, add_generation_prompt=add_generation_prompt
            )
        except ValueError as error:
            raise UserError(f"--template chat: {error}") from None

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness writes down."""
        chat = self._tokenizer.chat
        return chat.source if chat_template and chat is not None else None

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        pairs = []
        for (context, continuation), before, after in requests:
            if not after:
                raise UserError(
                    f"a task asks for a continuation without a token: {continuation!r} after "
                    f"{context[-40:]!r}"
                )
            after = after[-(self.max_length - 1) :]
            before = before[-(self.max_length - len(after)) :]
            pairs.append((tuple(before), tuple(after)))
        texts: dict[Any, list[tuple[str, str]]] = {}
        for pair, (strings, _, _) in zip(pairs, requests, strict=True):
            texts.setdefault(pair, []).append(strings)
        found = {}
        for pair, answer in self._scorer.pairs(self._label, pairs):
            found[pair] = answer
            # As soon as it is known, so that an interrupted run goes on after it.
            for strings in texts[pair]:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap where they are too long.

        Args:
            requests: their arguments hold one text each.
            disable_tqdm: of no meaning here.
        """
        del disable_tqdm
        totals = []
        for request in requests:
            (text,) = request.args
            total = 0.0
            for before, predicted in get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            ):
                tokens = (*before, predicted[-1])
                window = self._rolling(tokens, len(predicted))
                self._scorer.note(self._label, tokens, len(tokens), window.kept, window.cache_bytes)
                total += window.logprob
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of its end strings.

        Args:
            requests: their arguments hold a context and the options of its generation.
            disable_tqdm: of no meaning here.

        Raises:
            UserError: a task that samples.
        """
        del disable_tqdm
        texts = []
        for request in requests:
            context, options = request.args
            text = self._generate(context, options)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature", 0.0):
            raise UserError(f"a task asks for sampling, answers are greedy here: {options}")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks", _MOST_NEW_TOKENS))
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        prompt = prompt[-max(self.max_length - most, 1) :]
        language_model = self._scorer.language_model
        ends = {*language_model.eos_ids, *language_model.turn_end_ids, *self._stops(until)}
        ids = self._scorer.generation(
            self._label, tuple(prompt), tokens=most, stop_ids=tuple(sorted(ends))
        )
        text = self._tokenizer.decode(ids)
        # An answer may end in the middle of a token, or with several of them.
        cuts = [text.index(stop) for stop in until if stop and stop in text]
        return text[: min(cuts, default=len(text))]

    def _stops(self, until: Sequence[str]) -> tuple[int, ...]:
        stops = self._scorer.stops
        key = tuple(stop for stop in until if stop)
        if key not in stops:
            stops[key] = stop_tokens(key, self._tokenizer.vocab_size, self._tokenizer.decode)
        return stops[key]
