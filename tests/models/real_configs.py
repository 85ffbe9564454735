"""The `config.json` of published models, with the exact number of their parameters.

The counts are sums over the tensors of the published checkpoints; embeddings that serve as the
unembedding too count once. Gemma 3 is the language model of the multimodal checkpoint.
"""

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
LLAMA2 = LLAMA | {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
LLAMA31 = LLAMA | {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 262208,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "max_position_embeddings": 131072,
}


def sizes(hidden: int, layers: int, heads: int, mlp: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


REAL = {
    "llama-2-7b": (LLAMA2 | sizes(4096, 32, 32, 11008), 6_738_415_616),
    "llama-2-13b": (LLAMA2 | sizes(5120, 40, 40, 13824), 13_015_864_320),
    "llama-2-70b": (
        LLAMA2 | sizes(8192, 80, 64, 28672) | {"num_key_value_heads": 8},
        68_976_648_192,
    ),
    "llama-3.1-8b": (LLAMA31 | sizes(4096, 32, 32, 14336), 8_030_261_248),
    "llama-3.1-70b": (LLAMA31 | sizes(8192, 80, 64, 28672), 70_553_706_496),
    "mistral-7b-v0.3": (
        sizes(4096, 32, 32, 14336)
        | {
            "architectures": ["MistralForCausalLM"],
            "vocab_size": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "max_position_embeddings": 32768,
        },
        7_248_023_552,
    ),
    "qwen2.5-7b": (
        QWEN25 | sizes(3584, 28, 28, 18944) | {"num_key_value_heads": 4},
        7_615_616_512,
    ),
    "qwen2.5-72b": (
        QWEN25 | sizes(8192, 80, 64, 29568) | {"num_key_value_heads": 8},
        72_706_203_648,
    ),
    "gemma-7b": (
        sizes(3072, 28, 16, 24576)
        | {
            "architectures": ["GemmaForCausalLM"],
            "vocab_size": 256000,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
        },
        8_537_680_896,
    ),
    "gemma-2-9b": (
        sizes(3584, 42, 16, 14336)
        | {
            "architectures": ["Gemma2ForCausalLM"],
            "vocab_size": 256000,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "max_position_embeddings": 8192,
        },
        9_241_705_984,
    ),
    "gemma-3-4b": (
        GEMMA3 | sizes(2560, 34, 8, 10240) | {"num_key_value_heads": 4, "head_dim": 256},
        3_880_263_168,
    ),
    "gemma-3-27b": (
        GEMMA3
        | sizes(5376, 62, 32, 21504)
        | {"num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168},
        27_009_346_304,
    ),
}
