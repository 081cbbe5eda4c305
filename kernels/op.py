"""The contract of an op and of a policy primitive.

An *op* is a pure tensor function, registered as `torch.ops.tvc.<name>`: its reference in plain PyTorch is its schema,
its fake kernel, its CPU path, its export lowering and its test oracle. A *primitive* is what a policy can name (a
score, a selector, a rest rule, a merge, an exit gate): a pydantic model whose fields are the YAML keys, with the *taps*
(values of the graph) it takes; its `apply` is plain Python over tensors that calls ops, so the same lines run while a
graph is traced and, eagerly, in the verification oracle. Adding either costs one file in this folder.

The `apply` of the base classes ends in `*args, **taps` so that a subclass may name the taps it takes; they are always
passed by keyword.
"""

from __future__ import annotations

import dataclasses
import fractions
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from tvc.kernels.budget import Budget
from tvc.kernels.providers import PROVIDED, dispatched

Kind = Literal["score", "select", "rest", "merge", "when"]
Frames = Sequence[Sequence[int]]  # per scope the visual tokens of each of its frames, in order; an image is one frame


@dataclasses.dataclass(frozen=True)
class Op:
    """One op: `overload` is what a graph holds, `reference` is what it means, `lowering` what it becomes in aten."""

    name: str
    reference: Callable[..., Any]
    overload: Any
    cases: Callable[[], Iterator[tuple[str, tuple[Any, ...]]]]
    lowering: Callable[..., Any]


OPS: dict[str, Op] = {}


def op(
    cases: Callable[[], Iterator[tuple[str, tuple[Any, ...]]]],
    fake: Callable[..., Any] | None = None,
    lowering: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Registers a plain torch function as `torch.ops.tvc.<its name>`.

    `cases` yields (id, arguments) for tests and benches.
    `fake` gives the output's shape where running the reference on fake tensors would guard on sizes.
    `lowering` computes the same without promises that only the op itself has to keep (a contiguous output); default:
    the reference.

    The function must be pure, free of in-place writes to its arguments and of device branches, and must not return a
    view of an argument (return a clone where it would). Where `providers/` has a file of its name, that serves CUDA
    tensors.
    """

    def register(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        custom = torch.library.custom_op(f"tvc::{name}", reference, mutates_args=())
        custom.register_fake(fake or reference)
        if name in PROVIDED:
            custom.register_kernel("cuda")(dispatched(name, reference))
        made = Op(name, reference, getattr(torch.ops.tvc, name).default, cases, lowering or reference)
        OPS[name] = made
        return made

    return register


class State(NamedTuple):
    """A tensor [B, *sizes] that goes along with the caches from call to call, zeros where no call came before.

    `width` among the sizes stands for that of the decoder.
    """

    name: str
    sizes: tuple[int | Literal["width"], ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Tap:
    """A value of the traced graph that a primitive asks for.

    kind: `feature`   [B, V, D] the visual tokens at the site
          `key`       [B, V, d] attention keys of the visual tokens in `layer`, averaged over heads; with `of` joined
                      [B, V, G d] those of all heads side by side, which only a decoder layer has
          `attention` an `Attention` bundle taken from `layer`, rows chosen by `of`; with `rotary` False its q and k are
                      those of a layer that is about to run, before positions turned them
          `text`      a `(hidden [B, T, D], valid [B, T] bool)` pair: the text tokens at the site
          `transition` [B, V] how much attention and MLP of `layer`, a decoder layer before the site, changed each
                      visual token (see kernels/score_transition.py)
          `ordinal`   [B, V] int64 running number of each visual token of the sample, -1 pads
          `weights`   tensors by name, which `tensors` reads (see kernels/weights.py)
          `frame`     a `(frame, place)` pair, each [B, V] int64 with -1 pads (see kernels/frames.py)
          `neighbour` a `(right, below)` pair, each [B, V] int64 with -1 for none (see kernels/grid.py)
          `row`       [B, V] int64 tokens in the row of each visual token, as the decoder's positions tell; pads 1
          `pixel`     [B, V, P] float32 what the encoder was given of the cell of each visual token, zeros where it has
                      none
          `spent`     a `(entered, spent)` pair, each [B, N] int64: visual tokens of each image at the decoder's entry,
                      and their sum over the layers in front of `layer`, the step's own
          `memory`    tensors by name, as `states` says: what a score of a decoder step has kept of earlier calls on
                      the same cache (see `Score.remembered`)
    of: the rows of `attention`; `behind` of `text`: what stands behind the last visual token, all text if nothing does
    columns: for `neighbour` the length of a row; None: as the decoder's positions tell
    """

    kind: Literal[
        "feature",
        "key",
        "attention",
        "text",
        "ordinal",
        "transition",
        "weights",
        "frame",
        "spent",
        "neighbour",
        "row",
        "pixel",
        "memory",
    ]
    layer: str | None = None
    of: tuple[str, ...] = ()
    tensors: Callable[[], dict[str, torch.Tensor]] | None = None
    rotary: bool = True
    columns: int | None = None
    states: tuple[State, ...] = ()


class Attention(NamedTuple):
    """The q and k that enter an attention op, with the rows that score and the columns that are scored."""

    query: torch.Tensor  # [B, H, Q, d]
    key: torch.Tensor  # [B, G, N, d], G divides H
    mask: torch.Tensor | None  # [B|1, 1|H, Q, N] bool, True = may attend, or float, added to logits; None: everything
    rows: torch.Tensor  # [B, R] int64 rows of the query that score, -1 pads
    columns: torch.Tensor  # [B, V, g] int64 keys of each visual token among the N, -1 pads; g > 1: mean over g
    scale: float
    image: torch.Tensor | None = None  # [B, N] int64 image of each key, where an encoder packs several in one sequence
    softcap: float = 0.0  # what a hyperbolic tangent keeps logits within; 0: they are as they are


@dataclasses.dataclass(frozen=True)
class Scope:
    """Which visual tokens compete for one budget."""

    segment: torch.Tensor  # [B, V] int64 scope of each visual token, -1 pads
    counts: torch.Tensor  # [B, N] int64 visual tokens per scope, 0 pads (N >= 1 even where the chunk has no image)
    number: int  # int or SymInt: scopes in the chunk at most; 0 where the chunk has no visual token (a decode step)
    whole: bool = False  # one scope fills V in every sample: no pads, as among the tiles of an encoder


class Primitive(BaseModel):
    """What a policy can name. `key` is its name in YAML; a bare scalar in YAML sets the field `shorthand`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[Kind]
    key: ClassVar[str]
    shorthand: ClassVar[str | None] = None
    components: ClassVar[tuple[str, ...]] = ("vision", "language")  # whose layers its taps may be taken from
    gaps: ClassVar[bool] = False  # copes with frames of which an earlier step has taken tokens

    def taps(self) -> dict[str, Tap]:
        """The values of the graph that `apply` takes, by argument name."""
        return {}

    def scaled(self, factor: fractions.Fraction) -> Self:
        """With every budget times a factor; numbers of tokens that are written as plain fields scale in an override."""
        budgets = {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Budget)}
        return self.model_copy(update={name: budget.scaled(factor) for name, budget in budgets.items()})


class Score(Primitive):
    """Higher = keep."""

    kind: ClassVar[Kind] = "score"
    scoped: ClassVar[bool] = False  # `apply` takes the scope as well

    def apply(self, *args: Any, **taps: Any) -> torch.Tensor:
        """[B, V] float32, one number a visual token (pads: any finite number)."""
        raise NotImplementedError

    def remembered(self, *args: Any, **taps: Any) -> dict[str, torch.Tensor]:
        """The states of its `memory` tap behind this call, by name; takes the taps that `apply` takes.

        Two calls, each with some of the visual tokens, have to give what one with all of them gives. Samples that bring
        no visual token keep their states whatever this says.
        """
        raise NotImplementedError


class Select(Primitive):
    """Chooses the tokens that stay."""

    kind: ClassVar[Kind] = "select"
    needs_score: ClassVar[bool] = True
    weighs_score: ClassVar[bool] = False  # needs none, but takes one into account where the step has it
    terms: ClassVar[int] = 0  # score terms that `joined` makes one score of; 0: any number, added up
    exact: ClassVar[bool] = True  # `kept` is what stays; False: the most that can, as only the run tells

    @property
    def sure(self) -> bool:
        """Whether these settings make `kept_of_frames` what stays."""
        return type(self).exact

    def joined(self, terms: list[torch.Tensor], scope: Scope, *args: Any, **taps: Any) -> torch.Tensor:
        """[B, V] float32: the score that `apply` takes, from `terms` score terms [B, V] in the order of the policy.

        The taps are those of `apply`.
        """
        raise NotImplementedError

    def apply(self, score: torch.Tensor | None, scope: Scope, *args: Any, **taps: Any) -> torch.Tensor:
        """[B, K] int64 positions along V, ascending, pads (-1) first. K depends on sizes alone unless documented."""
        raise NotImplementedError

    def kept(self, counts: list[int]) -> list[int]:
        """How many of `counts` visual tokens (one number a scope) stay: the plan's side of `apply`."""
        raise NotImplementedError

    def kept_of_frames(self, frames: Frames) -> list[int]:
        """`kept` of scopes of such frames: for selectors to which these make a difference."""
        return self.kept([sum(scope) for scope in frames])


class Rest(Primitive):
    """What becomes of the tokens that were not chosen."""

    kind: ClassVar[Kind] = "rest"
    exact: ClassVar[bool] = True  # as in `Select`

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
        *args: Any,
        **taps: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """None where the others are dropped; else (chosen [B, K2] as in `Select`, feature [B, K2, D], size [B, K2])."""
        raise NotImplementedError

    @property
    def needs_score(self) -> bool:
        """Whether these settings make `apply` read the score."""
        return False

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        """How many tokens leave the step, per scope, when `chosen` of `counts` were selected."""
        return chosen

    def kept_of_frames(self, frames: Frames, chosen: list[int]) -> list[int]:
        """`kept` of scopes of such frames: for rules to which these make a difference."""
        return self.kept([sum(scope) for scope in frames], chosen)


class Merging(Primitive):
    """Joins tokens without a selection: a step of its own."""

    kind: ClassVar[Kind] = "merge"
    exact: ClassVar[bool] = True  # as in `Select`
    proportional: bool = Field(
        False, description="from here on the encoder's blocks add the log of a token's size to the attention it gets"
    )

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, *args: Any, **taps: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(chosen [B, K] as in `Select`, feature [B, K, D], size [B, K])."""
        raise NotImplementedError

    def for_model(self, tokens: int, steps: int, blocks: int) -> Self:
        """With every setting decided that only a model tells.

        Args:
            tokens: visual tokens of the largest scope in front of the first of the steps that were written as one.
            steps: how many these are.
            blocks: blocks of the component they act in.
        """
        return self

    @property
    def sure(self) -> bool:
        """Whether these settings make `kept_of_frames` what is left."""
        return type(self).exact

    def kept(self, counts: list[int]) -> list[int]:
        """How many of `counts` visual tokens (one number a scope) are left: the plan's side of `apply`."""
        raise NotImplementedError

    def fewest(self, counts: list[int]) -> list[int]:
        """How many are left at least, where the number is known only at run time."""
        return self.kept(counts)

    def kept_of_frames(self, frames: Frames) -> list[int]:
        """`kept` of scopes of such frames: for merges to which these make a difference."""
        return self.kept([sum(scope) for scope in frames])


class When(Primitive):
    """The gate of an exit."""

    kind: ClassVar[Kind] = "when"

    def apply(self, score: torch.Tensor | None, scope: Scope, *args: Any, **taps: Any) -> torch.Tensor:
        """[B] bool, True = this sample's visual tokens leave."""
        raise NotImplementedError


PRIMITIVES: dict[Kind, dict[str, type[Any]]] = {"score": {}, "select": {}, "rest": {}, "merge": {}, "when": {}}


_P = TypeVar("_P", bound=type[Primitive])


def primitive(cls: _P) -> _P:
    """Registers a primitive under its kind and key."""
    PRIMITIVES[cls.kind][cls.key] = cls
    return cls
