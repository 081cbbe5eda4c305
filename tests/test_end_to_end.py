"""Compiled models used as their originals are: `generate` in all its modes, later turns, batches, types."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import support
import tvc
from tvc.errors import ArgumentError
from tvc.runtime.cache import StagedCache

# A policy that cuts, compacts and keeps everything: what remains is the untouched model.
IDENTITY = ("fastv", ("keep=100%",))
# Their choice looks at no text, so that it is the same whatever comes later.
RANDOM = ("random", ("at=language.2", "keep=50%"))
UNIFORM = ("uniform", ("at=language.2", "keep=50%"))


@pytest.fixture(scope="session")
def identity(artifacts):
    policy, settings = IDENTITY
    return artifacts("llava", policy, settings=settings)


@pytest.fixture(scope="session")
def reduced(artifacts):
    return lambda family: artifacts(family, RANDOM[0], settings=RANDOM[1])


def right_padded(inputs):
    """The batch with each row's padding moved from its front to its end."""
    moved = dict(inputs)
    order = torch.argsort(1 - inputs["attention_mask"], dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in moved:
            moved[name] = moved[name].gather(1, order)
    return moved


def words(*numbers):
    """A row of ordinary text tokens."""
    return torch.tensor([[40 + number for number in numbers]])


def joined(inputs, *more):
    """`inputs` with text appended to every row."""
    batch = inputs["input_ids"].shape[0]
    ids = torch.cat([inputs["input_ids"], *(part.expand(batch, -1) for part in more)], 1)
    extra = ids.shape[1] - inputs["input_ids"].shape[1]
    made = {**inputs, "input_ids": ids}
    made["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in made:
            made[name] = torch.nn.functional.pad(made[name], (0, extra))
    return made


def without_image(inputs):
    return {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}


# generate ------------------------------------------------------------------------------------------------------------


class AfterThree(StoppingCriteria):
    """Stops once three tokens were written."""

    def __init__(self, prompt):
        self.prompt = prompt

    def __call__(self, input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.prompt + 3)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "top-k": {"do_sample": True, "top_k": 5},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.7},
    "bad words": {"do_sample": False, "bad_words_ids": [[60], [97], [100], [200], [201], [202]]},
    "at least": {"do_sample": False, "min_new_tokens": 5, "eos_token_id": list(range(3, 400))},
    "without a cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_writes_the_tokens_of_the_untouched_model(identity, mode, batch):
    inputs = support.inputs("llava", batch=batch)
    assert bool(inputs["attention_mask"].all()) == (batch == 1)
    answers = []
    for model in (identity.model, identity.compiled):
        torch.manual_seed(7)
        answers.append(model.generate(**inputs, max_new_tokens=8, **MODES[mode]))
    assert torch.equal(*answers)
    assert answers[0].shape[1] > inputs["input_ids"].shape[1]


def test_padding_on_the_right_changes_no_token(identity):
    """The untouched model itself would go on from the padding, so it is given the padding on the left."""
    inputs = support.inputs("llava", batch=3)
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = identity.model.generate(**inputs, **options)[:, length:]
    got = identity.compiled.generate(**right_padded(inputs), **options)[:, length:]
    assert torch.equal(wanted, got)


def test_scores_and_logits_are_those_of_the_untouched_model(identity):
    inputs = support.inputs("llava", batch=2)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    wanted, got = (
        model.generate(**inputs, **options, output_scores=True, output_logits=True, repetition_penalty=1.2)
        for model in (identity.model, identity.compiled)
    )
    assert torch.equal(wanted.sequences, got.sequences)
    assert len(got.scores) == len(got.logits) == 5
    for kind in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(getattr(got, kind)), torch.stack(getattr(wanted, kind)))
    assert isinstance(got.past_key_values, StagedCache)


def test_an_end_token_stops_each_sample_on_its_own(identity):
    inputs = support.inputs("llava", batch=3)
    length = inputs["input_ids"].shape[1]
    free = identity.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, length:]
    end = int(free[0, 2])
    wanted, got = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)
        for model in (identity.model, identity.compiled)
    )
    assert torch.equal(wanted, got)
    assert (got[0, length + 3 :] == 0).all()
    assert not torch.equal(got[:, length:], free[:, : got.shape[1] - length])


def test_stopping_criteria_stop(identity):
    inputs = support.inputs("llava", batch=2)
    length = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([AfterThree(length)])
    out = identity.compiled.generate(**inputs, max_new_tokens=20, do_sample=False, stopping_criteria=criteria)
    assert out.shape[1] == length + 3
    begun = time.perf_counter()
    out = identity.compiled.generate(**inputs, max_new_tokens=900, do_sample=False, max_time=0.3, eos_token_id=None)
    assert length < out.shape[1] < length + 900
    assert time.perf_counter() - begun < 30


def test_stop_strings_stop_where_the_untouched_model_stops(identity):
    inputs = support.inputs("llava")
    tokenizer = identity.processor.tokenizer
    free = identity.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    texts = [tokenizer.decode([token]) for token in free.tolist()]
    stop = next(text for text in texts[2:] if text.isascii() and text.strip())
    wanted, got = (
        model.generate(**inputs, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
        for model in (identity.model, identity.compiled)
    )
    assert torch.equal(wanted, got)
    assert got.shape[1] < inputs["input_ids"].shape[1] + 12


class Listener:
    """A streamer that remembers."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard += value.reshape(-1).tolist()

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token(reduced):
    inputs = support.inputs("llava")
    listener = Listener()
    out = reduced("llava").compiled.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=listener)
    assert listener.heard == out[0].tolist()
    assert listener.ended


# Calls ---------------------------------------------------------------------------------------------------------------


def test_a_call_gives_the_last_logits_of_the_untouched_model(identity):
    for inputs in (support.inputs("llava"), support.inputs("llava", batch=3), support.inputs("llava", images=2)):
        with torch.no_grad():
            wanted = identity.model(**inputs).logits[:, -1:]
        torch.testing.assert_close(identity.compiled(**inputs).logits, wanted, rtol=1e-5, atol=2e-5)


def test_padding_on_the_right_ends_at_each_samples_last_token(identity):
    inputs = right_padded(support.inputs("llava", batch=3))
    last = inputs["attention_mask"].sum(1) - 1
    with torch.no_grad():
        wanted = identity.model(**inputs).logits[torch.arange(3), last]
    torch.testing.assert_close(identity.compiled(**inputs).logits[:, 0], wanted, rtol=1e-5, atol=2e-5)


def test_text_alone_is_plain_text(identity, reduced):
    ids = torch.cat([torch.tensor([[1]]), words(*range(9))], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for made in (identity, reduced("llava")):
        with torch.no_grad():
            wanted = made.model(**inputs).logits[:, -1:]
        out = made.compiled(**inputs)
        torch.testing.assert_close(out.logits, wanted, rtol=1e-5, atol=2e-5)
        assert [kept.tolist() for kept in out.kept.values()] == [[list(range(10))]]
        tokens = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (made.model, made.compiled)]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_kept_names_the_places_that_stay(reduced, family):
    made, inputs = reduced(family), support.inputs(family, batch=3)
    visual, real = support.visual_mask(family, inputs["input_ids"]), inputs["attention_mask"].bool()
    out = made.compiled(**inputs)
    ((site, kept),) = out.kept.items()
    assert site == "language.2"
    assert kept.dtype == torch.int64
    for row in range(3):
        places = [place for place in kept[row].tolist() if place >= 0]
        assert places == sorted(set(places))
        text = (real[row] & ~visual[row]).nonzero().flatten().tolist()
        assert [place for place in places if not visual[row, place]] == text
        assert len(places) - len(text) == int(visual[row].sum()) // 2
        assert all(real[row, place] for place in places)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_batch_of_three_is_three_batches_of_one(reduced, family):
    made, inputs = reduced(family), support.inputs(family, batch=3)
    together = made.compiled(**inputs)
    tokens = made.compiled.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    patches = inputs["image_grid_thw"].prod(1).tolist() if "image_grid_thw" in inputs else [1, 1, 1]
    pixels = inputs["pixel_values"].split(patches)
    for row in range(3):
        start = int((1 - inputs["attention_mask"][row]).sum())
        alone = {
            name: value[row : row + 1, start * (value.shape == inputs["input_ids"].shape) :]
            for name, value in inputs.items()
        } | {"pixel_values": pixels[row]}
        out = made.compiled(**alone)
        torch.testing.assert_close(together.logits[row : row + 1], out.logits, rtol=1e-5, atol=2e-5)
        kept = together.kept["language.2"][row]
        assert (kept[kept >= 0] - start).tolist() == out.kept["language.2"][0].tolist()
        one = made.compiled.generate(**alone, max_new_tokens=6, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert one.tolist() == tokens[row, : len(one)].tolist()


def test_images_of_another_size_than_traced(reduced):
    made = reduced("qwen2_5_vl")
    counts = set()
    for seed in range(4):
        inputs = support.inputs("qwen2_5_vl", seed=seed)
        visual = int(support.visual_mask("qwen2_5_vl", inputs["input_ids"]).sum())
        out = made.compiled(**inputs)
        assert out.kept["language.2"].shape[1] == inputs["input_ids"].shape[1] - visual + visual // 2
        assert out.logits.isfinite().all()
        counts.add(visual)
    assert len(counts) > 1


@pytest.mark.parametrize("preset", ["fastv", pytest.param("pyramiddrop", marks=pytest.mark.conformance)])
def test_the_cache_is_as_long_as_the_plan_says(artifacts, preset):
    made, inputs = artifacts("llava", preset), support.inputs("llava")
    text = int((~support.visual_mask("llava", inputs["input_ids"])).sum())
    plan = tvc.plan(made.model, preset, text_tokens=text, processor=made.processor)
    out = made.compiled(**inputs)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [layer.tokens for layer in plan.layers]
    assert len({layer.tokens for layer in plan.layers}) > 1


# Later turns ---------------------------------------------------------------------------------------------------------


def first_turn(made, inputs, new=4):
    return made.compiled.generate(
        **inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, eos_token_id=None
    )


def second_turn(made, inputs, first, more, new=6):
    """The tokens of a second question that is asked of the first turn's cache."""
    longer = joined(inputs, first.sequences[:, inputs["input_ids"].shape[1] :], more)
    given = without_image(longer)
    cache = first.past_key_values
    seen = cache.get_seq_length()
    out = made.compiled.generate(**given, past_key_values=cache, max_new_tokens=new, do_sample=False, eos_token_id=None)
    assert seen == first.sequences.shape[1] - 1  # the last token written was never read
    return longer, out


@pytest.mark.parametrize("batch", [1, 3])
def test_a_second_turn_is_one_longer_prompt_of_the_untouched_model(identity, batch):
    inputs = support.inputs("llava", batch=batch)
    longer, got = second_turn(identity, inputs, first_turn(identity, inputs), words(3, 9, 4, 22))
    wanted = identity.model.generate(**longer, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(wanted, got)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_second_turn_of_a_reduced_model_is_one_longer_prompt(reduced, family, batch):
    made, inputs = reduced(family), support.inputs(family, batch=batch)
    longer, got = second_turn(made, inputs, first_turn(made, inputs), words(3, 9, 4, 22))
    wanted = made.compiled.generate(**longer, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(wanted, got)


def test_calls_that_hand_the_cache_on_equal_one_call(reduced):
    made, inputs = reduced("llava"), support.inputs("llava", batch=2)
    longer = joined(inputs, words(5, 6, 7))
    whole = made.compiled(**longer)
    out = made.compiled(**inputs)
    for token in (5, 6, 7):
        cache = out.past_key_values
        mask = longer["attention_mask"][:, : cache.get_seq_length() + 1]
        out = made.compiled(input_ids=words(token).expand(2, -1), attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(out.logits, whole.logits, rtol=1e-5, atol=2e-5)
    lengths = [[layer.keys.shape[2] for layer in o.past_key_values.layers] for o in (out, whole)]
    assert lengths[0] == lengths[1]


def test_a_second_turn_brings_a_second_image(artifacts):
    made = artifacts("llava", UNIFORM[0], settings=UNIFORM[1])
    both, cut = support.two_images()
    one = {
        "input_ids": both["input_ids"][:, :cut],
        "attention_mask": both["attention_mask"][:, :cut],
        "pixel_values": both["pixel_values"][:1],
    }
    first = made.compiled(**one)
    rest = {"input_ids": both["input_ids"][:, cut:], "attention_mask": both["attention_mask"]}
    second = made.compiled(**rest, pixel_values=both["pixel_values"][1:], past_key_values=first.past_key_values)
    together = made.compiled(**both)
    torch.testing.assert_close(second.logits, together.logits, rtol=1e-5, atol=2e-5)
    kept = [*first.kept["language.2"][0].tolist(), *second.kept["language.2"][0].tolist()]
    assert kept == together.kept["language.2"][0].tolist()
    again = made.compiled(**one)
    tokens = made.compiled.generate(
        input_ids=both["input_ids"],
        attention_mask=both["attention_mask"],
        pixel_values=both["pixel_values"][1:],
        past_key_values=again.past_key_values,
        max_new_tokens=5,
        do_sample=False,
    )
    assert torch.equal(tokens, made.compiled.generate(**both, max_new_tokens=5, do_sample=False))


# Targets and types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["ort", *(pytest.param(name, marks=pytest.mark.conformance) for name in ("torchscript", "torch", "pt2"))]
)
def test_a_saved_artifact_answers_as_it_did_in_memory(artifacts, target):
    made, inputs = artifacts("llava", "fastv", target), support.inputs("llava", batch=3)
    loaded = tvc.load(made.folder)
    here, there = made.compiled(**inputs), loaded(**inputs)
    torch.testing.assert_close(here.logits, there.logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(here.kept["language.2"], there.kept["language.2"])
    tokens = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (made.compiled, loaded)]
    assert torch.equal(*tokens)
    assert loaded.plan == made.compiled.plan
    reference = artifacts("llava", "fastv").compiled(**inputs)
    torch.testing.assert_close(there.logits, reference.logits, rtol=1e-5, atol=2e-5)


def test_graphs_of_another_runtime_are_not_compiled_again(artifacts):
    with pytest.raises(ArgumentError, match="not-in-torch"):
        artifacts("llava", "fastv", "torchscript").compiled.torch_compile()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.conformance)])
def test_half_precision_compiles_and_generates(artifacts, dtype):
    made, inputs = artifacts("llava", RANDOM[0], dtype=dtype, settings=RANDOM[1]), support.inputs("llava", batch=3)
    compiled = made.compiled
    assert compiled.dtype == getattr(torch, dtype)
    out = compiled(**inputs)
    assert out.past_key_values.layers[0].keys.dtype == compiled.dtype
    exact = artifacts("llava", RANDOM[0], settings=RANDOM[1]).compiled(**inputs)
    assert torch.equal(out.kept["language.2"], exact.kept["language.2"])
    # Rounding of weights and sums, many times over: 2^-8 and 2^-11 a number.
    room = {"bfloat16": 0.3, "float16": 0.04}[dtype]
    assert (out.logits.float() - exact.logits).abs().max() < room
    tokens = compiled.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 6
