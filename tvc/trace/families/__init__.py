"""Small records for model families that the generic capture cannot read: one module a model type, of its name.

A record is data. What it may hold, and what is taken where it is missing:

TILES_READ   the input [B, S, images, tiles] that says which tiles each text token reads, and the input [B, images,
             tiles] that says which there are; none where visual tokens are tokens of the text.
TOKEN_TYPES  what `token_type_ids` say: `image` (1 = a visual token; the default) or `prefix` (0 = the prompt).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def token_types(model_type: str) -> str:
    """What `token_type_ids` of this model type say."""
    return str(_recorded(model_type, "TOKEN_TYPES", "image"))


def tiles_read(model_type: str) -> tuple[str, str] | None:
    """Names of the inputs that say which tiles a text token reads, and which tiles there are."""
    found: tuple[str, str] | None = _recorded(model_type, "TILES_READ", None)
    return found


def _recorded(model_type: str, name: str, default: Any) -> Any:
    place = f"{__name__}.{model_type.replace('-', '_')}"
    if importlib.util.find_spec(place) is None:
        return default
    return getattr(importlib.import_module(place), name, default)
