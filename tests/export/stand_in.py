"""A small program with one cut, made by hand in plain PyTorch, that stands in for what the passes produce.

The decoder has the inputs and outputs that every compiled decoder has; the cut keeps the visual tokens that the last
text token attends to most. `eager` runs a component of a program; it is what every target is compared with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tvc.program import Component, Layer, Layout, Program, Stage

AUTO = torch.export.Dim.AUTO


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of the stand-in."""

    layers: int = 12
    before: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    inner: int = 128
    vocabulary: int = 300
    permille: int = 250
    tied: bool = True
    cut: bool = True

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def bounds(self) -> list[int]:
        return [0, self.before, self.layers] if self.cut else [0, self.layers]


def language_model(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocabulary,
    }
    heads = {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": shape.tied,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def attention_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, Q, N]: earlier real keys; a pad row sees everything, so that it stays finite."""
    seen = (key[:, None, :] >= 0) & (key[:, None, :] <= query[:, :, None])
    return (seen | (query < 0)[:, :, None])[:, None]


class Decoder(torch.nn.Module):
    """Prefill, decode steps and later turns in one graph; each stage has caches of its own length."""

    def __init__(self, shape: Shape, model: LlamaForCausalLM):
        super().__init__()
        self.shape, self.lm = shape, model

    def keep(
        self, query: torch.Tensor, key: torch.Tensor, past: torch.Tensor, text: torch.Tensor, visual: torch.Tensor
    ) -> torch.Tensor:
        """[B, T + K] slots that stay, ascending, pads (-1) first."""
        row = torch.softmax(
            query[:, :, -1:] @ key.repeat_interleave(self.shape.heads // self.shape.kv_heads, 1).transpose(2, 3), -1
        ).mean((1, 2))
        column = (visual + past.shape[1]).clamp(min=0)
        score = torch.where(visual >= 0, row.gather(1, column), -1.0)
        count = visual.shape[1] * self.shape.permille // 1000
        chosen = torch.sort(score, dim=1, descending=True, stable=True)[1][:, :count]
        return torch.sort(torch.cat([text, visual.gather(1, chosen)], 1), dim=1)[0]

    def forward(self, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape, base, stages = self.shape, self.lm.model, len(self.shape.bounds) - 1
        hidden, position_ids, query, text, visual = flat[:5]
        past_keys, past = flat[7 : 7 + stages], flat[7 + stages :]
        cache, all_keys = DynamicCache(), []
        for i in range(shape.layers):
            cache.update(past[2 * i], past[2 * i + 1], i)
        for stage, (start, stop) in enumerate(zip(shape.bounds, shape.bounds[1:], strict=False)):
            if stage:
                normed = base.layers[start].input_layernorm(hidden)
                attention = base.layers[start].self_attn
                q = attention.q_proj(normed[:, -1:]).unflatten(2, (shape.heads, shape.head)).transpose(1, 2)
                q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])  # noqa: F821
                kept = self.keep(q, cache.layers[start - 1].keys, past_keys[stage - 1], text, visual)
                slots = kept.clamp(min=0)
                hidden = hidden.gather(1, slots[:, :, None].expand(-1, -1, shape.width))
                query = torch.where(kept >= 0, query.gather(1, slots), -1)
                position_ids = position_ids.gather(1, slots)
            keys = torch.cat([past_keys[stage], query], 1)
            mask = attention_mask(query, keys)
            cos, sin = base.rotary_emb(hidden, position_ids)
            for layer in base.layers[start:stop]:
                hidden = layer(
                    hidden,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                    position_embeddings=(cos, sin),
                )
            all_keys.append(keys)
        logits = self.lm.lm_head(base.norm(hidden[:, -1:]))
        return logits, *all_keys, *(t for layer in cache.layers for t in (layer.keys, layer.values))


class Vision(torch.nn.Module):
    """Patches, two blocks without a cache, a projector: pixel_values [N, 3, 32, 32] to features [N, 16, D]."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(1)
        self.patch = torch.nn.Conv2d(3, 32, 8, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))
        self.norm = torch.nn.LayerNorm(32)
        self.project = torch.nn.Linear(32, width)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.patch(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            q, k, v = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in block(self.norm(hidden)).chunk(3, -1))
            hidden = hidden + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (self.project(torch.nn.functional.gelu(hidden)),)


class Embed(torch.nn.Module):
    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.embed_tokens = model.model.embed_tokens

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.embed_tokens(input_ids),)


def component(
    name: str, module: torch.nn.Module, inputs: dict[str, tuple[torch.Tensor, dict[int, Any]]], outputs: tuple[str, ...]
) -> Component:
    sample, dynamic = tuple(v[0] for v in inputs.values()), tuple(v[1] for v in inputs.values())
    spec = (dynamic,) if isinstance(module, Decoder) else dynamic
    with torch.no_grad():
        exported = torch.export.export(module, sample, dynamic_shapes=spec, strict=False).run_decompositions({})
    return Component(name, exported, tuple(inputs), outputs, sample, dynamic)


def decoder_inputs(
    shape: Shape, batch: int, chunk: int, visual: int, past: list[int]
) -> dict[str, tuple[torch.Tensor, dict[int, Any]]]:
    torch.manual_seed(2)
    both = {0: AUTO, 1: AUTO}
    start, positions = past[0], torch.arange(chunk).repeat(batch, 1) + past[0]
    made: dict[str, tuple[torch.Tensor, dict[int, Any]]] = {
        "inputs_embeds": (torch.randn(batch, chunk, shape.width), both),
        "position_ids": (positions, both),
        "query_positions": (positions.clone(), both),
        "text_index": (torch.cat([torch.arange(3), torch.arange(3 + visual, chunk)]).repeat(batch, 1), both),
        "visual_index": (torch.arange(3, 3 + visual).repeat(batch, 1), both),
        "visual_segment": (torch.zeros(batch, visual, dtype=torch.long), both),
        "visual_counts": (torch.full((batch, 2), visual // 2), both),
    }
    for stage, length in enumerate(past):
        made[f"past_key_positions.{stage}"] = (torch.arange(start - length, start).repeat(batch, 1), both)
    for i in range(shape.layers):
        length = past[0 if i < shape.before or not shape.cut else 1]
        for kind in ("key", "value"):
            made[f"past_{kind}.{i}"] = (torch.randn(batch, shape.kv_heads, length, shape.head), {0: AUTO, 2: AUTO})
    return made


def program_layout(shape: Shape = Shape()) -> Layout:
    layers = (Layer(0, shape.heads, shape.kv_heads, shape.head),) * shape.layers
    return Layout("stand-in", shape.width, shape.vocabulary, layers, (), 0, 1, 1, 16, (8,), 0, 0, 0, 4, ())


def program(shape: Shape = Shape()) -> Program:
    """The three components of the stand-in, their weights shared as a loaded model shares them."""
    model = language_model(shape)
    stages = len(shape.bounds) - 1
    outputs = (
        "logits",
        *(f"key_positions.{s}" for s in range(stages)),
        *(f"{kind}.{i}" for i in range(shape.layers) for kind in ("key", "value")),
    )
    parts = [
        component(
            "vision", Vision(shape.width), {"pixel_values": (torch.randn(2, 3, 32, 32), {0: AUTO})}, ("features",)
        ),
        component(
            "embed",
            Embed(model),
            {"input_ids": (torch.ones(2, 7, dtype=torch.long), {0: AUTO, 1: AUTO})},
            ("inputs_embeds",),
        ),
        component("decoder", Decoder(shape, model), decoder_inputs(shape, 2, 20, 8, [12, 9][:stages]), outputs),
    ]
    layout = program_layout(shape)
    tables = [
        Stage(s, range(a, b), f"language.{a}" if s else None)
        for s, (a, b) in enumerate(zip(shape.bounds, shape.bounds[1:], strict=False))
    ]
    return Program(layout, {part.name: part for part in parts}, tables)


def eager(made: Program) -> Any:
    """A runner over the traced programs themselves."""
    modules = {name: part.exported.module(check_guards=False) for name, part in made.components.items()}

    def run(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        part = made.components[name]
        with torch.no_grad():
            return dict(zip(part.outputs, modules[name](*(inputs[n] for n in part.inputs)), strict=True))

    return run


def prefill(shape: Shape, batch: int, padded: bool, chunk: int = 24, visual: int = 10) -> dict[str, torch.Tensor]:
    """A first chunk over empty caches; when padded, sample b starts with 2*b pads and holds fewer visual tokens."""
    inputs = {
        name: value
        for name, (value, _) in decoder_inputs(shape, batch, chunk, visual, [0] * (len(shape.bounds) - 1)).items()
    }
    for b in range(1, batch if padded else 1):
        pads = 2 * b
        inputs["query_positions"][b] = torch.cat([torch.full((pads,), -1), torch.arange(chunk - pads)])
        inputs["position_ids"][b] = inputs["query_positions"][b].clamp(min=0)
        text = inputs["text_index"][b]
        inputs["text_index"][b] = torch.where(text < pads, -1, text).sort()[0]
        seen = inputs["visual_index"][b]
        inputs["visual_index"][b] = torch.where(seen < pads, -1, seen).sort()[0]
    return inputs


def step(
    shape: Shape, embeds: torch.Tensor, position: torch.Tensor, outputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The next chunk: `embeds` [B, S, D] at `position` [B, S], no visual token, over the caches that `outputs` hold."""
    batch, length = position.shape
    none = torch.zeros(batch, 0, dtype=torch.long)
    made = {"inputs_embeds": embeds, "position_ids": position.clamp(min=0), "query_positions": position}
    made |= {
        "text_index": torch.where(position >= 0, torch.arange(length), -1),
        "visual_index": none,
        "visual_segment": none,
        "visual_counts": none,
    }
    made |= {f"past_key_positions.{s}": outputs[f"key_positions.{s}"] for s in range(len(shape.bounds) - 1)}
    return made | {f"past_{kind}.{i}": outputs[f"{kind}.{i}"] for i in range(shape.layers) for kind in ("key", "value")}


def conversation(
    run: Any, shape: Shape, batch: int, padded: bool, steps: int = 3, visual: int = 10
) -> list[dict[str, torch.Tensor]]:
    """Prefill, `steps` decode steps and one turn of five tokens, of which the first is padding in odd samples."""
    outputs = run("decoder", prefill(shape, batch, padded, visual=visual))
    history = [outputs]
    position = prefill(shape, batch, padded, visual=visual)["query_positions"].max(1).values
    torch.manual_seed(4)
    for _ in range(steps):
        position = position + 1
        token = torch.randint(0, shape.vocabulary, (batch, 1))
        embeds = run("embed", {"input_ids": token})["inputs_embeds"]
        outputs = run("decoder", step(shape, embeds, position[:, None], outputs))
        history.append(outputs)
    turn = position[:, None] + 1 + torch.arange(5)
    if padded:
        turn[1::2] = torch.cat([torch.full_like(turn[1::2, :1], -1), turn[1::2, :-1]], 1)
    history.append(run("decoder", step(shape, torch.randn(batch, 5, shape.width), turn, outputs)))
    return history


def differences(
    shape: Shape, got: list[dict[str, torch.Tensor]], want: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Largest difference of each output over the calls of a conversation; cached entries of pad slots don't count."""
    worst: dict[str, float] = {}
    for a, b in zip(got, want, strict=True):
        for name, value in b.items():
            assert a[name].shape == value.shape, (name, a[name].shape, value.shape)
            assert a[name].dtype == value.dtype, (name, a[name].dtype)
            gap = (a[name].double() - value.double()).abs()
            kind, _, index = name.partition(".")
            if kind in ("key", "value"):
                stage = int(shape.cut and int(index) >= shape.before)
                gap = gap * (b[f"key_positions.{stage}"] >= 0)[:, None, :, None]
            worst[name] = max(worst.get(name, 0.0), gap.max().item() if gap.numel() else 0.0)
    return worst
