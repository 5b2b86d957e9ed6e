"""Tiny configurations of transformers' causal language models: nearly every model_type, some 10 000 to 500 000 weights.

``SMALL`` replaces a setting wherever a configuration has it. ``OWN`` adds what one model_type needs besides.
"""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "d_ff": 48, "ffn_dim": 48, "n_inner": 48, "shared_intermediate_size": 24,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "sliding_window": 16,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
    "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "image_token_id": 5, "image_token_index": 5, "video_token_id": 6, "audio_token_id": 7, "initializer_range": 0.08,
}  # fmt: skip

_MLA: dict[str, Any] = {"num_key_value_heads": 4, "first_k_dense_replace": 1}
_LINEAR: dict[str, Any] = {"num_hidden_layers": 4}
"""Three layers of linear attention before one of full attention."""
_GEMMA4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "global_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "axk2": _MLA, "deepseek_v3": _MLA, "glm4_moe_lite": _MLA, "sarvam_mla": _MLA,
    "deepseek_v32": _MLA | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8},
    "glm_moe_dsa": _MLA | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8},
    "longcat_flash": {
        "num_key_value_heads": 4, "ffn_hidden_size": 48, "moe_topk": 2, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 16, "qk_head_dim": 16,
    },
    "dots3_note_text": _MLA, "minicpm3": _MLA, "youtu": _MLA,
    "bailing_hybrid": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse"], "num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 2,
        "linear_head_dim": 8, "linear_num_heads": 4, "head_dim": 8, "qk_head_dim": 16,
    }, "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {
        "intermediate_size": [48, 48], "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 4,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in
                                                ("full_attention", "sliding_attention")}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dory": {"sliding_window": 64}, "falcon_h1": {"mamba_d_ssm": 64}, "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2}, "ministral": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse"], "num_experts_per_token": 2, "linear_head_dim": 8, "qk_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1}, "qwen3_next": _LINEAR, "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR, "qwen4_exp_text": _LINEAR | {
        "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "ple_embed_dim": 8,
        "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "hc_lowrank": 4, "split_ngram_parts": 1,
    }, "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"],
        "attention_head_size": 8, "feed_forward_size": 48, "num_buckets": 2, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "hash_seed": 0,
    }, "xmod": {"default_language": "en_XX"}, "zaya": {"num_experts_per_tok": 1},
    "inkling2_text": {"unpadded_vocab_size": 96}, "inkling2_loop_text": {"unpadded_vocab_size": 96},
    "xlm": {"emb_dim": 32}, "musicgen_decoder": {"num_codebooks": 1},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3], "num_key_value_heads": 4, "attention_hidden_size": 64,
        "attention_head_dim": 16, "mamba_headdim": 16, "n_mamba_heads": 4, "num_query_groups": 4, "kv_channels": 8,
    },
}  # fmt: skip
"""Settings of one model_type. Of a model with parts, they go to the part of that model_type."""


NOT_BUILT: dict[str, str] = {
    "blt": "its tables of hashed byte groups have 96 million weights at the least",
    "dots3_note": "its configuration names layers 25 to 41",
    "emu3": "needs a vocabulary of images",
    "gemma3n": "its vision tower is another library's (timm); its text model is here as gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose states it is given",
    "gemma4_unified_assistant": "drafts for another model, whose states it is given",
    "musicgen": "reads audio codes; the causal model takes another configuration than the auto class gives it",
    "musicgen_melody": "reads audio codes; the causal model takes another configuration than the auto class gives it",
    "qwen4_exp": "its indexer has no sizes by default",
    "qwen4_exp_text": "its indexer has no sizes by default",
    "xlstm": "its kernel fails at these sizes",
}
"""model_type -> why there is no tiny model of it here."""

MULTIMODAL: dict[str, str] = {
    "gemma4": "Gemma4ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
"""model_type -> class that published checkpoints are saved from, if ``AutoModelForCausalLM`` loads another one."""


def causal_model_types() -> list[str]:
    """Every model_type that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str) -> Any:
    """A model with random weights in fp32, of the class that checkpoints are saved from."""
    import torch
    import transformers

    torch.manual_seed(0)
    auto: Any = getattr(transformers, MULTIMODAL.get(model_type, "AutoModelForCausalLM"))
    build = auto._from_config if model_type in MULTIMODAL else auto.from_config
    return build(tiny_config(model_type))


def tiny_config(model_type: str) -> Any:
    """A tiny configuration of ``model_type``, parts (text, vision, audio) included."""
    from transformers import AutoConfig, PretrainedConfig

    def small(given: Any) -> dict[str, Any]:
        known = given.to_dict()
        kept = {k: v for k, v in SMALL.items() if known.get(k) is not None and not isinstance(known[k], dict | list)}
        if "num_key_value_heads" in known:
            kept["num_key_value_heads"] = SMALL["num_key_value_heads"]
        return kept | OWN.get(given.model_type, {})

    whole = AutoConfig.for_model(model_type)
    parts = {
        name: type(part)(**small(part)).to_dict()
        for name, part in vars(whole).items()
        if isinstance(part, PretrainedConfig)
    }
    return type(whole)(**(small(whole) | parts | OWN.get(model_type, {})))
