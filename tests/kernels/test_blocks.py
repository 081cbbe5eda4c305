"""What ops hold in memory at once: of the matrices that tokens span with tokens, blocks of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tvc.kernels import OPS
from tvc.kernels.blocks import BLOCK, by_rows

TOKENS = 6 * BLOCK + 5
FIRST = torch.Generator().manual_seed(0)
FEATURE, SCORE = torch.randn(1, TOKENS, 8, generator=FIRST), torch.rand(1, TOKENS, generator=FIRST)
SCOPE = (torch.zeros(1, TOKENS, dtype=torch.int64), torch.tensor([[TOKENS]]))
PLACES = torch.arange(TOKENS)[None]
QUERY = torch.randn(1, 1, TOKENS, 4, generator=FIRST)
ATTENTION = (QUERY, QUERY.roll(1, 2), None, PLACES, PLACES[:, :, None], 0.5)
KEPT = PLACES[:, ::100].contiguous()
CASES: dict[str, tuple[Any, ...]] = {
    "attention_score": (*ATTENTION, "mean"),
    "bipartite_merge": (FEATURE, FEATURE, SCORE, *SCOPE, 500, 0, TOKENS // 2 + 1, "mean", False),
    "density_keep": (FEATURE, SCORE, *SCOPE, 10, 0, 0.5),
    "global_score": (*ATTENTION, 1.0, None),
    "max_min_keep": (FEATURE, *SCOPE, 0, 3, 3),
    "medoids_keep": (FEATURE, *SCOPE, 0, 3, 3, 2),
    "merge_clusters": (FEATURE, SCORE, *SCOPE, KEPT, SCORE, 1000, 100, TOKENS, 20),
    "pagerank_score": (*ATTENTION, 1.0, 2),
    "peak_score": ATTENTION,
}
IMAGES = (torch.arange(TOKENS) // BLOCK)[None]
PACKED = (QUERY, QUERY, (IMAGES[:, :, None] == IMAGES[:, None])[:, None], *ATTENTION[3:])


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple) else (result,):
            if isinstance(made, torch.Tensor):  # a view is as large as what it shows of
                self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.element_size())
        return result


def largest(name: str, arguments: tuple[Any, ...]) -> int:
    with Largest() as noted:
        OPS[name].reference(*arguments)
    return noted.numbers


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_is_as_large_as_tokens_by_tokens(name: str) -> None:
    assert largest(name, CASES[name]) < TOKENS * TOKENS / 2


@pytest.mark.parametrize("name", ["pairs_keep", "coverage_keep"])
def test_those_that_need_the_whole_matrix_hold_no_more_than_it(name: str) -> None:
    text = (torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
    given = {
        "pairs_keep": (FEATURE, SCORE, *SCOPE, 900, 0, 500, 100, TOKENS),
        "coverage_keep": (FEATURE, *text, *SCOPE, 0.02, 0.2, 0.5, 0, 2, 2),
    }
    assert largest(name, given[name]) == TOKENS * TOKENS


def test_packed_images_are_judged_in_blocks_too() -> None:
    mask = PACKED[2].numel()  # which is given whole
    assert largest("global_score", (*PACKED, 1.0, IMAGES)) <= mask
    one_by_one = [
        OPS["global_score"].reference(
            QUERY[:, :, at], QUERY[:, :, at], None, PLACES[:, : len(at)], PLACES[:, : len(at), None], 0.5, 1.0, None
        )
        for at in (torch.where(IMAGES[0] == image)[0] for image in range(int(IMAGES.max()) + 1))
    ]
    torch.testing.assert_close(
        OPS["global_score"].reference(*PACKED, 1.0, IMAGES), torch.cat(one_by_one, 1), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("rows", [0, 1, BLOCK, BLOCK + 1, 6 * BLOCK])
def test_every_row_comes_once_and_in_order(rows: int) -> None:
    seen: list[list[int]] = []

    def note(at: torch.Tensor, new: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor]:
        assert at.shape[0] == 3
        seen.append(at[0][new].tolist())
        return (total + 1,)

    (blocks,) = by_rows(note, (torch.zeros(()),), torch.zeros(3, rows, 2))
    assert [row for block in seen for row in block] == list(range(rows))
    assert int(blocks) == len(seen) == -(-rows // BLOCK)
