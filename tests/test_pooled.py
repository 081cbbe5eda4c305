"""Caches that hold means of frames once a prompt has been read: the untouched model, its cache rewritten by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import support
import tvc
from tvc.api import Prepared
from tvc.errors import SiteError
from tvc.kernels.op import OPS
from tvc.verification.check import compare

GROUP, PICTURES, EACH = (
    3,
    5,
    16,
)  # an image is a frame: five groups of three, and one token by itself
POOL = {"version": 1, "cache": {"pool": {"tokens": GROUP, "chunk": 2, "first": 1}}}
CUT = {"score": {"attention": {"of": "last"}}, "select": {"top": "50%"}}


@pytest.fixture(scope="module")
def made() -> tuple[Any, Prepared]:
    model, processor = support.build("llava")
    return model, Prepared(model, processor=processor)


def groups(visual: torch.Tensor, whole: set[int]) -> list[list[int]]:
    """The columns of each entry of a sample's caches; `whole` are the pictures that stay as they are."""
    made, seen = [], 0
    for column, shows in enumerate(visual.tolist()):
        if not shows:
            made.append([column])
            continue
        picture, place = divmod(seen, EACH)
        if picture in whole or place % GROUP == 0:
            made.append([column])
        else:
            made[-1].append(column)
        seen += 1
    return made


def by_hand(model: Any, inputs: dict[str, torch.Tensor], whole: set[int], turns: list[torch.Tensor]) -> list[Any]:
    """Logits of one sample without padding and of the turns behind it, each on the cache as it should be."""
    answers = []
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        answers.append(out.logits[:, -1])
        members = groups(support.visual_mask("llava", inputs["input_ids"])[0], whole)
        cache = DynamicCache()
        for layer, held in enumerate(out.past_key_values.layers):
            keys, values = (torch.stack([t[:, :, m].mean(2) for m in members], 2) for t in (held.keys, held.values))
            cache.update(keys, values, layer)
        place = inputs["input_ids"].shape[1]
        for tokens in turns:
            positions = torch.arange(place, place + tokens.shape[1])[None]
            out = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            answers.append(out.logits[:, -1])
            place += tokens.shape[1]
    return [answers, [held.keys.shape[2] for held in cache.layers]]


@pytest.mark.parametrize("target", ["torch", pytest.param("ort", marks=pytest.mark.conformance)])
def test_turns_behind_a_prompt_see_means(made: tuple[Any, Prepared], target: str) -> None:
    """A padded batch; the first two pictures stay as they are. The untouched model runs each sample alone."""
    model, prepared = made
    compiled = prepared.compile(POOL, target, verify=False)
    inputs = support.inputs("llava", 3, images=PICTURES)
    turns = [torch.tensor([[5, 6, 7]] * 3), torch.tensor([[8]] * 3)]
    answer = compiled(**inputs)
    got, mask = [answer.logits[:, 0]], inputs["attention_mask"]
    for tokens in turns:
        mask = torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)
        answer = compiled(input_ids=tokens, attention_mask=mask, past_key_values=answer.past_key_values)
        got.append(answer.logits[:, 0])
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "pixel_values": inputs["pixel_values"][row * PICTURES : (row + 1) * PICTURES],
        }
        want, lengths = by_hand(model, alone, {0, 1}, [tokens[:1] for tokens in turns])
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one[row], other[0], atol=2e-5 * float(other.abs().max()), rtol=0)
        places = answer.past_key_values.key_positions[0][row]
        assert [int((places >= 0).sum())] * 6 == lengths


@pytest.mark.conformance
def test_the_chunks_most_like_the_question_stay(made: tuple[Any, Prepared]) -> None:
    """Pictures of which one is told by the embeddings: its chunk alone keeps all of its tokens."""
    model, prepared = made
    policy = {"version": 1, "cache": {"pool": {"tokens": GROUP, "best": 2}}}
    compiled = prepared.compile(policy, verify=False)
    inputs = support.inputs("llava", 2, images=PICTURES)
    cache = compiled(**inputs).past_key_values
    places = cache.key_positions[0]
    visual = support.visual_mask("llava", inputs["input_ids"])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        text = model.get_input_embeddings()(inputs["input_ids"])
    for row in range(2):
        asked = text[row, visual[row].nonzero().max() + 1 :].mean(0)
        likeness = [
            torch.nn.functional.cosine_similarity(features[row * PICTURES + n], asked[None]).mean()
            for n in range(PICTURES)
        ]
        best = sorted(range(PICTURES), key=lambda n: -likeness[n])[:2]
        want = [group[0] for group in groups(visual[row], set(best)) if inputs["attention_mask"][row, group[0]]]
        assert [place for place in places[row].tolist() if place >= 0] == want
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    compiled(input_ids=torch.tensor([[8]] * 2), attention_mask=mask, past_key_values=cache)
    graphs = compiled.engine.run._modules
    prompt, step = ({node.target for node in graphs[f"decoder{name}"].graph.nodes} for name in ("", ", text only"))
    pooling = {OPS["pool_cache"].reference, OPS["evict"].reference}
    assert pooling <= prompt
    assert pooling.isdisjoint(step)  # a decode step pools nothing


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("lfm2_vl", "torch"),  # convolutions among its layers; its vision path is no graph
        *((name, "torch") for name in ("gemma3", "llava_onevision", "qwen2_5_vl")),
        *(("llava", target) for target in ("torch", "ort", "pt2", "torchscript")),
        ("qwen2_5_vl", "ort"),
    ],
)
def test_targets_and_families_beside_cuts_that_evict(family: str, target: str) -> None:
    model, processor = support.build(family)
    steps = [{"at": f"language.{layer}", **CUT, "score": "norm", "evict": "language.1"} for layer in (2, 4)]
    options = {"attention": {"chunks": {"frames": 1, "previous": 1}}}
    policy = {"version": 1, "cache": {"pool": {"tokens": 3, "last": 1, "best": 1}}, **options, "steps": steps}
    sample = None if processor is not None else support.inputs(family, 2)
    compiled = tvc.compile(model, policy, target, processor=processor, inputs=sample, verify=False)
    for batch in (1, 3):
        given = support.inputs(family, batch, images=PICTURES)
        assert not [row for row in compare(compiled, model, given, steps=3).comparisons if not row.passed]


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["torch", "ort"])
def test_a_video_by_the_preset(target: str) -> None:
    model, processor = support.build("qwen2_5_vl")
    policy = tvc.load_policy("video-xl-2", ["chunk=2", "previous=1", "best=1"])
    compiled = tvc.compile(model, policy, target, processor=processor, verify=False)
    videos, extra = support.by_hand.video_tokens(model, [(11, 4, 8), (5, 8, 8)])
    rows = [[1, 105, 106, *videos[0], 130, 131], [1, 107, *videos[1], 132, 133, 134]]
    inputs = support.by_hand.with_kinds(model, rows, extra)
    assert tvc.verify(compiled, model, inputs, steps=3).passed
    held = [layer.keys.shape[2] for layer in compiled(**inputs).past_key_values.layers]
    assert max(held) < inputs["input_ids"].shape[1]


@pytest.mark.conformance
def test_verification_sees_caches_that_were_not_pooled(made: tuple[Any, Prepared]) -> None:
    model, prepared = made
    plain = prepared.compile({"version": 1, "attention": {"chunks": {"frames": 99}}}, verify=False)
    plain.policy = prepared.compile(POOL, verify=False).policy
    rows = compare(plain, model, support.inputs("llava", images=PICTURES), steps=3).comparisons
    wrong = {row.output for row in rows if not row.passed}
    assert {"cache.0", "logits.1", "logits.2"} <= wrong
    assert "logits.0" not in wrong  # the prompt itself is read with everything there


@pytest.mark.conformance
def test_beams_and_artifacts_carry_pooled_caches(made: tuple[Any, Prepared], tmp_path: Any) -> None:
    _, prepared = made
    compiled = prepared.compile(POOL, verify=False)
    compiled.save_pretrained(tmp_path / "out")
    again = tvc.load(tmp_path / "out")
    inputs = support.inputs("llava", 2, images=PICTURES)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    first = compiled.generate(**copy.copy(inputs), **options)
    assert torch.equal(again.generate(**inputs, **options), first)


def test_text_that_reads_across_is_refused() -> None:
    model, processor = support.build("mllama")
    with pytest.raises(SiteError, match="no slot of the sequence"):
        tvc.compile(model, POOL, processor=processor, verify=False)
