"""Decode steps that choose which cached visual tokens to attend to: against the untouched model under masks that are
written out here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import support
from tvc.api import Prepared
from tvc.verification.check import compare

Inputs = dict[str, torch.Tensor]
CUT, FIRST, KEEP, ALIKE = 1, 3, 3, 0.9  # of ten visual tokens that a decode step finds it attends to three


def policy(**more: Any) -> dict[str, Any]:
    score = {"attention": {"of": "last", "layer": "previous"}}
    step = {"at": f"language.{CUT}", "score": score, "select": {"top": {"keep": "80%"}}}
    rule = {"at": f"language.{FIRST}", "keep": f"{10 * KEEP}%", "unless_alike": ALIKE}
    return {"version": 1, "steps": [step], "reselect": {**rule, **more}}


class Made:
    def __init__(self, whole: bool) -> None:
        self.whole = whole  # steps alike attend to everything
        self.model, self.processor = support.build("llava")
        # The same weights; its attention is written out, so that it can be looked at.
        self.plain = support.build_model("llava")
        self.plain.set_attn_implementation("eager")
        self.prepared = Prepared(self.model, processor=self.processor)
        self.compiled = self.prepared.compile(policy(bug_compatible=whole), verify=False)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.conformance)])
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.param)


def untouched(made: Made, inputs: Inputs, parts: Sequence[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, list[bool]]:
    """([B, S, vocabulary] of the untouched model, and of every step behind another whether the two are alike).

    `parts`: what came in one call each, as (columns, those that the compiled model kept at the cut).
    """
    valid = inputs["attention_mask"].bool()
    visual = support.visual_mask("llava", inputs["input_ids"]) & valid
    size = valid.shape[1]
    columns, itself = torch.arange(size), torch.eye(size, dtype=torch.bool)
    inputs = {**inputs, "position_ids": (valid.long().cumsum(1) - 1).clamp(min=0)}  # padding is not counted
    seen = ((columns <= columns[:, None])[None] & valid[:, None, :]) | itself  # pads see themselves: finite numbers
    masks = [seen.clone() for _ in made.plain.get_decoder().layers]
    start = 0
    for length, kept in parts:
        inside = (columns >= start) & (columns < start + length)
        for row in range(len(valid)):
            dropped = inside & ~torch.isin(columns, kept[row])
            visual[row] &= ~dropped
            for mask in masks[CUT:]:
                mask[row] &= ~dropped | itself
        start += length
    with (
        torch.no_grad(),
        support.masked(made.plain, masks),
    ):  # rows of this layer do not hang on what later layers attend to
        paid = made.plain(**inputs, output_attentions=True).attentions[FIRST - 1].mean(1)
    alike = []
    for row in range(len(valid)):
        start, before, chosen = 0, None, []
        for length, _ in parts:
            inside = slice(start, start + length)
            start += length
            if int(valid[row, inside].sum()) != 1 or bool(visual[row, inside].any()):
                before = None
                continue
            there = visual[row, :start].nonzero().flatten().tolist()
            now = paid[row, start - 1, there]
            same = before is not None and float(torch.cosine_similarity(now, before, 0)) >= ALIKE
            alike += [same] if before is not None else []
            if not same:
                chosen = sorted(there, key=lambda column, own=paid[row, start - 1]: (-own[column], column))
                chosen = chosen[: len(there) * KEEP // 10]
            elif made.whole:
                chosen = there
            for mask in masks[FIRST:]:
                mask[row, start - 1, [column for column in there if column not in chosen]] = False
            before = now
    with torch.no_grad(), support.masked(made.plain, masks):
        return made.plain(**inputs).logits, alike


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-5)


def asked(inputs: Inputs, new: int, **more: Any) -> dict[str, Any]:
    image = support.tokenizer("llava").convert_tokens_to_ids(support.family_record("llava").visual)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "suppress_tokens": [image]}
    return {**inputs, **options, "return_dict_in_generate": True, **more}


def behind(inputs: Inputs, sequences: torch.Tensor) -> Inputs:
    """The inputs with what was generated behind them."""
    more = sequences.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    return {**inputs, "input_ids": sequences, "attention_mask": mask}


def singles(sequences: torch.Tensor, start: int) -> list[tuple[int, torch.Tensor]]:
    return [(1, torch.full((len(sequences), 1), column)) for column in range(start, sequences.shape[1])]


def test_a_padded_batch_decodes_as_the_untouched_model_under_masks(made: Made) -> None:
    inputs = support.inputs("llava", 3)
    prompt = inputs["input_ids"].shape[1]
    out = made.compiled.generate(**asked(inputs, 9, output_logits=True))
    kept = made.compiled(**inputs).kept[f"language.{CUT}"]
    fed = out.sequences[:, :-1]
    want, alike = untouched(made, behind(inputs, fed), [(prompt, kept), *singles(fed, prompt)])
    close(torch.stack(out.logits, 1), want[:, prompt - 1 :])
    assert {True, False} == set(alike)


def test_each_sample_of_a_batch_decides_alone(made: Made) -> None:
    together = made.compiled.generate(**asked(support.inputs("llava", 3), 6, output_logits=True))
    alone = made.compiled.generate(**asked(support.inputs("llava", 1), 6, output_logits=True))
    close(torch.stack(together.logits, 1)[:1], torch.stack(alone.logits, 1))


def test_caches_hold_everything_and_steps_attend_to_a_share(made: Made) -> None:
    inputs = support.inputs("llava", 3)
    first = made.compiled(**inputs)
    step = made.compiled(
        input_ids=torch.full((3, 1), 40),
        attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        past_key_values=first.past_key_values,
    )
    one, two = first.past_key_values, step.past_key_values
    assert bool(one.marks["chosen.1"].all())
    assert not bool(one.marks["seen.1"].any())
    visual = int(one.marks["visual.1"][0].sum())
    assert visual == int(support.visual_mask("llava", inputs["input_ids"])[0].sum()) * 8 // 10
    hidden = (~two.marks["chosen.1"]).sum(1)
    assert hidden.tolist() == [visual - visual * KEEP // 10] * 3
    assert not bool((~two.marks["chosen.1"] & ~two.marks["visual.1"]).any())
    assert [layer.keys.shape[2] for layer in two.layers] == [layer.keys.shape[2] + 1 for layer in one.layers]


def conversation(
    made: Made, whole: Inputs, lengths: Sequence[int], pixels: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """What each call answers, and (slots, what the cut kept) of each."""
    got, parts, _ = support.conversation(made.compiled, whole, lengths, pixels)
    return got, [(length, kept[f"language.{CUT}"]) for length, kept in parts]


def test_a_later_turn_is_read_whole_and_starts_anew(made: Made) -> None:
    """Prompts, two steps, a turn in which one sample has one token, two more steps."""
    inputs = support.inputs("llava", 2)
    prompt = inputs["input_ids"].shape[1]
    more = torch.arange(40, 47).expand(2, -1) + torch.tensor([[0], [9]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
    mask[0, prompt + 2 : prompt + 4] = 0
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": mask}
    lengths = (prompt, 1, 1, 3, 1, 1)
    got, parts = conversation(made, whole, lengths, {0: inputs["pixel_values"]})
    want, _ = untouched(made, whole, parts)
    ends = torch.tensor(lengths).cumsum(0) - 1
    close(got, want[:, ends])


def test_an_image_of_a_later_turn_joins(made: Made) -> None:
    both, cut = support.two_images()
    ids = torch.cat([both["input_ids"][:, :cut], torch.tensor([[50]]), both["input_ids"][:, cut:]], 1)
    ids = torch.cat([ids, torch.tensor([[41, 43]])], 1)
    whole, pixels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, both["pixel_values"]
    edges = [0, cut, cut + 1, ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1]]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    got, parts = conversation(made, whole, lengths, {0: pixels[:1], 2: pixels[1:]})
    want, _ = untouched(made, {**whole, "pixel_values": pixels}, parts)
    # The first part ends in a visual token, which may have been dropped: it answers nothing.
    close(got[:, 1:], want[:, [end - 1 for end in edges[2:]]])


def test_beams_keep_their_own_choices(made: Made) -> None:
    inputs = support.inputs("llava", 2)
    prompt = inputs["input_ids"].shape[1]
    out = made.compiled.generate(**asked(inputs, 5, num_beams=3, length_penalty=0.0, output_scores=True))
    kept = made.compiled(**inputs).kept[f"language.{CUT}"]
    parts = [(prompt, kept), *singles(out.sequences, prompt)]
    logits = untouched(made, behind(inputs, out.sequences), parts)[0][:, prompt - 1 : -1]
    image = support.tokenizer("llava").convert_tokens_to_ids(support.family_record("llava").visual)
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, prompt:, None])
    assert image not in out.sequences[:, prompt:]
    close(out.sequences_scores, chosen.sum((1, 2)))


@pytest.mark.conformance
def test_attending_to_all_equals_no_reselection(made: Made) -> None:
    given = asked(support.inputs("llava", 3), 6, output_logits=True)
    every = made.prepared.compile(policy(keep="100%"), verify=False).generate(**given)
    plain = {name: value for name, value in policy().items() if name != "reselect"}
    none = made.prepared.compile(plain, verify=False).generate(**given)
    for one, other in zip(every.logits, none.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.conformance
def test_verification_sees_steps_that_attend_to_all(made: Made) -> None:
    plain = made.prepared.compile({**policy(keep="100%")}, verify=False)
    plain.policy = made.compiled.policy
    rows = compare(plain, made.model, support.inputs("llava"), steps=3).comparisons
    wrong = {row.output for row in rows if not row.passed}
    assert {"reselection", "logits.1"} <= wrong
    assert "logits.0" not in wrong


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("family", "target"),
    [
        *(("llava", target) for target in ("ort", "pt2", "torchscript")),
        *((family, target) for family in ("qwen2_5_vl", "gemma3") for target in ("torch", "ort")),
        ("lfm2_vl", "torch"),
    ],
)
def test_families_and_targets_agree_with_the_definition(family: str, target: str) -> None:
    """Positions on several axes, windows and spans, layers without attention; images of several sizes in a batch."""
    model, processor = support.build(family)
    prepared = Prepared(model, processor=processor, inputs=None if processor is not None else support.inputs(family, 2))
    rule = {"at": "language.3", "keep": "30%", "unless_alike": ALIKE}
    compiled = prepared.compile({"version": 1, "reselect": rule}, target, verify=False)
    for batch in (1, 3):
        rows = compare(compiled, model, support.inputs(family, batch)).comparisons
        assert not [row for row in rows if not row.passed]
        assert "reselection" in {row.output for row in rows}
