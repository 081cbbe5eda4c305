"""What methods keep of one picture and drop the rest: their papers' formulas on plain Python numbers.

Each takes what is given (see preset_given.py), how many tokens stay, and which of the policy's steps it is.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from policy_formulas import Left, Rows, best, cosine, dot, first, kept, length, mean, softmax, spaced, total

# Baselines ------------------------------------------------------------------------------------------------------------


def shuffled(g: Any, keep: int, stage: int) -> Left:
    """Numbers of a splitmix64 stream drive three rounds of cubes modulo a prime; the seed is 0."""
    prime, state, drawn, values = 16777199, 0, [], []
    for _ in range(6):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        drawn.append((z ^ z >> 31) % (prime - 1) + 1)
    for v in range(g.tokens):
        value = v + 1
        for factor, more in zip(drawn[::2], drawn[1::2], strict=True):
            value = pow(value * factor + more, 3, prime)
        values.append(float(value))
    return kept(g.x, best(values, keep))


def uniform(g: Any, keep: int, stage: int) -> Left:
    return kept(g.x, spaced(g.tokens, keep))


# The encoder's attention ----------------------------------------------------------------------------------------------


def by_class(g: Any, keep: int, stage: int) -> Left:
    """FasterVLM: what the class token attends to in the second-last of nine blocks."""
    return kept(g.x, best(g.of_class("vision.7"), keep))


def by_class_of_late_layers(g: Any, keep: int, stage: int) -> Left:
    """VTC-CLS: the last third but the last layer, blocks 6 and 7 of nine."""
    return kept(g.x, best(total([g.of_class("vision.6"), g.of_class("vision.7")]), keep))


def by_all(g: Any, keep: int, stage: int) -> Left:
    """FoPru, rank."""
    return kept(g.x, best(g.of_all("vision.7"), keep))


def by_rows(g: Any, keep: int, stage: int) -> Left:
    """FoPru, row: as many whole rows as the budget has room for."""
    values, wide = g.of_all("vision.7"), g.columns
    sums = [math.fsum(values[r * wide : (r + 1) * wide]) for r in range(g.tokens // wide)]
    rows = best(sums, keep // wide)
    return kept(g.x, [v for v in range(g.tokens) if v // wide in rows])


def anchored(g: Any, keep: int, stage: int) -> Left:
    """HiPrune: anchors of a middle layer (34% of nine blocks), what is beside them, and the best of a deep one."""
    deep, last = g.of_all("vision.7"), g.tokens - 1
    anchors = best(g.of_all("vision.3"), round(keep * 0.1 / 5))
    near = {min(max(v + d, 0), last) for v in anchors for d in (0, 1, -1, g.columns, -g.columns)}
    near = set(best(deep, keep, sorted(near)))  # where the budget is less than these
    return kept(g.x, [*near, *best(deep, keep - len(near), [v for v in range(g.tokens) if v not in near])])


def in_stretches(g: Any, keep: int, stage: int) -> Left:
    """HoloV: 16 stretches, the first of which are one longer, each with a budget by attention and variety."""
    values, n = g.of_class("vision.7"), g.tokens
    units = [[x / (length(row) + 1e-6) for x in row] for row in g.x]
    ends = list(itertools.accumulate(n // 16 + (c < n % 16) for c in range(16)))
    chunks, worth = [list(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)], []
    for chunk in chunks:
        size, a = len(chunk), [1000 * values[v] for v in chunk]
        if size == 1:
            worth.append(values[chunk[0]])
            continue
        alike = [[dot(units[i], units[j]) * (i != j) for j in chunk] for i in chunk]
        middles = [sum(row) / (size - 1) for row in alike]
        spread = [sum((c - m) ** 2 for c in row) / (size - 1) for row, m in zip(alike, middles, strict=True)]
        scale = sum(a) / size / (sum(spread) / size + 1e-6)
        worth.append(sum(one + 0.09 * scale * s for one, s in zip(a, spread, strict=True)) / size)
    share = [w / (sum(worth) + 1e-6) for w in worth]
    given = [int(s * keep) for s in share]
    for number in best([round(s, 9) for s in share], keep - sum(given)):
        given[number] += 1
    taken = [v for chunk, number in zip(chunks, given, strict=True) for v in best(values, number, chunk)]
    return kept(g.x, taken + best(values, keep - len(taken), [v for v in range(n) if v not in taken]))


def without_pairs(g: Any, keep: int, stage: int) -> Left:
    """VisPruner: half by attention; of the others, near-duplicates go eight a round."""
    order = best(g.of_class("vision.7"), g.tokens)
    important, line, x = order[: keep // 2], order[keep // 2 :], g.x
    while (surplus := len(line) - (keep - len(important))) > 0:
        even, odd = line[::2], line[1::2]
        alike = {v: round(max(cosine(x[v], x[w]) for w in odd), 6) for v in even}
        even.sort(key=lambda v, alike=alike: (-alike[v], v))  # type: ignore[misc]
        line = even[min(8, surplus) :] + odd
    return kept(x, important + line)


# One token after another ----------------------------------------------------------------------------------------------


def far_apart(g: Any, keep: int, stage: int) -> Left:
    """DivPrune: the smallest distance as large as it can be, greedily."""
    x, n = g.x, g.tokens
    apart = [[1 - cosine(a, b) for b in x] for a in x]
    alone = {v: min((apart[v][w] for w in range(n) if w != v), default=2.0) for v in range(n)}
    taken = [first(alone, 1.0)]
    while len(taken) < keep:
        taken.append(first({v: min(apart[v][w] for w in taken) for v in range(n) if v not in taken}, 1.0))
    return kept(x, taken)


def unlike_in_sum(g: Any, keep: int, stage: int) -> Left:
    """ToDRE, stage 1: from the most attended token on, the one least like those taken, in sum."""
    x = g.x
    taken = [best(g.of_class("vision.7"), 1)[0]]
    while len(taken) < keep:
        rest = [v for v in range(g.tokens) if v not in taken]
        taken.append(first({v: -sum(cosine(x[v], x[w]) for w in taken) for v in rest}, 1.0))
    return kept(x, taken)


def largest_volume(g: Any, keep: int, stage: int) -> Left:
    """CDPruner: what a token adds to the volume is how far it is from the space of those taken, times its relevance."""
    x, words = g.x, mean(g.words[0].double().tolist())
    likes = [cosine(row, words) for row in x]
    low, high = min(likes), max(likes)
    weight = [((like - low) / (high - low) if high - low > 1e-6 else 0.0) + 1e-6 for like in likes]
    left = {v: [value * weight[v] / length(row) for value in row] for v, row in enumerate(x)}
    taken: list[int] = []
    while len(taken) < keep:
        # Of what is explained nothing is left but rounding.
        size = {v: dot(row, row) if dot(row, row) > 1e-6 * weight[v] ** 2 else 0.0 for v, row in left.items()}
        picked = first(size)
        taken.append(picked)
        axis, long = left.pop(picked), size[picked]
        if long:
            for v, row in left.items():
                part = dot(row, axis) / long
                left[v] = [value - part * other for value, other in zip(row, axis, strict=True)]
    return kept(x, taken)


def covering(g: Any, keep: int, stage: int) -> Left:
    """MMTok: the text at a temperature of 0.02, the picture at 0.2 and half the weight."""
    x, words = g.x, g.words[0].double().tolist()
    told = [[p / len(words) for p in softmax([cosine(w, v) / 0.02 for v in x])] for w in words]
    seen = [[p / len(x) / 2 for p in softmax([cosine(w, v) / 0.2 for v in x])] for w in x]
    rows, taken = told + seen, []
    have = [0.0] * len(rows)
    while len(taken) < keep:
        rest = [v for v in range(len(x)) if v not in taken]
        gain = {v: sum(max(0.0, row[v] - h) for row, h in zip(rows, have, strict=True)) for v in rest}
        taken.append(first(gain))
        have = [max(h, row[taken[-1]]) for row, h in zip(rows, have, strict=True)]
    return kept(x, taken)


def from_pivots(g: Any, keep: int, stage: int) -> Left:
    """DART: four visual tokens and four words with the longest keys, each followed by those least like it."""
    keys = g.layer("language.1")[1][0].double()
    norms = [float(keys[:, slot].abs().sum()) for slot in range(g.length)]
    x, words, front = g.x, g.words[0].double().tolist(), g.visual[0]
    own = best([norms[slot] for slot in g.visual], min(4, keep))
    said = best([norms[slot] for slot in g.behind], 4)
    pivots, chosen = [x[v] for v in own] + [words[front + t] for t in said], list(own)
    for turn, pivot in enumerate(pivots):
        free = [v for v in range(g.tokens) if v not in chosen]
        likes = [-round(cosine(row, pivot), 9) for row in x]
        chosen += best(likes, math.ceil((keep - len(chosen)) / (len(pivots) - turn)), free)
    return kept(x, chosen)


# Groups and their middles ---------------------------------------------------------------------------------------------


def medoids(x: Rows, number: int) -> list[int]:
    """KKZ start, then rounds of k-medoids; of copies the lower index, and none is taken twice."""
    far = [[round(math.dist(a, b), 6) for b in x] for a in x]
    norms = [round(length(row), 6) for row in x]  # embedded tokens are all of one length
    centres = [norms.index(max(norms))]
    while len(centres) < number:
        near = {i: min(far[i][c] for c in centres) for i in range(len(x)) if i not in centres}
        centres.append(first(near))
    for _ in range(100):
        ranked = sorted(centres)
        home = {i: i if i in ranked else min(ranked, key=lambda c, i=i: far[i][c]) for i in range(len(x))}
        groups = [[i for i in home if home[i] == c] for c in ranked]
        after = [first({i: -sum(far[i][j] for j in group) for i in group}) for group in groups]
        if sorted(after) == ranked:
            break
        centres = after
    return sorted(centres)


def middles(g: Any, keep: int, stage: int) -> Left:
    """CenterCLIP."""
    return kept(g.x, medoids(g.x, keep))


def middles_of_neighbourhoods(g: Any, keep: int, stage: int) -> Left:
    """CenterCLIP, spectral: k-medoids of the rows of the eigenvectors of the smallest eigenvalues; sigma is 2."""
    rows = torch.tensor(g.x, dtype=torch.float64)
    near = torch.exp(-((rows[:, None] - rows[None]).square().sum(2)) / 8)
    root = near.sum(1).rsqrt()
    values, vectors = torch.linalg.eigh(torch.eye(len(rows)) - root[:, None] * near * root)
    number = keep
    # A budget that parts equal eigenvalues goes without them, or takes them all if they are the smallest.
    if keep < len(rows) and values[keep] - values[keep - 1] < 1e-6:
        equal = (values - values[keep]).abs() < 1e-6
        below = int((values < values[keep] - 1e-6).sum())
        number = below or int(equal.sum())
    columns = vectors[:, :number]
    return kept(g.x, medoids((columns / columns.norm(dim=1, keepdim=True)).tolist(), keep))


# The decoder's attention ----------------------------------------------------------------------------------------------


def by_last(g: Any, keep: int, stage: int) -> Left:
    """FastV asks the layer in front of its cut."""
    return kept(g.x, best(g.received("language.1", [g.length - 1]), keep))


def by_last_thrice(g: Any, keep: int, stage: int) -> Left:
    """PyramidDrop asks the layer behind each of its cuts, at a quarter, a half and three quarters of 32."""
    return kept(g.x, best(g.received(f"language.{8 * (stage + 1)}", [g.length - 1]), keep))


def by_change_and_text(g: Any, keep: int, stage: int) -> Left:
    """TransPrune: what layers 6 to 6, 8 or 11 do to a token, and what text asks of it; equal parts."""
    at = (7, 9, 12)[stage]
    change = [0.0] * g.tokens
    for layer in range(6, at):
        states = [part[0].double().tolist() for part in g.block(f"language.{layer}")]
        for before, after in (states[:2], states[2:]):
            turns = softmax([1 - cosine(a, b) for a, b in zip(before, after, strict=True)])
            for v, slot in enumerate(g.visual):
                change[v] += length(after[slot]) / length(before[slot]) * turns[slot]
    # Text in front of the picture pays nothing.
    paid = g.received(f"language.{at}", g.behind)
    both = [c / sum(change) + p / sum(paid) for c, p in zip(change, paid, strict=True)]
    return kept(g.x, best([round(value, 7) for value in both], keep))


def followed(g: Any, layer: str, keep: int) -> list[int]:
    """AIM, inside the decoder: five steps along the attention at a temperature of 0.1."""
    chances = []
    for moves in g.paid(layer, list(range(g.length)), 0.1):
        chance = [1 / g.length] * g.length
        for _ in range(5):
            chance = total(moves, chance)
        chances.append(chance)
    worth = [math.sqrt(sum(chance[slot] ** 2 for chance in chances) / len(chances)) for slot in g.visual]
    return best([float(f"{value:.6g}") for value in worth], keep)


def by_two_thresholds(g: Any, layer: str, guarded: int, share: float, least: float) -> list[int]:
    """MustDrop, inside the decoder: what text as a whole and each of its words pass by, but for a guarded set."""
    heads = g.paid(layer, g.text)
    rows = [mean([head[t] for head in heads])[g.visual[0] : g.visual[-1] + 1] for t in range(len(g.text))]
    sums, peaks = mean(rows), [max(column) for column in zip(*rows, strict=True)]
    guards = best(g.of_class("vision.7"), guarded)
    gone = {v for v in range(g.tokens) if sums[v] < share * sum(sums) and peaks[v] < least}
    return [v for v in range(g.tokens) if v not in gone or v in guards]


# Leaving --------------------------------------------------------------------------------------------------------------


def where_little_is_exchanged(g: Any, below: float) -> Left:
    """ToDRE, stage 2: text pays little to the picture and the picture little to text, in layer 27 of 32."""
    shares = []
    for rows, columns in ((g.text, g.visual), (g.visual, g.text)):
        paid = [row for head in g.paid("language.27", rows) for row in head]
        shares.append(sum(row[c] for row in paid for c in columns) / len(paid))
    return {} if max(shares) < below else kept(g.x, list(range(g.tokens)))


# Pictures and films ---------------------------------------------------------------------------------------------------


def thinned_regions(g: Any, share: float, within: float) -> Left:
    """ShowUI: regions of neighbours less than a distance apart, each thinned evenly to a share."""
    pixels = g.pixels[0].double().tolist()
    part = {v: {v} for v in range(g.tokens)}
    for v in range(g.tokens):
        for other in ([v + 1] if (v + 1) % g.columns else []) + ([v + g.columns] if v + g.columns < g.tokens else []):
            if math.dist(pixels[v], pixels[other]) < within:
                joined = part[v] | part[other]
                part |= dict.fromkeys(joined, joined)
    chosen: list[int] = []
    for region in {min(cells): sorted(cells) for cells in part.values()}.values():
        stay = max(1, len(region) - round(len(region) * (1 - share)))
        chosen += [region[i * (len(region) - 1) // max(1, stay - 1)] for i in range(stay)]
    return kept(g.x, chosen)


def every_frame(g: Any, every: int) -> Left:
    """The first frame of every so many."""
    return kept(g.x, [v for v in range(g.tokens) if v // g.places % every == 0])
