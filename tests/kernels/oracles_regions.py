"""What ops over the regions of a picture mean, with union-find over Python numbers; see oracles.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from kernel_oracles import ORACLES, Row


def regions_keep(
    pixels: Any, segment: Any, right: Any, below: Any, permille: int, within: float, floating: bool = False
) -> list[Row]:
    rows = []
    for shown, pictures, *others in zip(pixels, segment, right, below, strict=True):
        parent = list(range(len(pictures)))

        def find(token: int, parent: list[int] = parent) -> int:
            while parent[token] != token:
                token = parent[token]
            return token

        for other in others:
            for token, next_to in enumerate(other):
                if pictures[token] >= 0 and next_to >= 0 and math.dist(shown[token], shown[next_to]) < within:
                    one, two = sorted((find(token), find(next_to)))
                    parent[two] = one
        groups: dict[int, list[int]] = {}
        for token, picture in enumerate(pictures):
            if picture >= 0:
                groups.setdefault(find(token), []).append(token)
        kept = []
        for members in groups.values():
            # A product of whole numbers, halved to the even one by Python's own rule.
            stay = max(1, len(members) - round(len(members) * (1000 - permille) / 1000))
            if floating:
                places = torch.linspace(0, len(members) - 1, stay).long().tolist()
            else:
                places = [0] if stay == 1 else [i * (len(members) - 1) // (stay - 1) for i in range(stay)]
            kept += [members[place] for place in places]
        rows.append(sorted(kept))
    width = max(map(len, rows))
    return [[-1] * (width - len(row)) + row for row in rows]


ORACLES |= {"regions_keep": regions_keep}
