"""Plain functions for clustering by density peaks inside groups of tokens, in memory that grows with V, not V squared.

With the squared distance over D channels divided by D, a token's density is exp(-mean of the k smallest ones to tokens
of its group, its own 0 among them). Its lead is the distance to the nearest denser token of the group, or the group's
largest distance for the densest. The tokens with the highest density * lead are the centres.

Ties: of equally dense tokens (within a millionth) the lower index counts as denser, as it does among equal products;
tokens whose squared distance is below a millionth of their squared lengths are copies, at distance 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tvc.kernels.blocks import by_rows
from tvc.kernels.greedy import EQUAL, rows
from tvc.kernels.loop import State
from tvc.kernels.segments import per_token, ranks

FAR = torch.finfo(torch.float32).max
SAME = 1e-6


def histogram(group: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, groups] int64: how many tokens each group of `group [B, V]` (-1: none) has."""
    room = torch.zeros(group.shape[0], groups + 1, dtype=torch.int64, device=group.device)
    return room.scatter_add(1, group + 1, torch.ones_like(group))[:, 1:]


class Peaks:
    """Distances between tokens of one group, a block of rows at a time."""

    def __init__(self, feature: torch.Tensor, group: torch.Tensor):
        """Takes feature [B, V, D] and group [B, V] int64, -1 for tokens that take no part."""
        real = (group >= 0)[:, :, None]
        wide = torch.where(real, torch.nan_to_num(feature.float(), 0.0, 0.0, 0.0), 0.0)
        # Distances stay as they are when everything is moved; near zero their rounding is smallest.
        share = real.float() / real.sum(1, keepdim=True).clamp(min=1)
        self.near_zero = torch.where(real, wide - share.transpose(1, 2) @ wide, 0.0)
        ones = torch.ones(feature.shape[2], 1, device=feature.device)
        self.square = (self.near_zero * self.near_zero) @ ones  # [B, V, 1]
        self.group, self.width = group, feature.shape[2]

    def by_rows(self, body: Callable[..., State], *state: torch.Tensor) -> State:
        return by_rows(body, state, self.group)

    def block(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(squared distances [B, b, V] of the rows `at [B, b]` divided by D, which of them lie within a group)."""
        place = torch.arange(self.group.shape[1], device=self.group.device)
        own = self.square.squeeze(2).gather(1, at)[:, :, None]
        both = own + self.square.transpose(1, 2)
        apart = both - 2.0 * rows(self.near_zero, at) @ self.near_zero.transpose(1, 2)
        apart = torch.where((apart < SAME * both) | (at[:, :, None] == place), 0.0, apart) / self.width
        mine = self.group.gather(1, at)[:, :, None]
        return apart, (mine == self.group[:, None, :]) & (mine >= 0)

    def densities(self, neighbours: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([B, V] density, [B, V] largest squared distance within the group); `neighbours [B, V]` up to `most`."""
        column = torch.arange(most, device=self.group.device)

        def body(at: torch.Tensor, new: torch.Tensor, density: torch.Tensor, reach: torch.Tensor) -> State:
            apart, together = self.block(at)
            near = column.shape[0]  # `most`, which a loop cannot take from around it where only the run tells it
            room = torch.nn.functional.pad(torch.where(together, apart, FAR), (0, near), value=FAR)
            closest = room.topk(near, 2, largest=False).values
            wanted = neighbours.gather(1, at)[:, :, None]
            mean = torch.where(column < wanted, closest, 0.0).sum(2) / wanted.squeeze(2).clamp(min=1)
            far = torch.nn.functional.pad(torch.where(together, apart, 0.0), (0, 1)).amax(2)
            return density.scatter(1, at, (-mean).exp()), reach.scatter(1, at, far)

        zeros = torch.zeros(self.group.shape, device=self.group.device)
        density, reach = self.by_rows(body, zeros, zeros.clone())
        return density, reach

    def leads(self, density: torch.Tensor, widest: torch.Tensor) -> torch.Tensor:
        """[B, V] float32: the distance to the nearest denser token; of the densest the root of `widest [B, V]`."""
        place = torch.arange(self.group.shape[1], device=self.group.device)

        def body(at: torch.Tensor, new: torch.Tensor, lead: torch.Tensor) -> State:
            apart, together = self.block(at)
            own, other = density.gather(1, at)[:, :, None], density[:, None, :]
            equal = (other - own).abs() <= EQUAL * torch.maximum(other, own)
            denser = together & ((equal & (place < at[:, :, None])) | (~equal & (other > own)))
            near = torch.nn.functional.pad(torch.where(denser, apart, FAR), (0, 1), value=FAR).amin(2)
            return (lead.scatter(1, at, near),)

        lead = self.by_rows(body, torch.zeros(self.group.shape, device=self.group.device))[0]
        return torch.where(lead < FAR, lead, widest).sqrt()

    def nearest(self, centre: torch.Tensor) -> torch.Tensor:
        """[B, V] int64: the nearest centre of each token's group, the first of equals; a centre is its own."""

        def body(at: torch.Tensor, new: torch.Tensor, to: torch.Tensor) -> State:
            apart, together = self.block(at)
            apart = torch.where(together & centre[:, None, :], apart, FAR)
            apart = torch.nn.functional.pad(apart, (0, 1), value=FAR)
            low = apart.amin(2, keepdim=True)
            return (to.scatter(1, at, (apart <= low + EQUAL * low).float().argmax(2)),)

        start = torch.zeros(self.group.shape, dtype=torch.int64, device=self.group.device)
        found = self.by_rows(body, start)[0]
        return torch.where(centre, torch.arange(self.group.shape[1], device=self.group.device), found)


def centres(
    feature: torch.Tensor,
    group: torch.Tensor,
    members: torch.Tensor,
    number: torch.Tensor,
    neighbours: torch.Tensor,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, V] bool the centres, [B, V] int64 the centre of each token; what the others get means nothing).

    Args:
        feature: [B, V, D] float.
        group: [B, V] int64, -1 for tokens that take no part.
        members: [B, G] int64 tokens of each group.
        number: [B, G] int64 centres of each group.
        neighbours: [B, G] int64 the k of the density, at most `most`; fewer where a group has fewer tokens.
    """
    peaks = Peaks(feature, group)
    k = per_token(torch.minimum(neighbours, members).clamp(min=1), group)
    density, reach = peaks.densities(k, most)
    # Column 0 takes the tokens of no group.
    widest = torch.zeros(group.shape[0], members.shape[1] + 1, device=group.device)
    widest = widest.scatter_reduce(1, group + 1, reach, "amax")[:, 1:]
    value = density * peaks.leads(density, per_token(widest, group))
    centre = (group >= 0) & (ranks(group, members, value) < per_token(number, group))
    return centre, peaks.nearest(centre)
