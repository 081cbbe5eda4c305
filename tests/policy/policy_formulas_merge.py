"""What methods make of the tokens of one picture that they do not keep: their papers' formulas on plain numbers.

Each takes what is given (see preset_given.py), how many tokens stay, and which of the policy's steps it is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
from policy_formulas import Left, Row, Rows, best, cosine, dot, kept, length, mean, softmax, total
from policy_formulas_select import by_two_thresholds, followed

# Pairs ----------------------------------------------------------------------------------------------------------------


def pairs(metric: Rows, removed: int) -> list[tuple[int, int]]:
    """(source, target) of each merge: even tokens into the odd one most like them, the most alike first."""
    sources, targets = range(0, len(metric), 2), range(1, len(metric), 2)
    likes = {a: {b: round(cosine(metric[a], metric[b]), 9) for b in targets} for a in sources}
    partner = {a: max(row, key=lambda b, row=row: (row[b], -b)) for a, row in likes.items() if row}
    first = sorted(partner, key=lambda a: (-likes[a][partner[a]], a))[:removed]
    return [(a, partner[a]) for a in first]


def weighed(g: Any, members: list[int]) -> Row:
    """The mean of tokens that stand for several each."""
    sizes = [g.sizes[v] for v in members]
    return [value / sum(sizes) for value in total([g.x[v] for v in members], sizes)]


def by_key(g: Any, removed: int, stage: int) -> Left:
    """A round of ToMe (TinyChart, AuroraCap) in front of an encoder block, by the block's own keys."""
    merges = pairs(g.keys(f"vision.{stage}")[0].double().tolist(), min(removed, g.tokens // 2))
    gone = {a for a, _ in merges}
    return {v: weighed(g, [v, *(a for a, b in merges if b == v)]) for v in range(g.tokens) if v not in gone}


def halved(g: Any, share: float) -> Left:
    """AIM, at the entry: rounds that merge half of the tokens, and what is left to reach the budget."""
    left: Left = dict(enumerate(g.x))
    rounds = []
    while share < 0.5:
        rounds.append(0.5)
        share *= 2
    for part in [*rounds, share]:
        places, rows = list(left), list(left.values())
        merges = pairs(rows, len(rows) - math.floor(len(rows) * part + 0.5))
        gone = {a for a, _ in merges}
        left = {
            place: mean([rows[i], *(rows[a] for a, b in merges if b == i)])
            for i, place in enumerate(places)
            if i not in gone
        }
    return left


def aim(g: Any, merged: float, stage: int) -> Left:
    """Merging in front, seven ranks at layers 17, 18, 19, 21, 22, 23 and 24 of 32, and in the end nothing."""
    if stage == 0:
        return halved(g, merged)
    if stage == 8:
        return {}
    layer = (16, 17, 18, 20, 21, 22, 23)[stage - 1]
    share = (0.875, 0.858, 0.834, 0.8, 0.75, 0.667, 0.5)[stage - 1]
    return kept(g.x, followed(g, f"language.{layer}", math.floor(g.tokens * share + 1e-9)))


# Neighbours that are taken in -----------------------------------------------------------------------------------------


def prumerge(g: Any, plus: bool, most: int) -> Left:
    """q, k of all heads side by side; five neighbours by the mean key of the heads."""
    query, key = (part[0].transpose(0, 1).flatten(1).double().tolist() for part in g.layer("vision.7"))
    x, near, number = g.x, g.keys("vision.7")[0].double().tolist(), g.tokens
    a = softmax([dot(query[0], k) / math.sqrt(len(k)) for k in key])[1:]
    low, high = numpy.percentile(a, [25, 75])
    outliers = max(1, sum(value > high + 1.5 * (high - low) + 1e-9 for value in a))  # without any, the best one
    chosen = best(a, outliers)
    if plus:
        step = max(1, number // outliers // 3)
        chosen += [i for i in range(0, number - 1, step) if i not in chosen]
    chosen = best(a, most, chosen)
    made = {}
    for i in chosen:
        likes = [round(cosine(near[i], row), 9) for row in near]
        others = best(likes, 5, [j for j in range(number) if j != i])
        made[i] = total([x[i], *(x[j] for j in others)], [1.0, *(a[j] for j in others)])
    dropped = [i for i in range(number) if i not in chosen]
    if dropped:
        made[dropped[-1]] = total([x[j] for j in dropped], [a[j] for j in dropped])
    return made


def outlier_factors(values: Row, neighbours: int) -> Row:
    """The local outlier factor of numbers on a line; one that equals all of its neighbours is no outlier.

    Of neighbours at equal distances the larger numbers come first.
    """
    number = len(values)
    count = min(neighbours, number - 1)
    if count < 1:
        return [1.0] * number
    far = [[abs(a - b) for b in values] for a in values]
    near = [
        sorted((j for j in range(number) if j != i), key=lambda j, i=i: (far[i][j], -values[j]))[:count]
        for i in range(number)
    ]
    reach = [far[i][near[i][-1]] for i in range(number)]
    density = [1 / (sum(max(far[i][j], reach[j]) for j in near[i]) / count + 1e-10) for i in range(number)]
    return [sum(density[j] for j in near[i]) / count / density[i] for i in range(number)]


def outliers(values: Row, neighbours: int) -> int:
    return sum(factor > 1.5 for factor in outlier_factors(values, neighbours))


def recoverable(g: Any, most: int, stage: int) -> Left:
    """Attention outliers, then what suits the text, then some of the rest with their neighbours; six of these."""
    query, key = (part[0].transpose(0, 1).flatten(1).double().tolist() for part in g.layer("vision.7"))
    x, near, n = g.x, g.keys("vision.7")[0].double().tolist(), g.tokens
    a = softmax([dot(query[0], k) / math.sqrt(len(k)) for k in key])[1:]
    words = mean(g.words[0].double().tolist())
    s = [cosine(row, words) for row in x]
    chosen = best(a, outliers(a, 20))
    like = [min(s) if i in chosen else value for i, value in enumerate(s)]
    more = (n - len(chosen)) * outliers(like, 20) // n
    chosen += best(like, more, [i for i in range(n) if i not in chosen])
    chosen = (chosen or best(a, 1))[:most]
    rest = [i for i in range(n) if i not in chosen]
    made = kept(x, chosen)
    if not rest:
        return made
    centres = best(a, len(chosen) * outliers([a[i] for i in rest], 10) // len(rest), rest)
    for c in centres:
        value = [round(cosine(near[c], near[i]) + 1.8 * s[i], 9) for i in range(n)]
        taken = best(value, 6, [i for i in rest if i != c])
        made[c] = total([x[c], *(x[i] for i in taken)], [1.0, *(a[i] for i in taken)])
    left = [i for i in rest if i not in centres]
    if centres and left:
        made[left[-1]] = total([x[i] for i in left], [a[i] for i in left])
    return made


# Targets and folds ----------------------------------------------------------------------------------------------------


def around_targets(x: Rows, keys: Rows, score: Row, dominant: int, contextual: int) -> Left:
    """The best-scored, and every step-th of the others with the mean of what is nearest to it added."""
    made = kept(x, best(score, dominant))
    others = [i for i in range(len(x)) if i not in made]
    targets = others[:: max(1, len(others) // contextual)][:contextual] if contextual else []
    near = {
        i: max(targets, key=lambda t, i=i: (round(cosine(keys[i], keys[t]), 9), -t)) for i in others if i not in targets
    } if targets else {}  # fmt: skip
    for t in targets:
        members = [x[i] for i in near if near[i] == t]
        made[t] = total([x[t], *([mean(members)] if members else [])])
    return made


def visionzip(g: Any, keep: int, stage: int) -> Left:
    """Scores and keys of the second-last of nine blocks; four contextual tokens."""
    return around_targets(g.x, g.keys("vision.7")[0].double().tolist(), g.of_class("vision.7"), keep, 4)


def visiondrop(g: Any, keep: int, stage: int) -> Left:
    """The same again at three depths of 32, by what visual tokens pay each other."""
    if stage == 0:
        return visionzip(g, keep, stage)
    layer = f"language.{8 * stage}"
    score = [float(f"{value:.6g}") for value in g.received(layer, g.visual)]
    return around_targets(g.x, g.keys(layer)[0].double().tolist(), score, keep, 4)


def folded(g: Any, keep: int, stage: int) -> Left:
    """iLLaVA: the worst become one with the worst that stays; the worse, the heavier: ..., 3, 2, 1.

    Stages 0 and 1 are blocks 2 and 3 of nine, 25% to 36%, by the layers in front of them; the last is layer 9 of 32.
    """
    score = g.of_all(f"vision.{stage + 1}") if stage < 2 else g.received("language.8", [g.length - 1])
    x, order = g.x, best([float(f"{value:.6g}") for value in score], g.tokens)
    made, tail = kept(x, order[:keep]), order[keep - 1 :]
    weights = [float(1 + i) for i in range(len(tail))]
    return made | {tail[0]: [value / sum(weights) for value in total([x[i] for i in tail], weights)]}


def flowing(g: Any, keep: int, stage: int) -> Left:
    """VFlowOpt: what the tokens attend to that receive more than 1.2 times the mean; 3 x 3 cells of what goes, once."""
    heads, n = g.paid("vision.7", list(range(g.tokens + 1))), g.tokens
    score = _of_global([mean([head[row] for head in heads]) for row in range(n + 1)])[1:]
    chosen = best([float(f"{value:.6g}") for value in score], keep)
    if stage:
        return kept(g.x, chosen)
    made, cells = kept(g.x, chosen), {}
    for i in range(n):
        if i not in chosen:
            cell = (i // g.columns * 3 // g.rows, i % g.columns * 3 // g.columns)
            cells.setdefault(cell, []).append(i)
    for members in cells.values():
        weights = [score[i] / sum(score[j] for j in members) for i in members]
        made[best([round(value, 9) for value in score], 1, members)[0]] = total([g.x[i] for i in members], weights)
    return made


def _of_global(paid: Rows) -> Row:
    mass = mean(paid)
    rows = [n for n, value in enumerate(mass) if value > 1.2 * sum(mass) / len(mass)]
    return mean([paid[n] for n in rows or [mass.index(max(mass))]])


# Clusters -------------------------------------------------------------------------------------------------------------


def peaks(x: Rows, pool: list[int], number: int, around: int) -> dict[int, list[int]]:
    """Density peaks: each centre with what is nearest to it; of equally dense tokens the first is denser."""
    apart = {(v, w): math.dist(x[v], x[w]) / math.sqrt(len(x[v])) for v in pool for w in pool}
    dense = {v: round(math.exp(-mean_of(sorted(apart[v, w] ** 2 for w in pool)[:around])), 6) for v in pool}
    widest = max(apart.values())
    lead = {}
    for v in pool:
        denser = [apart[v, w] for w in pool if (dense[w], -w) > (dense[v], -v)]
        lead[v] = min(denser, default=widest)
    worth = {v: round(lead[v] * dense[v], 9) for v in pool}
    order = sorted(pool, key=lambda v: (-worth[v], v))
    # Copies behind the first have no lead; other ties would be settled by what rounding makes of the products.
    assert number >= len(pool) or worth[order[number - 1]] - worth[order[number]] > 1e-6 or not worth[order[number]]
    centres = order[:number]
    groups = {c: [c] for c in centres}
    for v in pool:
        if v not in groups:
            groups[min(sorted(centres), key=lambda c, v=v: round(apart[v, c], 9))].append(v)
    return groups


def mean_of(values: Row) -> float:
    return sum(values) / len(values)


def rated(g: Any, keep: int, stage: int) -> Left:
    """SparseVLM: what the words ask of which the picture reminds; clusters of the best third of the rest."""
    layer, x = ("language.2", "language.6", "language.15")[stage], g.x
    words = g.words[0].double().tolist()[g.visual[0] :]
    means = mean([softmax([dot(row, word) for word in words]) for row in x])
    raters = [slot for slot, value in zip(g.behind, means, strict=True) if value > mean_of(means) + 1e-9]
    score = g.received(layer, raters or g.behind)
    chosen = best(score, keep)
    rest = best(score, g.tokens, [v for v in range(g.tokens) if v not in chosen])
    made = kept(x, chosen)
    if rest:
        pool = sorted(rest[: len(rest) * 3 // 10 + 1])
        number = len(pool) // 10 + 1
        made |= {c: mean([x[i] for i in group]) for c, group in peaks(x, pool, number, number).items()}
    return made


def pact(g: Any, keep: int, cutoff: float) -> Left:
    """By the mean query and a token's length; of the best those apart by a cutoff; others join within 1.5 times it."""
    layer, x, n = "language.4", g.x, g.tokens
    query, key = (part[0].double().tolist() for part in g.layer(layer))
    score = [0.0] * n
    for head, rows in enumerate(query):
        middle = mean(rows[: g.visual[-1] + 1])
        shares = softmax([dot(middle, key[head * len(key) // len(query)][slot]) / 2 for slot in g.visual])
        score = [one + share * length(row) for one, share, row in zip(score, shares, x, strict=True)]
    keys = g.keys(layer, joined=True)[0].double().tolist()
    apart = [[max(0.0, 1 - cosine(a, b)) for b in keys] for a in keys]
    pool = best([float(f"{value:.6g}") for value in score], keep)
    dense = [round(sum(math.exp(-((apart[i][j] / 2) ** 2)) for j in pool), 4) for i in range(n)]
    centres: list[int] = []
    for i in best(dense, keep, pool):
        if all(apart[i][c] > cutoff for c in centres):
            centres.append(i)
    groups = {c: [c] for c in centres}
    for i in range(n):
        home = min(sorted(centres), key=lambda c, i=i: round(apart[i][c], 6))
        if i not in groups and apart[i][home] <= 1.5 * cutoff:
            groups[home].append(i)
    return {c: mean([x[i] for i in group]) for c, group in groups.items()}


# Windows --------------------------------------------------------------------------------------------------------------


def windows(g: Any, side: int, above: float) -> Left:
    """Whole windows side by side whose pairs are alike, each as its mean in the place of its middle token."""
    x, wide = g.x, g.columns
    made = dict(enumerate(x))
    for top in range(0, g.tokens // wide - side + 1, side):
        for start in range(0, wide - side + 1, side):
            cells = [(top + r) * wide + start + c for r in range(side) for c in range(side)]
            alike = [cosine(x[i], x[j]) for i in cells for j in cells if i != j]
            if mean_of(alike) >= above - 1e-9:
                for cell in cells:
                    del made[cell]
                made[cells[side * side // 2]] = weighed(g, cells)
    return made


def mustdrop(g: Any, stage: int, alike: float, guarded: int, share: float, least: float) -> Left:
    """Like windows of 3 x 3 at the entry; then two thresholds, at 10%, 22%, 35% and 47% of 32 layers."""
    if stage == 0:
        return windows(g, 3, alike)
    return kept(g.x, by_two_thresholds(g, f"language.{(2, 6, 10, 14)[stage - 1]}", guarded, share, least))


def pooled_frames(g: Any, near: int, far: int, group: int, frames: int) -> Left:
    """Windows of `near` tokens a side in the first of each group of frames, else of `far`, over `frames` frames."""
    cells: dict[tuple[int, ...], list[int]] = {}
    for v in range(g.tokens):
        opening = v // g.places // frames * frames
        side = near if opening % group == 0 else far
        place = v % g.places
        cells.setdefault((opening, place // g.columns // side, place % g.columns // side), []).append(v)
    return {members[0]: weighed(g, members) for members in cells.values()}
