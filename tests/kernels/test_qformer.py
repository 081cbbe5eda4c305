"""The merge `qformer` against the Q-Former of transformers, image by image."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from tvc.errors import WeightsError
from tvc.kernels import PRIMITIVES
from tvc.kernels.op import Scope

WIDTH, HIDDEN, QUERIES = 10, 12, 4
SETTINGS = {"keep": QUERIES, "heads": 3, "layers": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A file of weights, and what it means: tokens [P, D] of one image -> [M, D] of the first M queries."""
    torch.manual_seed(3)
    config = Blip2QFormerConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=20,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=2,
    )
    model, project = Blip2QFormerModel(config).eval(), torch.nn.Linear(HIDDEN, WIDTH)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.5)
    queries = torch.randn(1, QUERIES, HIDDEN)
    state = {**model.state_dict(), **{f"project.{name}": value for name, value in project.state_dict().items()}}
    file = tmp_path_factory.mktemp("weights") / "qformer.safetensors"
    safetensors.torch.save_file({**state, "query_tokens": queries}, file)

    def published(tokens: torch.Tensor, number: int = QUERIES) -> torch.Tensor:
        with torch.no_grad():
            made = model(query_embeds=queries[:, :number], encoder_hidden_states=tokens[None]).last_hidden_state
            wanted: torch.Tensor = project(made[0])
        return wanted

    return str(file), published


def test_names_and_shapes_are_those_of_transformers(trained: tuple[str, Any]) -> None:
    made = PRIMITIVES["merge"]["qformer"].model_validate({"weights": trained[0], **SETTINGS})
    wanted = made.shapes(WIDTH)
    found = made.tensors()
    assert set(found) == set(wanted)
    sizes = {"hidden": HIDDEN, "inner": 20}
    for name, shape in wanted.items():
        assert [sizes.get(size, size) for size in shape] == list(found[name].shape), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_image_of_a_padded_batch_is_read_as_by_itself(trained: tuple[str, Any], dtype: torch.dtype) -> None:
    """Two images, one behind pads, one with fewer tokens than queries beside a larger one, and no image at all."""
    file, published = trained
    rows = [[0] * 5 + [1] * 7, [-1] * 5 + [0] * 7, [-1] + [0] * 3 + [1] * 8, [-1] * 12]
    segment = torch.tensor(rows)
    counts = torch.stack([(segment == n).sum(1) for n in range(2)], 1)
    feature = torch.randn(4, 12, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = PRIMITIVES["merge"]["qformer"].model_validate({"weights": file, **SETTINGS})
    size = (segment >= 0).float()
    chosen, merged, sizes = made.apply(feature, size, Scope(segment, counts, 2), weights=made.tensors())
    assert merged.dtype == dtype
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for row in range(4):
        kept = chosen[row] >= 0
        assert int(kept.sum()) == sum(made.kept(counts[row].tolist()))
        assert not merged[row][~kept].any()
        assert float(sizes[row].sum()) == pytest.approx(float(size[row].sum()))
        for image in range(2):
            own = kept & (segment[row].gather(0, chosen[row].clamp(min=0)) == image)
            if int(counts[row, image]):
                tokens = feature[row, segment[row] == image].float()
                torch.testing.assert_close(merged[row, own].float(), published(tokens, int(own.sum())), **near)
            else:
                assert not own.any()


def test_a_chunk_without_an_image_has_no_new_tokens(trained: tuple[str, Any]) -> None:
    made = PRIMITIVES["merge"]["qformer"].model_validate({"weights": trained[0], **SETTINGS})
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    scope = Scope(nothing, torch.zeros(2, 1, dtype=torch.int64), 0)
    chosen, merged, sizes = made.apply(torch.zeros(2, 0, WIDTH), torch.zeros(2, 0), scope, weights=made.tensors())
    assert (chosen.shape, merged.shape, sizes.shape) == ((2, 0), (2, 0, WIDTH), (2, 0))


def test_heads_that_do_not_divide_the_width_are_refused(trained: tuple[str, Any]) -> None:
    made = PRIMITIVES["merge"]["qformer"].model_validate({"weights": trained[0], **SETTINGS, "heads": 5})
    with pytest.raises(WeightsError, match="5 heads, 12 wide"):
        made.tensors()
