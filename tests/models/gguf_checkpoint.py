"""Writes a hub checkpoint as a GGUF file, by the conventions of llama.cpp's converter.

Names of tensors and metadata come from the `gguf` package, types of tokens from sentencepiece's
own description of its model files: nothing here is shared with the reader under test.
"""

import json
import math

import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from models.safetensors_file import SafetensorsStore

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GemmaForCausalLM": gguf.MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
}


def write_checkpoint(folder, path):
    """Writes a folder of the fixtures; returns its config.json."""
    hf = json.loads((folder / "config.json").read_text())
    if (folder / "config.old.json").exists():
        hf = json.loads((folder / "config.old.json").read_text())
    arch = ARCHITECTURES[hf["architectures"][0]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_sizes(writer, hf, arch)
    if (folder / "tokenizer.json").exists():
        _add_byte_level(writer, folder, hf)
    elif (folder / "tokenizer.model").exists():
        _add_sentencepiece(writer, folder, hf)
    else:  # one that can say nothing
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        tokens = ["a", "b", "ab", *(f"[PAD{i}]" for i in range(3, hf["vocab_size"]))]
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(["a b"])
    _add_tensors(writer, folder, hf, arch)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf


def head_dim_of(hf):
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def _add_sizes(writer, hf, arch):
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    gemma = arch in (gguf.MODEL_ARCH.GEMMA, gguf.MODEL_ARCH.GEMMA2)
    if not gemma:
        writer.add_rope_freq_base(hf.get("rope_theta", 10000.0))
    if hf.get("head_dim"):
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])
    if arch == gguf.MODEL_ARCH.LLAMA:
        writer.add_rope_dimension_count(head_dim_of(hf))
        if hf.get("sliding_window"):  # llama.cpp has none here and writes none
            writer.add_sliding_window(hf["sliding_window"])
    if arch == gguf.MODEL_ARCH.GEMMA2:
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
    if arch in (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3):
        writer.add_sliding_window(hf["sliding_window"])


def _add_tensors(writer, folder, hf, arch):
    store = SafetensorsStore(folder)
    names = gguf.get_tensor_name_map(arch, hf["num_hidden_layers"])
    for hub_name in store.shapes:
        tensor = np.asarray(store.read(hub_name), np.float32)
        if arch == gguf.MODEL_ARCH.LLAMA:
            for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                if f"self_attn.{part}_proj" in hub_name:
                    tensor = interleave(tensor, hf[heads])
        if "Gemma" in hf["architectures"][0] and hub_name.endswith("norm.weight"):
            tensor = tensor + 1
        tensor = tensor * _folded_scale(hub_name, hf)
        name = names.get_name(hub_name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    if (hf.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(hf))


def interleave(tensor, heads):
    """Rows of each head: first half and second half take turns."""
    by_half = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return by_half.swapaxes(1, 2).reshape(tensor.shape)


def _folded_scale(hub_name, hf):
    """GGUF has no place for a `query_pre_attn_scalar` of its own: it goes into the queries."""
    scalar = hf.get("query_pre_attn_scalar")
    last = "q_norm.weight" if hf["architectures"] == ["Gemma3ForCausalLM"] else "q_proj.weight"
    if scalar is None or not hub_name.endswith(last):
        return np.float32(1)
    return np.float32(math.sqrt(head_dim_of(hf) / scalar))


def _llama3_factors(hf):
    rope = hf["rope_scaling"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    size = head_dim_of(hf)
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * hf["rope_theta"] ** (i / size)
        turns = rope["original_max_position_embeddings"] / wavelength
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def _add_sentencepiece(writer, folder, hf):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    tokens = [piece.piece for piece in proto.pieces]
    types = [int(piece.type) for piece in proto.pieces]
    for token_id, entry in _tokenizer_config(folder)["added_tokens_decoder"].items():
        types[int(token_id)] = 3 if entry["special"] else 4
    for token_id, kind in enumerate(types):
        if kind == 4:
            tokens[token_id] = tokens[token_id].replace("▁", " ")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types(types)
    if not proto.normalizer_spec.add_dummy_prefix:
        writer.add_add_space_prefix(False)
    _add_special(writer, folder, tokens)


def _add_byte_level(writer, folder, hf):
    pipeline = Tokenizer.from_file(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = [pipeline.id_to_token(i) or f"[PAD{i}]" for i in range(hf["vocab_size"])]
    types = [5 if token.startswith("[PAD") else 1 for token in tokens]
    for entry in content["added_tokens"]:
        types[entry["id"]] = 3 if entry["special"] else 4
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    _add_special(writer, folder, tokens)


def _pre_tokenizer(content):
    """The name that llama.cpp's converter finds by what a tokenizer does to a sample."""
    first = content["pre_tokenizer"]["pretokenizers"][0]
    if first["type"] == "Digits":
        return "smollm"
    return "llama-bpe" if "{1,3}" in first["pattern"]["Regex"] else "qwen2"


def _add_special(writer, folder, tokens):
    config = _tokenizer_config(folder)
    for key in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{key}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            getattr(writer, f"add_{key}_token_id")(tokens.index(token))
    if "add_bos_token" in config:
        writer.add_add_bos_token(config["add_bos_token"])
    template = folder / "chat_template.jinja"
    writer.add_chat_template(template.read_text() if template.exists() else config["chat_template"])


def _tokenizer_config(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())
