"""Token counts, costs and solved schedules against counts by hand and FLOPs counted on a run."""

from __future__ import annotations

import dataclasses
import json
import operator
import shlex
from typing import ClassVar

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tvc.errors import ArgumentError
from tvc.kernels.budget import Budget
from tvc.kernels.op import PRIMITIVES, Merging, Rest, Select, When
from tvc.policy import load_policy
from tvc.policy.options import Chunks, Pool
from tvc.policy.reselection import Reselect
from tvc.program import Layer, Layout, Site
from tvc.report.cost import attention_flops, one_image, plan_costs
from tvc.report.schedule import make_plan, plan_policy, solve_average, solve_kept
from tvc.trace.layout import read_layer


class Keep(Select):
    key: ClassVar[str] = "keep"
    keep: Budget

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]


class Above(Select):
    """Without a budget: what stays is known at run time."""

    key: ClassVar[str] = "above"
    exact: ClassVar[bool] = False

    def kept(self, counts: list[int]) -> list[int]:
        return counts


class Plus(Rest):
    """As a merge: the others leave `more` tokens behind."""

    key: ClassVar[str] = "plus"
    more: int

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        return [min(count, kept + self.more) for count, kept in zip(counts, chosen, strict=True)]


class Always(When):
    key: ClassVar[str] = "always"


class Below(When):
    key: ClassVar[str] = "below"


@dataclasses.dataclass(frozen=True)
class Gate:
    gate: When


@dataclasses.dataclass(frozen=True)
class Step:
    site: str
    select: Select | None = None
    rest: Rest | None = None
    exit: Gate | None = None
    scope: str = "image"
    merge: Merging | None = None
    evict: str = ""
    until: str = ""
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Steps:
    steps: tuple[Step, ...]
    name: str = "test"
    reselect: Reselect | None = None
    attention: Chunks | None = None
    cache: Pool | None = None


def share(site: str, keep: object, **more: object) -> Step:
    return Step(site, Keep(keep=keep), **more)


def layout(**changes: object) -> Layout:
    base = Layout(
        model_type="test",
        hidden_size=64,
        vocabulary=100,
        language=(Layer(1000, 4, 2, 16),) * 8,
        vision=(Layer(500, 2, 2, 8),) * 4,
        prefix_tokens=1,
        group=1,
        tiles=1,
        tile_tokens=577,
        visual_tokens=(576,),
        patch_linear=588,
        projector_linear=90,
        head_linear=6400,
        element_size=2,
        sites=(),
    )
    return dataclasses.replace(base, **changes)


def visual(plan: object) -> list[int]:
    return [layer.visual for layer in plan.layers]


def test_two_cuts_make_three_stages():
    plan = make_plan(Steps((share("language.5", "50%"), share("language.2", 100))), layout())
    assert visual(plan) == [576] * 2 + [100] * 3 + [50] * 3
    spans = [(s.part, s.first, s.last, s.visual, s.sites) for s in plan.stages]
    assert spans == [
        ("vision", 0, 3, 577, ()),
        ("language", 0, 1, 576, ()),
        ("language", 2, 4, 100, ("language.2",)),
        ("language", 5, 7, 50, ("language.5",)),
    ]
    assert plan.average_visual_tokens == (2 * 576 + 3 * 100 + 3 * 50) / 8


def test_cuts_from_vision_to_projector_to_decoder_chain():
    steps = (share("vision.1", "50%"), share("projector", "25%"), share("language.0", 30, rest=Plus(more=6)))
    plan = make_plan(Steps(steps), layout())
    assert plan.vision_tokens == (577, 289, 289, 289)
    assert visual(plan) == [36] * 8
    assert plan.layers[0].sites == ("projector", "language.0")


def test_each_image_keeps_its_own_share():
    two = layout(visual_tokens=(10, 7), tiles=2, tile_tokens=11)
    assert visual(make_plan(Steps((share("language.1", "50%"),)), two))[1:] == [5 + 3] * 7
    plan = make_plan(Steps((share("language.1", "50%", scope="sequence"),)), two)
    assert visual(plan)[1:] == [8] * 7
    assert not plan.exact
    assert "depend on content" in plan.text()


def test_what_decode_steps_attend_to_is_told_and_saves_nothing():
    steps = (share("language.1", 101),)
    rule = Reselect(at="language.3", layer="language.2", keep=Budget(permille=300))
    plain, plan = make_plan(Steps(steps), layout()), make_plan(Steps(steps, reselect=rule), layout())
    assert [layer.unread for layer in plan.layers] == [0] * 3 + [101 - 30] * 5
    assert [layer.held for layer in plan.layers] == [layer.held for layer in plain.layers]
    assert plan.compiled == plain.compiled
    assert "attend to 30 of 101 visual tokens from layer 3 on" in plan.text()
    assert "decode steps" not in plain.text()


def test_tiles_inside_the_encoder_are_cut_one_by_one():
    plan = make_plan(Steps((share("vision.2", "10%"),)), layout(visual_tokens=(36, 36), tiles=2, tile_tokens=37))
    assert plan.vision_tokens == (74, 74, 8, 8)
    assert visual(plan) == [6] * 8


def test_an_exit_leaves_no_visual_token():
    plan = make_plan(Steps((Step("language.6", exit=Gate(Always())),)), layout())
    assert visual(plan) == [576] * 6 + [0] * 2
    assert plan.fired is None


@pytest.mark.parametrize("step", [Step("language.6", exit=Gate(Below())), Step("language.6", Above())])
def test_a_decision_at_run_time_states_both_bounds(step):
    plan = make_plan(Steps((step,)), layout())
    assert visual(plan) == [576] * 8
    assert visual(plan.fired) == [576] * 6 + [0] * 2
    assert "at the least 432.0 visual tokens" in plan.text()


def test_keeping_everything_costs_what_the_dense_model_costs():
    plan = make_plan(Steps((share("vision.1", "100%"), share("language.3", "100%"))), layout())
    assert plan.compiled == plan.dense
    assert set(plan.ratio.values()) == {1.0}


def test_bytes_of_the_cache_follow_the_layers():
    plan = make_plan(Steps((share("language.4", 36),)), layout(), text_tokens=64)
    assert [layer.kv_bytes for layer in plan.layers] == [2 * 2 * 16 * 640 * 2] * 4 + [2 * 2 * 16 * 100 * 2] * 4
    assert plan.compiled.kv_bytes == sum(layer.kv_bytes for layer in plan.layers)


def test_vision_costs_follow_windows_and_blocks_behind_the_features():
    windowed = layout(
        vision=(Layer(500, 2, 2, 8, 64), Layer(500, 2, 2, 8)),
        prefix_tokens=0,
        group=4,
        tile_tokens=576,
        visual_tokens=(144,),
    )
    patches, blocks = 2 * 576 * 588, 2 * 2 * 500 * 576
    attention = 4 * 2 * 8 * 576 * (64 + 576)
    plan = make_plan(Steps(()), windowed)
    assert plan.dense.vision == patches + blocks + attention + 2 * 144 * 90
    shorter = make_plan(Steps(()), windowed, vision_blocks=1)
    assert shorter.dense.vision == plan.dense.vision
    assert shorter.compiled.vision == plan.dense.vision - 2 * 500 * 576 - 4 * 2 * 8 * 576**2


def test_prefill_and_decode_cost_what_is_counted_on_a_run():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    layers = tuple(read_layer(layer) for layer in model.model.layers)
    sizes = layout(language=layers, vision=(), tile_tokens=0, tiles=0, visual_tokens=(60,), head_linear=6400)
    plan = plan_costs(sizes, [60, 60, 20, 7], 9, new_tokens=1)

    def counted(queries: list[int], keys: list[int]) -> int:
        """Each layer run by itself: `queries` new tokens over a cache that makes it `keys` in all."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for layer, query, key in zip(model.model.layers, queries, keys, strict=True):
                hidden, positions = torch.randn(1, query, 64), torch.arange(key - query, key)[None]
                rotary = model.model.rotary_emb(hidden, positions)
                attention = layer.self_attn
                past = torch.randn(1, 2, key - query, 16)

                class Cache:
                    def update(self, k, v, *_args, past=past):
                        return torch.cat((past, k), 2), torch.cat((past, v), 2)

                attention(hidden, position_embeddings=rotary, attention_mask=None, past_key_values=Cache())
                layer.mlp(hidden)
            model.lm_head(torch.randn(1, 1, 64))
        return counter.get_total_flops()

    lengths = [69, 69, 29, 16]
    assert plan.compiled.prefill == counted(lengths, lengths)
    assert plan.dense.prefill == counted([69] * 4, [69] * 4)
    assert plan.compiled.decode == counted([1] * 4, [length + 1 for length in lengths])


def test_decode_is_the_mean_over_the_new_tokens():
    one, many = (plan_costs(layout(), [10] * 8, 5, new_tokens=n).compiled.decode for n in (1, 3))
    assert many == one + sum(4 * 4 * 16 for _ in range(8))


@settings(max_examples=40)
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 7), st.integers(100, 500))
def test_a_solved_schedule_is_the_best_below_the_target(first, second, layer, target):
    steps = (
        Step("language.0", Keep(keep=Budget(permille=first))),
        Step(f"language.{layer}", Keep(keep=Budget(permille=second))),
    )
    policy = Steps(steps)
    try:
        solved = solve_average(policy, layout(), target)
    except ArgumentError:
        reject()
    assert solved.average <= target

    def average_at(factor: int) -> float:
        shares = [min(1000, max(1, p * factor // 1_000_000)) for p in (first, second)]
        entry = 576 * shares[0] // 1000
        return (entry * layer + (entry * shares[1] // 1000) * (8 - layer)) / 8

    # Every point at which one of the two shares changes.
    points = {-(-1_000_000 * k // p) for p in (first, second) for k in range(1, 1001)}
    assert solved.average == max(a for a in map(average_at, points) if a <= target)


def test_a_solved_schedule_names_its_settings():
    policy = Steps((share("language.0", "80%"), Step("language.4", exit=Gate(Always()))))
    solved = solve_average(policy, layout(), 144)
    assert solved.settings == {"steps.0.select.keep.keep": "50%"}
    assert solved.average == 144
    assert visual(solved.plan) == [288] * 4 + [0] * 4


def test_counts_are_scaled_as_counts():
    solved = solve_average(Steps((share("language.0", 64), share("language.4", 32, number=1))), layout(), 96)
    assert solved.settings == {"steps.0.select.keep.keep": 128, "steps.1.select.keep.keep": 64}


@pytest.mark.parametrize("target", [100, 600])
def test_an_average_out_of_reach_is_refused_with_the_range(target):
    with pytest.raises(ArgumentError, match=r"144\.8 to 576\.0 visual tokens"):
        solve_average(Steps((share("language.2", "50%"),)), layout(), target)


def test_a_policy_without_budgets_cannot_be_solved():
    with pytest.raises(ArgumentError, match="without budgets"):
        solve_average(Steps((Step("language.2", exit=Gate(Always())),)), layout(), 100)


@settings(max_examples=40)
@given(st.integers(1, 1000), st.integers(1, 400), st.integers(0, 30), st.integers(4, 576))
def test_a_solved_number_is_the_most_below_the_target(share_of, count, more, target):
    """A share, then a count, then an exit that does not count; the rest of the last cut leaves tokens too."""
    steps = (
        Step("language.0", Keep(keep=Budget(permille=share_of))),
        Step("language.3", Keep(keep=Budget(count=count)), Plus(more=more)),
        Step("language.6", exit=Gate(Always())),
    )
    try:
        solved = solve_kept(Steps(steps), layout(), target)
    except ArgumentError:
        reject()

    def left(factor: int) -> int:
        first = 576 * min(1000, max(1, share_of * factor // 1_000_000)) // 1000
        return min(first, min(first, max(1, count * factor // 1_000_000)) + more)

    points = {-(-1_000_000 * k // n) for n in (share_of, count) for k in range(1, 1001)}
    behind = visual(solved.plan)[3]
    assert behind <= target
    assert behind == max(n for n in map(left, points) if n <= target)
    assert visual(solved.plan)[6:] == [0, 0]


def test_targets_of_a_merge_are_scaled_and_named():
    merge = PRIMITIVES["rest"]["merge"](targets={"stride": 10}, reduce="mean")
    policy = Steps((Step("language.0", Keep(keep=54), merge),))
    solved = solve_kept(policy, layout(), 128)
    assert solved.settings == {"steps.0.select.keep.keep": 108, "steps.0.rest.merge.targets.stride": 20}
    assert visual(solved.plan) == [128] * 8


def test_a_rest_without_numbers_is_left_alone():
    for rest in (PRIMITIVES["rest"]["drop"](), PRIMITIVES["rest"]["merge"](targets="kept")):
        solved = solve_kept(Steps((Step("language.0", Keep(keep=54), rest),)), layout(), 27)
        assert solved.settings == {"steps.0.select.keep.keep": 27}


def test_a_number_out_of_reach_is_refused_with_the_range():
    policy = Steps((Step("language.0", Keep(keep=54), Plus(more=10)),))
    with pytest.raises(ArgumentError, match=r"11\.0 to 576\.0 visual tokens"):
        solve_kept(policy, layout(), 10)


def test_a_plan_is_json_and_a_table():
    plan = make_plan(Steps((share("language.2", "50%"),)), layout(image_size=(336, 336)))
    values = json.loads(json.dumps(plan.to_json()))
    assert values["average_visual_tokens"] == plan.average_visual_tokens
    assert values["layers"][3]["tokens"] == 288 + 64
    assert values["stages"][-1] == {
        "part": "language", "sites": ["language.2"], "first": 2, "last": 7, "visual": 288, "text": 64, "tokens": 352,
        "evicted": 0, "held": 352,
    }  # fmt: skip
    table = plan.text()
    assert "test on test: 576 visual + 64 text tokens, image 336x336" in table
    assert any(line.split() == ["language", "2-7", "language.2", "288", "64", "352"] for line in table.splitlines())


def test_what_is_evicted_counts_in_prefill_and_not_in_caches():
    """Twice: layers 2 and 3 lose what the second step drops alone; they never hold what the first one dropped."""
    steps = (share("language.2", "50%", evict="language.1"), share("language.4", "25%", evict="language.1"))
    whole = make_plan(Steps(tuple(dataclasses.replace(step, evict="") for step in steps)), layout(), new_tokens=1)
    plan = make_plan(Steps(steps), layout(), new_tokens=1)
    assert [layer.visual for layer in plan.layers] == [576] * 2 + [288] * 2 + [72] * 4
    assert [layer.held for layer in plan.layers] == [576 + 64] + [72 + 64] * 7
    assert plan.compiled.prefill == whole.compiled.prefill
    sizes = layout()
    saved = [0, 504, 216, 216, 0, 0, 0, 0]
    bytes_of = [2 * layer.kv_heads * layer.head_dim * sizes.element_size for layer in sizes.language]
    assert whole.compiled.kv_bytes - plan.compiled.kv_bytes == sum(map(operator.mul, bytes_of, saved))
    keys = sum(attention_flops(layer, 1, n) for layer, n in zip(sizes.language, saved, strict=True))
    assert whole.compiled.decode - plan.compiled.decode == keys
    assert [(stage.first, stage.last, stage.held) for stage in plan.stages if stage.part == "language"] == [
        (0, 0, 640), (1, 1, 136), (2, 3, 136), (4, 7, 136),
    ]  # fmt: skip


def test_what_passes_layers_by_counts_again_behind_them():
    """Half of the tokens pass by layers 1 and 2, three quarters by layer 3, and at 5 an eighth of all is left."""
    steps = (
        share("language.1", "50%", until="language.3"),
        share("language.3", "25%", until="language.4"),
        share("language.5", "12.5%"),
    )
    plan = make_plan(Steps(steps), layout(), new_tokens=1)
    visual = [576, 288, 288, 144, 576, 72, 72, 72]
    assert [layer.visual for layer in plan.layers] == visual
    assert [layer.held for layer in plan.layers] == [count + 64 for count in visual]
    assert plan.average_visual_tokens == sum(visual) / 8
    sizes = layout()
    bytes_of = [2 * layer.kv_heads * layer.head_dim * sizes.element_size for layer in sizes.language]
    assert plan.compiled.kv_bytes == sum(size * (count + 64) for size, count in zip(bytes_of, visual, strict=True))
    whole = make_plan(Steps(()), layout(), new_tokens=1)
    saved = [plan.layers[i].flops - whole.layers[i].flops for i in range(8)]
    assert [i for i, flops in enumerate(saved) if not flops] == [0, 4]
    assert plan.compiled.prefill - whole.compiled.prefill == sum(saved)
    assert [(stage.first, stage.last, stage.sites) for stage in plan.stages if stage.part == "language"] == [
        (0, 0, ()), (1, 2, ("language.1",)), (3, 3, ("language.3",)), (4, 4, ()), (5, 7, ("language.5",)),
    ]  # fmt: skip


def test_images_that_share_a_budget_are_themselves_again_behind_a_bypass():
    sizes = layout(visual_tokens=(20, 12))
    shared = dataclasses.replace(share("language.1", "25%", until="language.3"), scope="sequence")
    plan = make_plan(Steps((shared, share("language.5", "50%"))), sizes)
    assert [layer.visual for layer in plan.layers] == [32, 8, 8, 32, 32, 16, 16, 16]
    assert plan.exact


def test_what_is_pooled_counts_in_prefill_and_not_in_caches():
    """Five frames of 7 tokens in chunks of two; each frame becomes 2 entries where its chunk does not stay as it is."""
    sizes = layout(visual_tokens=(7,) * 5)
    ends = make_plan(Steps((), cache=Pool(tokens=4, chunk=2, first=1)), sizes, text_tokens=9)
    assert [layer.held for layer in ends.layers] == [9 + 14 + 3 * 2] * 8
    assert ends.fired is None
    assert ends.compiled.prefill == ends.dense.prefill
    some = make_plan(Steps((), cache=Pool(tokens=4, chunk=2, first=1, best=1)), sizes, text_tokens=9)
    assert some.layers[0].held == 9 + 14 + 14 + 2  # the best may be another one, or the first itself
    assert some.fired.layers[0].held == 9 + 14 + 3 * 2
    steps = (Step("language.2", Keep(keep=Budget(count=5)), evict="language.1"),)
    cut = make_plan(Steps(steps, cache=Pool(tokens=4)), sizes, text_tokens=9)
    assert [layer.held for layer in cut.layers] == [9 + 5 * 2, *[9 + 5 * 2] * 7]
    assert [layer.tokens for layer in cut.layers] == [9 + 35] * 2 + [9 + 25] * 6


def legal(sizes: Layout) -> Layout:
    names = [*(f"vision.{i}" for i in range(len(sizes.vision))), "projector"]
    names += [f"language.{i}" for i in range(len(sizes.language))]
    return dataclasses.replace(sizes, sites=tuple(Site(name, True) for name in names))


# Average visual tokens per layer over the 32 layers of a 7B decoder, as the papers state or imply them.
@pytest.mark.parametrize(
    ("preset", "average"),
    [("fastv", (2 * 576 + 30 * 288) / 32), ("pyramiddrop", 270), ("visionzip", 64), ("random", 144), ("uniform", 144)],
)
def test_presets_have_the_averages_of_their_papers(preset, average):
    sizes = legal(layout(language=(Layer(1000, 4, 2, 16),) * 32, vision=(Layer(500, 2, 2, 8),) * 24))
    plan = plan_policy(load_policy(preset), sizes)
    assert plan.average_visual_tokens == average
    assert plan.policy == preset


@pytest.mark.parametrize("preset", ["fastv", "visionzip", "pyramiddrop", "uniform"])
def test_solved_settings_give_the_solved_average_when_they_are_set(preset):
    sizes = legal(layout(language=(Layer(1000, 4, 2, 16),) * 32, vision=(Layer(500, 2, 2, 8),) * 24))
    policy = load_policy(preset)
    plan = plan_policy(policy, sizes, average_tokens=200)
    assert 199 <= plan.average_visual_tokens <= 200
    again = plan_policy(policy.with_settings([f"{key}={value}" for key, value in plan.settings]), sizes)
    assert again.layers == plan.layers
    assert "solved: --set steps.0.select" in plan.text()


def test_a_solved_share_is_rounded_as_before():
    sizes = legal(layout(language=(Layer(1000, 4, 2, 16),) * 32, vision=(Layer(500, 2, 2, 8),) * 24))
    policy = load_policy("divprune")
    plan = plan_policy(policy, sizes, average_tokens=200)
    # 34.7% of 576 are 199.9, and 34.8% are 200.4.
    assert plan.settings == (("steps.0.select.max_min.keep", {"share": "34.7%", "round": "nearest"}),)
    assert plan.average_visual_tokens == 200
    (line,) = (line for line in plan.text().splitlines() if line.startswith("solved: "))
    _, flag, setting = shlex.split(line)
    assert flag == "--set"
    for settings_given in ([setting], dict(plan.settings)):
        assert plan_policy(policy.with_settings(settings_given), sizes).layers == plan.layers


@pytest.mark.parametrize(
    "sizes",
    [
        {"prefix_tokens": 1, "tile_tokens": 145, "tiles": 1, "visual_tokens": (144,)},
        {"prefix_tokens": 0, "tile_tokens": 64, "tiles": 5, "visual_tokens": (5 * 64 + 8,)},  # with newline tokens
        {"prefix_tokens": 0, "tile_tokens": 576, "tiles": 1, "group": 4, "visual_tokens": (144,)},  # packed
    ],
)
def test_one_of_two_equal_images_costs_half_of_their_vision(sizes):
    one = layout(**sizes)
    packed = one.group > 1
    two = dataclasses.replace(
        one,
        visual_tokens=one.visual_tokens * 2,
        tiles=one.tiles if packed else 2 * one.tiles,
        tile_tokens=one.tile_tokens * (1 + packed),
    )
    assert one_image(two) == one
    assert one_image(one) == one
    assert make_plan(Steps(()), two).dense.vision == 2 * make_plan(Steps(()), one).dense.vision
