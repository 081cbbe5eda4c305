"""Writing a compiled model as an artifact directory, and opening one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tvc.errors import ArtifactError, ModelError
from tvc.export import manifest
from tvc.export.base import Options
from tvc.export.base import target as find_target
from tvc.model import CompiledModel
from tvc.modules import carry, check_carried
from tvc.policy import ResolvedPolicy, load_policy, resolve
from tvc.policy.schema import dump_yaml
from tvc.program import Program
from tvc.report.cost import one_image
from tvc.report.report import write_report
from tvc.report.schedule import make_plan
from tvc.runtime.engine import Engine, Interface
from tvc.trace.layout import meta_model
from tvc.trace.load import Source, of_type, saved_configuration
from tvc.trace.processor import load_processor
from tvc.trace.survey import Survey, survey

CONSTANTS = "host.safetensors"
SAMPLE = "sample.safetensors"

_README = """# {model} with `{policy}`, compiled by tvc for `{target}`

```python
import tvc
compiled = tvc.load("{name}")
inputs = compiled.processor(images=[image], text=[prompt], return_tensors="pt")
print(compiled.processor.batch_decode(compiled.generate(**inputs, max_new_tokens=32)))
```

or `tvc run {name} --image photo.jpg --prompt "What is this?"`. Tokens, costs and checks: report.html.
"""
_REMEMBERED = """
Steps remember earlier turns. Beside its caches the decoder takes

{inputs}

zeros in front of the first turn, and gives each of them without `past_`. `past_key_values` carries them.
"""


def save(
    place: Path,
    program: Program,
    compiled: CompiledModel,
    source: Source,
    surveyed: Survey,
    *,
    given_sample: bool,
    overwrite: bool,
    timings: dict[str, float],
) -> None:
    """Writes everything that `open_artifact` needs and a reader wants to see."""
    with manifest.writing(place, overwrite=overwrite) as (folder, seal):
        if compiled.files is not None:  # the target's files were written to open the model: the same ones
            shutil.copytree(compiled.files, folder, dirs_exist_ok=True)
        else:
            find_target(compiled.target).write(program, folder, Options())
        compiled.config.save_pretrained(folder)
        compiled.generation_config.save_pretrained(folder)
        if compiled.processor is not None:
            compiled.processor.save_pretrained(folder)
        constants = {name: value.detach().contiguous() for name, value in surveyed.host.constants().items()}
        safetensors.torch.save_file(constants, folder / CONSTANTS)
        if given_sample and compiled.processor is None:  # else loading makes a sample of its own
            shapes = {name: value.contiguous() for name, value in surveyed.sample.items()}
            safetensors.torch.save_file(shapes, folder / SAMPLE)
        written, decided = carry(folder, compiled.policy)
        (folder / "policy.yaml").write_text(dump_yaml(written), encoding="utf-8")
        (folder / "policy.resolved.yaml").write_text(dump_yaml(decided), encoding="utf-8")
        readme = _README.format(
            model=source.name, policy=compiled.policy.name, target=compiled.target, name=place.name or "out"
        )
        (folder / "README.md").write_text(readme + _remembered(compiled.engine.interface), encoding="utf-8")
        fusions: dict[str, int] = {}
        for part in program.components.values():
            for name, count in part.meta.get("fusions", {}).items():
                fusions[name] = fusions.get(name, 0) + count
        facts = {"model": source.name, "policy": compiled.policy.name, "target": compiled.target}
        write_report(
            folder, compiled.plan, verification=compiled.verification, fusions=fusions, timings=timings, facts=facts
        )
        seal(
            manifest.describe(
                program,
                compiled.target,
                model={
                    "source": source.name,
                    "revision": source.revision,
                    "class": type(source.meta).__mro__[0].__name__,
                },
                policy=decided,
                runtime=compiled.engine.interface.to_json(),
                image_size=list(surveyed.layout.image_size),
            )
        )


def _remembered(interface: Interface) -> str:
    """What the page says of tensors that go from turn to turn, "" where there are none but caches."""
    memories = [
        f"- `{memory.name}` [{', '.join(('batch', *map(str, memory.sizes)))}] {memory.dtype}"
        for memory in interface.shape.memories
    ]
    return _REMEMBERED.format(inputs="\n".join(memories)) if memories else ""


def open_artifact(
    place: str | os.PathLike[str], *, device: torch.device | str | None = None, threads: int = 0
) -> CompiledModel:
    """The compiled model in a directory, checked file by file before anything is opened.

    Raises:
        ArtifactError: the directory is no artifact, incomplete, changed or unsafe.
    """
    folder = Path(place)
    content = manifest.read(folder)
    where = torch.device(device) if device is not None else torch.device("cpu")
    try:
        config, generation_config = saved_configuration(folder)
        meta = meta_model(config)
    except (OSError, ValueError, KeyError) as problem:
        raise ArtifactError(
            "the artifact's configuration cannot be read",
            where=str(folder / "config.json"),
            got=f"{type(problem).__name__}: {problem}",
            want="the configuration of a vision-language model that this transformers version knows",
            fix="install the versions that tvc.json names, or compile again",
        ) from problem
    try:
        processor = load_processor(str(folder))
    except ModelError:
        processor = None
    of_type(meta, getattr(torch, content["runtime"]["shape"]["dtype"]))
    sample = safetensors.torch.load_file(folder / SAMPLE) if SAMPLE in content["files"] else None
    height, width = content["image_size"]
    surveyed = survey(meta, processor, sample, image_size=(height, width), double=False)
    constants = safetensors.torch.load_file(folder / CONSTANTS, device=str(where))
    surveyed.host.adopt_constants(constants)
    interface = Interface.from_json(content["runtime"], where)
    runner = find_target(content["target"]).open(folder, content, where, Options(threads=threads))
    policy = stored_policy(folder, surveyed)
    check_carried(folder, policy, content["files"])
    compiled = CompiledModel(
        Engine(surveyed.host, interface, runner),
        target=content["target"],
        policy=policy,
        plan=make_plan(policy, one_image(surveyed.layout)),
        config=config,
        generation_config=generation_config,
        processor=processor,
        device=where,
    )
    compiled.verification = _verification(folder)
    return compiled


def stored_policy(folder: Path, surveyed: Survey) -> ResolvedPolicy:
    """The policy as it was resolved when the artifact was made."""
    resolved = load_policy(folder / "policy.resolved.yaml")
    original = load_policy(folder / "policy.yaml")
    again = resolve(resolved, surveyed.layout)
    return ResolvedPolicy(again.policy, original)


def _verification(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / "report.json").read_text(encoding="utf-8")).get("verification")


def open_temporarily(
    program: Program, target: str, device: torch.device
) -> tuple[Any, tempfile.TemporaryDirectory[str]]:
    """A runner over files of `target` that live as long as the returned folder."""
    folder = tempfile.TemporaryDirectory(prefix="tvc-")
    made = find_target(target)
    made.write(program, Path(folder.name), Options())
    content = {"components": manifest.interface(program), "target": target}
    return made.open(Path(folder.name), content, device, Options()), folder
