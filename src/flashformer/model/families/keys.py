"""What the families share of config.json: defaults, plain values, and keys that are ignored for a reason."""

from __future__ import annotations

from typing import Any

NO_BIAS: dict[str, str | bool] = {"qkv_bias": False, "o_bias": False, "mlp_bias": False}
ATTENTION_BIAS: dict[str, str | bool] = {**NO_BIAS, "qkv_bias": "attention_bias", "o_bias": "attention_bias"}
ALL_BIASES: dict[str, str | bool] = {**ATTENTION_BIAS, "mlp_bias": "mlp_bias"}

# Of the config classes of transformers, where a family does not say otherwise.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PLAIN: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "per_layer_config": (None,),
}
NO_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False, None), "sliding_window": (None,)}
NO_BIAS_KEYS: dict[str, tuple[Any, ...]] = {"attention_bias": (False, None), "mlp_bias": (False, None)}

TRAINING = "acts in training only"
_FORMAT = "weights keep the format in which they are stored"
_OUTPUTS = "chooses what transformers returns, not what it computes"
_GENERATION = "transformers reads it from generation_config.json only"
_LABEL = "a label"
_CLASSIFIER = "acts in classifiers only"
_RUNTIME = "chooses an implementation in transformers"
_TOKENIZER = "belongs to the tokenizer"
_CODE = "code from models is never run; the architecture decides"
UNREAD = "transformers' class does not read it"

IGNORED: dict[str, str] = {
    "torch_dtype": _FORMAT,
    "dtype": _FORMAT,
    "use_bfloat16": _FORMAT,
    "initializer_range": TRAINING,
    "attention_dropout": TRAINING,
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "tf_legacy_loss", "group_size_ratio"), TRAINING),
    "pretraining_tp": UNREAD,
    "max_sequence_length": "transformers reads max_position_embeddings instead",
    "end_token_id": "transformers reads eos_token_id instead",
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "tie_last_hidden_states": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "torchscript": _OUTPUTS,
    "use_cache": "the KV cache is always used; results are the same",
    "is_decoder": "every supported model is a decoder",
    "pad_token_id": "nothing is padded",
    "sep_token_id": "belongs to encoders",
    "decoder_start_token_id": "belongs to encoder-decoders",
    "auto_map": _CODE,
    "custom_pipelines": _CODE,
    "tokenizer_class": "tokenizer.json decides",
    **dict.fromkeys(("model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"), _TOKENIZER),
    "prefix": "unused by transformers' language models",
    "_name_or_path": _LABEL,
    "name_or_path": _LABEL,
    "_commit_hash": _LABEL,
    "transformers_version": _LABEL,
    "unsloth_version": _LABEL,
    "unsloth_fixed": _LABEL,
    "unsloth_optimized": _LABEL,
    "model_name": _LABEL,
    "internal_version": _LABEL,
    "is_llama_config": _LABEL,
    "transformers.js_config": "for another runtime",
    "finetuning_task": _LABEL,
    "task_specific_params": _GENERATION,
    "problem_type": _CLASSIFIER,
    "id2label": _CLASSIFIER,
    "label2id": _CLASSIFIER,
    "num_labels": _CLASSIFIER,
    "attn_implementation": _RUNTIME,
    "_attn_implementation": _RUNTIME,
    "_attn_implementation_autoset": _RUNTIME,
    "_attn_implementation_internal": _RUNTIME,
    "_flash_attn_2_enabled": _RUNTIME,
    "experts_implementation": _RUNTIME,
    "sequence_parallel_enabled": _RUNTIME,
    "selective_checkpoint_enabled": _RUNTIME,
    "move_model_to_device": _RUNTIME,
    **dict.fromkeys(
        (
            *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
            *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
            *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
            *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate"),
            *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
            *("begin_suppress_tokens", "exponential_decay_length_penalty", "cache_implementation"),
            *("encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "num_assistant_tokens"),
            *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind"),
            "target_lookbehind",
        ),
        _GENERATION,
    ),
}
