"""Preset `showui` from pixels to the tokens that stay: pictures of few shades, against a flood fill."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc

pytestmark = pytest.mark.conformance


def painted(family: str, inputs: dict[str, torch.Tensor], shades: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(pixel values of few shades, the shades [rows, columns] of each picture's cells)."""
    generator = torch.Generator().manual_seed(shades)
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        grids = [(int(height) // 2, int(width) // 2) for _, height, width in inputs["image_grid_thw"]]
        drawn = [torch.randint(0, shades, grid, generator=generator) for grid in grids]
        rows = torch.cat([each.flatten() for each in drawn]).repeat_interleave(4)
        return rows[:, None].expand(pixels.shape).float(), drawn
    side = {"llava": 14, "internvl": 28}[family]
    cells = (pixels.shape[0], pixels.shape[2] // side, pixels.shape[3] // side)
    whole = torch.randint(0, shades, cells, generator=generator)
    spread = whole.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return spread[:, None].expand(pixels.shape).float(), list(whole)


def thinned(shade: torch.Tensor) -> list[int]:
    """Places of the cells that stay of one picture."""
    rows, columns = shade.shape
    free, kept = {(r, c) for r in range(rows) for c in range(columns)}, []
    for start in sorted(free):
        edge, region = [start] if start in free else [], []
        while edge:
            r, c = edge.pop()
            if (r, c) not in free or shade[r, c] != shade[start]:
                continue
            free.remove((r, c))
            region.append(r * columns + c)
            edge += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        region.sort()
        stay = max(1, len(region) - round(len(region) / 2)) if region else 0
        kept += [region[i * (len(region) - 1) // max(stay - 1, 1)] for i in range(stay)]
    return sorted(kept)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_layers_are_passed_by_one_at_a_time(family: str) -> None:
    """As the published list has it: the same tokens in every other layer, and all of them between."""
    model, processor = support.build(family)
    inputs: dict[str, Any] = support.inputs(family, 3)
    policy = tvc.load_policy("showui", set=["before_layer=1..-2/2", "until=next", "within=40"])
    compiled = tvc.compile(model, policy, inputs=inputs, processor=processor)
    answer = compiled(**inputs)
    held = [layer.keys.shape[2] for layer in answer.past_key_values.layers]
    assert held[::2] == [held[0]] * 3
    assert held[1] == held[3] < held[0] == held[5]
    assert torch.equal(answer.kept["language.1"], answer.kept["language.3"])
    # Pixels go to the decoder once for all of its steps.
    assert [name for name in compiled.engine.interface.inputs["decoder"] if name.startswith("tap.")] == ["tap.pixels"]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "internvl"])
def test_what_shows_the_same_is_thinned_out(family: str) -> None:
    model, processor = support.build(family)
    inputs: dict[str, Any] = support.inputs(family, 3)
    compiled = tvc.compile(model, "showui", inputs=inputs, processor=processor)
    visual = support.visual_mask(family, inputs["input_ids"])
    for shades in (1, 2, 4):
        pixels, pictures = painted(family, inputs, shades)
        places = compiled(**{**inputs, "pixel_values": pixels}).kept["language.1"]
        wanted, start = [], 0
        for picture in pictures:  # of all samples, one after another
            wanted += [start + place for place in thinned(picture)]
            start += picture.numel()
        assert start == int(visual.sum())
        kept = torch.zeros_like(visual)
        for row, places_there in enumerate(places):
            kept[row, places_there[places_there >= 0]] = True
        assert (kept | visual)[inputs["attention_mask"].bool()].all()  # text stays
        assert kept[visual].nonzero().flatten().tolist() == wanted
    torch.testing.assert_close(kept.sum(1), (places >= 0).sum(1))
