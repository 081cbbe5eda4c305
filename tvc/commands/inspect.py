"""tvc inspect: what a model is made of, and where its visual tokens can be cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    model: str = typer.Argument(metavar="MODEL", help="A model directory or hub id."),
    graph: str | None = typer.Option(None, "--graph", metavar="COMPONENT", help="Print this component's graph."),
    as_json: bool = typer.Option(False, "--json", help="Write JSON for machines."),
) -> None:
    """Trace a model; show its graphs, its token counts, and each site with the reason where no cut is possible."""
    import tvc
    from tvc.report.cost import one_image

    program = tvc.inspect(model)
    if graph is not None:
        typer.echo(_graph(program, graph, as_json))
        return
    layout = one_image(program.layout)
    components = [_component(name, part) for name, part in program.components.items()]
    sites = [{"name": site.name, "legal": site.legal, "reason": site.reason} for site in layout.sites]
    facts = {
        "model_type": layout.model_type,
        "image_size": list(layout.image_size),
        "visual_tokens": sum(layout.visual_tokens),
        "tiles": layout.tiles,
        "tile_tokens": layout.tile_tokens,
        "prefix_tokens": layout.prefix_tokens,
        "group": layout.group,
        "resampled": layout.resampled,
        "vision_layers": len(layout.vision),
        "language_layers": len(layout.language),
        "hidden_size": layout.hidden_size,
    }
    if as_json:
        typer.echo(json.dumps({**facts, "components": components, "sites": sites}, indent=2))
        return
    typer.echo("\n".join([*_head(facts), "", *_components(components), "", *_sites(sites)]))


def _component(name: str, part: Any) -> dict[str, Any]:
    held = {spec.arg.name: spec.target for spec in part.exported.graph_signature.input_specs if spec.target}
    # A trace lists all weights of the module it was given, those of other components too; the graph reads its own.
    read = [held[node.name] for node in part.exported.graph.nodes if node.name in held and node.users]
    values = [part.exported.state_dict[name] for name in read if name in part.exported.state_dict]
    size = sum({id(value): value.numel() * value.element_size() for value in values}.values())
    nodes = sum(node.op == "call_function" for node in part.graph.nodes)
    return {"name": name, "nodes": nodes, "bytes": size, "inputs": list(part.inputs), "outputs": list(part.outputs)}


def _head(facts: dict[str, Any]) -> list[str]:
    height, width = facts["image_size"]
    own = not facts["resampled"]
    prefix = f", {facts['prefix_tokens']} of them no visual feature" if own and facts["prefix_tokens"] else ""
    group = f", {facts['group']} of which make one visual token" if own and facts["group"] > 1 else ""
    tiles = "1 tile" if facts["tiles"] == 1 else f"{facts['tiles']} tiles"
    return [
        f"{facts['model_type']}: {facts['visual_tokens']} visual tokens for an image of {height}x{width}",
        f"vision encoder: {facts['vision_layers']} layers over {tiles} of {facts['tile_tokens']} tokens{prefix}{group}",
        f"decoder: {facts['language_layers']} layers of width {facts['hidden_size']}",
    ]


def _components(components: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'component':11}{'nodes':>7}{'weights':>13}  inputs -> outputs"]
    for part in components:
        size = f"{part['bytes'] / 2**20:,.1f} MiB"
        ports = f"{_brief(part['inputs'])} -> {_brief(part['outputs'])}"
        lines.append(f"{part['name']:11}{part['nodes']:>7}{size:>13}  {ports}")
    return lines


def _brief(names: list[str]) -> str:
    """Names that differ only in a last number (`key.0`, `key.1`, ...) are written once, with how many there are."""
    counted: dict[str, int] = {}
    for name in names:
        stem, _, number = name.rpartition(".")
        key = f"{stem}.*" if stem and number.isdigit() else name
        counted[key] = counted.get(key, 0) + 1
    return ", ".join(f"{name} ({count})" if name.endswith(".*") else name for name, count in counted.items())


def _sites(sites: list[dict[str, Any]]) -> list[str]:
    """Neighbours that share an answer share a line."""
    lines = [f"{'site':20}cut"]
    for (_, reason), group in itertools.groupby(sites, key=lambda site: (_part(site["name"]), site["reason"])):
        names = [site["name"] for site in group]
        shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"
        lines.append(f"{shown:20}{'no: ' + reason if reason else 'yes'}")
    return lines


def _part(site: str) -> str:
    return site.partition(".")[0]


def _graph(program: Any, component: str, as_json: bool) -> str:
    from tvc.errors import ArgumentError

    if component not in program.components:
        known = ", ".join(program.components)
        raise ArgumentError(
            "the model has no such component",
            where="--graph",
            got=component,
            want=f"one of {known}",
            fix="write --graph decoder",
            slug="unknown-component",
        )
    text = program.text(component)
    return json.dumps({"component": component, "graph": text}, indent=2) if as_json else text
