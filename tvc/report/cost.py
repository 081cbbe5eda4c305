"""Prices token counts: FLOPs of vision, prefill and decode, and bytes of KV cache.

A matrix product of [m, k] and [k, n] is 2*m*k*n FLOPs, the count of `torch.utils.flop_counter`. Attention of q queries
over k keys is 4*H*d*q*k: q·k and weights·v, all pairs, because a kernel under a boolean mask computes them all. It is
6*H*d*q*k where q·k is had twice, as positions turn it and without (`attention: {unrotated: visual}`). Windows count in
vision encoders, which split their tokens into windows; a decoder's window is only a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tvc.errors import ArgumentError
from tvc.program import Layer, Layout
from tvc.report.plan import Cost, Plan, PlanLayer


def attention_flops(layer: Layer, queries: int, keys: int, products: int = 2) -> int:
    """FLOPs of an attention of so many matrix products over all pairs."""
    return 2 * products * layer.heads * layer.head_dim * queries * keys


def kv_bytes(layer: Layer, tokens: int, element_size: int) -> int:
    """Bytes of the keys and values of `tokens` tokens."""
    return 2 * layer.kv_heads * layer.head_dim * tokens * element_size


def tile_lengths(layout: Layout) -> list[int]:
    """Tokens of each sequence that the vision encoder attends within: a tile, or a frame of a packed encoder."""
    packed = [layout.group * count for image in layout.frame_tokens for count in image]
    if layout.prefix_tokens == 0 and layout.tiles == 1 and layout.tile_tokens == sum(packed):
        return packed
    return [layout.tile_tokens] * layout.tiles


def one_image(layout: Layout) -> Layout:
    """The layout of a prompt with the first of the sample images alone, which are all alike."""
    images = len(layout.visual_tokens)
    packed = layout.tiles == 1 and layout.tile_tokens == layout.group * sum(layout.visual_tokens)
    return dataclasses.replace(
        layout,
        visual_tokens=layout.visual_tokens[:1],
        tiles=max(1, layout.tiles // images),
        tile_tokens=layout.tile_tokens // images if packed else layout.tile_tokens,
    )


def shown(layout: Layout, frames: int) -> Layout:
    """The layout of a prompt with `frames` frames of a video, each of the size of the one image that it was made for.

    They are one video where the decoder's positions tell its frames. Elsewhere they come as images.

    Raises:
        ArgumentError: there is no frame.
    """
    if frames < 1:
        raise ArgumentError(
            "a video has no frames",
            where="--frames",
            got=frames,
            want="the number of frames that the decoder sees, at least 1",
            fix="write --frames 32, or leave it out for an image",
            slug="no-frames",
        )
    (count,) = layout.visual_tokens
    packed = layout.tiles == 1 and layout.tile_tokens == layout.group * count and not layout.in_order
    return dataclasses.replace(
        layout,
        visual_tokens=(frames * count,) if layout.serial else (count,) * frames,
        frames=frames if layout.serial else 1,
        tiles=layout.tiles if packed else frames * layout.tiles,
        tile_tokens=frames * layout.tile_tokens if packed else layout.tile_tokens,
    )


def vision_flops(layout: Layout, lengths: Sequence[Sequence[int]], projected: int) -> int:
    """FLOPs from pixels to features in the decoder's space.

    Args:
        layout: the model.
        lengths: per encoder block that runs, the tokens of each tile, prefix included.
        projected: visual tokens that the projector makes.
    """
    patches = sum(length - layout.prefix_tokens for length in tile_lengths(layout))
    total = 2 * patches * layout.patch_linear + 2 * projected * layout.projector_linear
    for layer, tiles in zip(layout.vision, lengths, strict=False):
        for length in tiles:
            total += 2 * layer.linear * length
            total += attention_flops(layer, length, min(layer.window or length, length))
    return total


def block_flops(layout: Layout, layer: Layer, queries: int, keys: int, read: int, products: int = 2) -> int:
    """FLOPs of a decoder block in which `queries` tokens attend to `keys`; where it reads visual tokens by
    cross-attention, it makes keys and values of `read` of them and of nothing else.
    """
    made = 2 * layout.hidden_size * layer.kv_heads * layer.head_dim if layer.crosses else 0
    paid = attention_flops(layer, queries, keys, products)
    return 2 * (layer.linear - made) * queries + 2 * made * read + paid


def decoder_flops(
    layout: Layout, queries: Sequence[int], keys: Sequence[int], prefill: bool = True, products: int = 2
) -> int:
    """FLOPs of a decoder call, one row of logits included: in layer i, `queries[i]` tokens attend to `keys[i]`.

    Args:
        prefill: the call brings the image, so that layers with cross-attention make keys and values.
        products: matrix products of an attention over all pairs.
    """
    triples = zip(layout.language, queries, keys, strict=True)
    blocks = sum(block_flops(layout, layer, q, k, k * prefill, products) for layer, q, k in triples)
    return blocks + 2 * layout.head_linear


def held(layout: Layout, visual: Sequence[int], text: int) -> list[tuple[int, int]]:
    """(visual, text) tokens whose keys and values each decoder layer holds, of `visual[i]` that reach layer i.

    Where some layers read visual tokens by cross-attention, these hold them alone, and the others text alone.
    """
    if not any(layer.crosses for layer in layout.language):
        return [(count, text) for count in visual]
    pairs = zip(layout.language, visual, strict=True)
    return [(count, 0) if layer.crosses else (0, text) for layer, count in pairs]


def price(
    layout: Layout,
    tokens: Sequence[int],
    kept: Sequence[int],
    vision: int,
    new_tokens: int,
    text_tokens: int,
    products: int = 2,
) -> Cost:
    """The cost of a prompt of which decoder layer i attends to `tokens[i]` tokens and holds `kept[i]` of them
    afterwards, and of `new_tokens` more; an attention has so many matrix `products` over all pairs.
    """
    layers = list(zip(layout.language, kept, strict=True))
    queries = [text_tokens if layer.crosses else count for layer, count in zip(layout.language, tokens, strict=True)]
    one = [1] * len(layers)
    keys = ([count if layer.crosses else count + step for layer, count in layers] for step in range(1, new_tokens + 1))
    steps = [decoder_flops(layout, one, each, False, products) for each in keys]
    cached = sum(kv_bytes(layer, count, layout.element_size) for layer, count in layers)
    prefill = decoder_flops(layout, queries, tokens, products=products)
    return Cost(vision, prefill, sum(steps) / len(steps), cached)


def plan_costs(
    layout: Layout,
    visual_tokens_per_layer: Sequence[int],
    text_tokens: int,
    vision_reductions: Mapping[int, Sequence[int]] | None = None,
    new_tokens: int = 1,
    *,
    vision_blocks: int | None = None,
    policy: str = "",
    sites: Mapping[int, tuple[str, ...]] | None = None,
    exact: bool = True,
    evicted: Sequence[int] | None = None,
    unread: Sequence[int] | None = None,
    products: int = 2,
    alone: tuple[str, ...] = (),
) -> Plan:
    """The plan of given token counts.

    Args:
        layout: the model and its sample images.
        visual_tokens_per_layer: visual tokens in each decoder layer, all images together.
        text_tokens: text tokens of the prompt; none is ever removed.
        vision_reductions: encoder block -> tokens of each tile from that block on, prefix included.
        new_tokens: how many new tokens the decode cost is averaged over.
        vision_blocks: encoder blocks that the compiled graph runs; the untouched model runs all of them.
        policy: its name, for the reader.
        sites: decoder layer -> names of the cuts before it.
        exact: False where counts depend on content.
        evicted: visual tokens that leave the cache of each decoder layer when the prompt has been read; default: none.
        unread: visual tokens that a decode step does not attend to in each decoder layer, for the reader alone: masks
            hide them from a kernel that computes all pairs; default: none.
        products: matrix products of an attention of the compiled decoder over all pairs.
        alone: what of the policy is about several frames of a video, and finds one, for the reader.
    """
    dense_tiles = tile_lengths(layout)
    depth = len(layout.vision)
    lengths, current = [], dense_tiles
    for block in range(depth):
        current = list((vision_reductions or {}).get(block, current))
        lengths.append(current)
    lengths = lengths[:vision_blocks]
    plan_layers = []
    parts = held(layout, visual_tokens_per_layer, text_tokens)
    none = [0] * len(layout.language)
    gone, hidden = none if evicted is None else evicted, none if unread is None else unread
    for index, (layer, (visual, text), left) in enumerate(zip(layout.language, parts, gone, strict=True)):
        count = visual + text
        flops = block_flops(layout, layer, text_tokens if layer.crosses else count, count, count, products)
        cached = kv_bytes(layer, count - left, layout.element_size)
        there = (sites or {}).get(index, ())
        plan_layers.append(PlanLayer(index, there, visual, text, flops, cached, left, hidden[index]))
    every = [sum(layout.visual_tokens)] * len(plan_layers)
    untouched = [visual + text for visual, text in held(layout, every, text_tokens)]
    dense_vision = vision_flops(layout, [dense_tiles] * depth, _projected(layout, dense_tiles))
    vision = vision_flops(layout, lengths, _projected(layout, current))
    return Plan(
        model_type=layout.model_type,
        policy=policy,
        image_size=layout.image_size,
        visual_tokens=layout.visual_tokens,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        layers=tuple(plan_layers),
        vision_tokens=tuple(sum(tiles) for tiles in lengths),
        vision_sites=tuple((block, f"vision.{block}") for block in sorted(vision_reductions or {})),
        dense=price(layout, untouched, untouched, dense_vision, new_tokens, text_tokens),
        compiled=price(
            layout,
            [layer.tokens for layer in plan_layers],
            [layer.held for layer in plan_layers],
            vision,
            new_tokens,
            text_tokens,
            products,
        ),
        exact=exact,
        frames=layout.frames,
        alone=alone,
    )


def _projected(layout: Layout, tiles: Sequence[int]) -> int:
    """Rows the projector multiplies: patches of every tile, a group of them at a time."""
    return sum((length - layout.prefix_tokens) // layout.group for length in tiles)
