"""Trained poolings against PyTorch's own layers: one image, two images, fewer queries, folded or not."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers.models.internvl import modeling_internvl as internvl

from tvc.errors import WeightsError
from tvc.kernels import PRIMITIVES
from tvc.kernels.merge_queries import sines
from tvc.kernels.op import Scope

SIDE, WIDTH, HEADS, QUERIES = 6, 16, 2, 9
PLACES = SIDE * SIDE


def images(number: int) -> tuple[torch.Tensor, Scope]:
    """Random tokens of `number` images, with two pads in front, and their scope."""
    torch.manual_seed(number)
    segment = torch.cat([torch.full((2,), -1), torch.arange(number).repeat_interleave(PLACES)])[None]
    feature = torch.randn(1, len(segment[0]), WIDTH)
    return feature, Scope(segment, torch.full((1, number), PLACES), number)


def pooled(key: str, settings: dict[str, Any], number: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(chosen, feature [N, K, D], size) of `number` images."""
    made = PRIMITIVES["merge"][key].model_validate(settings)
    feature, scope = images(number)
    size = (scope.segment >= 0).float()
    given = {"weights": made.tensors()} if "weights" in settings else {}
    chosen, merged, sizes = made.apply(feature, size, scope, **given)
    assert made.kept([PLACES] * number) == [chosen.shape[1] // number] * number
    assert chosen[0].tolist() == sorted(chosen[0].tolist())
    torch.testing.assert_close(sizes.sum(), torch.tensor(float(PLACES * number)))
    return chosen, merged.unflatten(1, (number, -1))[0], sizes


def each(number: int) -> torch.Tensor:
    """[N, P, D] the tokens of each image."""
    return images(number)[0][0, 2:].unflatten(0, (number, PLACES))


@pytest.fixture(scope="module")
def resampler(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A file of weights, and what it means in layers of PyTorch: queries [M, D], tokens [N, P, D] -> [N, M, D]."""
    torch.manual_seed(5)
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    norms = {name: torch.nn.LayerNorm(WIDTH, eps=1e-6) for name in ("query", "key", "value")}
    project, queries = torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.randn(QUERIES, WIDTH)
    for part in (attention, *norms.values()):
        for value in part.parameters():
            torch.nn.init.normal_(value, std=0.4)
    state = {f"attention.{name}": value for name, value in attention.state_dict().items()}
    state |= {f"norm_{n}.{name}": value for n, norm in norms.items() for name, value in norm.state_dict().items()}
    state |= {"queries": queries, "project.weight": project.weight.detach()}
    path = tmp_path_factory.mktemp("weights") / "queries.safetensors"
    safetensors.torch.save_file(state, path)

    def published(tokens: torch.Tensor, number: int) -> torch.Tensor:
        small = sines(math.isqrt(QUERIES), WIDTH)
        image = small.T.reshape(1, WIDTH, math.isqrt(QUERIES), -1)
        large = torch.nn.functional.interpolate(image, (SIDE, SIDE), mode="bicubic").flatten(2)[0].T
        asked = norms["query"](queries[:number] + small[:number]).expand(len(tokens), -1, -1)
        keys = norms["key"](large).expand(len(tokens), -1, -1)
        with torch.no_grad():
            made: torch.Tensor = project(attention(asked, keys, norms["value"](tokens))[0])
        return made

    return str(path), published


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "in-the-graph"])
@pytest.mark.parametrize(("keep", "number"), [(9, 1), (4, 1), (1, 2), (7, 2), ("25%", 2)])
def test_queries_are_the_published_resampler(resampler: Any, keep: Any, number: int, fold: bool) -> None:
    file, published = resampler
    settings = {"weights": file, "keep": keep, "heads": HEADS, "columns": SIDE, "fold": fold}
    chosen, feature, _ = pooled("queries", settings, number)
    torch.testing.assert_close(feature, published(each(number), chosen.shape[1] // number), rtol=1e-5, atol=2e-6)


def test_what_is_folded_is_a_constant_without_the_queries(resampler: Any) -> None:
    settings = {"weights": resampler[0], "keep": 4, "heads": HEADS, "columns": SIDE}
    folded = PRIMITIVES["merge"]["queries"].model_validate(settings).tensors()
    assert folded["logits"].shape == (HEADS, PLACES, QUERIES)
    assert folded["attention.in_proj_weight"].shape == (WIDTH, WIDTH)
    assert not {name for name in folded if name.startswith(("queries", "places", "norm_query", "norm_key"))}


def test_a_place_has_the_sines_of_its_column_and_of_its_row() -> None:
    table = sines(3, 8).reshape(3, 3, 8)
    for row in range(3):
        for column in range(3):
            rates = [1.0, 10000**-0.5]
            one, other = ([f(n * r) for f in (math.sin, math.cos) for r in rates] for n in (column, row))
            torch.testing.assert_close(table[row, column], torch.tensor([*one, *other]))


@pytest.mark.parametrize(
    ("changes", "got"), [({"keep": 10}, "keep 10, and 9 queries"), ({"heads": 3}, "3 heads, 16 wide")]
)
def test_queries_that_do_not_fit_are_refused(resampler: Any, changes: dict[str, Any], got: str) -> None:
    settings = {"weights": resampler[0], "keep": 4, "heads": HEADS, "columns": SIDE, **changes}
    with pytest.raises(WeightsError, match="queries-mismatch") as caught:
        PRIMITIVES["merge"]["queries"].model_validate(settings).tensors()
    assert caught.value.got == got


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 4, 5, 6])
def test_a_grid_is_pytorchs_adaptive_pooling_and_a_gated_network(
    tmp_path: pathlib.Path, side: int, number: int
) -> None:
    gate, up, down = torch.randn(10, WIDTH), torch.randn(10, WIDTH), torch.randn(WIDTH, 10)
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"gate.weight": gate, "up.weight": up, "down.weight": down}, file)
    _, feature, _ = pooled("grid_mlp", {"weights": str(file), "side": side, "columns": SIDE}, number)
    maps = each(number).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    cells = torch.nn.functional.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2)
    wanted = (torch.nn.functional.silu(cells @ gate.T) * (cells @ up.T)) @ down.T
    torch.testing.assert_close(feature, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("how", ["mean", "bilinear"])
def test_a_grid_is_resized_as_pytorch_does(how: str, side: int, number: int) -> None:
    _, feature, _ = pooled("resize", {"side": side, "how": how, "columns": SIDE}, number)
    maps = each(number).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    if how == "mean":
        wanted = torch.nn.functional.adaptive_avg_pool2d(maps, side)
    else:
        wanted = torch.nn.functional.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(feature, wanted.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def shuffling(inner: int, side: int, folder: pathlib.Path) -> tuple[str, Any]:
    """A file of weights, and what it means in layers of PyTorch."""
    parts = (
        torch.nn.LayerNorm(side**2 * WIDTH),
        torch.nn.Linear(side**2 * WIDTH, inner),
        torch.nn.Linear(inner, WIDTH),
    )
    for part in parts:
        for value in part.parameters():
            torch.nn.init.normal_(value, std=0.4)
    named = zip(("norm", "first", "second"), parts, strict=True)
    state = {f"{name}.{kind}": value for name, part in named for kind, value in part.state_dict().items()}
    safetensors.torch.save_file(state, folder / "w.safetensors")
    return str(folder / "w.safetensors"), torch.nn.Sequential(parts[0], parts[1], torch.nn.GELU(), parts[2])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("side", [2, 3, 4, 5, 6, 7])
def test_blocks_are_unshuffled_pixels_and_a_network(tmp_path: pathlib.Path, side: int, number: int) -> None:
    """PyTorch's own puts the numbers of one channel side by side, and pictures are padded for it with zeros."""
    file, network = shuffling(10, side, tmp_path)
    _, feature, _ = pooled("pixel_shuffle", {"weights": file, "side": side, "columns": SIDE}, number)
    missing = -SIDE % side
    maps = torch.nn.functional.pad(each(number).transpose(1, 2).unflatten(2, (SIDE, SIDE)), (0, missing, 0, missing))
    blocks = torch.nn.functional.pixel_unshuffle(maps, side).unflatten(1, (WIDTH, side**2))
    rows = blocks.flatten(3).permute(0, 3, 2, 1).flatten(2)  # [N, K, side^2 D], token after token
    with torch.no_grad():
        torch.testing.assert_close(feature, network(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
def test_blocks_are_those_of_internvl(tmp_path: pathlib.Path, number: int) -> None:
    side = 2
    file, network = shuffling(WIDTH, side, tmp_path)
    _, feature, _ = pooled("pixel_shuffle", {"weights": file, "side": side, "columns": SIDE}, number)
    vision = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    text = {"model_type": "qwen2", **vision, "num_key_value_heads": 2}
    config = internvl.InternVLConfig(vision_config=vision, text_config=text, downsample_ratio=1 / side)
    projector = internvl.InternVLMultiModalProjector(config)
    theirs = {"layer_norm": network[0], "linear_1": network[1], "linear_2": network[3]}
    projector.load_state_dict({f"{n}.{k}": v for n, part in theirs.items() for k, v in part.state_dict().items()})
    grid = each(number).unflatten(1, (SIDE, SIDE))
    with torch.no_grad():
        rows = internvl.InternVLModel.pixel_shuffle(None, grid, 1 / side)  # type: ignore[arg-type]
        torch.testing.assert_close(feature, projector(rows.flatten(1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "side"), [(3, 7, 2), (5, 4, 3), (2, 9, 2), (1, 5, 2), (1, 3, 2)])
def test_grids_that_are_no_squares_are_resized_by_the_length_of_their_rows(rows: int, columns: int, side: int) -> None:
    """Of a grid with a single row, half of the new one is the same twice; fewer tokens than cells stay as they are."""
    torch.manual_seed(rows)
    feature = torch.randn(1, rows * columns, 4)
    segment = torch.zeros(1, rows * columns, dtype=torch.int64)
    scope, lengths = Scope(segment, torch.tensor([[rows * columns]]), 1), torch.full_like(segment, columns)
    made = PRIMITIVES["merge"]["resize"].model_validate({"side": side, "how": "bilinear"})
    _, merged, _ = made.apply(feature, torch.ones(segment.shape), scope, columns=lengths)
    wanted = feature
    if rows * columns >= side * side:
        maps = feature.transpose(1, 2).unflatten(2, (rows, columns))
        sized = torch.nn.functional.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
        wanted = sized.flatten(2).transpose(1, 2)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
def test_latents_weigh_tokens_by_their_products(tmp_path: pathlib.Path, number: int) -> None:
    latents, file = torch.randn(5, WIDTH) / 4, tmp_path / "w.safetensors"
    safetensors.torch.save_file({"latents": latents}, file)
    _, feature, _ = pooled("latents", {"weights": str(file), "keep": 5}, number)
    tokens = each(number)
    torch.testing.assert_close(feature, (latents @ tokens.transpose(1, 2)).softmax(-1) @ tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_there_are_no_more_new_tokens_than_there_were_old_ones(tmp_path: pathlib.Path, whole: bool) -> None:
    """Tiles of an encoder hold no pads, whatever the count: what follows stacks them. Elsewhere pads cost memory."""
    latents, file = torch.randn(7, WIDTH) / 4, tmp_path / "w.safetensors"
    safetensors.torch.save_file({"latents": latents}, file)
    made = PRIMITIVES["merge"]["latents"].model_validate({"weights": str(file), "keep": 7})
    feature = torch.randn(2, 4, WIDTH)
    tile = Scope(torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 1), 4), 1, whole)
    chosen, merged, size = made.apply(feature, torch.ones(2, 4), tile, weights=made.tensors())
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2
    wanted = (latents[:4] @ feature.transpose(1, 2)).softmax(-1) @ feature
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(size, torch.ones(2, 4))
