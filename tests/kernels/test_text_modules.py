"""The modules of a selector that reads the text, against PyTorch's own layers and the formulas in plain numbers."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from tvc.errors import WeightsError
from tvc.kernels import PRIMITIVES
from tvc.kernels.op import Scope

WIDTH, HEADS, GROUPS, HEAD = 8, 4, 2, 2
TOKENS, WORDS = 20, 5


@pytest.fixture
def given() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    asked = torch.tensor([[False, True, True, False, True]])
    return {"feature": torch.randn(1, TOKENS, WIDTH), "text": torch.randn(1, WORDS, WIDTH), "asked": asked}


def made(kind: Any, key: str, settings: dict[str, Any], tmp_path: pathlib.Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The primitive with a file of random weights, and these."""
    path = tmp_path / f"{key}.safetensors"
    primitive = PRIMITIVES[kind][key].model_validate({"weights": str(path), **settings})
    shapes = primitive.shapes(WIDTH)
    weights = {n: torch.randn([6 if isinstance(s, str) else s for s in shape]) / 2 for n, shape in shapes.items()}
    safetensors.torch.save_file(weights, path)
    return primitive, primitive.tensors()


def projected(rows: torch.Tensor, weights: dict[str, torch.Tensor], norm: str, name: str) -> torch.Tensor:
    """[heads, N, d]."""
    normed = torch.nn.functional.rms_norm(rows, (WIDTH,), weights[f"{norm}.weight"], 1e-6)
    linear = torch.nn.functional.linear(normed, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    return linear.unflatten(1, (-1, HEAD)).transpose(0, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_query_attention_is_the_largest_share_of_any_head_and_word(
    given: dict[str, torch.Tensor], tmp_path: pathlib.Path, bias: bool
) -> None:
    settings = {"heads": HEADS, "groups": GROUPS, "bias": bias}
    primitive, weights = made("score", "query_attention", settings, tmp_path)
    ordinal = torch.arange(TOKENS)[None] - 2  # two pads in front
    pair = given["text"], given["asked"]
    score = primitive.apply(feature=given["feature"], ordinal=ordinal, text=pair, weights=weights)
    query = projected(given["text"][0, given["asked"][0]], weights, "norm_text", "query")
    key = projected(given["feature"][0, 2:], weights, "norm_visual", "key").repeat_interleave(HEADS // GROUPS, 0)
    shares = (query @ key.transpose(1, 2) / math.sqrt(HEAD)).softmax(-1)
    torch.testing.assert_close(score[0, 2:], shares.amax((0, 1)), rtol=1e-5, atol=1e-6)
    assert score[0, :2].tolist() == [0, 0]


def test_as_many_tokens_stay_as_the_head_says(given: dict[str, torch.Tensor], tmp_path: pathlib.Path) -> None:
    primitive, weights = made("select", "predicted", {"least": 0.1, "most": 0.9}, tmp_path)
    segment, counts = torch.tensor([[0] * 13 + [1] * 7]), torch.tensor([[13, 7]])
    score = torch.rand(1, TOKENS)
    scope = Scope(segment, counts, 2)
    chosen = primitive.apply(score, scope, text=(given["text"], given["asked"]), weights=weights)
    wanted = []
    for first, size in ((0, 13), (13, 7)):
        own = score[0, first : first + size].double()
        shares = own / own.sum()
        states = [math.log(size), float(own.max()), float(-(shares * shares.log()).sum())]
        seen = torch.cat([given["text"][0, given["asked"][0]].mean(0), torch.tensor(states)])
        hidden = torch.nn.functional.gelu(weights["hidden.weight"] @ seen + weights["hidden.bias"])
        told = float(torch.sigmoid(weights["share.weight"] @ hidden + weights["share.bias"]))
        number = math.ceil((0.1 + 0.8 * told) * size)
        wanted += sorted((own.argsort(descending=True)[:number] + first).tolist())
        assert number <= primitive.kept([size])[0]
    assert [index for index in chosen[0].tolist() if index >= 0] == wanted


def test_the_kept_tokens_attend_to_those_of_their_image(given: dict[str, torch.Tensor], tmp_path: pathlib.Path) -> None:
    primitive, weights = made("rest", "reencode", {"heads": HEADS, "groups": GROUPS}, tmp_path)
    segment, counts = torch.tensor([[0] * 12 + [1] * 8]), torch.tensor([[12, 8]])
    chosen = torch.tensor([[-1, 0, 3, 5, 11, 12, 19]])
    size = torch.arange(1.0, TOKENS + 1)[None]
    kept, feature, sizes = primitive.apply(
        given["feature"], size, chosen, None, Scope(segment, counts, 2), weights=weights
    )
    assert kept.tolist() == chosen.tolist()
    assert sizes.tolist() == [[0, 1, 4, 6, 12, 13, 20]]
    for places in ([0, 3, 5, 11], [12, 19]):
        rows = given["feature"][0, places]
        query, key, value = (projected(rows, weights, "norm", name)[None] for name in ("query", "key", "value"))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        wanted = rows + mixed[0].transpose(0, 1).flatten(1) @ weights["output.weight"].T
        where = [chosen[0].tolist().index(place) for place in places]
        torch.testing.assert_close(feature[0, where], wanted, rtol=1e-5, atol=1e-5)


def test_the_kept_tokens_read_all_of_their_image(given: dict[str, torch.Tensor], tmp_path: pathlib.Path) -> None:
    primitive, weights = made("rest", "reread", {"heads": HEADS, "groups": GROUPS}, tmp_path)
    segment, counts = torch.tensor([[-1] + [0] * 12 + [1] * 7]), torch.tensor([[12, 7]])
    chosen = torch.tensor([[-1, 1, 4, 12, 13, 19]])
    size = torch.arange(1.0, TOKENS + 1)[None]
    scope = Scope(segment, counts, 2)
    kept, feature, sizes = primitive.apply(given["feature"], size, chosen, None, scope, weights=weights)
    assert kept.tolist() == chosen.tolist()
    assert sizes.tolist() == [[0, 2, 5, 13, 14, 20]]
    for places, seen in (([1, 4, 12], slice(1, 13)), ([13, 19], slice(13, 20))):
        rows, read = given["feature"][0, places], given["feature"][0, seen]
        query = projected(rows, weights, "norm", "query")[None]
        key, value = (projected(read, weights, "norm_read", name)[None] for name in ("key", "value"))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        added = mixed[0].transpose(0, 1).flatten(1) @ weights["output.weight"].T
        wanted = rows + math.tanh(float(weights["gate"])) * added
        where = [chosen[0].tolist().index(place) for place in places]
        torch.testing.assert_close(feature[0, where], wanted, rtol=1e-5, atol=1e-5)


def test_behind_a_closed_gate_tokens_are_dropped(given: dict[str, torch.Tensor], tmp_path: pathlib.Path) -> None:
    primitive, weights = made("rest", "reread", {"heads": HEADS, "groups": GROUPS}, tmp_path)
    chosen, size = torch.tensor([[2, 3, 17]]), torch.ones(1, TOKENS)
    scope = Scope(torch.zeros(1, TOKENS, dtype=torch.int64), torch.tensor([[TOKENS]]), 1)
    shut = {**weights, "gate": torch.zeros(1)}
    _, feature, _ = primitive.apply(given["feature"], size, chosen, None, scope, weights=shut)
    assert torch.equal(feature, given["feature"][:, [2, 3, 17]])


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    for kind, key in (("score", "query_attention"), ("rest", "reencode"), ("rest", "reread")):
        settings = {"weights": "w.safetensors", "heads": 3, "groups": 1}
        with pytest.raises(WeightsError, match="heads-mismatch"):
            PRIMITIVES[kind][key].model_validate(settings).shapes(WIDTH)  # type: ignore[index]


def test_settings_that_exclude_each_other_are_refused() -> None:
    for kind, key, settings in (
        ("score", "query_attention", {"heads": 4, "groups": 3}),
        ("rest", "reencode", {"heads": 2, "groups": 4}),
        ("select", "predicted", {"least": 0.6, "most": 0.5}),
    ):
        with pytest.raises(ValidationError, match="give"):
            PRIMITIVES[kind][key].model_validate({"weights": "w.safetensors", **settings})  # type: ignore[index]
