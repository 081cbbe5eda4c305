"""Visual tokens that are in no slot of the decoder: the text reads them by cross-attention (Mllama).

The reference is the untouched model, in which dropped tokens have the lowest number in the mask that the model's own
code hands to its decoder. Which tiles there are is read off the processor's mask, whose rows say what each token reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared, layout_of
from tvc.errors import InputError, SiteError

TOKENS = 17  # of a tile of 56 pixels: 4 x 4 patches and the class token
QUARTER = {"at": "projector", "score": "random", "select": {"top": {"keep": "25%"}}, "rest": "drop"}
WHOLE = {**QUARTER, "select": {"top": {"keep": "100%"}}}
MERGED = {"at": "projector", "merge": {"bipartite": {"keep": "40%"}}}
SMALL = {"num_hidden_layers": 3, "cross_attention_layers": [1]}


def policy(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "mine", "steps": list(steps)}


@functools.cache
def prepared(small: bool = True) -> Prepared:
    """The family's tiny model; `small` leaves out all blocks that are there twice."""
    record = support.FURTHER["mllama"]
    with pytest.MonkeyPatch.context() as patched:
        if small:
            vision = {"num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [1]}
            config = {
                **record.config,
                "text_config": {**record.config["text_config"], **SMALL},
                "vision_config": {**record.config["vision_config"], **vision, "vision_output_dim": 96},
            }
            patched.setitem(support.FURTHER, "mllama", dataclasses.replace(record, config=config))
        return Prepared(support.build_model("mllama"), processor=support.build_processor("mllama"))


@functools.cache
def compiled(small: bool = True, target: str = "torch", whole: bool = False) -> Any:
    return prepared(small).compile(policy(WHOLE if whole else QUARTER), target, verify=False)


def asked(*samples: tuple[tuple[int, int], ...]) -> dict[str, torch.Tensor]:
    """A padded batch of samples with pictures of these sizes, one of which a tile may hold or several."""
    pictures = [[support.photo(row + i, size) for i, size in enumerate(sizes)] for row, sizes in enumerate(samples)]
    text = ["<s>look" + " at <|image|>" * len(sizes) + " and " * row + "where?" for row, sizes in enumerate(samples)]
    made = prepared().source.processor(images=pictures, text=text, padding=True, return_tensors="pt")
    return dict(made)


def ragged() -> dict[str, torch.Tensor]:
    """Two pictures of one and of four tiles, one of two tiles, and a sample without any."""
    made = asked(((50, 50),), ((56, 56), (131, 97)), ((200, 40),), ((56, 56),))
    made["input_ids"][3][made["input_ids"][3] == 3] = 60
    made["cross_attention_mask"][3] = 0
    made["aspect_ratio_mask"][3] = 0
    made["aspect_ratio_mask"][3, :, 0] = 1
    return made


def tiles(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, V] bool: visual tokens of tiles that some token of the text reads."""
    return inputs["cross_attention_mask"].any(1).repeat_interleave(TOKENS, 2).flatten(1)


@contextlib.contextmanager
def masked(model: Any, inputs: dict[str, torch.Tensor], kept: torch.Tensor) -> Iterator[None]:
    """In the block `model` reads of its visual tokens those whose numbers `kept` [B, K] lists, and padding."""
    gone = tiles(inputs)
    for row, numbers in enumerate(kept):
        gone[row, gone[row].nonzero().flatten()[numbers[numbers >= 0]]] = False

    def hook(_decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = kwargs["cross_attention_mask"]
        mask = mask.masked_fill(gone[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "cross_attention_mask": mask}

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()


def longer(inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with tokens behind them that read what the last one reads."""
    mask = inputs["cross_attention_mask"]
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
        "cross_attention_mask": torch.cat([mask, mask[:, -1:].expand(-1, tokens.shape[1], -1, -1)], 1),
    }


def places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # float32 over three to six blocks


def test_the_projector_is_the_one_site() -> None:
    model = support.build_model("mllama")
    layout = layout_of(model)
    assert [site.name for site in layout.sites if site.legal] == ["projector"]
    language = [site.reason for site in layout.sites if site.name.startswith("language.")]
    assert all("blocks 1, 4 read them by cross-attention" in reason for reason in language)
    plan = tvc.plan(model, policy(QUARTER), text_tokens=10)
    assert [(layer.visual, layer.text) for layer in plan.layers] == [(0, 10), (4, 0), (0, 10), (0, 10), (4, 0), (0, 10)]
    assert plan.compiled.kv_bytes == (4 * 10 + 2 * 4) * 2 * 2 * 16 * 4  # keys and values, 2 heads of 16 floats
    with pytest.raises(SiteError, match="cross-attention"):
        tvc.plan(model, "fastv")


def test_dropped_tokens_are_masked_ones() -> None:
    made, model, inputs = compiled(), prepared().source.model, ragged()
    out = made(**inputs)
    kept = out.kept["projector"]
    pictures = inputs["cross_attention_mask"].any(1).sum(2) * TOKENS  # [B, images] tokens, 0 where there is none
    assert pictures.unique().tolist() == [0, 17, 68]
    assert (kept >= 0).sum(1).tolist() == (pictures // 4).sum(1).tolist()
    padding = (~tiles(inputs)).sum(1)
    assert out.past_key_values.layers[1].keys.shape[2] == int(((kept >= 0).sum(1) + padding).max())
    position_ids = places(inputs["attention_mask"])
    with masked(model, inputs, kept):
        want = model(**inputs, position_ids=position_ids).logits[:, -1:]
    close(out.logits, want)
    # Decode steps, by `generate`; the reference runs once over all that was written.
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    written = made.generate(**inputs, **options, output_logits=True)
    whole = longer(inputs, written.sequences[:, inputs["input_ids"].shape[1] :])
    with masked(model, inputs, kept):
        want = model(**whole, position_ids=places(whole["attention_mask"])).logits[:, -5:-1]
    close(torch.stack(written.logits, 1), want)


def test_text_alone_passes_by_the_layers_that_read_images() -> None:
    made, model = compiled(), prepared().source.model
    text = {"input_ids": torch.tensor([[1, 20, 30, 40]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        close(made(**text).logits, model(**text).logits[:, -1:])
        want = model.generate(**text, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(made.generate(**text, max_new_tokens=4, min_new_tokens=4, do_sample=False), want)


def test_a_later_turn_reads_what_is_left() -> None:
    made, model, inputs = compiled(), prepared().source.model, asked(((56, 56),), ((131, 97),))
    more = torch.tensor([[50, 51, 52], [53, 54, 55]])
    whole = longer(inputs, more)
    read = whole["cross_attention_mask"]
    for mask in (read[:, -3:], read):  # of the turn alone, or of all so far
        first = made(**inputs)
        second = made(
            input_ids=more,
            attention_mask=whole["attention_mask"],
            cross_attention_mask=mask,
            past_key_values=first.past_key_values,
        )
        with masked(model, inputs, first.kept["projector"]):
            want = model(**whole, position_ids=places(whole["attention_mask"])).logits[:, -1:]
        close(second.logits, want)
    shorter = {"cross_attention_mask": inputs["cross_attention_mask"]}  # the prompt's, not lengthened
    for left, slug in ((shorter, "cross-mask"), ({}, "no-cross-mask")):
        cache = made(**inputs).past_key_values
        with pytest.raises(InputError, match=rf"] {slug}: (.|\n)*cross_attention_mask"):
            made(input_ids=more, attention_mask=whole["attention_mask"], past_key_values=cache, **left)


def test_padding_behind_prompts_changes_nothing() -> None:
    made, inputs = compiled(), ragged()
    order = torch.argsort(inputs["attention_mask"], dim=1, descending=True, stable=True)
    moved = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        moved[name] = inputs[name].gather(1, order)
    index = order[:, :, None, None].expand_as(inputs["cross_attention_mask"])
    moved["cross_attention_mask"] = inputs["cross_attention_mask"].gather(1, index)
    assert not moved["attention_mask"][:, -1].all()
    out, want = made(**moved), made(**inputs)
    assert torch.equal(out.kept["projector"], want.kept["projector"])
    close(out.logits, want.logits)


def test_images_without_a_mask_are_refused() -> None:
    """Tiles that an image lacks would be visual tokens like others."""
    inputs = asked(((56, 56),))
    del inputs["cross_attention_mask"]
    with pytest.raises(InputError, match="no-cross-mask"):
        compiled()(**inputs)


def test_a_mask_of_other_images_is_refused() -> None:
    inputs = asked(((56, 56),))
    first = compiled()(**inputs)
    other = torch.ones(1, 1, 2, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="cross-attention"):
        compiled()(input_ids=torch.tensor([[50]]), cross_attention_mask=other, past_key_values=first.past_key_values)


@pytest.mark.conformance
def test_all_kept_is_the_untouched_model() -> None:
    made, model, inputs = compiled(whole=True), prepared().source.model, ragged()
    position_ids = places(inputs["attention_mask"])
    with torch.no_grad():
        close(made(**inputs).logits, model(**inputs, position_ids=position_ids).logits[:, -1:])
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
        assert torch.equal(made.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.conformance
@pytest.mark.parametrize("name", ("divprune", "random", "uniform", "merged"))
@pytest.mark.parametrize("target", ("torch", "ort"))
def test_presets_agree_with_their_definition(name: str, target: str) -> None:
    """`compile` verifies: one sample and a padded batch, prefill and decode steps, every layer's keys and values."""
    chosen = policy(MERGED) if name == "merged" else tvc.load_policy(name).with_settings({"steps.0.at": "projector"})
    assert prepared(small=False).compile(chosen, target).verification is not None


@pytest.mark.conformance
@pytest.mark.parametrize("target", ("ort", "pt2", "torchscript"))
def test_an_artifact_reads_across_too(target: str, tmp_path: Any) -> None:
    made, inputs = compiled(target=target), ragged()
    made.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(tvc.load(tmp_path / "out")(**inputs).logits, made(**inputs).logits, atol=0, rtol=0)
    close(made(**inputs).logits, compiled()(**inputs).logits)
