"""Positions in fractions, counted token by token from the definition in exact numbers, and counted by the runtime."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvc.chunks import DecoderShape, sample_inputs
from tvc.errors import InputError
from tvc.runtime.positions import in_strides, of_slots


def counted(tokens: str, stride: int, last: Fraction = Fraction(-1)) -> tuple[list[Fraction], Fraction]:
    """Positions of `tokens`, a letter each: `.` padding, `t` text, any other an image's; and the last of them.

    Text is one behind what comes before it, rounded up; the i-th token of an image i strides behind that.
    """
    made, front, number, before = [], last, 0, ""
    for token in tokens:
        if token == "t":
            last = Fraction(math.ceil(last) + 1)
        elif token != ".":
            front, number = (front, number + 1) if token == before else (Fraction(math.ceil(last)), 1)
            last = front + number * Fraction(stride, 256)
        before = token
        made.append(last)
    return made, last


def given_to(rows: list[str], seen: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(positions, visual, segment) of rows as the runtime has them; `seen` tokens of every row came before."""
    valid = torch.tensor([[token != "." for token in row] for row in rows])
    images = [[ord(token) - ord("A") if token.isupper() else -1 for token in row] for row in rows]
    segment = torch.tensor(images, dtype=torch.int64).reshape(valid.shape)
    return (valid.long().cumsum(1) - 1).clamp(min=0) + seen, segment >= 0, segment


def check(rows: list[str], stride: int) -> None:
    nothing = torch.zeros(len(rows), dtype=torch.int64)
    positions, saved = in_strides(*given_to(rows), stride, nothing)
    assert positions.dtype == torch.float32
    for number, row in enumerate(rows):
        want, last = counted(row, stride)
        real = [i for i, token in enumerate(row) if token != "."]
        assert [Fraction(float(positions[number, i])) for i in real] == [want[i] for i in real]
        assert len(real) - int(saved[number]) == math.ceil(last) + 1


@pytest.mark.parametrize(
    ("stride", "want"),
    [
        (256, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (64, [0, 1, 1.25, 1.5, 1.75, 2, 2.25, 4, 4.25, 4.5, 6, 7]),
        (1, [0, 1, *(1 + n / 256 for n in range(1, 6)), 3, 3 + 1 / 256, 3 + 2 / 256, 5, 6]),
    ],
)
def test_two_images_as_the_paper_counts_them(stride: int, want: list[float]) -> None:
    positions, saved = in_strides(*given_to(["ttAAAAAtBBtt"]), stride, torch.tensor([0]))
    assert positions.tolist() == [want]
    assert saved.tolist() == [11 - want[-1]]


@pytest.mark.parametrize("stride", [1, 7, 64, 128, 255, 256])
def test_images_side_by_side_at_the_front_and_at_the_end(stride: int) -> None:
    check(["AAABBBBBCt", "..ttAAAttt", "......tAAA", "tttttttttt", ".........A"], stride)


def test_a_whole_stride_is_the_model_s_own_numbering() -> None:
    rows = ["..tAAAABBt", "AAAAAAAAAA"]
    own, visual, segment = given_to(rows)
    positions, saved = in_strides(own, visual, segment, 256, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(positions, own.float())
    assert saved.tolist() == [0, 0]


def test_positions_of_many_tokens_are_exact() -> None:
    check(["t" + "A" * 40_001 + "t" * 3], 3)


def test_a_chunk_without_a_token() -> None:
    empty = torch.zeros(2, 0, dtype=torch.int64)
    positions, saved = in_strides(empty, empty.bool(), empty, 64, torch.tensor([3, 0]))
    assert positions.shape == (2, 0)
    assert saved.tolist() == [3, 0]


@st.composite
def sequences(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=6))
    return "".join(("t" if text else "ABCDEF"[number]) * size for number, (text, size) in enumerate(parts))


@given(st.lists(sequences(), min_size=1, max_size=4), st.integers(1, 256))
def test_any_padded_batch_is_counted_as_its_definition_says(rows: list[str], stride: int) -> None:
    width = max(map(len, rows)) + 1
    check([row.rjust(width, ".") for row in rows], stride)


@given(sequences(), sequences(), st.integers(1, 256))
def test_a_later_chunk_goes_on_where_the_earlier_one_ended(first: str, second: str, stride: int) -> None:
    """Text stands between the two, as it does wherever a turn ends."""
    first, second = f"t{first}t", f"{second}t"
    _, saved = in_strides(*given_to([first]), stride, torch.tensor([0]))
    positions, _ = in_strides(*given_to([second], seen=len(first)), stride, saved)
    want, _ = counted(second, stride, counted(first, stride)[1])
    assert [Fraction(number) for number in positions[0].tolist()] == want


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graphs_of_half_precision_are_traced_with_positions_in_full(dtype: torch.dtype) -> None:
    shape = DecoderShape(8, 0, ((2, 4, 4),), dtype, torch.device("cpu"), stride=64)
    (position_ids,) = sample_inputs(("position_ids",), shape, [0], {})
    assert position_ids.dtype == torch.float32


def test_positions_have_the_type_that_the_model_numbers_tokens_in() -> None:
    ids, device = torch.zeros(2, 3, dtype=torch.int64), torch.device("cpu")
    for real, dtype in ((False, torch.int64), (True, torch.float32)):
        shape = DecoderShape(8, 3, ((2, 4, 4),), torch.bfloat16, device, real=real)
        (sample,) = sample_inputs(("position_ids",), shape, [0], {})
        assert sample.dtype == dtype
        for numbers in (torch.arange(5), torch.arange(5.0)):  # two of a cache, and the chunk's; one row for all
            made = of_slots(numbers.expand(3, 1, -1), shape, ids)
            assert (made.dtype, made.tolist()) == (dtype, [[[2, 3, 4]] * 2] * 3)
    half = torch.tensor([[[0.0, 0.5, 1.0]] * 2] * 3)
    assert of_slots(half, DecoderShape(8, 3, (), torch.float32, device, real=True), ids).tolist() == half.tolist()
    with pytest.raises(InputError, match="fractions of a position"):
        of_slots(half, DecoderShape(8, 3, (), torch.float32, device), ids)
