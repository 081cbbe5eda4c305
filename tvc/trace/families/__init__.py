"""Small records for model families that the generic capture cannot read: one module a model type, of its name.

A record is data. What it may hold, and what is taken where it is missing:

TOKEN_TYPES  what `token_type_ids` say: `image` (1 = a visual token; the default) or `prefix` (0 = the prompt).
"""

from __future__ import annotations

import importlib
import importlib.util


def token_types(model_type: str) -> str:
    """What `token_type_ids` of this model type say."""
    name = f"{__name__}.{model_type.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return "image"
    return str(getattr(importlib.import_module(name), "TOKEN_TYPES", "image"))
