"""GGUF files: written with the reference writer, read with our reader; and damaged ones."""

import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attend import dense_logits

import models
from models.gguf_file import GGUFStore

VOCAB, LAYERS, WIDTH, HEADS, KV_HEADS, MLP = 24, 2, 64, 4, 2, 96
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrs", "ab", "Ġ"]


def interleave(w, heads):
    """What llama.cpp's converter does to the rows of q and k, [out, in]."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write(path, *, tied=False, quantise=None, **changes):
    """Writes a random model; returns it."""
    config = models.ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "num_hidden_layers": LAYERS,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "intermediate_size": MLP,
            "rms_norm_eps": 2**-17,
            "rope_theta": 20000.0,
            "tie_word_embeddings": tied,
        }
    )
    model = models.Llama.init(config, seed=3)
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(2**-17)  # exact in float32
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(changes.get("merges", ["a b"]))
    writer.add_eos_token_id(2)
    writer.add_array("test.numbers", [1, 2, 3])

    def add(name, tensor):
        tensor = np.ascontiguousarray(tensor)
        if quantise is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(tensor, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, tensor)

    add("token_embd.weight", model.embed[...])
    add("output_norm.weight", model.norm.w[...])
    if not tied:
        add("output.weight", model.head.w[...].T)
    for i, block in enumerate(model.layers):
        attn, mlp = block.attn, block.mlp
        add(f"blk.{i}.attn_norm.weight", block.attn_norm.w[...])
        add(f"blk.{i}.attn_q.weight", interleave(np.asarray(attn.q.w[...].T), HEADS))
        add(f"blk.{i}.attn_k.weight", interleave(np.asarray(attn.k.w[...].T), KV_HEADS))
        add(f"blk.{i}.attn_v.weight", attn.v.w[...].T)
        add(f"blk.{i}.attn_output.weight", attn.o.w[...].T)
        add(f"blk.{i}.ffn_norm.weight", block.mlp_norm.w[...])
        add(f"blk.{i}.ffn_gate.weight", mlp.gate.w[...].T)
        add(f"blk.{i}.ffn_up.weight", mlp.up.w[...].T)
        add(f"blk.{i}.ffn_down.weight", mlp.down.w[...].T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def logits(model):
    ids = jnp.arange(9)[None] % VOCAB
    return dense_logits(model, ids, jnp.arange(9)[None])


@pytest.mark.parametrize("tied", [False, True])
def test_float32_is_exact(path, tied):
    wanted = write(path, tied=tied)
    lm = models.load(path)
    np.testing.assert_array_equal(logits(lm.model), logits(wanted))
    assert lm.config == wanted.config
    assert lm.eos_ids == (2,)
    assert lm.tokenizer.encode("ab<|im_end|>a") == [22, 2, 3]


@pytest.mark.parametrize(
    ("quantisation", "max_diff"), [("F16", 5e-3), ("BF16", 5e-2), ("Q8_0", 0.1), ("Q4_1", 1.5)]
)
def test_quantised(path, quantisation, max_diff):
    wanted = write(path, quantise=gguf.GGMLQuantizationType[quantisation])
    got = models.load(path).model
    assert np.abs(logits(got) - logits(wanted)).max() < max_diff


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_quantisation_that_the_package_dequantises(path, kind):
    """And no other; on random bytes (NaN among them), for most kinds can only be dequantised."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = GGUFStore(path)
    assert store.shapes == {"w": (3, 2 * block)}
    with np.errstate(all="ignore"):
        try:
            wanted = gguf.dequantize(raw, kind)
        except NotImplementedError:
            named = f"unsupported quantisation {kind.name}"
            with pytest.raises(models.CheckpointError, match=named):
                store.read("w")
        else:
            np.testing.assert_array_equal(store.read("w"), wanted)


def test_metadata(path):
    write(path)
    metadata = GGUFStore(path).metadata
    assert metadata["test.numbers"] == [1, 2, 3]
    assert metadata["tokenizer.ggml.tokens"] == TOKENS
    assert metadata["llama.rope.freq_base"] == 20000.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"scaling": gguf.RopeScalingType.YARN}, "yarn"),
        ({"pre": "gemma"}, "gemma"),
        ({"merges": ["a nowhere"]}, "nowhere"),
    ],
)
def test_unsupported(path, changes, named):
    write(path, **changes)
    with pytest.raises(models.CheckpointError, match=named) as refusal:
        models.load(path)
    assert str(path) in str(refusal.value)


def test_truncated_anywhere(path):
    write(path)
    whole = path.read_bytes()
    header = whole.index(b"blk.1.ffn_down.weight")
    for length in [*range(0, header, 37), len(whole) // 2, len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(models.CheckpointError, match=r"model\.gguf: "):
            GGUFStore(path)


def header(*parts, version=3, num_tensors=0, num_keys=0):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(parts)


def text(string):
    return struct.pack("<Q", len(string)) + string.encode()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs", "not b'GGUF'"),
        (header(version=1), "version 1"),
        (header(num_keys=2**60), "cut short"),
        (header(text("key"), struct.pack("<I", 77), num_keys=1), "metadata type 77"),
        (header(text("key"), struct.pack("<IIQ", 9, 9, 1), num_keys=1), "metadata type 9"),
        (header(text("key"), struct.pack("<IIQ", 9, 8, 2**62), num_keys=1), "cut short"),
        (header(text("key"), struct.pack("<IIQ", 9, 4, 2**62), num_keys=1), "cut short"),
        (
            header(text("general.alignment"), struct.pack("<II", 4, 0), num_keys=1),
            "general.alignment",
        ),
        (header(text("w"), struct.pack("<I", 9), num_tensors=1), "w has 9 axes"),
        (
            header(text("w"), struct.pack("<IQIQ", 1, 8, 999, 0), num_tensors=1),
            "999",
        ),
        (header(text("w"), struct.pack("<IQIQ", 1, 8, 8, 0), num_tensors=1), "Q8_0"),
        (
            header(text("w"), struct.pack("<IQIQ", 1, 2**40, 0, 0), num_tensors=1),
            "past the end",
        ),
    ],
)
def test_damaged(path, content, named):
    path.write_bytes(content)
    with pytest.raises(models.CheckpointError, match=named):
        GGUFStore(path)


def test_empty_array(path):
    path.write_bytes(header(text("key"), struct.pack("<IIQ", 9, 4, 0), num_keys=1))
    assert GGUFStore(path).metadata == {"key": []}


def test_integer_tensor_is_refused(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.ones(8, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(models.CheckpointError, match="w has the unsupported quantisation I32"):
        GGUFStore(path).read("w")
