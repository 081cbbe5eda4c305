"""Checks what a user hands to a model before the family's own code sees it: its errors would not say what to do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tvc.errors import ArgumentError, InputError
from tvc.runtime.cache import StagedCache
from tvc.trace.crossing import image_function
from tvc.trace.parts import PIXEL_NAMES

_RESULT = "what processor(images=..., text=..., return_tensors='pt') returns"


def check_call(inputs: Mapping[str, Any], visual_token_ids: Sequence[int], where: str = "forward") -> None:
    """Refuses inputs of one call of the model, or of `generate`, that contradict each other.

    Args:
        inputs: by name; `past_key_values` among them makes this a later turn.
        visual_token_ids: ids of the placeholders of images.
        where: the function that was called, for the error.

    Raises:
        InputError: tokens, mask, pixels and cache are of the wrong kind, or do not belong together.
    """
    past = inputs.get("past_key_values")
    _check_cache(past, where)
    ids: Any = inputs.get("input_ids")
    _check_ids(ids, inputs, where)
    _check_batch(past, ids, where)
    seen = past.seen if isinstance(past, StagedCache) else 0
    _check_mask(inputs.get("attention_mask"), ids, seen, where)
    new = ids[:, seen:] if where == "generate" else ids
    given = [name for name in PIXEL_NAMES if inputs.get(name) is not None]
    for name in given:
        if not isinstance(inputs[name], torch.Tensor):
            raise InputError(
                "the pixels are no tensor",
                where=where,
                got=f"{name} {_shape(inputs[name])}",
                want=f"{name} as one tensor",
                fix=f"pass {_RESULT}",
                slug="bad-pixels",
            )
    count = placeholders(new, visual_token_ids)
    if given and not count:
        raise InputError(
            "there are pixels, but the tokens have no place for them",
            where=where,
            got=f"{given[0]} {_shape(inputs[given[0]])}, and no placeholder token among the new input_ids",
            want="one placeholder token for each visual token",
            fix="let the processor make both: text with an image token or a chat template, and images",
            slug="no-placeholders",
        )
    # A token that the model itself wrote may be a placeholder by chance; only a first turn must come with its pixels.
    if count and not given and (seen == 0 or where == "generate"):
        raise InputError(
            "there are placeholders of an image, but no pixels",
            where=where,
            got=f"{count} placeholder tokens in input_ids, and no pixel_values",
            want="the pixels of each image, or text alone",
            fix=f"pass {_RESULT}, or leave the image token out of the text",
            slug="no-pixels",
        )


def placeholders(ids: torch.Tensor, visual_token_ids: Sequence[int]) -> int:
    """How many tokens of `ids` [B, S] stand for visual features."""
    return sum(int((ids == token).sum()) for token in visual_token_ids)


def count_mismatch(tokens: int, lengths: Sequence[int], where: str = "forward") -> InputError:
    """The error for `tokens` placeholders where the images make `lengths` visual tokens."""
    return InputError(
        "the placeholders in the text do not fit the images",
        where=where,
        got=f"{tokens} placeholder tokens",
        want=f"{sum(lengths)}, for images of {' + '.join(map(str, lengths))} visual tokens",
        fix="let the processor put the placeholders in, and do not truncate the text",
        slug="placeholder-count",
    )


def no_video(problem: str) -> InputError:
    """The error for a family whose videos go another way than its images; `problem`: what tells."""
    return InputError(
        "videos of this model do not pass through the vision path that was compiled",
        where="forward",
        got=f"pixel_values_videos, and {problem}",
        want="images; or a model whose videos take the same encoder and projector as its images",
        fix="pass the frames as images",
        slug="no-video",
    )


def video_inside_encoder() -> InputError:
    """The error for a policy that looks into the encoder, or cuts it, when a video comes."""
    return InputError(
        "this policy looks at pixels or inside the vision encoder, or cuts it, which is done for images alone",
        where="forward",
        got="pixel_values_videos",
        want="images, or a policy whose steps and scores are the decoder's",
        fix="pass the frames as images, or compile with a policy such as fastv",
        slug="video-inside-encoder",
    )


def check_handed_on(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses inputs of the vision path that its graph has no place for, and would leave unread.

    Args:
        given: what the call has for the vision path, by name.
        names: what the graph or its encoder takes.

    Raises:
        InputError: there is one.
    """
    unread = [name for name, value in given.items() if isinstance(value, torch.Tensor) and name not in names]
    if unread:
        raise InputError(
            "the vision graph was traced without an input",
            where="vision",
            got=", ".join(unread),
            want=f"{', '.join(dict.fromkeys(names))}, as in the sample that the model was compiled with",
            fix="compile with inputs=..., a sample that holds it too",
            slug="untraced-input",
        )


# Of no effect on features.
_TELLING = ("return_dict", "output_hidden_states", "output_attentions", "use_cache")


def check_options(owner: Any, given: Mapping[str, Any]) -> None:
    """Refuses options of the vision path other than the configuration's: a graph has no choice about them.

    Args:
        owner: the module whose way from images to visual tokens the graph stands for.
        given: the inputs of the call.

    Raises:
        InputError: there is one.
    """
    parameters = inspect.signature(image_function(owner)).parameters
    options = {
        name: value
        for name, value in given.items()
        if name in parameters and isinstance(value, (bool, int, float, str, list, tuple))
    }
    _refuse_options(
        {
            name: value
            for name, value in options.items()
            if value not in (parameters[name].default, getattr(owner.config, name, None))
        }
    )


def check_traced(pending: Mapping[str, Any], traced: Mapping[str, Any]) -> None:
    """Refuses an encoder's arguments `pending` where they differ from the numbers and words that it was `traced` with.

    Raises:
        InputError: one does.
    """
    _refuse_options({name: value for name, value in pending.items() if name in traced and value != traced[name]})


def _refuse_options(other: Mapping[str, Any]) -> None:
    told = [f"{name}={value}" for name, value in other.items() if name not in _TELLING]
    if told:
        raise InputError(
            "the vision path was traced with other options",
            where="vision",
            got=", ".join(told),
            want="what the configuration says, as when the model was compiled",
            fix="leave the option out, or set it in the model's configuration and compile that model",
            slug="untraced-option",
        )


def unplaced(problem: Exception) -> InputError:
    """The error for images that a family fails to lay out over the tokens' positions."""
    return InputError(
        "the placeholders in the text do not fit the images",
        where="generate",
        got=f"{type(problem).__name__}: {problem}",
        want="as many placeholder tokens as the images have visual tokens, and the grid of each image",
        fix="let the processor put the placeholders in, do not truncate the text, and pass all that it returned",
        slug="placeholder-count",
    )


def check_sample(inputs: Any) -> None:
    """Refuses sample inputs that nothing can be traced with.

    Raises:
        ArgumentError: they are no mapping, hold no tokens or no image, or are of different batches.
    """
    if not isinstance(inputs, Mapping):
        raise ArgumentError(
            "the sample inputs are not named",
            where="inputs",
            got=type(inputs).__name__,
            want="a mapping of names to tensors",
            fix=f"pass {_RESULT}",
            slug="bad-inputs",
        )
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise ArgumentError(
            "the sample inputs hold no token ids",
            where="inputs",
            got=f"input_ids {_shape(ids)} among {sorted(inputs)}",
            want="input_ids as a tensor [batch, sequence]",
            fix=f"pass {_RESULT}",
            slug="bad-inputs",
        )
    if not any(isinstance(inputs.get(name), torch.Tensor) for name in PIXEL_NAMES):
        raise ArgumentError(
            "the sample inputs hold no image",
            where="inputs",
            got=f"{sorted(inputs)}",
            want="pixel_values among them, as a tensor",
            fix="pass what the processor returns for a prompt with an image",
            slug="no-image",
        )
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape != ids.shape:
        raise ArgumentError(
            "the sample's attention mask does not fit its tokens",
            where="inputs",
            got=f"attention_mask {_shape(mask)}",
            want=f"{_shape(ids)}, as input_ids",
            fix=f"pass {_RESULT}",
            slug="bad-inputs",
        )


def _check_cache(past: Any, where: str) -> None:
    if past is None or isinstance(past, StagedCache):
        return
    length = past.get_seq_length() if hasattr(past, "get_seq_length") else -1
    if length != 0:  # `generate` hands over an empty cache of its own at first
        raise InputError(
            "the cache is not one of a compiled model",
            where=where,
            got=f"past_key_values of type {type(past).__name__}",
            want="the past_key_values of an earlier answer of this model",
            fix="keep out.past_key_values, or run the whole prompt again without a cache",
            slug="foreign-cache",
        )


def _check_ids(ids: Any, inputs: Mapping[str, Any], where: str) -> None:
    if ids is None:
        raise InputError(
            "a compiled model needs token ids",
            where=where,
            got=f"inputs {sorted(name for name, value in inputs.items() if value is not None)}",
            want="input_ids [batch, sequence]",
            fix="pass the processor's input_ids; inputs_embeds alone do not say where the image stands",
            slug="no-input-ids",
        )
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
        raise InputError(
            "the token ids are not a batch of whole numbers",
            where=where,
            got=f"input_ids {_shape(ids)}" + (f" {ids.dtype}" if isinstance(ids, torch.Tensor) else ""),
            want="int64 [batch, sequence], neither of them 0",
            fix="ask the processor for return_tensors='pt'",
            slug="bad-input-ids",
        )


def _check_batch(past: Any, ids: torch.Tensor, where: str) -> None:
    if not isinstance(past, StagedCache) or where == "generate":  # which may yet repeat the prompts
        return
    cached, batch = len(past.key_positions[0]), len(ids)
    if cached != batch:
        raise InputError(
            "the cache, and what goes along with it, is of another number of samples",
            where=where,
            got=f"input_ids of {batch} samples, past_key_values of {cached}",
            want=f"{cached} samples, those of the earlier call in its order",
            fix="pass a row for every sample, padding where one has nothing to say; or repeat the cache's rows with "
            "past_key_values.batch_select_indices",
            slug="other-batch",
        )


def _check_mask(mask: Any, ids: torch.Tensor, seen: int, where: str) -> None:
    if mask is None:
        return
    batch, new = ids.shape
    # `generate` is given the whole sequence; a call of the model only what is new.
    widths = {new} if where == "generate" else {new, seen + new}
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in widths:
        both = f"[{batch}, {seen + new}] (cached and new tokens) or " if len(widths) > 1 else ""
        raise InputError(
            "the attention mask does not fit the tokens",
            where=where,
            got=f"attention_mask {_shape(mask)}",
            want=f"{both}[{batch}, {new}]",
            fix="pass the processor's attention_mask, extended by one column for each token since",
            slug="mask-shape",
        )


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
