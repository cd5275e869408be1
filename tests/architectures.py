"""Tiny configs of the architectures that the compiler is measured and tested on: the one home.

Sizes are small, and odd enough that no two of them are alike by chance: what confuses heads with
layers, or groups with heads, shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
PLAIN = {**COMMON, "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 128}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
VISION = {**COMMON, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
SPOKEN = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 128}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """The class of a config and what it is given; `generates` if it decodes with a KV cache."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    regions: str = "auto"
    generates: bool = False

    @property
    def config(self) -> transformers.PretrainedConfig:
        """The config, as a model of this size would have it."""
        kind: Any = getattr(transformers, f"{self.kind}Config")
        return kind(**self.options)  # type: ignore[no-any-return]


def decoder(kind: str, **options: Any) -> Architecture:
    """A model that generates."""
    return Architecture(kind, options, generates=True)


DECODERS = {
    "llama": decoder("Llama", **GROUPED),
    "qwen2": decoder("Qwen2", **GROUPED),
    "qwen3": decoder("Qwen3", **HEADS),
    "mistral": decoder("Mistral", **GROUPED, sliding_window=8),
    "phi": decoder("Phi", **PLAIN),
    "phi3": decoder("Phi3", **GROUPED, pad_token_id=0),
    "gemma": decoder("Gemma", **HEADS),
    "gemma2": decoder("Gemma2", **HEADS, sliding_window=8),
    "gemma3_text": decoder("Gemma3Text", **{**HEADS, "num_hidden_layers": 7}, sliding_window=8),
    "falcon": decoder(
        "Falcon", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=128
    ),
    "glm": decoder("Glm", **HEADS, pad_token_id=0),
    "glm4": decoder("Glm4", **HEADS, pad_token_id=0),
    "baichuan": decoder("Llama", **PLAIN),
    "yi": decoder("Llama", **GROUPED, rope_theta=5e6),
    "qwen2_moe": decoder("Qwen2Moe", **GROUPED, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": decoder("Qwen3Moe", **HEADS, **EXPERTS, mlp_only_layers=[0]),
    "mixtral": decoder("Mixtral", **GROUPED, num_local_experts=4),
    "gpt2": decoder("GPT2", **SPOKEN),
    "opt": decoder(
        "OPT",
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
    ),
    "gpt_neox": decoder("GPTNeoX", **PLAIN),
    "gptj": decoder("GPTJ", **SPOKEN, rotary_dim=8),
    "bloom": decoder("Bloom", hidden_size=64, n_layer=3, n_head=4, vocab_size=128),
    "olmo2": decoder("Olmo2", **GROUPED),
    "stablelm": decoder("StableLm", **GROUPED),
    "starcoder2": decoder("Starcoder2", **GROUPED),
    "cohere": decoder("Cohere", **GROUPED),
    "granite": decoder("Granite", **GROUPED),
    "deepseek_v3": decoder(
        "DeepseekV3",
        **{**GROUPED, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}
OTHERS = {
    "bert": Architecture("Bert", PLAIN),
    "roberta": Architecture("Roberta", PLAIN),
    "modernbert": Architecture("ModernBert", {**PLAIN, "pad_token_id": 0, "local_attention": 8}),
    "deberta_v2": Architecture(
        "DebertaV2",
        {
            **PLAIN,
            "relative_attention": True,
            "position_buckets": 16,
            "pos_att_type": ["p2c", "c2p"],
        },
    ),
    "electra": Architecture("Electra", {**PLAIN, "embedding_size": 32}),
    "distilbert": Architecture(
        "DistilBert",
        {
            "dim": 64,
            "hidden_dim": 96,
            "n_layers": 3,
            "n_heads": 4,
            "vocab_size": 128,
            "max_position_embeddings": 128,
        },
    ),
    "t5": Architecture(
        "T5",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "vocab_size": 128},
        regions="encoder.block",
    ),
    "whisper": Architecture(
        "Whisper",
        {
            "d_model": 64,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "vocab_size": 128,
            "max_source_positions": 32,
            "max_target_positions": 64,
            "num_mel_bins": 16,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
        regions="encoder.layers",
    ),
    "vit": Architecture("ViT", VISION),
    "dinov2": Architecture("Dinov2", VISION),
    "siglip": Architecture(
        "Siglip",
        {"text_config": {**PLAIN, "max_position_embeddings": 64}, "vision_config": VISION},
    ),
    "clip": Architecture("CLIP", {"text_config": PLAIN, "vision_config": VISION}),
}
ARCHITECTURES = {**DECODERS, **OTHERS}
