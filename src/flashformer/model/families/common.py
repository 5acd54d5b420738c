"""What the families share: the tensors of a pre-norm decoder and the keys that every saved config carries."""

from __future__ import annotations

from typing import Any

from ..family import TensorRule

_LAYER = "model.layers.{i}."

TENSORS = (
    TensorRule("embed", "model.embed_tokens.weight", ("vocab_size", "d_model")),
    TensorRule("layers.{i}.attn_norm", _LAYER + "input_layernorm.weight", ("d_model",)),
    TensorRule("layers.{i}.q", _LAYER + "self_attn.q_proj.weight", ("q_width", "d_model")),
    TensorRule("layers.{i}.k", _LAYER + "self_attn.k_proj.weight", ("kv_width", "d_model")),
    TensorRule("layers.{i}.v", _LAYER + "self_attn.v_proj.weight", ("kv_width", "d_model")),
    TensorRule("layers.{i}.o", _LAYER + "self_attn.o_proj.weight", ("d_model", "q_width")),
    TensorRule("layers.{i}.q_bias", _LAYER + "self_attn.q_proj.bias", ("q_width",), "qkv_bias"),
    TensorRule("layers.{i}.k_bias", _LAYER + "self_attn.k_proj.bias", ("kv_width",), "qkv_bias"),
    TensorRule("layers.{i}.v_bias", _LAYER + "self_attn.v_proj.bias", ("kv_width",), "qkv_bias"),
    TensorRule("layers.{i}.o_bias", _LAYER + "self_attn.o_proj.bias", ("d_model",), "o_bias"),
    TensorRule("layers.{i}.ffn_norm", _LAYER + "post_attention_layernorm.weight", ("d_model",)),
    TensorRule("layers.{i}.gate", _LAYER + "mlp.gate_proj.weight", ("d_ff", "d_model")),
    TensorRule("layers.{i}.up", _LAYER + "mlp.up_proj.weight", ("d_ff", "d_model")),
    TensorRule("layers.{i}.down", _LAYER + "mlp.down_proj.weight", ("d_model", "d_ff")),
    TensorRule("layers.{i}.gate_bias", _LAYER + "mlp.gate_proj.bias", ("d_ff",), "mlp_bias"),
    TensorRule("layers.{i}.up_bias", _LAYER + "mlp.up_proj.bias", ("d_ff",), "mlp_bias"),
    TensorRule("layers.{i}.down_bias", _LAYER + "mlp.down_proj.bias", ("d_model",), "mlp_bias"),
    TensorRule("final_norm", "model.norm.weight", ("d_model",)),
    TensorRule("lm_head", "lm_head.weight", ("vocab_size", "d_model")),
)

IGNORED_TENSORS = ("*.rotary_emb.inv_freq",)  # follows from the config

PLAIN: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
}

_TRAINING = "acts in training only"
_FORMAT = "weights keep the format in which they are stored"
_OUTPUTS = "chooses what transformers returns, not what it computes"
_GENERATION = "transformers reads it from generation_config.json only"
_LABEL = "a label"
_CLASSIFIER = "acts in classifiers only"
_RUNTIME = "chooses an implementation in transformers"

IGNORED: dict[str, str] = {
    "torch_dtype": _FORMAT,
    "dtype": _FORMAT,
    "use_bfloat16": _FORMAT,
    "initializer_range": _TRAINING,
    "attention_dropout": _TRAINING,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "torchscript": _OUTPUTS,
    "use_cache": "the KV cache is always used; results are the same",
    "is_decoder": "every supported model is a decoder",
    "pad_token_id": "nothing is padded",
    "sep_token_id": "belongs to encoders",
    "decoder_start_token_id": "belongs to encoder-decoders",
    "auto_map": "code from models is never run; the architecture decides",
    "tokenizer_class": "tokenizer.json decides",
    "prefix": "unused by transformers' language models",
    "_name_or_path": _LABEL,
    "name_or_path": _LABEL,
    "_commit_hash": _LABEL,
    "transformers_version": _LABEL,
    "unsloth_version": _LABEL,
    "unsloth_fixed": _LABEL,
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
    "experts_implementation": _RUNTIME,
    **dict.fromkeys(
        (
            *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
            *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
            *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
            *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate"),
            *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
            *("begin_suppress_tokens", "exponential_decay_length_penalty"),
        ),
        _GENERATION,
    ),
}
