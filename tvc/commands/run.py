"""tvc run: an answer of an artifact about a photo."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import typer

_ARTIFACT = typer.Argument(metavar="OUT", help="A directory that tvc compile wrote.")
_IMAGE = typer.Option(None, "--image", help="The photo.")


def register(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    artifact: pathlib.Path = _ARTIFACT,
    image: pathlib.Path | None = _IMAGE,
    prompt: str | None = typer.Option(None, "--prompt", help="The question."),
    max_new_tokens: int = typer.Option(32, "--max-new-tokens", min=1, help="The longest answer, in tokens."),
    stream: bool = typer.Option(False, "--stream", help="Write the answer as it comes."),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda or cuda:N."),
    as_json: bool = typer.Option(False, "--json", help="Write JSON for machines, when the answer is there."),
) -> None:
    """Ask a compiled model about a photo, by greedy search."""
    _check(image, prompt, stream and as_json)

    import tvc
    from tvc.commands.show import open_photo
    from tvc.runtime.prompts import prepared

    photo = open_photo(pathlib.Path(str(image)))
    compiled = tvc.load(artifact, device=device)
    if compiled.processor is None:
        raise _no_processor(artifact)
    inputs = prepared(compiled.processor, photo, str(prompt))
    moved = {name: value.to(compiled.device) if hasattr(value, "to") else value for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    streamer = Streamer(compiled.processor) if stream else None
    started = time.perf_counter()
    ids = compiled.generate(**moved, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    seconds = time.perf_counter() - started
    new = ids[0, length:]
    if stream:
        return
    text = compiled.processor.batch_decode([new], skip_special_tokens=True)[0].strip()
    if not as_json:
        typer.echo(text)
        return
    facts = {"text": text, "tokens": new.tolist(), "prompt_tokens": length, "seconds": round(seconds, 4)}
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


class Streamer:
    """Writes text as its tokens come; `generate` hands over the prompt first."""

    def __init__(self, processor: Any):
        self._processor, self._written, self._prompt = processor, "", True
        self._tokens: list[int] = []

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._tokens += value.reshape(-1).tolist()
        text = self._processor.batch_decode([self._tokens], skip_special_tokens=True)[0]
        # A character may take several tokens; until the last one is there it reads as a replacement mark.
        if text.startswith(self._written) and not text.endswith("\ufffd"):
            typer.echo(text[len(self._written) :], nl=False)
            self._written = text

    def end(self) -> None:
        text = self._processor.batch_decode([self._tokens], skip_special_tokens=True)[0]
        typer.echo(text[len(self._written) :])


def _check(image: pathlib.Path | None, prompt: str | None, both: bool) -> None:
    from tvc.errors import ArgumentError

    if image is None or prompt is None:
        given = {"--image": image, "--prompt": prompt}
        missing = " and ".join(name for name, value in given.items() if value is None)
        present = ", ".join(f'{name} "{value}"' for name, value in given.items() if value is not None)
        raise ArgumentError(
            f"{missing} is missing" if " and " not in missing else f"{missing} are missing",
            where="tvc run",
            got=present or "neither",
            want="a photo and a question about it",
            fix='tvc run OUT --image photo.jpg --prompt "What is this?"; for text alone, call the model from Python',
            slug="no-image" if image is None else "no-prompt",
        )
    if both:
        raise ArgumentError(
            "an answer is either streamed or written as JSON",
            where="--stream, --json",
            got="both",
            want="one of them",
            fix="leave --stream out",
            slug="stream-and-json",
        )


def _no_processor(artifact: pathlib.Path) -> Exception:
    from tvc.errors import ArtifactError

    return ArtifactError(
        "the artifact holds no processor",
        where=str(artifact),
        got="no processor_config.json",
        want="a tokenizer and an image processor, to turn text and photo into tensors",
        fix="compile from a model directory that holds its processor, or call the model from Python with tensors",
        slug="no-processor",
    )
