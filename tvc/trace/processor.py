"""Loads the processor of a model directory or hub id, for text and still images only.

Processors of recent families insist on a video processor, and that insists on torchvision, although nothing here is
ever given a video. The class is therefore narrowed to its image and text parts before it is loaded.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils import cached_file

from tvc.errors import ModelError

_UNWANTED = ("video_processor", "feature_extractor")
_CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(model: str) -> Any:
    """The processor saved at `model` (a directory or a hub id).

    Raises:
      ModelError: nothing there names a processor, the processor cannot see images, or a package it needs is missing.
    """
    made = processor_class(model)
    if "image_processor" not in made.get_attributes():
        raise ModelError(
            "the model's processor cannot read images",
            slug="no-image-processor",
            where=model,
            got=made.__name__,
            want="a processor with an image processor",
            fix="give a vision-language model",
        )
    try:
        return image_only(made).from_pretrained(model)
    except (OSError, ImportError, ValueError, TypeError) as problem:
        raise ModelError(
            "the model's processor cannot be loaded",
            slug="bad-processor",
            where=model,
            got=f"{type(problem).__name__}: {problem}",
            want=f"files that {made.__name__} loads",
            fix="install the package or add the file that the line above names",
        ) from problem


def processor_class(model: str) -> type[ProcessorMixin]:
    """The class that the files of `model` name, else the one that its model type has by default.

    Raises:
      ModelError: there is neither.
    """
    for name in _named_classes(model):
        found = processor_class_from_name(name)
        if found is not None:
            return found
    raise ModelError(
        "the model has no processor",
        slug="no-processor",
        where=model,
        got="no file that names a processor class",
        want=f"one of {', '.join(_CONFIG_FILES)}",
        fix="save the model's processor beside its weights: processor.save_pretrained(directory)",
    )


def image_only(made: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`made` without its video and audio parts, or `made` itself where it has none.

    The subclass keeps the name, because that is what is saved as `processor_class`.
    """
    order = made.get_attributes()
    absent = [name for name in order if name in _UNWANTED]
    if not absent:
        return made
    present = [name for name in order if name not in absent]
    inherited: Any = made.__init__
    # `from_pretrained` reads the accepted names off the constructor's code object, so a wrapper would lose the options:
    # the constructor is copied instead, with None as the default of every argument that has none.
    arguments = inspect.getfullargspec(inherited).args[1:]
    given = inherited.__defaults__ or ()
    defaults = (None,) * (len(arguments) - len(given)) + given
    constructor = types.FunctionType(
        inherited.__code__, inherited.__globals__, "__init__", defaults, inherited.__closure__
    )

    class Parts(ProcessorMixin):
        """Stands behind `made`, whose constructor takes and hands on parts by their place among all of them."""

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            parts = dict(zip(present, args, strict=True))
            places = order[: order.index(present[-1]) + 1]
            return super().from_args_and_dict([parts.get(name) for name in places], processor_dict, **kwargs)

        def __init__(self, *args: Any, **kwargs: Any):
            parts = dict(zip(order, args, strict=False)) | kwargs
            super().__init__(**{name: part for name, part in parts.items() if name not in absent})

    members: dict[str, Any] = {
        "__init__": constructor,
        "__module__": made.__module__,
        "get_attributes": classmethod(lambda cls: list(present)),
        # Chat templates of some families fill in the video defaults even where a conversation holds no video.
        "video_processor": types.SimpleNamespace(num_frames=None, fps=None),
    }
    return type(made.__name__, (made, Parts), members)


def _named_classes(model: str) -> Iterator[str]:
    for file in _CONFIG_FILES:
        path = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            with open(path, encoding="utf-8") as stream:
                name = json.load(stream).get("processor_class")
            if name is not None:
                yield name
    # Only where something to process with was saved at all: a bare model directory has no processor.
    if cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is not None:
        name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(model).model_type)
        if isinstance(name, (tuple, list)):
            yield from name
        elif name is not None:
            yield name
