"""The presets that act between decoder layers: published counts, and each step against its formula in plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from policy_cases import layout, policy, step

from tvc.errors import SiteError
from tvc.kernels.op import Attention, Scope
from tvc.kernels.rest_cluster import Cluster
from tvc.kernels.select_pivots import Pivots
from tvc.kernels.text_raters import text_raters
from tvc.kernels.when_cross_attention import CrossAttention
from tvc.passes.reduction import decide
from tvc.passes.taps import rater_mask, raters_among
from tvc.policy import Step, load_policy, resolve
from tvc.policy.budgets import leaving

VISUAL, TEXT, WIDTH, HEADS, GROUPS, HEAD = 40, 9, 6, 4, 2, 5
FRONT = 3  # text tokens in front of the image
LENGTH = VISUAL + TEXT


def steps(name: str, *settings: str, language: int = 32, visual: tuple[int, ...] = (576,)) -> tuple[Step, ...]:
    return resolve(load_policy(name, set=settings), layout(language=language, visual=visual)).steps


def left(name: str, *settings: str, language: int = 32, visual: tuple[int, ...] = (576,)) -> list[list[int]]:
    model = layout(language=language, visual=visual)
    return [after for _, _, after in leaving(resolve(load_policy(name, set=settings), model).steps, model)]


class Prompt:
    """Random values of one prompt: text, an image, more text."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden, self.entry = draw(1, LENGTH, WIDTH), draw(1, LENGTH, WIDTH)
        self.query, self.key = draw(1, HEADS, LENGTH, HEAD), draw(1, GROUPS, LENGTH, HEAD)
        self.mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
        self.visual = torch.arange(FRONT, FRONT + VISUAL)[None]
        self.text = torch.cat([torch.arange(FRONT), torch.arange(FRONT + VISUAL, LENGTH)])[None]
        self.segment, self.counts = torch.zeros_like(self.visual), torch.tensor([[VISUAL]])
        self.feature = self.hidden[:, self.visual[0]]
        self.size = torch.ones(1, VISUAL)

    def attention(self, rows: torch.Tensor) -> Attention:
        return Attention(self.query, self.key, self.mask, rows, self.visual[:, :, None], HEAD**-0.5)

    def paid(self, head: int, row: int, temperature: float = 1.0) -> list[float]:
        """What a row pays to every token, by hand."""
        keys = self.key[0, head * GROUPS // HEADS].double()
        logits = (keys[: row + 1] @ self.query[0, head, row].double() * HEAD**-0.5 / temperature).tolist()
        powers = [math.exp(x - max(logits)) for x in logits]
        return [power / sum(powers) for power in powers] + [0.0] * (LENGTH - row - 1)

    def received(self, rows: list[int]) -> list[float]:
        """Mean over heads and rows of what each visual token gets."""
        paid = [self.paid(head, row) for head in range(HEADS) for row in rows]
        return [sum(row[v] for row in paid) / len(paid) for v in self.visual[0].tolist()]

    def decided(self, one: Step, scores: list[Any], taps: dict[str, Any] | None = None) -> Any:
        return decide(one, self.feature, self.size, self.segment, self.counts, scores, taps or {})


def best(score: list[float], number: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda v: (-score[v], v))[:number])


# DART -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "each"), [(188, 23), (124, 15), (60, 7)])
def test_dart_keeps_the_published_number_of_tokens(count: int, each: int) -> None:
    assert left("dart", f"keep={count}") == [[4 + 8 * each]] == [[count]]
    (only,) = steps("dart")
    assert (only.at, only.select.model_dump()["layer"]) == ("language.2", "language.1")  # type: ignore[union-attr]


def _dart(prompt: Prompt, keep: int, visual: int, text: int) -> list[int]:
    norms = [float(prompt.key[0, :, token].double().abs().sum()) for token in range(LENGTH)]
    image, behind = prompt.visual[0].tolist(), list(range(FRONT + VISUAL, LENGTH))
    own = sorted(image, key=lambda token: -norms[token])[:visual]
    pivots = own + sorted(behind, key=lambda token: -norms[token])[:text]
    rows, kept = prompt.hidden[0].double(), list(own)
    for turn, pivot in enumerate(pivots):
        free = [token for token in image if token not in kept]
        cosine = {t: float(torch.cosine_similarity(rows[t], rows[pivot], dim=0)) for t in free}
        kept += sorted(free, key=lambda t: cosine[t])[: math.ceil((keep - len(kept)) / (len(pivots) - turn))]
    return sorted(token - FRONT for token in kept)


@pytest.mark.parametrize(("seed", "keep"), [(0, 20), (1, 13), (2, 4), (3, 3), (4, 40), (5, 1)])
def test_dart_keeps_pivots_and_what_is_least_like_them(seed: int, keep: int) -> None:
    prompt = Prompt(seed)
    (only,) = steps("dart", f"keep={keep}", visual=(VISUAL,))
    taps = {
        "feature": prompt.feature,
        "words": (prompt.hidden[:, prompt.text[0]], prompt.text >= 0),
        "attention": prompt.attention(prompt.text),
    }
    chosen = prompt.decided(only, [], {"select": taps}).chosen
    assert chosen[0][chosen[0] >= 0].tolist() == _dart(prompt, keep, min(4, keep), 4)


def test_dart_has_no_text_pivot_where_there_is_no_text() -> None:
    prompt = Prompt(0)
    nothing = torch.full((1, 2), -1)
    words = (torch.zeros(1, 2, WIDTH), nothing >= 0)
    pivots = Pivots.model_validate({"keep": 12})
    scope = Scope(prompt.segment, prompt.counts, 1)
    chosen = pivots.apply(None, scope, prompt.feature, words, prompt.attention(nothing))
    assert chosen[0].tolist() == _dart(prompt, 12, 4, 0)


# SparseVLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "sizes"),
    [
        ((), (309, 204, 113)),
        ((52.7, 35.3, 30.8), (312, 117, 39)),
        ((41.4, 19.3, 47.3), (249, 55, 27)),
        ((11.5, 36.6, 53.2), (82, 32, 18)),
    ],
)
def test_sparsevlm_leaves_the_published_number_of_tokens(shares: tuple[float, ...], sizes: tuple[int, ...]) -> None:
    names = ("keep", "keep_second", "keep_third")
    settings = [f"{name}={share}%" for name, share in zip(names, shares, strict=False)]
    assert left("sparsevlm", *settings) == [[size] for size in sizes]
    assert [one.at for one in steps("sparsevlm")] == ["language.3", "language.7", "language.16"]


def _raters(prompt: Prompt) -> list[int]:
    entry, behind = prompt.entry[0].double(), list(range(FRONT + VISUAL, LENGTH))
    means = [0.0] * len(behind)
    for v in prompt.visual[0].tolist():
        logits = [float(entry[v] @ entry[t]) for t in behind]
        powers = [math.exp(x - max(logits)) for x in logits]
        means = [mean + power / sum(powers) / VISUAL for mean, power in zip(means, powers, strict=True)]
    return [t for t, mean in zip(behind, means, strict=True) if mean > sum(means) / len(means)]


def _clusters(rows: torch.Tensor, pool: list[int]) -> dict[int, list[int]]:
    number = len(pool) // 10 + 1
    distance = {(v, w): float((rows[v] - rows[w]).norm()) / math.sqrt(WIDTH) for v in pool for w in pool}
    density = {}
    for v in pool:
        near = sorted(distance[v, w] ** 2 for w in pool)[:number]
        density[v] = math.exp(-sum(near) / number)
    gamma = {}
    for v in pool:
        denser = [distance[v, w] for w in pool if density[w] > density[v]]
        gamma[v] = (min(denser) if denser else max(distance.values())) * density[v]
    centres = sorted(pool, key=lambda v: -gamma[v])[:number]
    groups: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for v in pool:
        if v not in groups:
            groups[min(centres, key=lambda c, v=v: distance[v, c])].append(v)
    return groups


# With 13 of 40 kept the pool holds 9 tokens and has one centre; with a larger share of the rest it has three.
@pytest.mark.parametrize(("seed", "pool"), [(0, 300), (1, 300), (2, 800), (3, 1000)])
def test_sparsevlm_keeps_what_raters_attend_to_and_clusters_the_best_of_the_rest(seed: int, pool: int) -> None:
    prompt = Prompt(seed)
    mask = rater_mask(prompt.entry, prompt.visual, prompt.text)
    rows = raters_among(prompt.text, mask)
    raters = _raters(prompt)
    assert rows[rows >= 0].tolist() == raters
    share = f"steps.0.rest.cluster.pool={pool // 10}%"
    first = steps("sparsevlm", "keep=34%", share, visual=(VISUAL,))[0]
    decision = prompt.decided(first, [{"attention": prompt.attention(rows)}])

    score = prompt.received(raters)
    kept = best(score, 13)
    order = [v for v in sorted(range(VISUAL), key=lambda v: -score[v]) if v not in kept]
    features = prompt.feature[0].double()
    groups = _clusters(features, sorted(order[: min(27, 27 * pool // 1000 + 1)]))
    real = decision.chosen[0] >= 0
    assert decision.chosen[0][real].tolist() == sorted([*kept, *groups])
    for place, v in enumerate(decision.chosen[0].tolist()):
        if v >= 0:
            want = features[groups.get(v, [v])].mean(0).float()
            torch.testing.assert_close(decision.feature[0, place], want, rtol=1e-5, atol=1e-6)
            assert decision.size[0, place] == len(groups.get(v, [v]))


def test_all_text_rates_where_none_stands_out() -> None:
    visual, seen = torch.randn(1, 5, WIDTH), torch.ones(1, 5, dtype=torch.bool)
    for words in (1, 3):
        asked = torch.ones(1, words, dtype=torch.bool)
        assert text_raters.overload(visual, seen, torch.ones(1, words, WIDTH), asked).all()


def test_text_in_front_rates_where_none_stands_behind() -> None:
    hidden = torch.randn(1, 8, WIDTH)
    mask = rater_mask(hidden, torch.arange(3, 8)[None], torch.tensor([[-1, 0, 1, 2]]))
    assert mask[0, 1:].any()
    assert not mask[0, 0]


def test_a_pool_is_a_share() -> None:
    assert Cluster().kept([576], [300]) == [309]
    with pytest.raises(ValueError, match="share such as"):
        Cluster.model_validate({"pool": 12})


# TransPrune -----------------------------------------------------------------------------------------------------------


def test_transprune_leaves_the_published_number_of_tokens_behind_the_published_layers() -> None:
    assert left("transprune") == [[504], [360], [72]]
    acting = steps("transprune")
    assert [one.at for one in acting] == ["language.7", "language.9", "language.12"]
    layers = [[tap.layer for tap in one.score[0].primitive.taps().values()] for one in acting]
    assert layers == [[f"language.{k}" for k in range(6, last)] for last in (7, 9, 12)]
    assert [one.score[1].primitive.model_dump()["layer"] for one in acting] == [one.at for one in acting]


def test_transprune_adds_what_layers_change_and_what_the_text_attends_to() -> None:
    prompt = Prompt(6)
    second = steps("transprune", "keep_second=50%", visual=(VISUAL,))[1]
    names = list(second.score[0].primitive.taps())
    assert len(names) == 3
    sums = [torch.rand(1, VISUAL) for _ in names]
    taps = [dict(zip(names, sums, strict=True)), {"attention": prompt.attention(prompt.text)}]
    chosen = prompt.decided(second, taps).chosen[0].tolist()
    change = [sum(float(part[0, v]) for part in sums) for v in range(VISUAL)]
    # Text in front of the image cannot attend to it.
    paid = prompt.received(list(range(FRONT + VISUAL, LENGTH)))
    score = [c / sum(change) + p / sum(paid) for c, p in zip(change, paid, strict=True)]
    assert chosen == best(score, VISUAL // 2)


@pytest.mark.parametrize(
    ("at", "settings", "slug"),
    [
        ("language.0", "{}", "no-layer"),
        ("language.3", "{since: language.5}", "no-layer"),
        ("language.3", "{since: language.0}", "no-layer"),
        ("language.3", "{layer: self}", "later-layer"),
        ("language.3", "{layer: language.3}", "later-layer"),
        ("vision.3", "{}", "no-layer"),
    ],
)
def test_transitions_of_layers_that_have_not_run_are_refused(at: str, settings: str, slug: str) -> None:
    text = policy(step(at, f"score: {{transition: {settings}}}\n    select: {{top: 50%}}"))
    with pytest.raises(SiteError, match=slug):
        resolve(load_policy(text), layout())


# AIM ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [8, 28, 32, 64])
def test_aim_keeps_ever_fewer_tokens_and_in_the_end_none(frames: int) -> None:
    counts = left("aim", language=28, visual=(196,) * frames)
    assert counts[0] == [49] * frames
    # The layer in front of each cut ranks: its share is 1 until layer 13 and falls by an eighth a layer.
    published = [int(49 * frames * max(0.0, 1 - (layer - 13) / 8)) for layer in range(14, 22)]
    short = [number - sum(after) for number, after in zip(published, counts[1:], strict=True)]
    assert set(short) == ({0} if frames % 8 == 0 else {0, 1, 2})
    assert [one.at for one in steps("aim", language=28)[1:]] == [f"language.{k}" for k in range(15, 23)]


@pytest.mark.parametrize(("at", "layer"), [("language.2", "vision.2"), ("vision.2", "previous")])
def test_attention_is_not_followed_in_the_encoder(at: str, layer: str) -> None:
    text = policy(step(at, f"score: {{pagerank: {{layer: {layer}}}}}\n    select: {{top: 50%}}"))
    with pytest.raises(SiteError, match="decoder-only"):
        resolve(load_policy(text), layout())


def test_aim_follows_attention_for_five_steps() -> None:
    prompt = Prompt(7)
    one = steps("aim", language=28, visual=(VISUAL,))[1]
    rows = torch.arange(LENGTH)[None]
    score = one.score[0].primitive.apply(attention=prompt.attention(rows))
    squares = [0.0] * LENGTH
    for head in range(HEADS):
        moves = [prompt.paid(head, row, temperature=0.1) for row in range(LENGTH)]
        chance = [1 / LENGTH] * LENGTH
        for _ in range(5):
            chance = [sum(chance[i] * moves[i][j] for i in range(LENGTH)) for j in range(LENGTH)]
        squares = [total + end**2 / HEADS for total, end in zip(squares, chance, strict=True)]
    want = torch.tensor([math.sqrt(squares[v]) for v in prompt.visual[0].tolist()])
    torch.testing.assert_close(score[0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("language", [*range(24, 81), 22])
def test_aim_has_a_layer_for_each_of_its_ranks_in_any_decoder_deep_enough(language: int) -> None:
    sites = [one.site.index for one in steps("aim", language=language)]
    assert sites[0] == 0
    assert sites == sorted(set(sites))
    assert len(sites) == 9


# FastV and PyramidDrop: what the last query pays ----------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["1", "25%", "50%", "100%"])
@pytest.mark.parametrize(("name", "stage"), [("fastv", 0), ("pyramiddrop", 0), ("pyramiddrop", 1), ("pyramiddrop", 2)])
def test_the_last_query_decides(name: str, stage: int, keep: str) -> None:
    prompt, one = Prompt(stage), steps(name, f"keep={keep}")[stage]
    (term,) = one.score
    # FastV asks the layer in front of its cut, PyramidDrop the layer behind it.
    assert (one.at, term.primitive.layer) == {
        "fastv": [("language.2", "language.1")],
        "pyramiddrop": [("language.8", "language.8"), ("language.16", "language.16"), ("language.24", "language.24")],
    }[name][stage]
    number = 1 if keep == "1" else math.floor(VISUAL * float(keep[:-1]) / 100)
    chosen = prompt.decided(one, [{"attention": prompt.attention(torch.tensor([[LENGTH - 1]]))}]).chosen
    assert [v for v in chosen[0].tolist() if v >= 0] == best(prompt.received([LENGTH - 1]), number)


def test_of_tokens_that_the_last_query_pays_the_same_the_first_stay() -> None:
    prompt, (one,) = Prompt(0), steps("fastv", "keep=3")
    prompt.key = torch.ones_like(prompt.key)
    chosen = prompt.decided(one, [{"attention": prompt.attention(torch.tensor([[LENGTH - 1]]))}]).chosen
    assert chosen[0].tolist()[-3:] == [0, 1, 2]


# ToDRE, stage 2 -------------------------------------------------------------------------------------------------------


def test_todre_leaves_at_seven_eighths_of_the_depth() -> None:
    for layers, site in ((32, 28), (40, 35), (28, 24), (24, 21)):
        (only,) = steps("todre-exit", language=layers)
        assert only.at == f"language.{site}"
        assert only.exit is not None
        assert only.exit.gate.model_dump() == {"below": 0.1, "layer": f"language.{site - 1}"}


@pytest.mark.parametrize("seed", range(3))
def test_todre_leaves_where_text_and_image_attend_little_to_each_other(seed: int) -> None:
    prompt = Prompt(seed)
    image, text = prompt.visual[0].tolist(), prompt.text[0].tolist()
    shares = {}
    for rows, columns in ((text, image), (image, text)):
        paid = [prompt.paid(head, row) for head in range(HEADS) for row in rows]
        shares[len(rows)] = sum(row[column] for row in paid for column in columns) / len(paid)
    bars = tuple(shares.values())
    scope = Scope(prompt.segment, prompt.counts, 1)
    taps = {"of_text": prompt.attention(prompt.text), "of_visual": prompt.attention(prompt.visual)}
    for below, leaves in ((max(bars) + 0.01, True), (max(bars) - 0.01, False), (min(bars) - 0.01, False)):
        assert CrossAttention(below=below).apply(None, scope, **taps).tolist() == [leaves]


def test_no_visual_token_leaves_a_sample_that_has_none() -> None:
    prompt = Prompt(0)
    columns = torch.zeros(1, 0, 1, dtype=torch.int64)
    taps = {name: prompt.attention(prompt.text)._replace(columns=columns) for name in ("of_text", "of_visual")}
    empty = Scope(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), 0)
    assert CrossAttention(below=1.0).apply(None, empty, **taps).tolist() == [False]
