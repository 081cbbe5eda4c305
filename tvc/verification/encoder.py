"""The vision encoder of an untouched model: which of its tokens make which visual token, and what it says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tvc.errors import TraceError
from tvc.trace.layout import residual_argument, used_vision_blocks
from tvc.trace.observe import Observer, Seen, observed
from tvc.trace.parts import feature_owner, keywords
from tvc.verification.steps import Sample

_BASE = 8  # one digit of a visual token's number is read off a ratio of gradients, so it must be small


class _Leaf(Observer):
    """Cuts the encoder open in front of its last used block, whose attention is then silent: tokens stay apart."""

    silent = True

    def __init__(self, block: int):
        self.block = block
        self.leaf: torch.Tensor | None = None

    def entering(self, component: str, index: int, block: torch.nn.Module, arguments: dict[str, Any]) -> None:
        if component == "vision" and index == self.block:
            name = residual_argument(block)
            self.leaf = arguments[name].detach().requires_grad_()
            arguments[name] = self.leaf


def token_map(model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """[tokens] int64: the visual token (over all samples, in order) that each encoder token ends in, -1 for none.

    With attention silent every encoder token moves one visual token only. The features are weighted by the digits of
    the visual tokens' numbers and derived by the encoder tokens: the ratio to the unweighted derivative is the digit.

    Raises:
        TraceError: an encoder token ends in several visual tokens.
    """
    observer = _Leaf(used_vision_blocks(model) - 1)
    with torch.enable_grad(), observed(model, observer):
        features = flat_features(model, inputs)
        leaf = observer.leaf
        if leaf is None or not features.requires_grad:
            raise unmapped("the features do not depend on the encoder's blocks")
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(features.shape[1], generator=generator).to(features)
        told = features @ direction

        def gradient(weights: torch.Tensor) -> torch.Tensor:
            made = torch.autograd.grad((told * weights.to(told)).sum(), leaf, retain_graph=True)[0]
            return made.reshape(-1, leaf.shape[-1]).double()

        return numbered(gradient, len(told), told.device)


def numbered(gradient: Callable[[torch.Tensor], torch.Tensor], count: int, device: torch.device) -> torch.Tensor:
    """[rows] int64: which of `count` outputs each row of inputs moves, -1 for none.

    Args:
        gradient: [rows, channels] float64 of the sum of the outputs, each times its entry of the weights [count].

    Raises:
        TraceError: a row moves several of them.
    """
    numbers = torch.arange(count, device=device)
    plain = gradient(torch.ones_like(numbers))
    length = (plain * plain).sum(1)
    result, factor = torch.zeros(len(plain), dtype=torch.int64, device=plain.device), 1
    while factor <= max(1, count - 1):
        digit = gradient(numbers // factor % _BASE)
        ratio = (digit * plain).sum(1) / length.clamp(min=1e-30)
        if bool(((ratio - ratio.round()).abs() > 0.1)[length > 0].any()):
            raise unmapped("what goes in ends in several visual tokens")
        result += ratio.round().long() * factor
        factor *= _BASE
    return torch.where(length > 0, result, -1)


def unmapped(why: str) -> TraceError:
    return TraceError(
        "encoder tokens cannot be matched with visual tokens",
        where="verification",
        got=why,
        want="every encoder token in one visual token at most",
        fix="take the score from a decoder layer, or compile with verify=False",
        slug="tokens-not-matched",
    )


def flat_features(model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """[visual tokens of all samples, D] what the model's own `get_image_features` gives."""
    owner: Any = feature_owner(model)
    parts = feature_parts(owner.get_image_features(**keywords(owner.get_image_features, inputs)))
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def feature_parts(output: Any) -> list[torch.Tensor]:
    """[tokens, D] of each image (or tile), from what `get_image_features` returned."""
    pooled = getattr(output, "pooler_output", output)
    if pooled is None:  # the model makes them elsewhere
        return []
    if isinstance(pooled, torch.Tensor):
        return list(pooled) if pooled.dim() == 3 else [pooled]
    return list(pooled)


@dataclasses.dataclass
class EncoderTaps:
    """Turns what attention calls of one encoder block saw into one number (or key) a visual token."""

    owner: torch.Tensor  # [tokens] from `token_map`
    number: int  # visual tokens; those that no encoder token ends in (newlines) get 0
    images: list[int]  # visual tokens of each image

    def _image(self) -> torch.Tensor:
        """[tokens] which image each encoder token belongs to; one that ends in no visual token, to that before it."""
        lengths = torch.tensor(self.images, device=self.owner.device)
        of_visual = torch.arange(len(self.images), device=self.owner.device).repeat_interleave(lengths)
        found = torch.where(self.owner < 0, 0, of_visual[self.owner.clamp(min=0)])
        return found.cummax(0).values

    def _pooled(self, values: torch.Tensor) -> torch.Tensor:
        """[visual tokens, ...] means of `values` [tokens, ...] over the encoder tokens of each visual token."""
        real = self.owner >= 0
        flat = values.reshape(len(values), -1).float()
        total = flat.new_zeros(self.number, flat.shape[1]).index_add(0, self.owner[real], flat[real])
        members = flat.new_zeros(self.number).index_add(0, self.owner[real], flat.new_ones(int(real.sum())))
        return total / members.clamp(min=1)[:, None]

    def keys(self, calls: list[Seen]) -> torch.Tensor:
        """[visual tokens, d] keys averaged over heads."""
        return self._pooled(torch.cat([c.key.float().mean(1).flatten(0, 1) for c in calls]))

    def attention(self, calls: list[Seen], of: str, heads: str) -> torch.Tensor:
        """[visual tokens] the attention that a block's tokens pay: `cls` (the first), `visual` or `all` of them.

        The mean is over the tokens that pay in a tile, or in an image where images are packed.
        """
        received, rows, start = [], [], 0
        for call in calls:
            batch, _, length, _ = call.query.shape
            weights = _weights(call, heads == "joined")
            if of == "cls":
                paying = (torch.arange(length, device=weights.device) == 0).expand(batch, -1)
            elif of == "visual":
                paying = (self.owner[start : start + batch * length] >= 0).reshape(batch, length) & _alive(call)
            else:
                paying = _alive(call)  # tokens that were dropped pay nothing
            received.append((weights * paying[:, None, :, None]).sum(2))
            rows.append(paying)
            start += batch * length
        total = torch.cat([by_head.transpose(1, 2).flatten(0, 1) for by_head in received])  # [tokens, heads]
        if _packed(calls):
            image, each = self._image(), torch.cat([paying.flatten() for paying in rows]).float()
            payers = each.new_zeros(len(self.images)).index_add(0, image, each)[image]
        else:
            payers = torch.cat([paying.sum(1, keepdim=True).expand(paying.shape).flatten() for paying in rows])
        by_head = total / payers.clamp(min=1)[:, None]
        mean = by_head.mean(1)
        pooled = {"mean": mean, "joined": mean, "sum": by_head.sum(1), "max": by_head.amax(1)}[heads]
        return self._pooled(pooled[:, None])[:, 0]

    def of_global(self, calls: list[Seen], above: float) -> torch.Tensor:
        """[visual tokens] the attention that those tokens pay which receive more than `above` times the mean of it.

        Where no token does, the one that receives most pays. Tiles are judged apart, and so are packed images.
        """
        tiles = [
            (paid, alive) for call in calls for paid, alive in zip(_weights(call).mean(1), _alive(call), strict=True)
        ]
        if _packed(calls):
            paid, alive = torch.block_diag(*(paid for paid, _ in tiles)), torch.cat([alive for _, alive in tiles])
            image = self._image()
            tiles = [(paid[own][:, own], alive[own]) for own in (image == n for n in image.unique())]
        received = []
        for paid, alive in tiles:
            mass = paid[alive].mean(0)
            payers = alive & (mass > above * mass[alive].mean())
            payers |= alive & (mass == mass[alive].max()) & ~payers.any()
            received.append(paid[payers].mean(0))
        return self._pooled(torch.cat(received)[:, None])[:, 0]


def _packed(calls: list[Seen]) -> bool:
    """Whether all images are in one row: they, or parts of them, are calls of their own, or a mask keeps them apart."""
    return len(calls) > 1 or calls[0].query.shape[0] == 1


def _alive(call: Seen) -> torch.Tensor:
    """[batch, length] bool: tokens that some token may attend to, and so were not dropped."""
    batch, _, length, _ = call.query.shape
    if call.mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=call.query.device)
    return _boolean(call.mask).any(1).expand(batch, length, length).any(1)


def _weights(call: Seen, joined: bool = False) -> torch.Tensor:
    """[batch, heads, length, length] what each token pays to each; `joined`: as one head of the full width."""
    count = call.query.shape[1]
    key = call.key.float().repeat_interleave(count // call.key.shape[1], 1)
    weights = call.query.float() @ key.transpose(2, 3) * call.scale
    mask = None if call.mask is None else _boolean(call.mask)
    bias = call.mask if call.mask is not None and call.mask.dtype != torch.bool else None
    if joined:
        weights = weights.sum(1, keepdim=True) * count**-0.5
        mask = None if mask is None else mask.all(1, keepdim=True)
        bias = None if bias is None else bias.amin(1, keepdim=True)
    if call.softcap:
        weights = (weights / call.softcap).tanh() * call.softcap
    if bias is not None:
        weights = weights + bias
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    return weights.softmax(-1)


def _boolean(mask: torch.Tensor) -> torch.Tensor:
    """What a mask lets be seen; a float one is added to logits and forbids by its lowest numbers."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def tile_mask(seen: Seen, alive: torch.Tensor, sized: Sequence[Sample] | None) -> torch.Tensor:
    """The mask of an encoder's attention without the tokens that were cut.

    Args:
        alive: [T, N] bool, for each tile the tokens that are left.
        sized: the tiles, where the logarithm of each token's size is added to its logits.
    """
    left = alive[:, None, None, :].to(seen.query.device)
    if seen.mask is None:
        allowed = left.expand(-1, 1, seen.query.shape[2], -1)
    else:
        allowed = _boolean(seen.mask) & left
    if sized is None:
        return allowed
    sizes = torch.ones(alive.shape, device=seen.query.device)
    for tile in sized:
        sizes[tile.row, tile.slots] = tile.size
    added = sizes.log().to(seen.query.dtype)[:, None, None, :].expand(allowed.shape)
    return added.masked_fill(~allowed, float("-inf"))
