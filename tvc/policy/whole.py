"""What needs the visual tokens as they entered: rows of an image's grid, frames of a video, pixels; how a step is
refused.
"""

from __future__ import annotations

from typing import Any

from tvc.errors import SiteError
from tvc.kernels.op import Merging, Primitive
from tvc.policy.document import Path
from tvc.policy.schema import Policy, SiteName, Step, parse_sites
from tvc.program import Layout


def refusal(policy: Policy, path: Path, summary: str, *, got: object, want: object, fix: str, slug: str) -> SiteError:
    return SiteError(summary, where=policy.document.where(path), got=got, want=want, fix=fix, slug=slug)


def check_frames(policy: Policy, site: SiteName, path: Path, primitive: Primitive) -> None:
    """Refuses a primitive that looks at the frames of videos where these are not known, or no longer whole."""
    own = policy.steps[int(path[1])]
    earlier = [step.at for step in policy.steps[: int(path[1])] if step.lasts]
    ranged = parse_sites(own.at) is not None and not own.until
    earlier += [own.at] if ranged else []  # the first of its sites
    if site.component == "language" and (primitive.gaps or not earlier):
        return
    raise refusal(
        policy,
        path,
        f"`{primitive.key}` works on whole frames"
        + (", and an earlier step leaves gaps in them" if earlier else ", which only the decoder's positions tell"),
        got=f"{primitive.key} behind a step at {earlier[-1]}" if earlier else f"{primitive.key} at {site}",
        want="the first reduction of the policy, at a language site",
        fix="move it in front" if earlier and not ranged else "write at: language.0",
        slug="no-frames",
    )


def check_scope(policy: Policy, path: Path, step: Step, site: SiteName) -> None:
    """Refuses budgets for each frame where frames are not known."""
    if step.scope != "frame" or site.component == "language":
        return
    raise refusal(
        policy,
        (*path, "scope"),
        "which frame of a video a token is of, only the decoder's positions tell",
        got=f"scope: frame at {site}",
        want="a language site, or scope: image (an image, or a whole video)",
        fix="write at: language.0",
        slug="no-frames",
    )


def check_sizes(policy: Policy, path: Path, merge: Merging | None, site: SiteName) -> None:
    """Refuses attention in proportion to sizes where these are not known."""
    if merge is None or not merge.proportional or site.component == "vision":
        return
    raise refusal(
        policy,
        (*path, "merge", merge.key, "proportional"),
        "attention in proportion to the sizes of tokens is known inside the vision encoder alone",
        got=f"proportional: true at {site}",
        want="a vision site",
        fix="write proportional: false, or act at a vision site",
        slug="sizes-unknown",
    )


def check_video(steps: tuple[Step, ...]) -> None:
    """Refuses a step that cuts the vision encoder, or looks at it or at pixels, where the prompt shows a video."""
    for step in steps:
        taps = ((primitive, tap) for primitive in step.primitives() for tap in primitive.taps().values())
        looks = next((primitive for primitive, tap in taps if tap.kind == "pixel" or _inside(tap.layer)), None)
        if looks is None and step.site.component != "vision":
            continue
        raise SiteError(
            "a step looks at pixels or inside the vision encoder, or cuts it, which is done for images alone",
            where=step.where,
            got=f"a step at {step.at}" if looks is None else f"{looks.key} at {step.at}",
            want="for a video, steps and scores that are the decoder's",
            fix="plan an image, or a policy such as fastv",
            slug="video-inside-encoder",
        )


def _inside(layer: str | None) -> bool:
    return layer is not None and layer.startswith("vision.")


def check_pixels(policy: Policy, layout: Layout, site: SiteName, path: Path, primitive: Primitive) -> None:
    """Refuses a primitive that looks at the pixels of visual tokens where these are not known."""
    if layout.apart:
        raise refusal(
            policy,
            path,
            f"`{primitive.key}` looks at pixels, and which are a visual token's is not known of {layout.model_type}"
            if layout.untraced
            else f"`{primitive.key}` looks at pixels, and no visual token of {layout.model_type} has any of its own",
            got=layout.apart,
            want="an encoder whose tokens each stand for a part of the picture",
            fix="choose among features instead: select: {max_min: 25%}",
            slug="untraced-vision" if layout.untraced else "resampled-vision",
        )
    if site.component != "language":
        raise refusal(
            policy,
            path,
            f"`{primitive.key}` looks at the pixels of visual tokens, which reach the decoder alone",
            got=f"{primitive.key} at {site}",
            want="a language site",
            fix="write at: language.0",
            slug="decoder-only",
        )


def with_depth(policy: Policy, layout: Layout, site: SiteName, path: Path, primitive: Primitive) -> dict[str, Any]:
    """What a primitive that counts the tokens of all decoder layers has to know of them, and of its own place."""
    if "depth" not in type(primitive).model_fields:
        return {}
    if site.component != "language":
        raise refusal(
            policy,
            path,
            f"`{primitive.key}` counts the tokens of the decoder's layers",
            got=f"{primitive.key} at {site}",
            want="a language site",
            fix="write at: language.0",
            slug="decoder-only",
        )
    found = {"depth": len(layout.language), "before": site.index}
    for name, number in found.items():
        written = getattr(primitive, name)
        if written not in (None, number):
            raise refusal(
                policy,
                (*path, name),
                f"`{primitive.key}` has another number than the model and its site give",
                got=f"{name}: {written} at {site} of {len(layout.language)} layers",
                want=f"{name}: {number}",
                fix="leave it out",
                slug="other-depth",
            )
    return found


def with_columns(policy: Policy, layout: Layout, site: SiteName, path: Path, primitive: Primitive) -> dict[str, Any]:
    """The row length of a primitive that works on the grid of an image's tokens: the model's, where none is written."""
    if "columns" not in type(primitive).model_fields:
        return {}
    earlier = [step.at for step in policy.steps[: int(path[1])] if step.lasts]
    if earlier:
        raise refusal(
            policy,
            path,
            f"`{primitive.key}` works on the rows of an image, and an earlier step leaves gaps in them",
            got=f"{primitive.key} behind a step at {earlier[-1]}",
            want="the first reduction of the policy",
            fix="move it in front, or choose with select: {top: ...} here",
            slug="broken-grid",
        )
    written = getattr(primitive, "columns", None)
    asked = {tap.kind for tap in primitive.taps().values()}
    if written is None and layout.spatial and site.component == "language" and asked & {"neighbour", "row"}:
        _check_one_grid(policy, path, primitive)
        return {}
    columns = written or layout.columns(site.component)
    if columns is None and layout.spatial:
        raise _told_elsewhere(policy, layout, site, path, primitive)
    if columns is None:
        raise refusal(
            policy,
            (*path, "columns"),
            f"the visual tokens of {layout.model_type} are no square grids of one size, so their rows are not known",
            got=f"{', '.join(str(n) for n in layout.visual_tokens)} visual tokens from {layout.tiles} tiles"
            + ("" if layout.in_order else ", packed or stitched together"),
            want="a model whose encoder turns every image into square tiles of one size, or the length of a row",
            fix="write columns: N where every image has rows of N tokens, or take a selector without a grid",
            slug="no-grid",
        )
    return {"columns": columns}


def _check_one_grid(policy: Policy, path: Path, primitive: Primitive) -> None:
    """Refuses a primitive that counts rows through its scope where that holds several images, of grids of their own."""
    asked = {tap.kind for tap in primitive.taps().values()}
    if policy.steps[int(path[1])].scope != "sequence" or asked & {"neighbour", "frame"}:
        return
    raise refusal(
        policy,
        (*path[:2], "scope"),
        f"`{primitive.key}` works on the rows of one image, and the images of a prompt have rows of several lengths",
        got=f"{primitive.key} with scope: sequence",
        want="scope: image, or the length of a row that all images have",
        fix="leave scope out, or write columns: N where every image has rows of N tokens",
        slug="no-grid",
    )


def _told_elsewhere(policy: Policy, layout: Layout, site: SiteName, path: Path, primitive: Primitive) -> SiteError:
    """Why a grid that the decoder's positions tell is none for this primitive at this site."""
    told = any(tap.kind in ("neighbour", "row") for tap in primitive.taps().values())
    if told:
        summary = f"`{primitive.key}` works on the rows of an image, which only the decoder's positions tell"
        got, want, fix = f"{primitive.key} at {site}", "a language site", "write at: language.0"
    else:
        summary = f"`{primitive.key}` is defined on one square grid, and images of {layout.model_type} are of any shape"
        got = f"{', '.join(str(n) for n in layout.visual_tokens)} visual tokens, rows as the decoder's positions tell"
        want = "a model whose encoder turns every image into square tiles of one size"
        fix = "write columns: N where every image has N rows of N tokens, or take grid_mlp, which pools any grid"
    slug = "no-grid" if told else "no-square-grid"
    return refusal(policy, (*path, "columns"), summary, got=got, want=want, fix=fix, slug=slug)
