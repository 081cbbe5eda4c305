"""One policy with a cut inside the encoder, behind the projector, at the decoder's entry and in mid-decoder."""

from __future__ import annotations

import pytest
import torch

import support
import tvc
from tvc import api, compiler
from tvc.policy import load_policy, resolve
from tvc.trace.load import load
from tvc.trace.survey import survey
from tvc.verification.check import compare

POLICY = """
version: 1
name: four-cuts
steps:
  - at: vision.2
    score: {attention: {of: cls, layer: previous}}
    select: {top: {keep: 75%}}
    rest: drop
  - at: projector
    score: {norm: {of: feature}}
    select: {top: {keep: 75%}}
    rest: {merge: {targets: {stride: 2}, by: feature_cosine, reduce: mean}}
  - at: language.0
    score: {attention: {of: cls, layer: vision.2}}
    select: {top: {keep: 60%}}
    rest: drop
  - at: language.3
    score: {attention: {of: last, layer: previous}}
    select: {top: {keep: 50%}}
    rest: drop
"""
# 16 patches: 12 stay in the encoder, 9 + 2 merged behind the projector, 6 at the entry, 3 in the middle.
COUNTS = {"vision.2": 12, "projector": 11, "language.0": 6, "language.3": 3}


@pytest.mark.conformance
@pytest.mark.parametrize("targets", [("torch", "ort"), ("torchscript", "pt2")])
def test_four_cuts_in_one_policy(targets: tuple[str, ...]) -> None:
    model, processor = support.build("llava")
    surveyed = survey(load(model, processor=processor).meta, processor)
    resolved = resolve(load_policy(POLICY), surveyed.layout)
    program = compiler.reduce(compiler.trace(model, surveyed, resolved, _quiet), resolved, _quiet)
    inputs = support.inputs("llava", 3)
    visual = support.visual_mask("llava", inputs["input_ids"])
    for target in targets:
        source = load(model, processor=processor)
        compiled = api.finish(source, survey(source.meta, processor), resolved, program, target)
        kept = compiled(**inputs).kept
        for site, count in COUNTS.items():
            for sample in range(3):
                staying = kept[site][sample]
                staying = staying[staying >= 0]
                if site.startswith("language."):
                    staying = staying[visual[sample][staying]]
                assert len(staying) == count, (target, site)
                assert (staying.diff() > 0).all()
        failed = [row for row in compare(compiled, model, inputs, steps=2).comparisons if not row.passed]
        assert not failed, (target, failed[:3])


# More than the 16 patches: all stay, also where targets are asked for beside them.
GENEROUS = """
version: 1
name: generous
steps:
  - at: vision.1
    score: {norm: {of: feature}}
    select: {top: {keep: 10}}
    rest: {merge: {targets: {stride: 9}, by: feature_cosine, reduce: mean}}
  - at: vision.2
    score: {attention: {of: cls, layer: previous}}
    select: {top: {keep: 100}}
    rest: drop
"""


def test_an_encoder_keeps_no_more_tokens_than_there_are() -> None:
    model, processor = support.build("llava")
    inputs = support.inputs("llava", 2)
    compiled = tvc.compile(model, GENEROUS, processor=processor)
    answer = compiled(**inputs)
    assert answer.kept["vision.2"].tolist() == [list(range(16))] * 2
    with torch.no_grad():
        untouched = model(**inputs).logits[:, -1:]
    torch.testing.assert_close(answer.logits, untouched, atol=1e-4, rtol=0)


def _quiet(_line: str) -> None:
    return None
