"""tvc show: the photo with the patches that an artifact keeps, merges and drops."""

from __future__ import annotations

import pathlib
from typing import Any

import typer

_ARTIFACT = typer.Argument(metavar="OUT", help="A directory that tvc compile wrote.")
_IMAGE = typer.Option(..., "--image", help="The photo.")
_OUTPUT = typer.Option(..., "--output", "-o", help="The PNG to write.")


def register(app: typer.Typer) -> None:
    app.command("show")(show)


def show(
    artifact: pathlib.Path = _ARTIFACT,
    image: pathlib.Path = _IMAGE,
    prompt: str = typer.Option("describe the picture", "--prompt", help="The question: some scores look at it."),
    output: pathlib.Path = _OUTPUT,
) -> None:
    """Draw which patches of a photo stay at each site of the policy."""
    import tvc
    from tvc.report.overlay import overlay

    photo = open_photo(image)
    compiled = tvc.load(str(artifact))
    drawn = overlay(photo, kept_panels(compiled, photo, prompt))
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(output)
    typer.echo(f"{output}: {drawn.width}x{drawn.height}")


def kept_panels(compiled: Any, photo: Any, prompt: str) -> list[Any]:
    """A panel per site, from one call of the compiled model on the photo and the prompt."""
    from tvc.report.panels import panels
    from tvc.report.patches import views
    from tvc.runtime.prompts import prepared

    inputs = prepared(compiled.processor, photo, prompt)
    kept = {site: positions[0].tolist() for site, positions in compiled(**inputs).kept.items()}
    placeholders = _placeholders(compiled, inputs["input_ids"][0].tolist())
    layout = views(photo, len(placeholders), inputs, compiled.processor.image_processor, _tile_side(compiled.config))
    merging = {str(step.site): _merges(step) for step in compiled.policy.steps}
    return panels(kept, placeholders, layout, merging)


def _merges(step: Any) -> bool:
    return step.merge is not None or (step.rest is not None and step.rest.key != "drop")


def _placeholders(compiled: Any, ids: list[int]) -> list[int]:
    names = ("image_token_id", "image_token_index")
    token = next(value for name in names if (value := getattr(compiled.config, name, None)) is not None)
    return [position for position, value in enumerate(ids) if value == token]


def _tile_side(config: Any) -> int:
    """Patches along a side of a tile; 0 where the encoder has no fixed size."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return size // patch if isinstance(size, int) and isinstance(patch, int) else 0


def open_photo(path: pathlib.Path) -> Any:
    """The photo, upright, in RGB.

    Raises:
        ArgumentError: the file is missing or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    from tvc.errors import ArgumentError

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ArgumentError(
            "the photo cannot be read",
            where="--image",
            got=f"{path}: {error}",
            want="an image file, for example PNG or JPEG",
            fix="check the path",
            slug="bad-image",
        ) from error
