"""Prompts that `generate` repeats, for beams or for several answers: each is run once, and its answer repeated.

Text repeats row by row, but images do not: they may be packed, or several a sample. Nor is there a reason to encode and
prefill the same prompt several times.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from tvc.errors import InputError
from tvc.runtime.engine import Answer
from tvc.trace.crossing import image_function


def image_inputs(owner: Any) -> set[str]:
    """Names of the inputs that describe images and videos: what the family's own code takes to encode them."""
    functions = [image_function(owner), getattr(owner, "get_video_features", None)]
    return {name for function in functions if function is not None for name in inspect.signature(function).parameters}


def once_each(inputs: Mapping[str, Any], times: int, images: set[str]) -> dict[str, Any]:
    """The inputs of every prompt without its repetitions; those of images come unrepeated already.

    Raises:
        InputError: the rows of a prompt have gone different ways already (a search without a cache).
    """
    ids = inputs["input_ids"]
    groups = ids.unflatten(0, (-1, times))
    if not bool((groups == groups[:, :1]).all()):
        raise InputError(
            "images cannot be sent again for answers that have gone different ways",
            where="generate",
            got=f"{times} answers a prompt without a cache",
            want="a cache, which holds what the images said",
            fix="leave use_cache=False out",
            slug="beams-without-cache",
        )
    made = {}
    for name, value in inputs.items():
        if name in images or not isinstance(value, torch.Tensor) or not value.dim():
            made[name] = value
        elif name == "position_ids" and value.dim() == 3:  # of several axes, which come first
            made[name] = value[:, ::times]
        elif value.shape[0] == len(ids):
            made[name] = value[::times]
        else:
            made[name] = value
    return made


def repeated(answer: Answer, times: int) -> Answer:
    """The answer to each prompt, `times` times."""
    answer.cache.batch_repeat_interleave(times)
    kept = {site: rows.repeat_interleave(times, 0) for site, rows in answer.kept.items()}
    return dataclasses.replace(answer, logits=answer.logits.repeat_interleave(times, 0), kept=kept)
