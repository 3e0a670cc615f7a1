"""Folders as transformers writes them, of small random models."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 300
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": {"model_type": "llama", "head_dim": 8},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    # As files before version 5 have it.
    "llama, divided": {
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 6},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "sliding_window": 5},
    "qwen2 in a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_parameters": YARN},
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_folder(folder: Path, values: dict, tokenizer: bytes) -> Path:
    """A folder of a random model of transformers', in several files, with a chat template."""
    values = SMALL | values
    config = AutoConfig.for_model(**values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size="10KB")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}, "chat_template": TEMPLATE})
    )
    return folder
