"""Budgets against a model: averages over the layers become counts, and a budget that keeps nothing is refused."""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction

from tvc.errors import SiteError
from tvc.kernels.budget import Budget
from tvc.kernels.op import Frames, Primitive
from tvc.policy.schema import Policy, Step
from tvc.program import Layout, spread


def scope_frames(scope: str, images: Frames) -> Frames:
    """Visual tokens of each frame per scope of a step, from those per image."""
    if scope == "image":
        return images
    frames = [count for image in images for count in image]
    return [[count] for count in frames] if scope == "frame" else [frames]


def leaving(steps: tuple[Step, ...], layout: Layout) -> Iterator[tuple[Step, list[int], list[int]]]:
    """Per step, how many visual tokens each of its scopes has on entering and on leaving.

    A gate decided at run time is taken not to fire, so the counts are upper bounds behind one.
    """
    images: Frames = layout.frame_tokens
    for step in steps:
        frames = scope_frames(step.scope, images)
        entering = [sum(scope) for scope in frames]
        if step.exit is not None:
            left = [0] * len(entering) if step.exit.gate.key == "always" else entering
        elif step.merge is not None:
            left = step.merge.kept_of_frames(frames)
        else:
            chosen = step.select.kept_of_frames(frames) if step.select is not None else entering
            left = step.rest.kept_of_frames(frames, chosen) if step.rest is not None else chosen
        yield step, entering, left
        images = images if step.until else _images_left(step, images, left)


def _images_left(step: Step, images: Frames, left: list[int]) -> Frames:
    """Visual tokens of each frame of each image behind a step that leaves so many of its scopes.

    What it leaves of several frames is divided among them in proportion: how it truly is, only the run tells. What a
    step of scope `sequence` leaves can't be told apart by image: later steps see it as one.
    """
    if step.scope == "frame":
        counts = iter(left)
        return [[next(counts) for _ in image] for image in images]
    return [spread(total, scope) for total, scope in zip(left, scope_frames(step.scope, images), strict=True)]


def with_spreads(steps: tuple[Step, ...], layout: Layout) -> tuple[Step, ...]:
    """The steps with every merge settled that depends on the model's depth and on what enters the first of a range."""
    ranges = collections.Counter(step.number for step in steps)
    fronts: dict[int, int] = {}
    made: tuple[Step, ...] = ()
    for step in steps:
        if step.merge is not None:
            inside = step.site.component == "vision"
            # Inside the encoder every tile is a scope of its own.
            tile = layout.tile_tokens - layout.prefix_tokens
            entering = dataclasses.replace(layout, visual_tokens=(tile,), frames=1) if inside else layout
            images: Frames = entering.frame_tokens
            for _, _, left in leaving(made, entering):
                images = [[count] for count in left]
            largest = max((sum(scope) for scope in scope_frames(step.scope, images)), default=0)
            front = fronts.setdefault(step.number, largest)
            blocks = len(layout.vision if inside else layout.language)
            step = dataclasses.replace(step, merge=step.merge.for_model(front, ranges[step.number], blocks))
        made = (*made, step)
    return made


def check_nothing_emptied(policy: Policy, steps: tuple[Step, ...], layout: Layout) -> None:
    """Refuses a budget that rounds down to no token for one of the sample's images.

    Raises:
        SiteError: with the smallest share that keeps a token.
    """
    for step, entering, left in leaving(steps, layout):
        number = step.number
        if step.exit is not None:
            continue
        for image, (before, after) in enumerate(zip(entering, left, strict=True)):
            if before and not after:
                enough, least = _least(step, before)
                share = f"{enough // 10}.{enough % 10}%" if enough % 10 else f"{enough // 10}%"
                budgets = ", ".join(str(b) for p in step.primitives() for _, b in fields(p, lambda _: True))
                raise SiteError(
                    f"step {number} keeps nothing of the {before} visual tokens of {step.scope} {image}",
                    where=policy.document.where(("steps", number, "select")),
                    got=f"keep {budgets} of {before}",
                    want=f"at least one token: {share} or more, or a count",
                    fix=f"write keep: {share}, or keep: {least}; to drop all of them, exit: {{when: always}}",
                    slug="keeps-nothing",
                )


def _least(step: Step, tokens: int) -> tuple[int, int]:
    """The smallest share (in permille) and the smallest count of a scope's tokens with which something stays."""

    def stays(budget: Budget) -> bool:
        select = step.select
        if select is None:
            return True
        budgets = {name: budget for name, _ in fields(select, lambda _: True)}
        return select.model_copy(update=budgets).kept([tokens]) != [0]

    shares = range(-(-1000 // tokens), 1001)
    enough = next((n for n in shares if stays(Budget(permille=n))), 1000)
    return enough, next((n for n in range(1, tokens + 1) if stays(Budget(count=n))), tokens)


def fields(primitive: Primitive, wanted: Callable[[Budget], bool]) -> Iterator[tuple[str, Budget]]:
    """The primitive's own budgets that are `wanted`, by field name."""
    for name in type(primitive).model_fields:
        value = getattr(primitive, name)
        if isinstance(value, Budget) and wanted(value):
            yield name, value


def _is_average(budget: Budget) -> bool:
    return budget.average is not None


def with_averages(policy: Policy, steps: tuple[Step, ...], layout: Layout) -> tuple[Step, ...]:
    """The steps with each `{average: n}` as the count that brings the mean over the decoder's layers closest to n.

    With several such steps each keeps the same share of what enters it. The mean is over the decoder's layers and over
    the images of the sample.

    Raises:
        SiteError: no count reaches the average; steps ask for different averages; the step acts where none is defined.
    """
    marked = [i for i, step in enumerate(steps) if step.select and any(fields(step.select, _is_average))]
    if not marked:
        return steps
    asked = {budget.average or 0 for i in marked for _, budget in fields(steps[i].select, _is_average)}  # type: ignore[arg-type]
    target, where = max(asked), policy.document.where(("steps", steps[marked[0]].number, "select"))
    if len(asked) > 1:
        raise SiteError(
            "steps ask for different averages over the same layers",
            where=where,
            got=", ".join(str(n) for n in sorted(asked)),
            want="one average, shared by all steps that name one",
            fix=f"write {{average: {target}}} in each of them, or give all but one a share",
            slug="several-averages",
        )
    largest = max(layout.visual_tokens, default=0)

    def candidate(size: int) -> tuple[Step, ...]:
        """The steps with counts: the first keeps `size`, the next the same share of that, and so on."""
        made, count = list(steps), largest
        for i in marked:
            count = max(1, count * size // max(largest, 1))
            select = steps[i].select
            if select is not None:
                update = {name: Budget(count=count) for name, _ in fields(select, _is_average)}
                made[i] = dataclasses.replace(steps[i], select=select.model_copy(update=update))
        return tuple(made)

    means = [_mean(candidate(size), layout) for size in range(1, largest + 1)]
    if not means or not means[0] <= target <= means[-1]:
        bounds = f"{float(means[0]):.1f} to {float(means[-1]):.1f}" if means else "an image in the sample"
        raise SiteError(
            f"no budget makes the average over the {len(layout.language)} decoder layers {target} visual tokens",
            where=where,
            got=f"{{average: {target}}}",
            want=bounds,
            fix="choose an average in that range, or act at another layer" if means else "give a sample with an image",
            slug="unreachable-average",
        )
    above = bisect.bisect_left(means, target)
    best = min(range(max(above - 1, 0), min(above + 1, len(means))), key=lambda i: (abs(means[i] - target), i))
    return candidate(best + 1)


def _mean(steps: tuple[Step, ...], layout: Layout) -> Fraction:
    """Visual tokens per image and decoder layer."""
    total, current = 0, sum(layout.visual_tokens)
    after = {}
    for step, entering, left in leaving(steps, layout):
        if step.site.component == "language":
            after[step.site.index] = sum(left)
            if step.until:
                after[int(step.until.removeprefix("language."))] = sum(entering)
        else:
            current = sum(left)
    for layer in range(len(layout.language)):
        current = after.get(layer, current)
        total += current
    return Fraction(total, max(len(layout.language), 1) * max(len(layout.visual_tokens), 1))
