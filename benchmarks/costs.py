"""What `tvc plan` says of published settings, beside what papers and their code claim; no weights are needed.

    python benchmarks/costs.py

The claims are data in `claims.yaml`; the table is written to `benchmarks/results/costs.md` and `.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
import yaml

import tvc
from tvc.api import layout_of
from tvc.program import Layout
from tvc.report.cost import one_image
from tvc.report.plan import Plan
from tvc.report.schedule import plan_policy
from tvc.report.timing import environment

HERE = pathlib.Path(__file__).parent
TEXT_TOKENS = 64


def llava(
    vision: dict[str, Any], text: dict[str, Any], images: tuple[int, ...] = (), tiles: int = 1, frames: int = 1
) -> Layout:
    """LLaVA's architecture in these sizes, without weights.

    Args:
        images: visual tokens of each image, or of a video; default: those of one image of one tile.
        tiles: how many pictures the encoder is given.
        frames: of each of the images, which are videos where they have more than one.
    """
    strategy = "default" if vision["model_type"].startswith("clip") else "full"  # without the CLS token, or all
    parts = {"vision_config": vision, "text_config": {"model_type": "llama", **text}}
    config = transformers.LlavaConfig(**parts, vision_feature_select_strategy=strategy)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    layout = one_image(layout_of(model))
    return dataclasses.replace(layout, visual_tokens=images, tiles=tiles, frames=frames) if images else layout


CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CLIP_BIGG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "image_size": 378,
    "patch_size": 14,
}
# 27 layers; the last one is not run, as its features are taken before it.
SIGLIP_768 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 756,
    "patch_size": 14,
    "vision_use_head": False,
}
# Features of a frame are pooled from 27 x 27 to 14 x 14.
SIGLIP_384 = {**SIGLIP_768, "image_size": 384}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
MODELS: dict[str, Callable[[], Layout]] = {
    "llava-1.5-7b": lambda: llava(CLIP_L, LLAMA_7B),
    "llava-1.5-13b": lambda: llava(CLIP_L, LLAMA_13B),
    "clip-bigg-378": lambda: llava(CLIP_BIGG, LLAMA_7B),
    "siglip-768-decoder": lambda: llava(SIGLIP_768, LLAMA_7B),
    "siglip-384-decoder": lambda: llava(SIGLIP_384, QWEN2_7B),
    "llava-next-7b": lambda: llava(CLIP_L, LLAMA_7B, (2880,), 5),
    "qwen2.5-vl-7b's decoder": lambda: llava(SIGLIP_384, QWEN2_7B, (1000,)),
    "llava-ov-7b, 32 frames": lambda: llava(SIGLIP_384, QWEN2_7B, (196,) * 32, 32),
    "llava-ov-7b, a video": lambda: llava(SIGLIP_384, QWEN2_7B, (6272,), 32, 32),
}
QUANTITIES: dict[str, Callable[[Plan], float]] = {
    "average": lambda plan: plan.average_visual_tokens,
    "last": lambda plan: plan.layers[-1].visual,
    "prefill": lambda plan: plan.ratio["prefill"],
    "total": lambda plan: (plan.compiled.vision + plan.compiled.prefill) / (plan.dense.vision + plan.dense.prefill),
    "kv": lambda plan: plan.ratio["kv_bytes"],
}
COLUMNS = ("preset", "settings", "model", "quantity", "published", "plan", "source", "why they differ")


@functools.cache
def _model(name: str) -> Layout:
    return MODELS[name]()


def compared(claim: dict[str, Any]) -> dict[str, Any]:
    """The claim with `plan`, the figure that `tvc.plan` gives for it."""
    policy = tvc.load_policy(claim["preset"]).with_settings(claim["settings"])
    plan = plan_policy(policy, _model(claim["model"]), text_tokens=TEXT_TOKENS)
    return {**claim, "plan": round(QUANTITIES[claim["quantity"]](plan), 4)}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"# Published costs beside `tvc plan` ({TEXT_TOKENS} text tokens)",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in rows:
        settings = ", ".join(f"{key}: {value}" for key, value in row["settings"].items()) or "as shipped"
        figures = [f"{row[name]:.4g}" for name in ("published", "plan")]
        cells = [row["preset"], settings, row["model"], row["quantity"], *figures, row["source"], row.get("why", "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    claims = yaml.safe_load((HERE / "claims.yaml").read_text(encoding="utf-8"))
    rows = [compared(claim) for claim in claims]
    results = HERE / "results"
    (results / "costs.json").write_text(json.dumps({"environment": environment(HERE), "rows": rows}, indent=1) + "\n")
    (results / "costs.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
