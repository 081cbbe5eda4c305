"""The space of the smallest eigenvalues of symmetric matrices, from matrix products and bounded loops alone.

An eigendecomposition is no operator of ONNX, and its vectors are not determined where eigenvalues are equal. The
projector on the space that they span is, and it tells the same: for Q [V, K] with orthonormal columns the rows of Q Q^T
[V, V] have the distances and the lengths of the rows of Q.

Reflections make a matrix tridiagonal, counts of negative pivots tell its eigenvalues, and Newton-Schulz steps carry
those on one side of a threshold to 1 and the others to -1, scaled so that the smallest of them grows by 2.5 a step
(Chen and Chow, A Stable Scaling of Newton-Schulz, 2014). All in float64.

A matrix [B, V, V] may hold a block for each segment, with zeros between them; each is then decided by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tvc.kernels.greedy import EQUAL
from tvc.kernels.loop import State, repeat
from tvc.kernels.segments import per_token

LARGEST = 0.5  # matrices are scaled so that no eigenvalue is larger
SAME = EQUAL * LARGEST  # eigenvalues that lie closer to each other count as equal
NOTHING = 1e-40  # squares below it are none, next to eigenvalues of that size
POINTS, PASSES = 1024, 3  # a pass narrows the range of an eigenvalue down by the number of points
DOUBLINGS = 21  # from SAME beyond LARGEST
STEPS = 40  # more than there ever are from the smallest distance on
STEEPEST = 1.6977  # above it rounding may turn the sign of an eigenvalue of 1


def _ones(size: int, like: torch.Tensor) -> torch.Tensor:
    # Sums are matrix products: of tensors without an element ONNX Runtime leaves a reduced axis in place.
    return torch.ones(size, 1, dtype=torch.float64, device=like.device)


def _tridiagonal(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, V] the diagonal, [B, V] the squares beside it, 0 behind the last) of a matrix with the same eigenvalues."""
    tokens = matrix.shape[1]
    place, ones = torch.arange(tokens, device=matrix.device)[:, None], _ones(tokens, matrix)

    def reflect(number: torch.Tensor, now: torch.Tensor) -> State:
        tail = torch.where(place > number, now @ (place == number).double(), 0.0)  # [B, V, 1]
        square = tail.transpose(1, 2) @ tail
        next_one = (place == number + 1).double()
        head = tail.transpose(1, 2) @ next_one
        length = torch.where(head < 0, -square.sqrt(), square.sqrt())
        mirror = tail + length * next_one
        half = square + length * head  # half of the mirror's own square
        image = torch.where(square > NOTHING, now @ mirror / half.clamp(min=NOTHING), 0.0)
        image = image - mirror * (mirror.transpose(1, 2) @ image) / (2 * half).clamp(min=NOTHING)
        return (now - image @ mirror.transpose(1, 2) - mirror @ image.transpose(1, 2),)

    rounds = torch.full((), 1, dtype=torch.int64, device=matrix.device) * tokens
    made = repeat(reflect, (matrix.clone(),), rounds)[0]
    beside = (torch.where(place + 1 == place.T, made, 0.0) @ ones).squeeze(2)
    return (torch.where(place == place.T, made, 0.0) @ ones).squeeze(2), beside * beside


class _Blocks(NamedTuple):
    """Tridiagonal matrices, one segment's behind the other's."""

    diagonal: torch.Tensor  # [B, V]
    beside: torch.Tensor  # [B, V] squares
    member: torch.Tensor  # [B, V, N] float64, 1 in the column of the row's segment

    def below(self, points: torch.Tensor) -> torch.Tensor:
        """[B, N, P] float64: how many eigenvalues of each segment lie below each of `points [B, N, P]`."""
        place = torch.arange(self.diagonal.shape[1], device=points.device)[:, None]

        def pivot(number: torch.Tensor, count: torch.Tensor, last: torch.Tensor, square: torch.Tensor) -> State:
            at = (place == number).double()
            own = self.member.transpose(1, 2) @ at  # [B, N, 1]
            here = self.diagonal[:, None] @ at - own.transpose(1, 2) @ points - square / last
            here = torch.where(here.abs() < NOTHING, -NOTHING, here)
            return count + own * (here < 0).double(), here, self.beside[:, None] @ at

        one = torch.ones(points.shape[0], 1, points.shape[2], dtype=torch.float64, device=points.device)
        rounds = torch.full((), 1, dtype=torch.int64, device=points.device) * self.diagonal.shape[1]
        state = (torch.zeros_like(points), one, torch.zeros_like(one[:, :, :1]))
        return repeat(pivot, state, rounds)[0]


def _threshold(blocks: _Blocks, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, N] between the eigenvalues taken and the others, [B, N] how far off the nearest of them lies at least).

    Args:
        blocks: the matrices.
        number: [B, N] float64, how many of the smallest eigenvalues are asked for, 1 or more.
    """
    wanted, step = number[:, :, None], torch.arange(1, POINTS + 1, device=number.device).double()
    low, width = torch.full_like(wanted, -SAME), LARGEST + 2 * SAME
    for _ in range(PASSES):
        width = width / (POINTS + 1)
        few = (blocks.below(low + step * width) < wanted).double()
        low = low + few @ _ones(POINTS, number) * width
    middle = low + width / 2
    reach = SAME * 2.0 ** torch.arange(DOUBLINGS, device=number.device).double()
    count = blocks.below(torch.cat([middle - reach, middle + reach], 2))
    down, up = count[:, :, :DOUBLINGS], count[:, :, DOUBLINGS:]
    parted = (up[:, :, :1] > wanted) & (down[:, :, :1] > 0)
    side = torch.where(parted, down, up)
    # The longest stretch from the side of the eigenvalue asked for that holds no other.
    free = (side == side[:, :, :1]).double() @ _ones(DOUBLINGS, number) - 1
    spare = SAME * (2.0**free - 1) / 2
    return (
        (middle + torch.where(parted, -SAME - spare, SAME + spare)).squeeze(2),
        spare.clamp(min=SAME / 16).squeeze(2),
    )


def _signs(matrix: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """[B, V, V]: every eigenvalue of `matrix` becomes 1 or -1, what it is the sign of.

    Args:
        matrix: eigenvalues of at most 1 in size.
        least: [B, V] what they have at least in size, in the block of each row.
    """

    def step(number: torch.Tensor, now: torch.Tensor, low: torch.Tensor) -> State:
        scale = (3.0 / (1.0 + low + low * low)).sqrt().clamp(max=STEEPEST)
        now, low = now * scale, low * scale
        return 1.5 * now - 0.5 * (now @ now @ now), 1.5 * low - 0.5 * low * low * low

    rounds = torch.full((), STEPS, dtype=torch.int64, device=matrix.device)
    return repeat(step, (matrix, least[:, :, None].clone()), rounds, lambda now, low: (low < 1 - 1e-12).any())[0]


def smallest(matrix: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """[B, V, V] float64: the projector on the eigenvectors of each segment's smallest eigenvalues; pads stay alone.

    Eigenvalues count as equal where they differ by less than a millionth of the largest that there can be. Of equal
    ones all are taken or none: none where some but not all of them are among the smallest, all where none is smaller.

    Args:
        matrix: [B, V, V] float64, symmetric with eigenvalues of at least 0, and zeros between two segments.
        segment: [B, V] int64, -1 pads; counts: [B, N] int64.
        number: [B, N] int64, how many eigenvalues are taken of each segment.
    """
    tokens = segment.shape[1]
    place = torch.arange(tokens, device=segment.device)
    # Rows of absolute numbers add up to more than any eigenvalue; a segment whose rows are nothing has eigenvalues 0.
    sums = (matrix.abs() @ _ones(tokens, matrix)).squeeze(2)
    widest = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.float64, device=matrix.device)
    widest = widest.scatter_reduce(1, segment + 1, sums, "amax")[:, 1:]
    scale = LARGEST / torch.where(widest > 0, widest, 1.0)
    matrix = matrix * per_token(scale, segment)[:, :, None]

    order = torch.sort(segment, dim=1, stable=True).indices
    beside = matrix.gather(1, order[:, :, None].expand(matrix.shape)).gather(2, order[:, None, :].expand(matrix.shape))
    member = segment.gather(1, order)[:, :, None] == torch.arange(counts.shape[1], device=segment.device)
    blocks = _Blocks(*_tridiagonal(beside), member.double())
    threshold, least = _threshold(blocks, number.clamp(min=1).double())

    same = place[:, None] == place
    valid = (segment >= 0)[:, :, None]
    shifted = torch.where(same, per_token(threshold, segment)[:, :, None] - matrix, -matrix)
    shifted = torch.where(valid, shifted, same.double())
    signs = _signs(shifted, torch.where(valid.squeeze(2), per_token(least, segment), 1.0))
    return torch.where(same, 0.5 + 0.5 * signs, 0.5 * signs)
