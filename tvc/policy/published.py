"""Settings that a policy has ready for a budget, as its paper ships them: `budgets: {33%: {keep: 33.4%}}`.

Each stands under the share of the visual tokens that it is published for, and gives some of the policy's parameters. It
holds whole: what it says of layers and shares belongs together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from tvc.kernels.budget import Budget
from tvc.policy.document import Document, Path, nearest


def published(document: Document, parse: Callable[[Document], object]) -> dict[str, dict[str, Any]]:
    """The parameters of each budget, by its share in one spelling.

    Args:
        document: a policy's text.
        parse: reads a policy; each budget's settings are read in their place.

    Raises:
        PolicyError: a key is no share, a budget names no parameter, or the policy can't have its values.
    """
    written = document.data.get("budgets", {})
    parameters = document.data.get("parameters", {})
    if not isinstance(written, dict) or not all(isinstance(settings, dict) for settings in written.values()):
        raise document.error(
            ("budgets",),
            "`budgets` does not say for shares what parameters are",
            got=written,
            want="parameters for each share of the visual tokens",
            fix="write budgets: and below it 33%: {keep: 33.4%}",
            slug="wrong-type",
        )
    plain = {key: value for key, value in document.data.items() if key != "budgets"}
    found: dict[str, dict[str, Any]] = {}
    for text, settings in written.items():
        path: Path = ("budgets", text)
        share = _share(document, path, text)
        if share in found:
            raise document.error(
                path,
                "two budgets are the same share",
                got=text,
                want="each share once",
                fix="remove one of them",
                slug="duplicate-budget",
            )
        chosen = dataclasses.replace(document, data=plain)
        for name, value in settings.items():
            if name not in parameters:
                close = nearest(name, parameters)
                raise document.error(
                    (*path, name),
                    "a budget sets what is no parameter of the policy",
                    got=name,
                    want=f"one of {', '.join(sorted(parameters))}" if parameters else "a policy with parameters",
                    fix=f'write "{close}"' if close else f'write {name} under parameters, and "{{{name}}}" in a step',
                    slug="unknown-parameter",
                )
            mark = document.marks.get((*path, name), document.source)
            chosen = chosen.replaced(("parameters", name), value, mark)
        parse(chosen)
        found[share] = settings
    return found


def _share(document: Document, path: Path, text: str) -> str:
    try:
        budget = Budget.model_validate(text)
    except ValidationError:
        budget = Budget(count=1)
    if budget.permille is None:
        raise document.error(
            path,
            "a budget stands under what is no share",
            got=text,
            want="a share of the visual tokens, in percent",
            fix="write 33%: {keep: 33.4%}",
            slug="bad-budget",
        )
    return str(budget)


def without(data: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's data less the budgets that set other parameters than these: they were of steps that are gone."""
    budgets = data.get("budgets")
    if not isinstance(budgets, dict):
        return dict(data)
    kept = {
        share: settings
        for share, settings in budgets.items()
        if not isinstance(settings, dict) or all(name in parameters for name in settings)
    }
    return {**data, "budgets": kept} if kept else {key: value for key, value in data.items() if key != "budgets"}
