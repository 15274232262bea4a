"""Tiny configs: one base for all architectures, and what a single architecture needs on top of it."""

VOCAB = 173  # a prime that no other dimension equals
LAYERS = 4

BASE = dict(
    vocab_size=VOCAB, num_vocab=VOCAB, embedding_size=VOCAB, vocab_size_per_layer_input=VOCAB,
    hidden_size=64, hidden_dim=64, n_embd=64, d_model=64, model_dim=64, block_dim=64, dim_model_base=64,
    num_hidden_layers=LAYERS, num_layers=LAYERS, n_layer=LAYERS, n_layers=LAYERS, num_transformer_layers=LAYERS,
    intermediate_size=96, ffn_hidden_size=96, mlp_hidden_size=96, ff_intermediate_size=96, intermediate_size_mlp=96,
    n_inner=96, moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_intermediate_size=32,
    expert_ffn_hidden_size=32,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, num_key_value_heads=2, num_kv_heads=2, n_kv_heads=2,
    head_dim=16, q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    num_experts=4, n_routed_experts=4, num_local_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2,
    num_experts_per_token=2, n_shared_experts=1, num_shared_experts=1, num_shared_expert=1, n_group=1, topk_group=1,
    first_k_dense_replace=1, routed_scaling_factor=1.0, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    moe_layer_freq=1, topk_method="noaux_tc", scoring_func="sigmoid",
    rms_norm_eps=1e-5, layer_norm_eps=1e-5, layer_norm_epsilon=1e-5, norm_eps=1e-5, layernorm_epsilon=1e-5,
    rope_theta=10000.0, rope_local_base_freq=10000.0, rope_scaling=None, partial_rotary_factor=0.5, rotary_dim=8,
    max_position_embeddings=128, n_positions=128, n_ctx=128, block_size=128, model_max_length=128,
    attention_bias=False, mlp_bias=False, use_bias=False, use_conv_bias=True, conv_bias=False, use_qk_norm=True,
    sliding_window=8, attention_window_size=8, layer_types=["sliding_attention", "full_attention"] * 2,
    conv_kernel=4, conv_L_cache=3, state_size=8, ssm_state_size=8, n_groups=1, layer_group_size=2, group_norm_size=2,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4, index_head_dim=16, index_n_heads=2, index_topk=4,
    logits_scaling=1.0, attention_multiplier=0.25, embedding_multiplier=1.0, residual_multiplier=1.0,
    scale_depth=1.0, scale_emb=1.0, mamba_d_conv=4, mamba_d_state=8, mamba_expand=2,
)  # fmt: skip

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_YARN = _ROPE | {"type": "yarn", "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
_LLAMA_4 = _YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
_ROPE_BY_TYPE = {"sliding_attention": _ROPE, "full_attention": _ROPE}
_KDA = dict(kda_layers=[1, 2, 3], full_attn_layers=[4], num_heads=4, head_dim=16, short_conv_kernel_size=4)
_GEMMA_4 = dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, global_head_dim=16)
_LFM2 = dict(block_multiple_of=8, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False)
_LONGCAT = dict(zero_expert_type="identity", zero_expert_num=1, mla_scale_q_lora=True, mla_scale_kv_lora=True)
_NAS_BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 0.5}}
_HADAMARD = {"bits": 2, "group_size": 128, "mode": "affine"}

# Keys of both the outer and the nested text config; "text_model_type" names the inner one.
OVERRIDES = {
    "afm7": dict(num_kv_reuse_layers=1),
    "apertus": dict(post_norm=False, qk_norm=True),
    "baichuan_m1": dict(sliding_window_layers=[1], conv_window=2),
    "dbrx": dict(
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ),
    "deepseek_v2": dict(rope_scaling=_YARN, topk_method="greedy"),
    "exaone4": dict(sliding_window_pattern="LLLG"),
    "exaone_moe": dict(is_moe_layer=[False, True, True, True]),
    "gemma3": dict(sliding_window_pattern=2),
    "gemma3_text": dict(sliding_window_pattern=2),
    "gemma3n": dict(
        text_model_type="gemma3n_text", num_kv_shared_layers=2, final_logit_softcapping=30.0,
        hidden_size_per_layer_input=8, activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=2, altup_coef_clip=120.0, altup_correct_scale=True, altup_active_idx=0,
        laurel_rank=8, vocab_size_per_layer_input=151,
    ),
    "gemma4": dict(text_model_type="gemma4_text", **_GEMMA_4),
    "gemma4_text": _GEMMA_4,
    "glm_moe_dsa": dict(rope_parameters=_ROPE),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.25),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"] * 2, mamba_n_heads=4, mamba_d_head=32, mamba_proj_bias=False,
        mamba_n_groups=1, mamba_conv_bias=True,
    ),
    "hunyuan": dict(
        use_mixed_mlp_moe=True, use_cla=True, cla_share_factor=2,
        rope_scaling={"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    ),
    "jamba": dict(attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2),
    "kimi_k3": dict(
        text_model_type="kimi_linear", linear_attn_config=_KDA, attn_res_block_size=2, activation_situ_beta=1.0
    ),
    "kimi_linear": dict(linear_attn_config=_KDA),
    "lfm2": _LFM2,
    "lfm2-vl": _LFM2,
    "lfm2_moe": dict(use_expert_bias=True, num_dense_layers=1),
    "llama4": dict(attention_chunk_size=8, interleave_moe_layer_step=1, num_experts_per_tok=1),
    "llama4_text": dict(no_rope_layers=[1, 1, 1, 0]),
    "longcat_flash": _LONGCAT | dict(attention_method="MLA"),
    "longcat_flash_ngram": _LONGCAT | dict(ngram_vocab_size_ratio=2),
    "mamba": dict(time_step_rank=4),
    "mamba2": dict(time_step_rank=4, time_step_limit=(0.0, 10.0), head_dim=32),
    "mellum": dict(rope_parameters=_ROPE_BY_TYPE),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[0, 1, 0, 1], moe_layer_freq=[0, 1, 1, 1], add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False, sliding_window_size=8, swa_rope_theta=10000.0, swa_num_attention_heads=4,
        swa_num_key_value_heads=2, swa_head_dim=16, swa_v_head_dim=16,
    ),
    "minicpm3": dict(rope_scaling=_YARN | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}),
    "minimax_m3_vl": dict(moe_layer_freq=[0, 1, 1, 1], dense_intermediate_size=96, layer_types=None),
    "ministral3": dict(rope_parameters=_LLAMA_4),
    "mistral4": dict(rope_parameters=_LLAMA_4),
    "muse_spark": dict(
        post_norm_eps=1e-5, rope_parameters=_ROPE, layer_rope_theta=[10000.0, 0.0] * 2, final_logit_softcapping=30.0,
        output_multiplier=1.0, moe_hidden_size=32, num_shared_experts=0,
    ),
    "nemotron": dict(hidden_act="relu2"),
    "nemotron-nas": dict(block_configs=[_NAS_BLOCK] * 4),
    "nemotron_h": dict(
        mamba_num_heads=4, mamba_head_dim=32, mamba_proj_bias=False, hybrid_override_pattern=["M", "*", "-", "E"],
        moe_shared_expert_intermediate_size=32,
    ),
    "olmo_hybrid": dict(linear_allow_neg_eigval=False, layer_types=["linear_attention", "full_attention"] * 2),
    "openelm": dict(ffn_dim_divisor=8, num_query_heads=[4] * 4, num_kv_heads=[2] * 4, ffn_multipliers=[1.0] * 4),
    # It writes to 100,352 fixed columns of the logits without looking; with fewer it corrupts memory.
    "phi3small": dict(vocab_size=100_352, num_hidden_layers=2, dense_attention_every_n_layers=2, gegelu_limit=20.0),
    "plamo": dict(n_shared_head=2),
    "prism_hadamard_qwen35": dict(
        text_model_type="qwen3_5_text", hidden_size=128, schema_version=1, tensor_namespace="mlx-lm-text",
        quantization=_HADAMARD,
        modules=[
            dict(path="model.embed_tokens", embedding=True, dtype="float16", block=0),
            dict(path="lm_head", embedding=False, dtype="float16", block=0),
        ],
    ),
    "qwen": dict(kv_channels=16),
    "recurrent_gemma": dict(conv1d_width=4, logits_soft_cap=30.0, block_types=["recurrent", "attention"] * 2),
    "rwkv7": dict(a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8, decay_low_rank_dim=8),
    "spark2_5": dict(rope_parameters=_ROPE_BY_TYPE),
    "stablelm": dict(use_qkv_bias=False),
    "step3p5": dict(num_attention_groups=2, moe_top_k=2, share_expert_dim=32),
}  # fmt: skip

# Files that no test builds, and what they raise or say; a new mlx-lm version that changes it makes itself noticed.
NOT_BUILT = dict.fromkeys(
    ["activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline", "rope_utils", "ssm",
     "switch_layers"],
    "a helper: it defines no Model",
)  # fmt: skip
NEEDS_METAL = dict.fromkeys(["bitnet", "muse_spark"], "[metal_kernel] No Metal back-end.")
NOT_BUILT |= NEEDS_METAL

# Files whose untied model is built and whose tied one is not.
NOT_TIED = {
    "baichuan_m1": "'Model' object has no attribute 'lm_head'",  # its forward pass wants the head that it left out
    "olmo": "Invalid type tuple",  # tied, it returns its cache with its logits
    "prism_hadamard_qwen35": "Unknown or unsupported packed module: lm_head",  # the manifest above packs the head
}
