"""Text that reads visual keys unrotated: which decoders cannot do so, and what it cannot stand beside."""

from __future__ import annotations

from collections.abc import Sequence

from tvc.policy.document import Path
from tvc.policy.options import Unrotated
from tvc.policy.schema import Policy, Step
from tvc.policy.whole import refusal
from tvc.program import Layout

PATH = (Unrotated.place, Unrotated.key)


def check_unrotated(policy: Policy, steps: Sequence[Step], layout: Layout) -> None:
    """Refuses visual keys that text reads unrotated where nothing turns them, or another rule counts on it.

    Args:
        steps: the resolved ones.

    Raises:
        SiteError: with the reason.
    """
    if not isinstance(policy.attention, Unrotated):
        return
    crosses = any(layer.crosses for layer in layout.language)
    if crosses or layout.unturned:
        raise refusal(
            policy,
            PATH,
            f"the text of {layout.model_type} cannot read visual keys unrotated",
            got="it reads visual tokens by cross-attention, and they have no position" if crosses else layout.unturned,
            want="a decoder whose layers turn queries and keys of their own by positions (rotary embedding)",
            fix="leave attention out",
            slug="nothing-rotated",
        )
    _check_caches(policy, steps)
    for step in steps:
        for primitive in step.primitives():
            for tap in primitive.taps().values():
                layer = tap.layer or step.at
                if tap.kind in ("attention", "key") and layer.startswith("language."):
                    raise refusal(
                        policy,
                        ("steps", step.number),
                        f"`{primitive.key}` takes queries or keys of a decoder layer as positions turn them",
                        got=f"{primitive.key} of {layer}, and attention: {Unrotated.key}",
                        want="scores of features, or of the vision encoder",
                        fix="take another score (norm, cosine), or leave attention out",
                        slug="turned-score",
                    )


def _check_caches(policy: Policy, steps: Sequence[Step]) -> None:
    """Refuses rules by which caches hold something else than the keys that ran through their layers."""
    evicting = next((step for step in steps if step.evict), None)
    others: dict[str, tuple[Path, bool]] = {
        "evict": (("steps", evicting.number if evicting else 0, "evict"), evicting is not None),
        "cache": (("cache",), policy.cache is not None),
        "reselect": (("reselect",), policy.reselect is not None),
    }
    for key, (path, asked) in others.items():
        if asked:
            raise refusal(
                policy,
                path,
                f"`{key}` is not defined where caches hold visual keys unrotated",
                got=f"{key}, and attention: {Unrotated.key}",
                want="one of the two",
                fix=f"remove {key}, or leave attention out",
                slug="not-beside-unrotated",
            )
