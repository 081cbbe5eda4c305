"""Text that reads visual keys unrotated: an attention written out here over the untouched model's own projections."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

import support
import tvc
from tvc.api import Prepared
from tvc.errors import SiteError, TraceError
from tvc.kernels import OPS
from tvc.policy import load_policy
from tvc.report.cost import attention_flops
from tvc.report.schedule import plan_policy
from tvc.verification.check import compare

Inputs = dict[str, torch.Tensor]
RULE = {"version": 1, "attention": {"unrotated": "visual"}}
CUT = {"at": "language.2", "score": {"norm": {}}, "select": {"top": "50%"}}


@pytest.fixture(scope="module")
def made() -> tuple[Any, Prepared]:
    model, processor = support.build("llava")
    return model, Prepared(model, processor=processor)


@pytest.fixture(scope="module")
def compiled(made: tuple[Any, Prepared]) -> Any:
    return made[1].compile({**RULE, "steps": [CUT]}, verify=False)


@contextlib.contextmanager
def by_pairs(model: Any, masks: Sequence[torch.Tensor], raw: torch.Tensor) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Every decoder layer attends under a mask of its own, [B, S, S] bool.

    Pairs `raw` [B, S, S] bool have the logit of what the projections give, the others that of what rotations make of
    it. Gives the keys [B, G, S, d] of every layer, raw and turned.
    """
    rotate, layers = modeling_llama.apply_rotary_pos_emb, iter(masks)
    seen: list[torch.Tensor] = []
    keys: dict[str, list[torch.Tensor]] = {"raw": [], "turned": []}

    def noted(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **more: Any) -> Any:
        seen[:] = [query, key]
        return rotate(query, key, cos, sin, **more)

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        keys["raw"].append(seen[1])
        keys["turned"].append(key)
        heads = [part.repeat_interleave(module.num_key_value_groups, 1).double() for part in (key, seen[1], value)]
        turned = torch.einsum("bhqd,bhnd->bhqn", query.double(), heads[0])
        plain = torch.einsum("bhqd,bhnd->bhqn", seen[0].double(), heads[1])
        logits = torch.where(raw[:, None], plain, turned) / query.shape[3] ** 0.5
        weights = logits.masked_fill(~next(layers)[:, None], float("-inf")).softmax(-1)
        return torch.einsum("bhqn,bhnd->bqhd", weights, heads[2]).to(value.dtype).contiguous(), None

    configs = {id(part.config): part.config for part in model.get_decoder().modules() if hasattr(part, "config")}
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(modeling_llama, "apply_rotary_pos_emb", noted)
        patched.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS, "written_out", attend)
        for config in configs.values():
            patched.setattr(config, "_attn_implementation_internal", "written_out")
        yield keys


def everything(valid: torch.Tensor) -> torch.Tensor:
    """[B, S, S] bool: causal, without padding; pads see themselves, so that their numbers stay finite."""
    size = valid.shape[1]
    return (torch.ones(size, size).tril().bool() & valid[:, None, :].bool()) | torch.eye(size, dtype=torch.bool)


def untouched(
    model: Any, whole: Inputs, parts: Sequence[tuple[int, torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """[B, S, vocabulary] by the definition, and keys; `parts`: (slots, what the cut kept) of one call after another.

    Visual tokens read those that came in their own call turned, and all earlier ones raw, as text does.
    """
    valid, visual = whole["attention_mask"].bool(), support.visual_mask("llava", whole["input_ids"])
    size, start = valid.shape[1], 0
    columns, itself = torch.arange(size), torch.eye(size, dtype=torch.bool)
    masks, call = [everything(valid) for _ in model.get_decoder().layers], torch.zeros(size)
    for number, (length, kept) in enumerate(parts):
        inside = (columns >= start) & (columns < start + length)
        call[inside] = number
        for row in range(len(valid)):
            for mask in masks[2:]:
                mask[row] &= ~(inside & ~torch.isin(columns, kept[row])) | itself
        start += length
    turned = ~visual[:, None, :] | (visual[:, :, None] & (call[:, None] == call))
    places = (valid.long().cumsum(1) - 1).clamp(min=0)  # padding is not counted
    with by_pairs(model, masks, ~turned) as keys:
        return model(**whole, position_ids=places).logits, keys


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5 * float(want.abs().max()))


def test_a_padded_batch_steps_and_a_later_turn_equal_the_definition(made: tuple[Any, Prepared], compiled: Any) -> None:
    inputs = support.inputs("llava", 3)
    prompt, more = inputs["input_ids"].shape[1], torch.arange(40, 46).expand(3, -1) + torch.tensor([[0], [9], [4]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    mask[0, prompt + 2 : prompt + 4] = 0
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": mask}
    lengths = (prompt, 1, 1, 3, 1)
    got, parts, cache = support.conversation(compiled, whole, lengths, {0: inputs["pixel_values"]})
    want, keys = untouched(made[0], whole, [(length, kept["language.2"]) for length, kept in parts])
    close(got, want[:, torch.tensor(lengths).cumsum(0) - 1])
    visual = support.visual_mask("llava", whole["input_ids"])
    for layer, held in enumerate(cache.layers):  # raw where they are visual, turned where they are text
        places = cache.key_positions[int(layer >= 2)]
        wanted = torch.where(visual[:, None, :, None], keys["raw"][layer], keys["turned"][layer])
        index = places.clamp(min=0)[:, None, :, None].expand(held.keys.shape)
        real = (places >= 0)[:, None, :, None]
        close(held.keys * real, wanted.gather(2, index) * real)
    plain = made[0](**whole).logits.detach()[:, -1]
    assert (plain - want[:, -1]).abs().max() > 0.01 * plain.abs().max()


def test_visual_tokens_of_a_later_turn_read_earlier_ones_raw(made: tuple[Any, Prepared], compiled: Any) -> None:
    both, cut = support.two_images()
    ids = torch.cat([both["input_ids"][:, :cut], torch.tensor([[50]]), both["input_ids"][:, cut:]], 1)
    ids = torch.cat([ids, torch.tensor([[41, 43]])], 1)
    whole, pixels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, both["pixel_values"]
    edges = [0, cut, cut + 1, ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1]]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    got, parts, _ = support.conversation(compiled, whole, lengths, {0: pixels[:1], 2: pixels[1:]})
    calls = [(length, kept["language.2"]) for length, kept in parts]
    want, _ = untouched(made[0], {**whole, "pixel_values": pixels}, calls)
    # The first part ends in a visual token, which may have been dropped: it answers nothing.
    close(got[:, 1:], want[:, [end - 1 for end in edges[2:]]])


def test_beams_take_along_which_of_their_keys_are_raw(made: tuple[Any, Prepared], compiled: Any) -> None:
    inputs = support.inputs("llava", 2)
    scores, whole = support.beams(compiled, inputs, 4)
    kept, prompt = compiled(**inputs).kept["language.2"], inputs["input_ids"].shape[1]
    steps = [(1, torch.full((2, 1), column)) for column in range(prompt, prompt + 4)]
    want, _ = untouched(made[0], whole, [(prompt, kept), *steps])
    close(scores, support.worth(want, whole["input_ids"], 4))


def test_a_chunk_of_text_makes_no_second_keys(compiled: Any) -> None:
    """In PyTorch a decode step runs a graph of its own, in which all new keys are turned."""
    answer = compiled(**support.inputs("llava"))
    compiled(input_ids=torch.tensor([[40]]), past_key_values=answer.past_key_values)
    graphs = compiled.engine.run._modules
    whole, text = (
        sum(node.target is OPS["unrotated_keys"].reference for node in graphs[name].graph.nodes)
        for name in ("decoder", "decoder, text only")
    )
    assert (whole, text) == (6, 0)


def test_plans_count_the_second_logits(made: tuple[Any, Prepared]) -> None:
    layout = made[1].survey.layout
    plain, twice = (plan_policy(load_policy({"version": 1, "steps": [CUT], **more}), layout) for more in ({}, RULE))
    once = sum(
        attention_flops(one, row.tokens, row.tokens) for one, row in zip(layout.language, plain.layers, strict=True)
    )
    assert twice.compiled.prefill - plain.compiled.prefill == once // 2
    assert twice.dense == plain.dense
    assert twice.compiled.kv_bytes == plain.compiled.kv_bytes


@pytest.mark.parametrize("family", ["mllama", "gemma3n"])
def test_decoders_that_do_not_turn_visual_keys_of_their_own_are_refused(family: str) -> None:
    model, processor = support.build(family)
    given = support.inputs(family, 2) if processor is None else None
    with pytest.raises(SiteError, match="nothing-rotated"):
        tvc.compile(model, RULE, processor=processor, inputs=given, verify=False)


@pytest.mark.conformance
def test_keys_that_are_made_in_another_way_are_refused() -> None:
    model, processor = support.build("mistral4")
    with pytest.raises(TraceError, match="unknown-keys"):
        tvc.compile(model, RULE, processor=processor, verify=False)


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_with_the_definition(dtype: torch.dtype) -> None:
    model, processor = support.build("llava")
    compiled = tvc.compile(model.to(dtype), {**RULE, "steps": [CUT]}, processor=processor, verify=False)
    rows = compare(compiled, model, support.inputs("llava", 3), steps=3).comparisons
    assert not [row for row in rows if not row.passed]


@pytest.mark.conformance
def test_verification_sees_keys_that_are_turned(made: tuple[Any, Prepared], compiled: Any) -> None:
    plain = made[1].compile({"version": 1, "steps": [CUT]}, verify=False)
    plain.policy = compiled.policy
    rows = compare(plain, made[0], support.inputs("llava"), steps=2).comparisons
    assert {row.output for row in rows if not row.passed} >= {"key.0", "logits.0", "logits.1"}


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("family", "target"),
    [
        *((name, "torch") for name in ("gemma3", "llava_onevision", "qwen2_5_vl", "paligemma")),
        *(("llava", target) for target in ("ort", "pt2", "torchscript")),
        *((name, "ort") for name in ("gemma3", "qwen2_5_vl")),
    ],
)
def test_targets_and_families_agree_with_the_definition(family: str, target: str) -> None:
    """Positions on several axes, windows and spans, features in several parts."""
    model, processor = support.build(family)
    compiled = tvc.compile(model, {**RULE, "steps": [CUT]}, target, processor=processor, verify=False)
    for batch in (1, 3):
        rows = compare(compiled, model, support.inputs(family, batch), steps=3).comparisons
        assert not [row for row in rows if not row.passed]


@pytest.mark.conformance
@pytest.mark.parametrize(
    "more",
    [
        {"positions": {"stride": 64}},
        {"positions": {"rescale": {"factor": 4}}},
        {"positions": "renumber", "steps": [CUT]},
        {"steps": [{"at": "projector", "select": {"stride": 5}}, {**CUT, "rest": "merge"}]},
        {"steps": [{"at": "vision.2", "select": {"stride": "50%"}}, {"at": "language.3", "exit": {"when": "always"}}]},
    ],
    ids=["stride", "rescale", "renumber", "projector", "exit"],
)
def test_other_rules_beside_it(made: tuple[Any, Prepared], more: dict[str, Any]) -> None:
    compiled = made[1].compile({**RULE, **more}, verify=False)
    rows = compare(compiled, made[0], support.inputs("llava", 3), steps=3).comparisons
    assert not [row for row in rows if not row.passed]
