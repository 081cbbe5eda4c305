"""Spans that are read off a mask by hand, and the mask that they say, rebuilt by a loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvc.errors import ModelError
from tvc.trace.spans import read_spans

# Two forms that models have of a window beside blocks: whether a block reaches back out of the window.
HELD, FREE = "window and (causal or block)", "(window and causal) or block"


def written(valid: list[list[bool]], block: list[int], window: int = 0, form: str = FREE) -> torch.Tensor:
    """[B, 1, S, S] bool: columns of one number in `block` see each other (0: none), all others what came before."""
    mask = torch.zeros(len(valid), 1, len(block), len(block), dtype=torch.bool)
    for b, row in enumerate(valid):
        for q in range(len(block)):
            for k in range(len(block)):
                near, together = window == 0 or k > q - window, block[q] > 0 and block[q] == block[k]
                seen = near and (k <= q or together) if form == HELD else (near and k <= q) or together
                mask[b, 0, q, k] = seen and row[q] and row[k]
    return mask


def rebuilt(spans: torch.Tensor, valid: list[list[bool]], window: int, seen: int = 0) -> torch.Tensor:
    """The mask [B, 1, S, S] that spans say in a layer of that window, of real tokens alone."""
    mask = torch.zeros(len(valid), 1, spans.shape[1], spans.shape[1], dtype=torch.bool)
    for b, row in enumerate(valid):
        for q, (first, last) in enumerate(spans[b].tolist()):
            for k in range(spans.shape[1]):
                near = window == 0 or k > q - window or k + seen >= first
                mask[b, 0, q, k] = row[q] and row[k] and near and (k <= q or k + seen <= last)
    return mask


def tensor(valid: list[list[bool]]) -> torch.Tensor:
    return torch.tensor(valid)


WHOLE = [[True] * 9]
PADDED = [[True] * 9, [False] * 2 + [True] * 7]


@pytest.mark.parametrize("window", (0, 3))
@pytest.mark.parametrize("valid", (WHOLE, PADDED))
def test_causal_attention_has_no_spans(valid: list[list[bool]], window: int) -> None:
    mask = written(valid, [0] * 9, window)
    assert read_spans(mask, tensor(valid), 0, {window}) is None
    assert read_spans({"one": mask, "other": mask.float().log()}, tensor(valid), 0, {window}) is None


def test_no_mask_is_causal() -> None:
    assert read_spans(None, tensor(WHOLE), 0, {0}) is None
    assert read_spans(tensor(WHOLE), tensor(WHOLE), 0, {0}) is None  # which slots are padding says nothing more
    assert read_spans({"full_attention": None, "sliding_attention": None}, tensor(WHOLE), 0, {4}) is None


def test_a_prefix_is_one_span() -> None:
    spans = read_spans(written(WHOLE, [1] * 5 + [0] * 4), tensor(WHOLE), 0, {0})
    assert spans is not None
    assert spans[0, :, 1].tolist() == [4, 4, 4, 4, 4, 5, 6, 7, 8]
    assert spans[0, 5:, 0].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("valid", (WHOLE, PADDED))
@pytest.mark.parametrize(
    "block", ([0, 1, 1, 1, 0, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1])
)
def test_blocks(block: list[int], valid: list[list[bool]]) -> None:
    mask = written(valid, block)
    spans = read_spans(mask, tensor(valid), 0, {0})
    assert spans is not None
    assert torch.equal(rebuilt(spans, valid, 0), mask)
    ends = [
        max([k for k, other in enumerate(block) if number and other == number], default=q)
        for q, number in enumerate(block)
    ]
    assert spans[0, :, 1].tolist() == ends


@pytest.mark.parametrize("form", (HELD, FREE))
@pytest.mark.parametrize("valid", (WHOLE, PADDED))
def test_a_window_beside_blocks(valid: list[list[bool]], form: str) -> None:
    """The block of five is longer than the window of three, so that the two forms differ."""
    block = [0, 1, 1, 1, 1, 1, 0, 2, 2]
    narrow, full = written(valid, block, 3, form), written(valid, block)
    assert not torch.equal(narrow, written(valid, block, 3, HELD if form == FREE else FREE))
    for given_mask in (narrow, {"sliding_attention": narrow, "full_attention": full}):
        spans = read_spans(given_mask, tensor(valid), 0, {3})
        assert spans is not None
        assert torch.equal(rebuilt(spans, valid, 3), narrow)
        assert torch.equal(rebuilt(spans, valid, 0), full)
    spans = read_spans({"full_attention": full, "sliding_attention": narrow}, tensor(valid), 0, {0, 3})
    assert spans is not None
    assert torch.equal(rebuilt(spans, valid, 3), narrow)


def test_one_span_over_the_whole_prompt_hides_the_window() -> None:
    """PaliGemma 2: the prompt sees itself in both directions, in layers with a window as well."""
    full = written(WHOLE, [1] * 9)
    spans = read_spans({"full_attention": full, "sliding_attention": full}, tensor(WHOLE), 0, {0, 3})
    assert spans is not None
    assert torch.equal(rebuilt(spans, WHOLE, 3), full)
    assert torch.equal(rebuilt(spans, WHOLE, 0), full)


def test_blocks_in_the_windowed_layers_alone_are_refused() -> None:
    """One set of spans serves all layers: a full layer that is causal beside a windowed one with blocks is another."""
    block = [0, 1, 1, 1, 1, 1, 0, 2, 2]
    masks = {"full_attention": written(WHOLE, [0] * 9), "sliding_attention": written(WHOLE, block, 3)}
    with pytest.raises(ModelError) as caught:
        read_spans(masks, tensor(WHOLE), 0, {3})
    assert caught.value.slug == "not-causal"


@pytest.mark.parametrize("low", (float("-inf"), torch.finfo(torch.float32).min))
def test_float_masks(low: float) -> None:
    mask = written(PADDED, [0, 1, 1, 1, 0, 2, 2, 2, 0])
    floats = torch.zeros(mask.shape).masked_fill(~mask, low)
    spans = read_spans(floats, tensor(PADDED), 0, {0})
    assert spans is not None
    assert torch.equal(spans, read_spans(mask, tensor(PADDED), 0, {0}))


def test_one_mask_for_all_samples() -> None:
    mask = written(WHOLE, [0, 1, 1, 1, 0, 2, 2, 2, 0])
    spans = read_spans(mask, tensor(WHOLE * 2), 0, {0})
    assert spans is not None
    assert torch.equal(rebuilt(spans, WHOLE * 2, 0), mask.expand(2, -1, -1, -1))


@pytest.mark.parametrize("form", (HELD, FREE))
def test_a_later_turn(form: str) -> None:
    """Columns of the cache stand in front of the chunk's; places count on from them."""
    block, seen = [0, 1, 1, 1, 1, 1, 0, 2, 2], 4
    narrow = written(PADDED, block, 3, form)
    cached = torch.ones(2, 1, 9, seen, dtype=torch.bool)
    spans = read_spans(torch.cat([cached, narrow], 3), tensor(PADDED), seen, {3})
    assert spans is not None
    assert torch.equal(rebuilt(spans, PADDED, 3, seen), narrow)
    assert spans[0, :, 1].tolist() == [4, 9, 9, 9, 9, 9, 10, 12, 12]
    assert (spans[..., 0] >= seen).all()


def test_a_mask_of_another_form_is_refused() -> None:
    mask = written(WHOLE, [0] * 9)
    mask[0, 0, 2, 6] = True  # one token ahead, and none in between
    for given_mask in (mask, {"full_attention": mask}, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
        with pytest.raises(ModelError) as caught:
            read_spans(given_mask, tensor(WHOLE), 0, {0, 3})
        assert caught.value.slug == "not-causal"


def test_blocks_of_several_parts_are_refused() -> None:
    """Tokens of one block with others in between: no first and last place say that."""
    with pytest.raises(ModelError) as caught:
        read_spans(written(WHOLE, [1, 1, 0, 0, 1, 1, 0, 0, 0]), tensor(WHOLE), 0, {0})
    assert caught.value.slug == "not-causal"


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[list[bool]], list[int], int, str]:
    """(which slots are real, left-padded; block of each column; window; form)."""
    size = draw(st.integers(2, 14))
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=5)))
    block: list[int] = []
    for number, (start, stop) in enumerate(pairwise([0, *cuts, size]), 1):
        block += [number if draw(st.booleans()) else 0] * (stop - start)
    pads = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3))
    valid = [[False] * pad + [True] * (size - pad) for pad in pads]
    return valid, block, draw(st.integers(0, size + 1)), draw(st.sampled_from((HELD, FREE)))


@given(prompts(), st.integers(0, 3), st.booleans())
def test_what_is_read_says_the_same_mask(
    prompt: tuple[list[list[bool]], list[int], int, str], seen: int, several: bool
) -> None:
    valid, block, window, form = prompt
    narrow, full = written(valid, block, window, form), written(valid, block)
    cached = torch.ones(len(valid), 1, len(block), seen, dtype=torch.bool)
    masks = {"sliding_attention": torch.cat([cached, narrow], 3)}
    if several:
        masks["full_attention"] = torch.cat([cached, full], 3)
    spans = read_spans(masks, tensor(valid), seen, {window})
    if spans is None:
        assert not any(narrow[b, 0, q, q + 1 :].any() for b in range(len(valid)) for q in range(len(block)))
        return
    assert torch.equal(rebuilt(spans, valid, window, seen), narrow)
    if several:
        assert torch.equal(rebuilt(spans, valid, 0, seen), full)
