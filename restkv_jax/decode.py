"""What a training stack imports: pure functions on arrays and pytrees.

With a model that follows the `CausalLM` protocol::

    plan = CachePlan(policy=RestKV(), budget=512, headroom=128)
    logits, (cache,) = prefill(model, tokens, valid, plans=(plan,))
    state = init_decode(logits, cache, row_keys(seed, batch), limit, stop_tokens)
    state, tokens, logprobs = decode_chunk(model, state, stop_tokens, steps=32)

or `generate` for all of it. `extend` feeds given tokens, such as a question about a compressed
context, and `score_tokens` scores them; `prefill_chunked` and `prefill_bounded` take the prompt in
pieces. None of them but `generate` ever talks to the host.
`measure_fidelity` compares evicted caches with the full one, layer by layer and token by token.
`save_cache` and `restore_cache` keep a cache, or a generation in its middle, on disk.
`with_output_factors(model)` spares every prefill the factorisation of the output projections, for
weights that stay as they are. `shard(model, MeshRules.over(data=2, model=4))` runs all of it on
several devices. With the arrays of any model's attention: `layer_inputs`, then
`score`, `select` or `compress`.
"""

from restkv_jax.allocation import AdaKV, FrozenHeads, HeadAllocation, SharedBudget
from restkv_jax.cache import KVCache, init_cache
from restkv_jax.calibration import calibrate_head_budgets
from restkv_jax.checkpoint import CacheFolderError, RestoredCache, restore_cache, save_cache
from restkv_jax.compression import CompressedLayer, compress, score, select
from restkv_jax.decode_loop import DecodeState, decode_chunk, decode_step, init_decode
from restkv_jax.extend import extend, last_logits, score_tokens
from restkv_jax.factors import FactoredLM, with_output_factors
from restkv_jax.fidelity import Fidelity, kl_divergence, measure_fidelity, same_top1
from restkv_jax.fingerprint import weights_fingerprint
from restkv_jax.generate import (
    Generation,
    bucket_length,
    continue_from,
    generate,
    pad_prompts,
)
from restkv_jax.head_budgets import HeadBudgets
from restkv_jax.joining import form_of, join_rows
from restkv_jax.layer import LayerInputs
from restkv_jax.layer_inputs import layer_inputs
from restkv_jax.leave_one_out import leave_one_out, removal_changes
from restkv_jax.mesh_rules import MeshRules
from restkv_jax.pieces import prefill_bounded, prefill_chunked
from restkv_jax.plan import CachePlan, DecodeEviction
from restkv_jax.policies import (
    CAOTE,
    H2O,
    POLICIES,
    PRESETS,
    TOVA,
    Ablation,
    CriticalKV,
    DropKV,
    ExpectedAttention,
    Full,
    KeyDiff,
    Knorm,
    LaCache,
    Policy,
    Random,
    RestKV,
    SnapKV,
    Streaming,
    VNorm,
)
from restkv_jax.prefill import align_right, prefill
from restkv_jax.protocols import Attend, CausalLM, LayerSpec, StagedLM
from restkv_jax.sampling import GREEDY, Sampling, row_keys, sample
from restkv_jax.sharding import ShardedLM, shard
from restkv_jax.slots import LayerStack

__all__ = [
    "CAOTE",
    "GREEDY",
    "H2O",
    "POLICIES",
    "PRESETS",
    "TOVA",
    "Ablation",
    "AdaKV",
    "Attend",
    "CacheFolderError",
    "CachePlan",
    "CausalLM",
    "CompressedLayer",
    "CriticalKV",
    "DecodeEviction",
    "DecodeState",
    "DropKV",
    "ExpectedAttention",
    "FactoredLM",
    "Fidelity",
    "FrozenHeads",
    "Full",
    "Generation",
    "HeadAllocation",
    "HeadBudgets",
    "KVCache",
    "KeyDiff",
    "Knorm",
    "LaCache",
    "LayerInputs",
    "LayerSpec",
    "LayerStack",
    "MeshRules",
    "Policy",
    "Random",
    "RestKV",
    "RestoredCache",
    "Sampling",
    "ShardedLM",
    "SharedBudget",
    "SnapKV",
    "StagedLM",
    "Streaming",
    "VNorm",
    "align_right",
    "bucket_length",
    "calibrate_head_budgets",
    "compress",
    "continue_from",
    "decode_chunk",
    "decode_step",
    "extend",
    "form_of",
    "generate",
    "init_cache",
    "init_decode",
    "join_rows",
    "kl_divergence",
    "last_logits",
    "layer_inputs",
    "leave_one_out",
    "measure_fidelity",
    "pad_prompts",
    "prefill",
    "prefill_bounded",
    "prefill_chunked",
    "removal_changes",
    "restore_cache",
    "row_keys",
    "same_top1",
    "sample",
    "save_cache",
    "score",
    "score_tokens",
    "select",
    "shard",
    "weights_fingerprint",
    "with_output_factors",
]
