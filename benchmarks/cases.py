"""The models that are measured: random weights, real shapes, and a prompt of exactly as many tokens as the case says.

Each is a LLaVA whose vision encoder is too small to count, so that the numbers are the decoder's. The *ideal* of a case
is the same model taken apart: its layers before the cut, over the full prompt, and its layers behind it, over the kept
tokens alone, each compiled by the same code with every token kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

IMAGE_TOKEN = 5
PATCH = 14


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder and a prompt. `visual` and `kept` are squares, so that an image of that many patches exists."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    visual: int
    text: int
    kept: int
    before_layer: int
    intermediate: int
    vocabulary: int = 1000
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rest: Any = "drop"

    @property
    def policy(self) -> dict[str, Any]:
        """The cheapest published way to choose: attention of the last token in the layer before."""
        step = {
            "at": f"language.{self.before_layer}",
            "score": {"attention": {"of": "last", "layer": "previous"}},
            "select": {"top": {"keep": self.kept}},
            "rest": self.rest,
        }
        return {"version": 1, "name": self.name, "steps": [step]}

    @property
    def parts(self) -> tuple[Case, Case]:
        """The layers before the cut with the full prompt, and those behind it with the kept tokens."""
        before = dataclasses.replace(self, layers=self.before_layer, kept=self.visual, before_layer=0)
        rest = self.layers - self.before_layer
        return before, dataclasses.replace(self, layers=rest, visual=self.kept, before_layer=0)


_LLAMA_7B = {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 32, "intermediate": 11008, "vocabulary": 32064}
_QWEN_7B = {"layers": 28, "width": 3584, "heads": 28, "kv_heads": 4, "intermediate": 18944, "vocabulary": 152064}
_GPU = {"text": 64, "before_layer": 2, "dtype": torch.bfloat16, "device": "cuda"}
# The decoder that speed-ups are quoted on, and a small one that answers in a second; then the shapes of 7 billion
# parameters, for a GPU: LLaVA-1.5, LLaVA-NeXT (2,880 tokens, here the next square) and Qwen2.5-VL.
CASES = {
    "decoder-12x768": Case("decoder-12x768", 12, 768, 12, 12, 576, 64, 64, 2, 3072),
    "decoder-12x768-gqa": Case("decoder-12x768-gqa", 12, 768, 12, 4, 576, 64, 64, 2, 3072),
    "small": Case("small", 4, 64, 4, 2, 64, 8, 16, 1, 128),
    "llava-1.5-7b": Case("llava-1.5-7b", visual=576, kept=64, **_LLAMA_7B, **_GPU),
    "llava-1.5-7b-merge": Case(
        "llava-1.5-7b-merge",
        visual=576,
        kept=64,
        rest={"merge": {"targets": "kept", "reduce": "size_weighted"}},
        **_LLAMA_7B,
        **_GPU,
    ),
    "llava-next-7b": Case("llava-next-7b", visual=2916, kept=324, **_LLAMA_7B, **_GPU),
    "qwen2.5-vl-7b-4096": Case("qwen2.5-vl-7b-4096", visual=4096, kept=484, **_QWEN_7B, **_GPU),
    "qwen2.5-vl-7b-16384": Case("qwen2.5-vl-7b-16384", visual=16384, kept=1849, **_QWEN_7B, **_GPU),
}
KEEP_ALL = {
    "version": 1,
    "name": "keep-all",
    "steps": [{"at": "language.0", "select": {"stride": {"keep": "100%"}}, "rest": "drop"}],
}


def build_model(case: Case, seed: int = 0) -> Any:
    """The case's model with random weights, in eval mode."""
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=_side(case.visual) * PATCH,
            patch_size=PATCH,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=case.width,
            intermediate_size=case.intermediate,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            vocab_size=case.vocabulary,
            max_position_embeddings=32768,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    with torch.device(case.device):
        return transformers.LlavaForConditionalGeneration._from_config(config, dtype=case.dtype).eval()


def build_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and pixel_values: half of the text, the image, the other half."""
    generator = torch.Generator().manual_seed(seed)
    side = _side(case.visual) * PATCH
    text = torch.randint(10, case.vocabulary, (case.batch, case.text), generator=generator)
    image = torch.full((case.batch, case.visual), IMAGE_TOKEN)
    half = case.text // 2
    ids = torch.cat((text[:, :half], image, text[:, half:]), 1)
    pixels = torch.randn(case.batch, 3, side, side, generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(case.dtype)}
    return {name: value.to(case.device) for name, value in made.items()}


def _side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} visual tokens make no square image")
    return side
