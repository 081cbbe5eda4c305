"""LLaVA around decoders of many kinds: each agrees with its definition, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

import support
from tvc.api import Prepared
from tvc.errors import ExportError, TvcError
from tvc.verification.check import compare

WIDE, SLIDING = {"head_dim": 16}, {"head_dim": 16, "sliding_window": 8}
CAPPED = {**SLIDING, "query_pre_attn_scalar": 16}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 4,
    "num_key_value_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
AGREE: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            *("apertus", "arcee", "bitnet", "cohere", "diffllama", "doge", "ernie4_5", "granite", "granitemoe", "lfm2"),
            *("llama", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi3", "seed_oss"),
            *("stablelm", "starcoder2"),
        )
    },
    **dict.fromkeys(("gemma", "glm", "glm4", "qwen3", "vaultgemma"), WIDE),
    **dict.fromkeys(("cohere2", "mistral"), SLIDING),
    **dict.fromkeys(("gemma2", "gemma3_text"), CAPPED),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), LATENT),
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, **WIDE},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("no-kv-layer", {}),
    "falcon_h1": ("unknown-attention", {}),
    "gpt_oss": ("unknown-attention", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": ("no-kv-layer", {}),
    "jamba": ("no-kv-layer", {}),
    "llama4_text": ("unknown-attention", {}),
    "minimax": ("no-kv-layer", {}),
    "qwen3_next": ("no-kv-layer", {}),
}
NO_ONNX = ("deepseek_v2",)  # its rotary embedding multiplies complex numbers
POLICY = {
    "version": 1,
    "name": "twice",
    "steps": [
        {"at": "language.1", "score": {"attention": {"of": "last"}}, "select": {"top": {"keep": "60%"}}},
        {"at": "language.3", "score": "norm", "select": {"top": {"keep": 3}}},
    ],
}


def build(kind: str, changed: dict[str, Any]) -> Any:
    turned = {"rope_parameters": LLAMA3} if kind == "llama" else {}
    return support.llava_around({"model_type": kind, **changed, **turned}, {}, 0.08)


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("kind", "target"),
    [(kind, target) for kind in AGREE for target in ("torch", "ort") if target == "torch" or kind not in NO_ONNX],
)
def test_a_decoder_equals_the_untouched_model_under_masks(kind: str, target: str) -> None:
    model, inputs = build(kind, AGREE[kind]), support.asked_of_llava()
    compiled = Prepared(model, inputs=inputs).compile(POLICY, target, verify=False)
    report = compare(compiled, model, inputs, steps=4)
    assert not [row for row in report.comparisons if not row.passed]
    assert report.left_out == ()


@pytest.mark.conformance
@pytest.mark.parametrize("kind", NO_ONNX)
def test_a_decoder_without_onnx_operators_is_refused_by_that_target(kind: str) -> None:
    with pytest.raises(ExportError, match="not-exportable"):
        Prepared(build(kind, AGREE[kind]), inputs=support.asked_of_llava()).compile(POLICY, "ort", verify=False)


@pytest.mark.conformance
@pytest.mark.parametrize("kind", REFUSED)
def test_a_decoder_that_cannot_be_cut_is_refused_with_the_reason(kind: str) -> None:
    slug, changed = REFUSED[kind]
    with pytest.raises(TvcError, match=slug):
        Prepared(build(kind, changed), inputs=support.asked_of_llava()).compile(POLICY, verify=False)
