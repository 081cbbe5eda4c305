"""Presets that say something of all decoder layers, in the place of steps: positions, masks, caches, rotary embeddings.

What a compiled decoder calls for them is called here, with what the preset resolves to, and compared with the formulas.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from policy_cases import layout
from policy_formulas import Row, Rows, best, cosine, dot, mean, softmax
from preset_given import BEHIND, FRONT, GROUPS, HEAD, HEADS, KINDS, SCALE, Given
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tvc.kernels.attention_mask import attention_mask
from tvc.kernels.pool_cache import pool_cache, pool_entries, whole_chunks
from tvc.kernels.unrotated_attention import unrotated_attention, unrotated_keys
from tvc.passes.chunk_attention import chunk_of_slots
from tvc.passes.pool_caches import relevance
from tvc.passes.unrotate_keys import raw_pairs
from tvc.policy import load_policy, resolve
from tvc.policy.options import Chunks, Pool, Unrotated
from tvc.policy.positions import Rescale, stride_of
from tvc.runtime.positions import in_strides
from tvc.trace.frequencies import rescaled

GRIDS = {"odd": (1, 5, 7), "one": (1, 1, 1)}
FILMS = {"formula": (11, 2, 3), "odd": (9, 1, 5), "one": (1, 1, 1)}


def policy_of(name: str, *settings: str) -> Any:
    return resolve(load_policy(name, set=list(settings)), layout(language=4))


def given(kind: str, grids: dict[str, Any], plain: tuple[int, int, int]) -> Given:
    return Given(kind, grids.get(kind, plain), seed=0, numbers={})


# V2PE -----------------------------------------------------------------------------------------------------------------


def numbered(shows: list[int], stride: int) -> Row:
    """The image of each token, -1 for text: text is at the next whole number, an image's tokens at fractions."""
    made: Row = []
    front, inside, last = 0.0, 0, -1.0
    for own, before in zip(shows, [-1, *shows], strict=False):
        if own < 0:
            last = math.ceil(last) + 1.0
        else:
            front, inside = (front, inside + 1) if own == before else (float(math.ceil(last)), 1)
            last = front + inside * stride / 256
        made.append(last)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_v2pe_numbers_visual_tokens_in_fractions(kind: str) -> None:
    """Two images with words around each; a stride of 256 is a whole position for each token."""
    g, stride = given(kind, GRIDS, (1, 4, 6)), {"all": 256, "odd": 3}.get(kind, 64)
    policy = policy_of("v2pe") if stride == 64 else policy_of("v2pe", f"stride={stride}")
    shows = [*[-1] * FRONT, *[0] * g.tokens, *[-1] * BEHIND, *[1] * 3, -1]
    segment = torch.tensor([shows])
    whole = torch.arange(len(shows))[None]
    positions, saved = in_strides(whole, segment >= 0, segment, stride_of(policy.positions), torch.zeros(1).long())
    want = numbered(shows, stride)
    assert positions[0].tolist() == want
    assert int(saved) == len(shows) - 1 - want[-1]
    assert (want == whole[0].tolist()) == (kind == "all")


# Video-XL-2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_video_xl_2_sees_the_chunks_right_before(kind: str) -> None:
    """Chunks of four frames see three before them (here one, as films are short; `all`: as many as there are)."""
    previous = {"all": 99, "formula": 1}.get(kind, 0)
    g, rule = given(kind, FILMS, (9, 2, 2)), policy_of("video-xl-2", f"previous={previous}").attention
    assert isinstance(rule, Chunks)
    assert policy_of("video-xl-2").attention == Chunks(frames=4, previous=3)
    places, slots = torch.arange(g.length)[None], torch.tensor([g.visual])
    chunks = chunk_of_slots(g.frames_of_tokens(), slots, places, rule.frames)
    seen = attention_mask.overload(places, places, 0, None, chunks, rule.previous)[0, 0]
    chunk = {slot: v // g.places // 4 for v, slot in enumerate(g.visual)}
    want = [
        [
            key <= query and not (query in chunk and key in chunk and chunk[query] - chunk[key] > previous)
            for key in range(g.length)
        ]
        for query in range(g.length)
    ]
    assert seen.tolist() == want
    assert (seen == torch.ones_like(seen).tril()).all() == (kind in ("all", "one"))


@pytest.mark.parametrize("kind", KINDS)
def test_video_xl_2_keeps_the_best_chunks_and_means_of_the_others(kind: str) -> None:
    """The first and the last chunk and the one most like the words behind them stay; of others four tokens are one."""
    number = 99 if kind == "all" else 1
    g, rule = given(kind, FILMS, (11, 2, 3)), policy_of("video-xl-2", "chunk=2", f"best={number}").cache
    assert isinstance(rule, Pool)
    assert policy_of("video-xl-2").cache == Pool(tokens=4, chunk=4, first=1, last=1, best=4)
    hidden = torch.cat([g.words[:, :FRONT], g.feature, g.words[:, FRONT:]], 1)
    places, slots, frame = torch.arange(g.length)[None], torch.tensor([g.visual]), g.frames_of_tokens()[0]
    score = relevance(hidden, slots, torch.tensor([g.text]))
    whole = whole_chunks.overload(frame, score, rule.chunk, rule.first, rule.last, rule.best)
    entry, kept = pool_entries.overload(places, slots, frame, whole, rule.tokens)
    _, key = g.layer("language.1")
    got = pool_cache.overload(key, entry, kept)

    words, number_of_chunks = mean(g.words[0].double().tolist()[FRONT:]), -(-g.frames // 2)
    likes = [
        [cosine(row, words) for v, row in enumerate(g.x) if v // g.places // 2 == c] for c in range(number_of_chunks)
    ]
    worth = [round(sum(own) / len(own), 6) for own in likes]
    stays = {0, number_of_chunks - 1, *best(worth, number)}
    entries: list[list[int]] = []
    for slot in range(g.length):
        v = slot - FRONT
        inside = 0 <= v < g.tokens and v // g.places // 2 not in stays and v % g.places % 4 != 0
        if inside:
            entries[-1].append(slot)
        else:
            entries.append([slot])
    assert kept[0].tolist() == [members[0] for members in entries]
    rows = [[mean([head[slot] for slot in members]) for members in entries] for head in key[0].double().tolist()]
    torch.testing.assert_close(got[0].double(), torch.tensor(rows, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert (len(entries) == g.length) == (kind in ("all", "one"))


# Vista-LLaMA ----------------------------------------------------------------------------------------------------------


def turned(row: Row, place: int) -> Row:
    """Pairs of numbers, half a row apart, turned by a place."""
    half, made = len(row) // 2, list(row)
    for i in range(half):
        angle = place / 10000 ** (i / half)
        one, other = row[i], row[i + half]
        made[i], made[i + half] = (
            one * math.cos(angle) - other * math.sin(angle),
            other * math.cos(angle) + one * math.sin(angle),
        )
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_vista_lets_text_read_visual_tokens_unturned(kind: str) -> None:
    g, rule = given(kind, GRIDS, (1, 3, 4)), policy_of("vista-unrotated").attention
    assert rule == Unrotated(keys="visual")
    raw = [part[0].double().tolist() for part in g.layer("language.1")]
    value = g.drawn("value", 1, GROUPS, g.length, HEAD)
    rotated = [[[turned(row, place) for place, row in enumerate(head)] for head in part] for part in raw]
    query, key = (torch.tensor(part)[None] for part in rotated)
    slots, places = torch.tensor([g.visual]), torch.arange(g.length)[None]
    shown = torch.tensor([[slot in g.visual for slot in range(g.length)]])
    mask = torch.ones(g.length, g.length, dtype=torch.bool).tril()[None, None]
    cached = unrotated_keys.overload(key, g.layer("language.1")[1], slots)
    pairs = raw_pairs(shown, slots, places)
    raw_query = g.layer("language.1")[0]
    got = unrotated_attention.overload(query, key, value, mask, raw_query, cached, pairs, SCALE, 0.0)

    for head in range(HEADS):
        group = head * GROUPS // HEADS
        rows: Rows = value[0, group].double().tolist()
        for q in range(g.length):
            logits = []
            for k in range(q + 1):
                kind_of = raw if k in g.visual and q not in g.visual else rotated
                logits.append(dot(kind_of[0][head][q], kind_of[1][group][k]) * SCALE)
            shares = softmax(logits)
            want = [dot(shares, list(column)) for column in zip(*rows[: q + 1], strict=True)]
            torch.testing.assert_close(got[0, head, q], torch.tensor(want), rtol=1e-4, atol=1e-5)


# Visual context window ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "window"), [(16, 512), (32, 64), (20, 4096)])
def test_the_visual_context_window_stretches_slow_frequencies(width: int, window: int) -> None:
    """YaRN: frequencies that turn 32 times or more in the window stay, those that turn once or less are divided."""
    rule = policy_of("visual-context-window").positions
    assert isinstance(rule, Rescale)
    config = transformers.LlamaConfig(
        hidden_size=width, num_attention_heads=1, max_position_embeddings=window, rope_theta=10000.0
    )
    decoder = torch.nn.Module()
    decoder.rotary = LlamaRotaryEmbedding(config)
    before = decoder.rotary.inv_freq.clone()

    def place(turns: float) -> float:
        """The number of the frequency that turns so often."""
        return width * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(10000))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), width - 1)
    want = []
    for i in range(width // 2):
        frequency, ramp = 10000 ** (-2 * i / width), min(1.0, max(0.0, (i - low) / (high - low)))
        want.append(frequency / 4 * ramp + frequency * (1 - ramp))
    with rescaled(decoder, rule.factor, rule.window, rule.fast, rule.slow):
        torch.testing.assert_close(decoder.rotary.inv_freq, torch.tensor(want), rtol=1e-5, atol=0)
        assert decoder.rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert torch.equal(decoder.rotary.inv_freq, before)
