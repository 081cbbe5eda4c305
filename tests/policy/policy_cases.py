"""Every mistake that a policy can hold, one row each; the expected five lines lie in tests/golden/errors/<name>.txt."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvc.program import Layer, Layout, Site


def layout(
    vision: int = 6,
    language: int = 12,
    prefix: int = 1,
    visual: tuple[int, ...] = (64,),
    refused: dict[str, str] | None = None,
) -> Layout:
    """A model of the given depth; `refused` gives the reason of each site that can't be cut."""
    layer = Layer(linear=1000, heads=4, kv_heads=2, head_dim=8)
    names = [*(f"vision.{i}" for i in range(vision)), "projector", *(f"language.{i}" for i in range(language))]
    refused = refused or {}
    return Layout(
        model_type="llava",
        hidden_size=32,
        vocabulary=100,
        language=(layer,) * language,
        vision=(layer,) * vision,
        prefix_tokens=prefix,
        group=1,
        tiles=len(visual),
        tile_tokens=64 + prefix,
        visual_tokens=visual,
        patch_linear=10,
        projector_linear=10,
        head_linear=10,
        element_size=4,
        sites=tuple(Site(name, name not in refused, refused.get(name, "")) for name in names),
    )


def with_layer(index: int, **other: Any) -> Layout:
    """A model one of whose decoder layers is another."""
    plain = layout()
    layers = list(plain.language)
    layers[index] = dataclasses.replace(layers[index], **other)
    return dataclasses.replace(plain, language=tuple(layers))


def policy(*steps: str, head: str = "version: 1") -> str:
    """YAML text: the head, then the steps, each an indented block."""
    return "\n".join([head, "steps:", *(f"  - {step}" for step in steps)])


UNROTATED = "version: 1\nattention: {unrotated: visual}"
NORM = "score: norm\n    select: {top: {keep: 50%}}"
TOP = "score: {attention: {of: last, layer: previous}}\n    select: {top: {keep: 50%}}"


def step(at: str, rest: str = TOP) -> str:
    return f"at: {at}\n    {rest}"


KEEP = 'version: 1\nparameters: {keep: 25%}\nsteps:\n  - at: language.2\n    select: {stride: "{keep}"}\n'

# Found while reading: name -> (source, settings).
READING: dict[str, tuple[object, object]] = {
    "empty": ("", ()),
    "only-comments": ("# nothing here\n", ()),
    "not-yaml": ("version: 1\nsteps: [\n", ()),
    "two-documents": ("version: 1\n---\nversion: 1\n", ()),
    "a-list": ("- version: 1\n- steps: []\n", ()),
    "code-tag": ("version: 1\nname: !!python/object/apply:os.system [echo]\n", ()),
    "anchor": ("version: 1\nname: &a x\nabout: *a\n", ()),
    "nested-too-deep": ("steps: " + "[" * 40 + "]" * 40 + "\n", ()),
    "duplicate-key": (policy(step("language.2")) + "\npositions: keep\npositions: renumber", ()),
    "key-not-text": (policy(step("language.2")) + "\non: 3", ()),
    "number-too-long": ("version: " + "9" * 5000 + "\nsteps: []", ()),
    "unsupported-type": ({"version": 1, "steps": [{"at": object}]}, ()),
    "source-of-wrong-type": (3, ()),
    "unknown-preset": ("fastvv", ()),
    "missing-file": ("nowhere/policy.yaml", ()),
    "extends-unknown": ("version: 1\nextends: visonzip\n", ()),
    "version-missing": (policy(step("language.2"), head="name: x"), ()),
    "version-2": (policy(step("language.2"), head="version: 2"), ()),
    "unknown-top-key": (policy(step("language.2"), head="version: 1\nposition: keep"), ()),
    "no-steps": ("version: 1\nname: x\n", ()),
    "steps-not-a-list": ("version: 1\nsteps: {at: language.2}\n", ()),
    "name-not-text": (policy(step("language.2"), head="version: 1\nname: 3"), ()),
    "deviations-not-texts": (policy(step("language.2"), head="version: 1\ndeviations: some"), ()),
    "positions-stride-of-nothing": ("version: 1\npositions: {stride: 0}", ()),
    "positions-stride-of-a-share": ("version: 1\npositions: {stride: 25%}", ()),
    "positions-without-stride": ("version: 1\npositions: {}", ()),
    "positions-rescale-by-one": ("version: 1\npositions: {rescale: {factor: 1}}", ()),
    "positions-two-of-them": ("version: 1\npositions: {stride: 64, rescale: {factor: 2}}", ()),
    "positions-unknown-key": ("version: 1\npositions: {step: 64}", ()),
    "reselect-not-a-mapping": ("version: 1\nreselect: 30%", ()),
    "reselect-without-a-share": ("version: 1\nreselect: {at: language.3}", ()),
    "reselect-unknown-key": ("version: 1\nreselect: {at: language.3, keep: 30%, alike: 0.9}", ()),
    "reselect-outside-the-decoder": ("version: 1\nreselect: {at: projector, keep: 30%}", ()),
    "reselect-at-a-range": ("version: 1\nreselect: {at: language.1..2, keep: 30%}", ()),
    "reselect-by-the-encoder": ("version: 1\nreselect: {at: language.3, keep: 30%, layer: vision.2}", ()),
    "reselect-on-average": ("version: 1\nreselect: {at: language.3, keep: {average: 3}}", ()),
    "reselect-more-than-alike": ("version: 1\nreselect: {at: language.3, keep: 30%, unless_alike: 90}", ()),
    "reselect-bug-of-nothing": ("version: 1\nreselect: {at: language.3, keep: 30%, bug_compatible: true}", ()),
    "steps-empty-beside-fractions": ("version: 1\nsteps: []\npositions: {stride: 64}", ()),
    "attention-of-no-name": ("version: 1\nattention: {}", ()),
    "attention-unknown-name": ("version: 1\nattention: {chunk: {frames: 4}}", ()),
    "attention-chunks-of-nothing": ("version: 1\nattention: {chunks: {frames: 0}}", ()),
    "attention-two-of-them": ("version: 1\nattention: {chunks: {frames: 4}, unrotated: visual}", ()),
    "attention-unrotated-text": ("version: 1\nattention: {unrotated: text}", ()),
    "cache-pool-of-one": ("version: 1\ncache: {pool: {tokens: 1}}", ()),
    "cache-pool-unknown-key": ("version: 1\ncache: {pool: {tokens: 4, top: 3}}", ()),
    "attention-chunks-without-frames": ("version: 1\nattention: {chunks: {previous: 3}}", ()),
    "positions-unknown": (policy(step("language.2"), head="version: 1\npositions: kept"), ()),
    "unknown-step-key": (policy(step("language.2"), "at: language.4\n    selekt: {top: 3}"), ()),
    "step-not-a-mapping": (policy("language.2"), ()),
    "no-action": (policy("at: language.2"), ()),
    "select-and-exit": (policy(step("language.2", TOP + "\n    exit: {when: always}")), ()),
    "no-site": (policy(TOP), ()),
    "bad-site": (policy(step("langage.2")), ()),
    "site-not-text": (policy(step("2")), ()),
    "scope-unknown": (policy(step("language.2", TOP + "\n    scope: images")), ()),
    "unknown-score": (policy(step("language.2", "score: {atention: {}}\n    select: {top: 3}")), ()),
    "unknown-selector": (policy(step("language.2", "score: uniform\n    select: {topp: 3}")), ()),
    "unknown-rest": (policy(step("language.2", TOP + "\n    rest: merg")), ()),
    "unknown-gate": (policy(step("language.2", "exit: {when: alway}")), ()),
    "weights-no-safetensors": (policy(step("language.2", "exit: {when: {router: gate.pt}}")), ()),
    "weights-no-text": (policy(step("language.2", "exit: {when: {router: {weights: 3}}}")), ()),
    "score-with-two-names": (policy(step("language.2", "score: {norm: {}, random: {}}\n    select: {top: 3}")), ()),
    "score-with-a-stray-key": (policy(step("language.2", "score: {norm: {}, wieght: 1}\n    select: {top: 3}")), ()),
    "score-empty": (policy(step("language.2", "score: []\n    select: {top: 3}")), ()),
    "score-a-number": (policy(step("language.2", "score: 3\n    select: {top: 3}")), ()),
    "weight-zero": (policy(step("language.2", "score: [{norm: {}, weight: 0}]\n    select: {top: 3}")), ()),
    "normalize-unknown": (
        policy(step("language.2", "score: [{norm: {}, normalize: min-max}]\n    select: {top: 3}")),
        (),
    ),
    "no-score": (policy(step("language.2", "select: {top: 3}")), ()),
    "no-score-for-merge": (
        policy(step("language.2", "select: {stride: 3}\n    rest: {merge: {targets: {top: 2}}}")),
        (),
    ),
    "unused-score": (policy(step("language.2", "score: uniform\n    select: {stride: {keep: 25%}}")), ()),
    "score-beside-exit": (policy(step("language.2", "score: uniform\n    exit: {when: always}")), ()),
    "rest-beside-exit": (policy(step("language.2", "rest: drop\n    exit: {when: always}")), ()),
    "evict-no-layer-of-the-decoder": (policy(step("language.2", TOP + "\n    evict: vision.2")), ()),
    "evict-no-word": (policy(step("language.2", TOP + "\n    evict: true")), ()),
    "evict-before-the-decoder": (policy(step("projector", "select: {stride: 3}\n    evict: earlier")), ()),
    "until-no-layer-of-the-decoder": (policy(step("language.2", TOP + "\n    until: vision.3")), ()),
    "until-no-word": (policy(step("language.2", TOP + "\n    until: later")), ()),
    "until-before-the-decoder": (policy(step("vision.2", "select: {stride: 3}\n    until: next")), ()),
    "until-a-layer-of-a-range": (
        policy(step("language.1..4", "select: {stride: 50%}\n    until: language.6")),
        (),
    ),
    "until-of-a-rest-that-merges": (policy(step("language.2", TOP + "\n    rest: merge\n    until: next")), ()),
    "until-of-a-merge": (policy(step("language.2", "merge: {pairs: {reduce: mean, keep: 50%}}\n    until: next")), ()),
    "until-of-an-exit": (policy(step("language.2", "exit: {when: always}\n    until: next")), ()),
    "memory-of-no-kind": (policy(step("language.0", "score: {novelty: {memory: video}}\n    select: {top: 3}")), ()),
    "until-beside-evict": (
        policy(step("language.2", TOP + "\n    until: next"), step("language.4", TOP + "\n    evict: earlier")),
        (),
    ),
    "until-beside-reselect": (
        policy(step("language.2", TOP + "\n    until: next")) + "\nreselect: {at: language.5, keep: 30%}",
        (),
    ),
    "until-beside-chunks": (
        policy(step("language.2", TOP + "\n    until: next")) + "\nattention: {chunks: {frames: 2}}",
        (),
    ),
    "until-beside-pooled-caches": (
        policy(step("language.2", TOP + "\n    until: next")) + "\ncache: {pool: {tokens: 4, chunk: 2}}",
        (),
    ),
    "exit-without-when": (policy(step("language.2", "exit: {}")), ()),
    "exit-unknown-key": (policy(step("language.2", "exit: {wen: always}")), ()),
    "gate-without-score": (policy(step("language.2", "exit: {when: {above: 0.5}}")), ()),
    "gate-with-two-sides": (policy(step("language.2", "exit: {when: {score: uniform, above: 1, below: 2}}")), ()),
    "gate-unknown-key": (policy(step("language.2", "exit: {when: {score: uniform, abov: 1}}")), ()),
    "keep-float": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 0.25}}")), ()),
    "keep-float-above-one": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 64.0}}")), ()),
    "keep-zero": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 0}}")), ()),
    "keep-zero-percent": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 0%}}")), ()),
    "keep-above-all": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 150%}}")), ()),
    "keep-too-fine": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 33.33%}}")), ()),
    "keep-quoted-number": (policy(step("language.2", "score: uniform\n    select: {top: {keep: '54'}}")), ()),
    "keep-true": (policy(step("language.2", "score: uniform\n    select: {top: {keep: true}}")), ()),
    "keep-fraction-above-all": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 3/2}}")), ()),
    "keep-fraction-too-fine": (policy(step("language.2", "score: uniform\n    select: {top: {keep: 1/3000001}}")), ()),
    "keep-unknown-rounding": (
        policy(step("language.2", "score: uniform\n    select: {top: {keep: {share: 25%, round: half}}}")),
        (),
    ),
    "keep-rounding-of-nothing": (
        policy(step("language.2", "score: uniform\n    select: {top: {keep: {round: up}}}")),
        (),
    ),
    "keep-rounded-elsewhere": (
        policy(step("language.2", "select: {regions: {keep: {share: 62%, round: up}}}")),
        (),
    ),
    "keep-exact-elsewhere": (policy(step("language.2", "merge: {bipartite: {keep: 2/3}}")), ()),
    "keep-unknown-mapping": (policy(step("language.2", "score: uniform\n    select: {top: {keep: {mean: 3}}}")), ()),
    "keep-average-zero": (policy(step("language.2", "score: uniform\n    select: {top: {keep: {average: 0}}}")), ()),
    "setting-missing": (policy(step("language.2", "score: uniform\n    select: {top: {}}")), ()),
    "setting-unknown": (policy(step("language.2", "score: {attention: {laier: self}}\n    select: {top: 3}")), ()),
    "setting-unknown-inside": (
        policy(step("language.2", "select: {stride: 3}\n    rest: {merge: {targets: {strid: 3}}}")),
        (),
    ),
    "setting-not-a-choice": (policy(step("language.2", "score: {attention: {of: lst}}\n    select: {top: 3}")), ()),
    "setting-of-wrong-type": (policy(step("language.2", "score: {random: {seed: x}}\n    select: {top: 3}")), ()),
    "setting-out-of-bounds": (
        policy(step("language.2", "score: uniform\n    select: {threshold: {relative: 3}}")),
        (),
    ),
    "deviations-of-another-kind": (policy(step("language.2"), head="version: 1\nunverified: everything"), ()),
    "bug-without-a-window": (
        policy(step("language.2", "score: uniform\n    select: {frames: {keep: 3, bug_compatible: true}}")),
        (),
    ),
    "settings-that-exclude-each-other": (
        policy(step("language.2", "score: uniform\n    select: {threshold: {above: 1, relative: 0.5}}")),
        (),
    ),
    "setting-where-none-is-taken": (policy(step("language.2", TOP + "\n    rest: {drop: 3}")), ()),
    "same-site": (policy(step("language.2"), step("language.2")), ()),
    "step-order": (policy(step("language.4"), step("language.2")), ()),
    "component-order": (policy(step("language.4"), step("vision.2", "select: {stride: 3}")), ()),
    "unreachable-step": (policy(step("language.2", "exit: {when: always}"), step("language.4")), ()),
    "template-unknown": (policy(step('"language.{layr}"'), head="version: 1\nparameters: {layer: 2}"), ()),
    "template-unquoted": (
        policy(
            step("language.2", "score: uniform\n    select: {top: {keep: {n}}}"), head="version: 1\nparameters: {n: 2}"
        ),
        (),
    ),
    "parameter-unused": (policy(step("language.2"), head="version: 1\nparameters: {layer: 2}"), ()),
    "parameter-named-like-a-key": (policy(step("language.2"), head="version: 1\nparameters: {steps: 2}"), ()),
    "parameter-of-a-parameter": (policy(step("language.2"), head='version: 1\nparameters: {a: "{b}", b: 2}'), ()),
    "budgets-not-a-mapping": (policy(step("language.2"), head="version: 1\nbudgets: [33%]"), ()),
    "budget-without-parameters": (policy(step("language.2"), head="version: 1\nbudgets: {33%: 64}"), ()),
    "budget-not-a-share": (KEEP + 'budgets: {"64": {keep: 64}}\n', ()),
    "budget-twice": (KEEP + "budgets: {33%: {keep: 33%}, 33.0%: {keep: 34%}}\n", ()),
    "budget-unknown-parameter": (KEEP + "budgets:\n  33%: {keap: 33%}\n", ()),
    "budget-of-a-bad-value": (KEEP + "budgets:\n  50%: {keep: 50%}\n  33%: {keep: 0.33}\n", ()),
    "set-unknown-parameter": ("fastv", ["before_layr=3"]),
    "set-unknown-step": ("fastv", ["steps.1.at=language.3"]),
    "set-unknown-place": ("fastv", ["steps.0.selct.top.keep=3"]),
    "set-inside-a-single-value": ("fastv", ["steps.0.rest.merge.by=key_cosine"]),
    "set-without-value": ("fastv", ["keep"]),
    "set-float": ("fastv", ["keep=0.5"]),
    "set-nothing": ("fastv", {"keep": 0}),
}

RENUMBER = "version: 1\npositions: renumber"
# Found against a model: name -> (policy, layout).
REMEMBERS = "score: {novelty: {memory: conversation}}"

RESOLVING: dict[str, tuple[str, Layout]] = {
    "frames-in-front-of-the-decoder": (policy(step("projector", "select: {stride: 3}\n    scope: frame")), layout()),
    "memory-of-an-exit": (policy(step("language.2", "exit: {when: {" + REMEMBERS + ", above: 0.5}}")), layout()),
    "memory-behind-an-exit": (
        policy(
            step("language.1", "exit: {when: {score: uniform, above: 0.5}}"),
            step("language.2", REMEMBERS + "\n    select: {top: 3}"),
        ),
        layout(),
    ),
    "memory-beside-until": (
        policy(step("language.2", REMEMBERS + "\n    select: {top: 3}\n    until: next")),
        layout(),
    ),
    "memory-beside-evict": (
        policy(
            step("language.0", REMEMBERS + "\n    select: {top: 3}"),
            step("language.2", "select: {stride: 2}\n    evict: language.1"),
        ),
        layout(),
    ),
    "memory-beside-reselect": (
        policy(
            step("language.0", REMEMBERS + "\n    select: {top: 3}"),
            head="version: 1\nreselect: {at: language.3, keep: 30%}",
        ),
        layout(),
    ),
    "memory-beside-pooled-caches": (
        policy(step("language.0", REMEMBERS + "\n    select: {top: 3}"), head="version: 1\ncache: {pool: {tokens: 4}}"),
        layout(),
    ),
    "reselect-at-the-first-layer": ("version: 1\nreselect: {at: language.0, keep: 30%}", layout()),
    "reselect-by-a-later-layer": ("version: 1\nreselect: {at: language.3, keep: 30%, layer: language.3}", layout()),
    "reselect-beyond-the-last-layer": ("version: 1\nreselect: {at: language.12, keep: 30%}", layout()),
    "reselect-in-front-of-a-cut": (
        policy(step("language.2"), step("language.4"), head="version: 1\nreselect: {at: language.4, keep: 30%}"),
        layout(),
    ),
    "reselect-of-nothing": (
        policy(step("language.2", "exit: {when: always}"), head="version: 1\nreselect: {at: language.4, keep: 30%}"),
        layout(),
    ),
    "reselect-beside-pooled-caches": (
        "version: 1\nreselect: {at: language.3, keep: 30%}\ncache: {pool: {tokens: 4}}",
        layout(),
    ),
    "reselect-where-nothing-is-in-the-sequence": (
        "version: 1\nreselect: {at: language.3, keep: 30%}",
        layout(refused={"language.3": "the text reads the image by cross-attention"}),
    ),
    "fractions-on-axes": (
        "version: 1\npositions: {stride: 64}",
        dataclasses.replace(layout(), whole_positions="its tokens have positions on 3 axes"),
    ),
    "numbers-without-a-cut": (policy(step("projector", "select: {stride: 3}"), head=RENUMBER), layout()),
    "numbers-that-tokens-hold": (
        policy(step("language.2"), head=RENUMBER),
        dataclasses.replace(layout(), kept_positions="it adds positions to its tokens before its first layer"),
    ),
    "frames-at-several-sites": (policy(step("language.0..1", "score: change\n    select: {frames: 50%}")), layout()),
    "depth-of-another-model": (
        policy(step("language.2", "score: norm\n    select: {afford: {cost: 30%, depth: 28}}")),
        layout(),
    ),
    "cost-before-the-decoder": (policy(step("projector", "score: norm\n    select: {afford: 30%}")), layout()),
    "layer-beyond-the-last": (policy(step("language.12")), layout()),
    "layer-before-the-first": (policy(step("vision.-7", "select: {stride: 3}")), layout()),
    "tap-layer-beyond-the-last": (
        policy(step("language.2", "score: {attention: {of: cls, layer: vision.6}}\n    select: {top: 3}")),
        layout(),
    ),
    "site-without-meaning": (
        policy(step("vision.2", "select: {stride: 3}")),
        layout(refused={f"vision.{i}": "the pixel shuffle behind the encoder needs the whole grid" for i in range(6)}),
    ),
    "no-cls": (
        policy(step("language.0", "score: {attention: {of: cls, layer: vision.-2}}\n    select: {top: 3}")),
        layout(prefix=0),
    ),
    "cls-in-the-decoder": (policy(step("language.2", "score: {attention: cls}\n    select: {top: 3}")), layout()),
    "text-in-the-encoder": (
        policy(step("language.0", "score: {attention: {of: [last, text], layer: vision.2}}\n    select: {top: 3}")),
        layout(),
    ),
    "text-before-the-decoder": (
        policy(step("projector", "score: {cosine: {to: text}}\n    select: {top: 3}")),
        layout(),
    ),
    "previous-of-the-first": (policy(step("language.0")), layout()),
    "previous-keys-of-the-first": (
        policy(step("language.0", "select: {stride: 3}\n    rest: {merge: {by: key_cosine, layer: previous}}")),
        layout(),
    ),
    "previous-of-the-projector": (policy(step("projector")), layout()),
    "self-of-the-projector": (
        policy(step("projector", "score: {norm: {of: key}}\n    select: {top: 3}")),
        layout(),
    ),
    "evict-at-the-entry": (policy(step("language.0", "select: {stride: 3}\n    evict: earlier")), layout()),
    "evict-from-a-later-layer": (policy(step("language.2", TOP + "\n    evict: language.2")), layout()),
    "evict-beyond-the-last-layer": (policy(step("language.2", TOP + "\n    evict: language.12")), layout()),
    "evict-past-a-step-that-does-not": (
        policy(step("language.2"), step("language.4", TOP + "\n    evict: language.1")),
        layout(),
    ),
    "evict-further-than-the-step-before": (
        policy(step("language.2", TOP + "\n    evict: language.1"), step("language.4", TOP + "\n    evict: earlier")),
        layout(),
    ),
    "until-before-its-step": (policy(step("language.4", TOP + "\n    until: language.3")), layout()),
    "until-beyond-the-last-layer": (policy(step("language.4", TOP + "\n    until: language.12")), layout()),
    "until-an-illegal-site": (
        policy(step("language.4", TOP + "\n    until: language.9")),
        layout(refused={"language.9": "another sequence joins there"}),
    ),
    "until-over-a-layer-without-attention": (
        policy(step("language.2", TOP + "\n    until: language.6")),
        with_layer(4, heads=0),
    ),
    "inside-a-bypass": (
        policy(step("language.1", "select: {stride: 50%}\n    until: language.3"), step("language.2")),
        layout(),
    ),
    "layer-passed-by": (
        policy(step("language.1", "select: {stride: 50%}\n    until: language.3"), step("language.3")),
        layout(),
    ),
    "tokens-counted-beside-a-bypass": (
        policy(
            step("language.1", "select: {stride: 50%}\n    until: next"),
            step("language.3", "score: uniform\n    select: {afford: 30%}"),
        ),
        layout(),
    ),
    "until-beside-cross-attention": (
        policy(step("language.2", TOP + "\n    until: language.4")),
        with_layer(5, crosses=True),
    ),
    "evict-inside-a-stage": (
        policy(
            step("language.2"),
            step("language.5", TOP + "\n    evict: language.3"),
            head=RENUMBER,
        ),
        layout(),
    ),
    "later-layer": (
        policy(step("language.2", "score: {attention: {of: last, layer: language.5}}\n    select: {top: 3}")),
        layout(),
    ),
    "layer-not-a-name": (
        policy(step("language.2", "score: {attention: {of: last, layer: prev}}\n    select: {top: 3}")),
        layout(),
    ),
    "keeps-nothing": (policy(step("language.2", "select: {stride: {keep: 1%}}")), layout(visual=(16,))),
    "keeps-nothing-of-one-image": (
        policy(step("language.2", "select: {stride: {keep: 10%}}")),
        layout(visual=(64, 9)),
    ),
    "same-site-of-a-model": (policy(step("language.3"), step("language.-1")), layout(language=4)),
    "step-order-of-a-model": (policy(step("language.-1"), step("language.2")), layout(language=4)),
    "chunks-behind-a-step-before-the-decoder": (
        policy(step("projector", "select: {stride: 3}"), head="version: 1\nattention: {chunks: {frames: 4}}"),
        layout(),
    ),
    "unrotated-where-nothing-is-turned": (
        UNROTATED,
        dataclasses.replace(layout(), unturned="it adds positions to its tokens before its first layer"),
    ),
    "unrotated-beside-cross-attention": (UNROTATED, with_layer(3, crosses=True)),
    "unrotated-beside-evict": (policy(step("language.2", NORM + "\n    evict: earlier"), head=UNROTATED), layout()),
    "unrotated-beside-pooled-caches": (UNROTATED + "\ncache: {pool: {tokens: 4}}", layout()),
    "unrotated-beside-reselect": (UNROTATED + "\nreselect: {at: language.3, keep: 30%}", layout()),
    "unrotated-beside-a-turned-score": (policy(step("language.2"), head=UNROTATED), layout()),
    "frequencies-of-a-decoder-that-keeps-them": (
        "version: 1\npositions: {rescale: {factor: 4}}",
        dataclasses.replace(layout(), fixed_frequencies="its frequencies are rescaled already (yarn)"),
    ),
    "frames-outside-the-decoder": (
        policy(step("projector", "score: change\n    select: {top: 3}")),
        layout(),
    ),
    "frames-behind-a-cut": (
        policy(step("language.2"), step("language.4", "score: uniform\n    select: {frames: 50%}")),
        layout(),
    ),
    "pixels-outside-the-decoder": (policy(step("projector", "select: {regions: 50%}")), layout()),
    "pixels-of-no-token": (
        policy(step("language.1", "select: {regions: 50%}")),
        dataclasses.replace(layout(), resampled="a Q-Former makes each visual token of all tokens of the encoder"),
    ),
    "regions-without-a-grid": (
        policy(step("language.1", "select: {regions: 50%}")),
        dataclasses.replace(layout(), in_order=False),
    ),
    "queries-of-a-layer-that-has-run": (
        policy(step("language.2", "score: {mean_query: previous}\n    select: {top: 3}")),
        layout(),
    ),
    "joined-keys-of-the-encoder": (
        policy(
            step("language.2", TOP + "\n    rest: {merge: {by: key_cosine, layer: vision.2, heads: joined}}"),
        ),
        layout(),
    ),
    "average-out-of-reach": (
        policy(step("language.6", "select: {stride: {keep: {average: 20}}}")),
        layout(),
    ),
    "averages-that-differ": (
        policy(
            step("language.2", "select: {stride: {keep: {average: 20}}}"),
            step("language.6", "select: {stride: {keep: {average: 30}}}"),
        ),
        layout(),
    ),
}
