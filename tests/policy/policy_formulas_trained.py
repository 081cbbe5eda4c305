"""Methods with trained modules: their papers' formulas on numpy arrays of the weights.

Each takes what is given (see preset_given.py), whose `weights` are the arrays by name, and how many tokens there are to
be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
from policy_formulas import Left, best, gelu, kept, spaced

Array = numpy.ndarray
GELU = numpy.vectorize(gelu, otypes=[float])


def arrays(g: Any) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in g.weights.items()}


def shares(logits: Array) -> Array:
    """Softmax along the last axis."""
    powers = numpy.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def normed(rows: Array, weights: dict[str, Array], name: str, epsilon: float) -> Array:
    """A layer norm."""
    apart = rows - rows.mean(-1, keepdims=True)
    made = apart / numpy.sqrt((apart**2).mean(-1, keepdims=True) + epsilon)
    return made * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def even(rows: Array) -> Array:
    """A root-mean-square norm without weights."""
    return rows / numpy.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)


def linear(rows: Array, weights: dict[str, Array], name: str) -> Array:
    made = rows @ weights[f"{name}.weight"].T
    return made + weights[f"{name}.bias"] if f"{name}.bias" in weights else made


def attend(query: Array, key: Array, value: Array, heads: int, groups: int) -> Array:
    """[Q, H d] of [Q, H d], [N, G d] and [N, G d]: every head with the keys of its group."""
    wide = query.shape[1] // heads
    made = []
    for head in range(heads):
        own = slice(head * wide, (head + 1) * wide)
        group = head * groups // heads
        theirs = slice(group * wide, (group + 1) * wide)
        made.append(shares(query[:, own] @ key[:, theirs].T / math.sqrt(wide)) @ value[:, theirs])
    return numpy.concatenate(made, 1)


def placed(g: Any, rows: Array) -> Left:
    """New tokens at evenly spaced places."""
    return dict(zip(spaced(g.tokens, len(rows)), rows.tolist(), strict=True))


def behind(g: Any) -> Array:
    return numpy.asarray(g.words[0].double())[g.visual[0] :]


# One new token after another ------------------------------------------------------------------------------------------


def latents(g: Any, keep: int) -> Left:
    """FLASH: z = softmax(A x^T) x."""
    x, vectors = numpy.asarray(g.x), arrays(g)["latents"][:keep]
    return placed(g, shares(vectors @ x.T) @ x)


def qformer(g: Any, keep: int) -> Left:
    """B-VLLM's sampler: two layers of two heads, the first of which reads the picture."""
    weights, x = arrays(g), numpy.asarray(g.x)
    made = normed(weights["query_tokens"][0, :keep], weights, "layernorm", 1e-12)

    def added(rows: Array, more: Array, name: str) -> Array:
        return normed(rows + linear(more, weights, f"{name}.dense"), weights, f"{name}.LayerNorm", 1e-12)

    for layer in range(2):
        for kind, seen in (("attention", None), ("crossattention", x)):
            if layer == 1 and seen is not None:
                continue
            front = f"encoder.layer.{layer}.{kind}"
            query = linear(made, weights, f"{front}.attention.query")
            key, value = (
                linear(made if seen is None else seen, weights, f"{front}.attention.{part}")
                for part in ("key", "value")
            )
            made = added(made, attend(query, key, value, 2, 2), f"{front}.output")
        front = f"encoder.layer.{layer}"
        made = added(made, GELU(linear(made, weights, f"{front}.intermediate_query.dense")), f"{front}.output_query")
    return placed(g, linear(made, weights, "project"))


def table(side: int, wide: int) -> Array:
    """[side, side, wide]: sines and cosines of the column, then of the row."""
    rates = 10000.0 ** (-numpy.arange(wide // 4) / (wide // 4))
    one = numpy.concatenate([f(numpy.arange(side)[:, None] * rates) for f in (numpy.sin, numpy.cos)], 1)
    return numpy.stack([[numpy.concatenate([one[c], one[r]]) for c in range(side)] for r in range(side)])


def cubic(old: int, new: int) -> Array:
    """[new, old] the weights of bicubic interpolation along one axis (a = -0.75, corners not aligned)."""
    made = numpy.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        base = math.floor(place)
        for at in range(base - 1, base + 3):
            far = abs(place - at)
            if far <= 1:
                weight = 1.25 * far**3 - 2.25 * far**2 + 1
            else:
                weight = -0.75 * far**3 + 3.75 * far**2 - 6 * far + 3
            made[i, min(max(at, 0), old - 1)] += weight
    return made


def resampled(g: Any, keep: int) -> Left:
    """MQT: queries at the places of a grid of their own, keys at those of the picture's, which holds no picture."""
    weights, x = arrays(g), numpy.asarray(g.x)
    number, wide = weights["queries"].shape
    small, sized = table(math.isqrt(number), wide), cubic(math.isqrt(number), g.columns)
    large = numpy.einsum("ro,cp,opd->rcd", sized, sized, small).reshape(-1, wide)
    asked = weights["queries"][:keep] + small.reshape(-1, wide)[:keep]
    parts = []
    for part, (name, rows) in enumerate((("query", asked), ("key", large), ("value", x))):
        inner = slice(part * wide, (part + 1) * wide)
        mapped = normed(rows, weights, f"norm_{name}", 1e-6) @ weights["attention.in_proj_weight"][inner].T
        parts.append(mapped + weights["attention.in_proj_bias"][inner])
    mixed = linear(attend(*parts, 2, 2), weights, "attention.out_proj")
    return placed(g, mixed @ weights["project.weight"].T)


def celled(g: Any, side: int) -> Left:
    """TokenFLEX: adaptive means of a coarser grid, and a gated network; fewer tokens than cells go through it alone."""
    weights, x, wide = arrays(g), numpy.asarray(g.x), g.columns

    def span(cell: int, size: int) -> range:
        return range(cell * size // side, -(-(cell + 1) * size // side))

    means = x if g.tokens < side * side else numpy.stack(
        [x[[r * wide + c for r in span(i, g.rows) for c in span(j, wide)]].mean(0)
         for i in range(side) for j in range(side)]
    )  # fmt: skip
    gate = linear(means, weights, "gate")
    return placed(g, (gate / (1 + numpy.exp(-gate)) * linear(means, weights, "up")) @ weights["down.weight"].T)


def shuffled_pixels(g: Any, side: int) -> Left:
    """Blocks side by side, zeros where a block reaches over the edge; a norm and two layers."""
    weights, x, made = arrays(g), numpy.asarray(g.x), {}
    for top in range(0, g.rows, side):
        for start in range(0, g.columns, side):
            cells = [(top + r, start + c) for r in range(side) for c in range(side)]
            nothing = numpy.zeros(x.shape[1])
            rows = [x[r * g.columns + c] if r < g.rows and c < g.columns else nothing for r, c in cells]
            inner = GELU(linear(normed(numpy.concatenate(rows), weights, "norm", 1e-5), weights, "first"))
            made[top * g.columns + start] = linear(inner, weights, "second").tolist()
    return made


# What reads the text --------------------------------------------------------------------------------------------------


def rated_by_network(g: Any, keep: int) -> Left:
    """CoViPAL: one hidden layer, which sees each token and the mean of the text but its last token."""
    weights, words = arrays(g), behind(g)
    told = even(words[:-1].mean(0)) @ weights["text.weight"].T + weights["hidden.bias"]
    hidden = GELU(even(numpy.asarray(g.x)) @ weights["visual.weight"].T + told)
    score = (hidden @ weights["score.weight"].T + weights["score.bias"])[:, 0]
    return kept(g.x, best([round(value, 5) for value in score.tolist()], keep))


def leaves(g: Any, stage: int) -> bool:
    """DyVTE: the router of layer `stage` + 1 looks at the text's mean but its last token, and at that."""
    weights, words = arrays(g), behind(g)
    front = f"language.{stage + 1}"
    seen = numpy.concatenate([words[:-1].mean(0), words[-1]])
    stay, leave = weights[f"{front}.route.weight"] @ GELU(weights[f"{front}.hidden.weight"] @ seen)
    return bool(leave > stay)


def asked_for(g: Any, least: float, most: float) -> Left:
    """QTSplus: cross-attention scores, a share told by a head, and an attention among those that stay."""
    weights, x, words = arrays(g), numpy.asarray(g.x), behind(g)

    def projected(rows: Array, module: str, norm: str, name: str) -> Array:
        return linear(even(rows) * weights[f"{module}.{norm}.weight"], weights, f"{module}.{name}")

    query, key = projected(words, "score", "norm_text", "query"), projected(x, "score", "norm_visual", "key")
    wide, score = query.shape[1] // 2, numpy.zeros(len(x))
    for head in range(2):
        own = query[:, head * wide : (head + 1) * wide]
        score = numpy.maximum(score, shares(own @ key.T / math.sqrt(wide)).max(0))  # both heads share the only key
    p = score / score.sum()
    states = [math.log(len(x)), score.max(), -(p * numpy.log(p)).sum()]
    hidden = GELU(linear(numpy.concatenate([words.mean(0), states]), weights, "budget.hidden"))
    told = 1 / (1 + math.exp(-float(linear(hidden, weights, "budget.share")[0])))
    number = max(1, math.ceil((least + (most - least) * told) * len(x) - 1e-9))
    chosen = sorted(best([round(value, 6) for value in score.tolist()], number))
    rows = x[chosen]
    parts = [projected(rows, "reencode", "norm", name) for name in ("query", "key", "value")]
    made = rows + attend(*parts, 2, 1) @ weights["reencode.output.weight"].T
    return dict(zip(chosen, made.tolist(), strict=True))


def reread(g: Any, keep: int) -> Left:
    """Evenly spaced tokens take from all, through a gate, what an attention of two heads and one key reads."""
    weights, x = arrays(g), numpy.asarray(g.x)
    chosen = spaced(g.tokens, keep)
    rows = x[chosen]
    query = linear(even(rows) * weights["norm.weight"], weights, "query")
    key, value = (linear(even(x) * weights["norm_read.weight"], weights, name) for name in ("key", "value"))
    read = attend(query, key, value, 2, 1) @ weights["output.weight"].T
    return dict(zip(chosen, (rows + math.tanh(float(weights["gate"][0])) * read).tolist(), strict=True))
