"""Make a small random model of every causal architecture in transformers' mapping, and see what dmfast makes of it.

A configuration is the default of its class with every size shrunk by its name (``SIZES``). ``OVERRIDES`` has what names
do not tell. ``verdict`` samples, scores and differentiates, and compares each with plain transformers, which runs every
sequence alone, unpadded, without a cache and with the model's own positions.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import dmfast
from dmfast import LanguageModel
from dmfast.samples import Samples

VOCAB, PAD, BOS, ENDS = 48, 0, 1, [2, 11, 12, 13, 20, 21]
PROMPTS = [[5, 6, 7, 8, 9, 10, 14], [15], [16, 17, 18]]
NEW_TOKENS, TOLERANCE, LARGEST = 10, 1e-4, 150_000_000

#: The sizes of a small model, by the names that configurations have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim", "embedding_size",
         "input_embedding_size", "output_embedding_size", "lru_width", "attention_hidden_size", "hidden_size_global",
         "backbone_hidden_size", "linear_hidden_size", "pronunciation_embed_dim", "shape_embed_dim", "out_hidden_size"],
        32),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
         "swa_num_attention_heads", "index_n_heads"],
        4),
    **dict.fromkeys(
        ["num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "linear_num_key_heads",
         "linear_num_value_heads", "linear_num_heads", "mamba_n_groups", "n_groups", "mamba_ngroups",
         "num_query_groups", "num_global_key_value_heads", "o_groups"],
        2),
    **dict.fromkeys(
        ["head_dim", "kv_channels", "dim_head", "d_head", "attention_head_size", "qk_rope_head_dim", "qk_nope_head_dim",
         "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_head_dim", "d_kv",
         "index_head_dim", "global_head_dim", "mamba_d_state", "state_size", "ssm_state_size", "mamba_head_dim"],
        8),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
         "num_encoder_layers", "num_decoder_layers", "num_blocks"],
        2),
    **dict.fromkeys(
        ["intermediate_size", "moe_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dim_ff", "dff",
         "ffn_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp",
         "moe_shared_expert_intermediate_size", "d_inner", "n_inner", "feed_forward_size", "dense_intermediate_size",
         "shared_experts_intermediate_size", "expert_ffn_hidden_size", "mamba_d_ssm"],
        64),
    **dict.fromkeys(["num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts", "zero_expert_num"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token", "moe_k", "top_k_experts"],
        2),
    **dict.fromkeys(["topk_group", "n_group", "num_expert_group", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "qk_head_dim"], 16),
    "gated_norm_rank": 16,
    **dict.fromkeys(
        ["vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "audio_vocab_size",
         "pronunciation_vocab_size", "shape_vocab_size"],
        VOCAB),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions",
         "max_source_positions", "context_length", "model_max_length"],
        64),
    **dict.fromkeys(
        ["sliding_window", "attention_window_size", "sliding_window_size", "local_attention", "keep_window_size",
         "attention_chunk_size", "chunk_size", "mamba_chunk_size", "window_size", "block_size"],
        4),
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "d_rel": 8, "rel_extent": 8, "moe_num_shared_experts": 1,
    "rotary_dim": 4, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_headdim": 8,
    "time_step_rank": 4, "mamba_dt_rank": 4, "num_buckets": 8, "position_bias_num_buckets": 8,
    "hc_lowrank": 8, "router_hidden_size": 16,
    "initializer_range": 0.2, "init_std": 0.2, "floor_scale": 8, "pretraining_tp": 1, "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1, "query_pre_attn_scalar": 8, "num_kv_shared_layers": 0, "num_dense_layers": 1,
    # a choice among more keys than this has ties, and two forwards of different shapes break ties in different ways
    "index_topk": 64,
}  # fmt: skip

MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}}
#: These settings can't be told from names.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cpmant": {"prompt_length": 4},
    "dbrx": {"rope_parameters": None, "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3,
             "layer_types": None},
    "diffllama": {"attention_dropout": 0.0},  # diffllama refuses any other value
    "glm46v": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE["text_config"]["rope_parameters"],
                                                      "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}},
    "glm_ocr": MROPE,
    "glmga": MROPE,
    "paddleocr_vl": MROPE,
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    # beyond this window a position would keep the best keys of all, also of later ones
    "doge": {"keep_window_size": 64},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"per_layer_config": {"2": {"head_dim": 16}}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4,
                         "num_experts_per_tok": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"scale_emb": 1, "dim_model_base": 32},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen2_5_vl": MROPE,
    "qwen2_vl": {**MROPE, "vision_config": {"embed_dim": 32}},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                                  "indexer_budget": 64, "indexer_compress_ratio": 2}},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
                       "indexer_compress_ratio": 2},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
              "attention_head_dim": 16, "attention_hidden_size": 64, "n_mamba_heads": 2},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
               "num_mem_blocks": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "attention_hidden_size": 64,
               "attention_head_dim": 16},
}  # fmt: skip


class Verdict(NamedTuple):
    """Say what was found for one family."""

    kind: str  # one of: holds, refused, not built, wrong, crashes
    text: str  # the largest error in nats, or the reason
    notes: str = ""  # what dmfast does for the sake of the model


def families() -> list[str]:
    """Return the names of all causal architectures of transformers' auto-mapping."""
    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal() -> list[str]:
    """Return the names of the architectures that take images with text and are in no causal mapping."""
    return [name for name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in families()]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", bos_token="w1")


# --- a small configuration --------------------------------------------------------------------------------------


def small_config(name: str) -> PretrainedConfig:
    """Return a configuration of the family's class whose sizes are all small."""
    return _shrunk(CONFIG_MAPPING[name], OVERRIDES.get(name, {}))


def _shrunk(kind: type[PretrainedConfig], overrides: Mapping[str, Any]) -> PretrainedConfig:
    theirs = {}
    try:
        theirs = kind().to_dict()
    except Exception:
        # a class may refuse its own default, and then its fields tell
        theirs = {f: v for f, v in vars(kind).items() if not f.startswith("_")}
    given: dict[str, Any] = {}
    subs = getattr(kind, "sub_configs", {})
    for field, value in theirs.items():
        if field in subs or (isinstance(value, dict) and "model_type" in value):
            sub = subs.get(field)
            if sub is None or sub.__name__ == "AutoConfig":
                sub = CONFIG_MAPPING[value["model_type"]] if isinstance(value, dict) else None
            if sub is not None:
                given[field] = _shrunk(sub, overrides.get(field, {})).to_dict()
        elif field in SIZES and not isinstance(value, (list, dict)):
            if value is not None or field in ("num_key_value_heads", "head_dim"):
                given[field] = SIZES[field]
        elif ("drop" in field or "jitter" in field) and isinstance(value, float):
            given[field] = 0.1  # dmfast must switch this off
        elif field.endswith(("token_id", "token_index")) and field not in ("decoder_start_token_id",):
            special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": ENDS[0]}
            if field in special:
                given[field] = special[field]
            elif isinstance(value, int):
                given[field] = VOCAB - 1
    given |= _layers(theirs)
    rope = theirs.get("rope_parameters")
    if rope:
        given["rope_parameters"] = _small_rope(rope)
    # these must be equal, and some classes do not see to it
    if "qk_rope_head_dim" in theirs:
        given |= {"head_dim": 8, "num_key_value_heads": 4}
        if rope:
            given["rope_parameters"].pop("partial_rotary_factor", None)
    own = {k: v for k, v in overrides.items() if k not in subs}
    given |= own
    return kind(**{k: v for k, v in given.items() if v != "drop"})


def _layers(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the lists that have an entry for each layer with one layer of each kind, and how many that are."""
    count = next((f for f in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(theirs.get(f), int)), None)
    if count is None or theirs[count] < 3:
        return {}
    lists = {f: v for f, v in theirs.items() if isinstance(v, list) and len(v) == theirs[count]}
    kinds: dict[Any, int] = {}
    for i in range(theirs[count]):
        kinds.setdefault(tuple(str(v[i]) for v in lists.values()), i)
    picked = sorted(kinds.values())[:4]
    picked += [i for i in range(theirs[count]) if i not in picked][: max(2 - len(picked), 0)]
    picked.sort()
    return {count: len(picked)} | {f: [v[i] for i in picked] for f, v in lists.items()}


_ROPE = ("rope_theta", "partial_rotary_factor", "mrope_interleaved", "llama_4_scaling_beta",
         "original_max_position_embeddings")  # fmt: skip


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope parameters that fit the small sizes, without a scaling that depends on the length of the training."""
    if any(isinstance(v, Mapping) for v in rope.values()):
        return {k: _small_rope(v) if isinstance(v, Mapping) else v for k, v in rope.items()}
    kept = {k: v for k, v in rope.items() if k in _ROPE}
    if "mrope_section" in rope:
        kept["mrope_section"] = [2, 1, 1]
    return {"rope_type": "default", **kept}


# --- a small model ----------------------------------------------------------------------------------------------


def build(name: str, config: PretrainedConfig | None = None) -> torch.nn.Module:
    """Return a random model of the family in training mode, spread so that each token and position matters."""
    config = small_config(name) if config is None else config
    auto = AutoModelForImageTextToText if name in multimodal() else AutoModelForCausalLM
    if auto is AutoModelForCausalLM:
        for each in _parts(config):
            if hasattr(each, "is_decoder"):
                each.is_decoder = True
        config.is_encoder_decoder = False
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters although all sizes with a usual name are small")
    torch.manual_seed(0)
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.15 if parameter.dim() > 1 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.float().train()


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


# --- what dmfast makes of it ------------------------------------------------------------------------------------


def alone(model: torch.nn.Module, x: Samples) -> torch.Tensor:
    """Return (N,) log pi of each sequence by plain transformers: alone, unpadded, uncached, with its own positions."""
    found = []
    for tokens, mask, scored in zip(x.tokens, x.attention_mask.bool(), x.score_mask, strict=True):
        ids, n = tokens[mask][None], int(scored.sum())
        logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]
        found.append(logits.double().log_softmax(-1).gather(-1, ids[0, -n:, None]).sum())
    return torch.stack(found)


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def measure(model: torch.nn.Module) -> tuple[dict[str, float], list[str]]:
    """Return how far each way to score is from plain transformers', and what dmfast does for the sake of the model.

    Errors are in nats. That of ``gradient`` is relative to the largest.
    """
    reference = copy.deepcopy(model).eval()
    policy = LanguageModel(model, tokenizer(), eos_token_id=ENDS)
    for seed in range(9):  # until a row ends early, as most draws have one
        x = policy.sample(PROMPTS, 4, max_new_tokens=NEW_TOKENS, seed=seed)
        ended = [bool((~x.score_mask[:, t]).any()) for t in range(x.prompt_len, x.tokens.shape[1])]
        if any(ended):
            break
    assert any(ended), "no row ended early"
    with torch.no_grad():
        expected = alone(reference, x)
    found = {"log q": x.log_prob}
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)
            where = "train" if mode else "eval"
            found[f"together, {where}"] = policy.log_prob(x)
            found[f"alone, {where}"] = policy.log_prob(x, batch_size=1)
    model.train()
    inside = torch.zeros(len(x), dtype=torch.bool)
    if policy._guard.first_position:  # RoBERTa and its kin count no position for a padding token, even a drawn one
        inside = ((x.tokens == PAD) & x.attention_mask.bool()).any(1)
    expected = torch.where(inside, found["together, eval"], expected)
    errors = {name: float((value - expected).abs().max()) for name, value in found.items()}
    x = x[~inside]
    noise = torch.randn(len(x), generator=torch.Generator().manual_seed(2)).double()
    policy.loss(x, log_target=x.log_prob + noise, log_proposal=x.log_prob - 0.2, log_z=0.3).loss.backward()
    ours = _gradients(model)
    log_pi = alone(reference, x)
    weight = (noise - 0.3 + 0.2).exp() - (log_pi.detach() - x.log_prob + 0.2).exp()
    (-(weight * log_pi).sum() / len(x)).backward()
    theirs = _gradients(reference)
    largest = max(float(g.abs().max()) for g in theirs.values())
    zero = torch.zeros(())
    errors["gradient"] = max(
        float((ours.get(n, zero) - theirs.get(n, zero)).abs().max()) / largest for n in ours.keys() | theirs.keys()
    )
    notes = [] if policy._guard.padded else ["prompts of one length at a time"]
    return errors, notes + ([] if policy._guard.cached else ["without a cache"])


def verdict(name: str) -> Verdict:
    """Return what holds for a family. "wrong" and "crashes" are failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(name)
        except Exception as error:
            return Verdict("not built", _short(error))
        try:
            with torch.no_grad():
                copy.deepcopy(model).eval()(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)
        except Exception as error:
            return Verdict("not built", f"plain transformers can't run it on text alone: {_short(error)}")
        try:
            errors, notes = measure(model)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            by_us = Path(frames[-1].filename).is_relative_to(Path(dmfast.__file__).parent)
            named = isinstance(error, (RuntimeError, ValueError)) and type(model).__name__ in str(error)
            return Verdict("refused" if by_us and named else "crashes", _short(error))
    bad = {name: f"{v:.2g}" for name, v in errors.items() if not v <= TOLERANCE * (10 if name == "gradient" else 1)}
    if bad:
        return Verdict("wrong", str(bad), ", ".join(notes))
    worst = max(v for name, v in errors.items() if name != "gradient")
    return Verdict("holds", f"{worst:.1g}", ", ".join(notes))


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
