"""The ONNX graphs themselves: which operators they hold, how they name sizes, and what is refused."""

from __future__ import annotations

import collections

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import stand_in
import torch

from tvc.errors import ArgumentError, ArtifactError, ExportError, InputError
from tvc.export import base, ort, ort_attention, ort_graph
from tvc.program import Component, Program

OPTIONS = base.Options(threads=1)


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory):
    place = tmp_path_factory.mktemp("ort")
    base.target("ort").write(program, place, OPTIONS)
    return place


@pytest.fixture(scope="module")
def decoder(folder):
    return onnx.load(folder / "decoder.onnx", load_external_data=False)


def test_every_layer_before_and_after_the_cut_is_one_attention_node(decoder, shape):
    found = collections.Counter((node.domain, node.op_type) for node in decoder.graph.node)
    assert found["", "Attention"] == shape.layers
    assert found["", "RotaryEmbedding"] == 2 * shape.layers + 1  # and the query of the score
    # The first norm has no sum before it, nor have the score's and the layer's behind the cut, of gathered rows.
    assert (
        found["com.microsoft", "SkipSimplifiedLayerNormalization"] + found["", "RMSNormalization"]
        == 2 * shape.layers + 2
    )
    assert found["com.microsoft", "SkipSimplifiedLayerNormalization"] >= 2 * shape.layers - 2
    assert found["com.microsoft", "FusedMatMul"] == 7 * shape.layers + 2
    assert not [node.op_type for node in decoder.graph.node if node.domain not in ("", "com.microsoft")]
    attentions = [node for node in decoder.graph.node if node.op_type == "Attention"]
    assert all(len(node.input) == 6 and len(node.output) >= 3 for node in attentions)
    assert [list(node.output[1:3]) for node in attentions] == [[f"key.{i}", f"value.{i}"] for i in range(shape.layers)]


def test_sizes_have_names_and_stages_their_own(decoder, shape):
    sizes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in decoder.graph.input
    }
    assert sizes["inputs_embeds"] == ["batch", "chunk", shape.width]
    assert sizes["past_key.0"] == ["batch", shape.kv_heads, "past_0", shape.head]
    assert sizes[f"past_value.{shape.layers - 1}"] == ["batch", shape.kv_heads, "past_1", shape.head]
    assert {opset.domain: opset.version for opset in decoder.opset_import}[""] == 23


def test_weights_lie_outside_the_graphs(folder):
    for name in ("vision", "embed", "decoder"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        onnx.checker.check_model(str(folder / f"{name}.onnx"))
        assert all(len(value.raw_data) < 1024 for value in model.graph.initializer)
        places = {
            entry.value for value in model.graph.initializer for entry in value.external_data if entry.key == "location"
        }
        assert places == {"model.onnx_data"}


def test_fusing_changes_no_number_and_not_the_original(program, eager, shape):
    part = program.components["decoder"]
    before = str(part.exported.graph)
    fused, counts = ort_attention.fuse(part.exported)
    assert str(part.exported.graph) == before
    assert counts == {"rotary": 2 * shape.layers + 1, "cached_attention": shape.layers, "attention": 0}
    inputs = stand_in.prefill(shape, 3, True)
    got = fused.module(check_guards=False)(*(inputs[name] for name in part.inputs))
    want = eager("decoder", inputs)
    for name, value in zip(part.outputs, got, strict=True):
        torch.testing.assert_close(value, want[name], rtol=0, atol=1e-6)


class Rotation(torch.nn.Module):
    """Rotates by tables whose halves are equal, or, when `skewed`, are not."""

    def __init__(self, skewed: bool):
        super().__init__()
        self.skewed = skewed

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angle = torch.cat([angle, angle * 2 if self.skewed else angle], -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        return (x * cos + turned * sin,)


@pytest.mark.parametrize("skewed", [False, True])
def test_only_a_table_of_two_equal_halves_becomes_a_rotation(skewed):
    inputs = {"x": (torch.randn(2, 4, 5, 16), {2: stand_in.AUTO}), "angle": (torch.randn(2, 5, 8), {1: stand_in.AUTO})}
    part = stand_in.component("rotation", Rotation(skewed), inputs, ("y",))
    fused, counts = ort_attention.fuse(part.exported)
    assert counts["rotary"] == int(not skewed)
    got, want = fused.module()(*part.sample)[0], part.exported.module()(*part.sample)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


class Sections(torch.nn.Module):
    """M-RoPE: each section of the doubled table comes from its own row of three."""

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angle = torch.cat([angle, angle], -1)
        tables = []
        for table in (angle.cos(), angle.sin()):
            parts = table.split([2, 3, 3, 2, 3, 3], -1)
            tables.append(torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)[:, None])
        turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
        return (x * tables[0] + turned * tables[1],)


def test_the_sections_of_a_three_dimensional_rotation_are_recognised(tmp_path):
    inputs = {
        "x": (torch.randn(2, 4, 5, 16), {2: stand_in.AUTO}),
        "angle": (torch.randn(3, 2, 5, 8), {2: stand_in.AUTO}),
    }
    part = stand_in.component("rotation", Sections(), inputs, ("y",))
    fused, counts = ort_attention.fuse(part.exported)
    assert counts["rotary"] == 1
    torch.testing.assert_close(
        fused.module()(*part.sample)[0], part.exported.module()(*part.sample)[0], rtol=0, atol=1e-6
    )


class Kept(torch.nn.Module):
    """The compiler's own attention op over a joined cache, grouped, soft-capped, with casts around the rotation."""

    def forward(self, x, k, v, past_k, past_v, angle, mask) -> tuple[torch.Tensor, ...]:
        angle = torch.cat([angle, angle], -1)
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        x, k = (t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin for t in (x, k))
        keys, values = torch.cat([past_k, k], -2), torch.cat([past_v, v], -2)
        return torch.ops.tvc.attention(x, keys, values, mask, 0.25, 5.0), keys, values, ~mask


def test_the_attention_op_is_exported_whole(tmp_path):
    import tvc.kernels.attention  # noqa: F401  registers it

    def heads(count, length):
        return torch.randn(2, count, length, 16), {2: stand_in.AUTO}

    inputs = {"x": heads(4, 5), "k": heads(2, 5), "v": heads(2, 5), "past_k": heads(2, 7), "past_v": heads(2, 7)}
    inputs["angle"] = torch.randn(2, 5, 8), {1: stand_in.AUTO}
    inputs["mask"] = torch.rand(2, 1, 5, 12) > 0.3, {2: stand_in.AUTO, 3: stand_in.AUTO}
    sample, dynamic = tuple(v[0] for v in inputs.values()), tuple(v[1] for v in inputs.values())
    exported = torch.export.export(Kept(), sample, dynamic_shapes=dynamic)
    part = Component("decoder", exported, tuple(inputs), ("y", "keys", "values", "hidden"), sample, dynamic)
    whole = Program(stand_in.program_layout(), {"decoder": part})
    base.target("ort").write(whole, tmp_path, OPTIONS)
    assert part.meta["fusions"] == {"rotary": 2, "cached_attention": 1, "attention": 0, "linear": 0, "residual_norm": 0}
    run = base.target("ort").open(tmp_path, {"components": base.interface(whole)}, None, OPTIONS)
    got, want = run("decoder", dict(zip(inputs, sample, strict=True))), exported.module()(*sample)
    for name, value in zip(part.outputs, want, strict=True):
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)


class Capped(torch.nn.Module):
    """What an operator without a translation looks like to the exporter."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.special.bessel_j0(x),)


def test_an_operator_without_a_counterpart_is_refused_by_name(program):
    part: Component = stand_in.component("odd", Capped(), {"x": (torch.randn(3), {})}, ("y",))
    with pytest.raises(ExportError, match="bessel_j0"):
        ort.convert(part, program, OPTIONS)


class Stretched(torch.nn.Module):
    """Multiplies numbers by what two sizes are to each other: one value of the graph, no constant."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ratio = x.shape[0] / y.shape[0]
        return x * ratio, torch.arange(x.shape[0]) * ratio, x * 3.0


@pytest.mark.parametrize(("long", "short"), [(7, 3), (5, 5), (2, 6)])
def test_a_factor_may_be_computed_from_sizes(tmp_path, long, short):
    sizes = {"x": (torch.randn(5, 2), {0: stand_in.AUTO}), "y": (torch.randn(3, 2), {0: stand_in.AUTO})}
    part: Component = stand_in.component("odd", Stretched(), sizes, ("scaled", "counted", "constant"))
    whole = Program(stand_in.program_layout(), {"odd": part})
    base.target("ort").write(whole, tmp_path, OPTIONS)
    run = base.target("ort").open(tmp_path, {"components": base.interface(whole)}, None, OPTIONS)
    x, y = torch.randn(long, 2), torch.randn(short, 2)
    got = run("odd", {"x": x, "y": y})
    for name, value in zip(part.outputs, Stretched()(x, y), strict=True):
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)


class Turned(torch.nn.Module):
    """All samples turn by the same table, which has one row."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angles = torch.arange(x.shape[2]).float()[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return (x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin,)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_table_turns_every_sample(tmp_path, batch):
    sizes = {"x": (torch.randn(2, 4, 5, 8), {0: stand_in.AUTO, 2: stand_in.AUTO})}
    part: Component = stand_in.component("odd", Turned(), sizes, ("turned",))
    whole = Program(stand_in.program_layout(), {"odd": part})
    base.target("ort").write(whole, tmp_path, OPTIONS)
    run = base.target("ort").open(tmp_path, {"components": base.interface(whole)}, None, OPTIONS)
    x = torch.randn(batch, 4, 6, 8)
    torch.testing.assert_close(run("odd", {"x": x})["turned"], Turned()(x)[0], rtol=0, atol=1e-6)


def by_tables(rows: int | str, known: bool) -> ir.Model:
    """A rotation of [batch, 2, length, 4] by tables [rows, length, 2], whose shapes are `known` where it stands."""

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    x, y = value("x", "batch", 2, "length", 4), value("y", "batch", 2, "length", 4)
    tables = [value(name, rows, "length", 2) for name in ("cos", "sin")]
    passed = [ir.node("Identity", [table]) for table in tables]
    for node, table in zip(passed, tables, strict=True):
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, table.shape if known else None
    turn = ir.node("RotaryEmbedding", [x, *(node.outputs[0] for node in passed)], outputs=[y])
    return ir.Model(ir.Graph([x, *tables], [y], nodes=[*passed, turn], opset_imports={"": 23}), ir_version=10)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("alone", [True, False], ids=["one-row", "a-row-each"])
def test_tables_get_a_row_for_every_sample_where_they_may_have_one_alone(alone, known, batch):
    rows = 1 if alone else batch
    model = by_tables(rows if alone or not known else "batch", known)
    ort_graph.widen_rotation_tables(model)
    wide = [node.op_type for node in model.graph].count("Expand")
    assert wide == (2 if alone or not known else 0)
    assert all(node.outputs[0].dtype == ir.DataType.FLOAT for node in model.graph if node.op_type == "Expand")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    torch.manual_seed(0)
    x, angle = torch.randn(batch, 2, 5, 4), torch.randn(rows, 5, 2)
    given = {"x": x, "cos": angle.cos(), "sin": angle.sin()}
    (got,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    (one, two), cos, sin = x.split(2, -1), given["cos"][:, None], given["sin"][:, None]
    want = torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
    torch.testing.assert_close(torch.from_numpy(got), want)


@pytest.mark.parametrize("opset", [22, 27])
def test_an_opset_that_onnx_runtime_refuses_is_not_written(program, tmp_path, opset):
    with pytest.raises(ArgumentError, match="23 to 26"):
        base.target("ort").write(program, tmp_path, base.Options(opset=opset))


def test_inputs_of_the_wrong_shape_are_explained(folder, program):
    run = base.target("ort").open(folder, {"components": base.interface(program)}, None, OPTIONS)
    with pytest.raises(InputError, match="pixel_values"):
        run("vision", {"pixel_values": torch.zeros(1, 4, 32, 32)})


def test_a_graph_that_cannot_be_read_is_an_artifact_error(tmp_path, program):
    (tmp_path / "vision.onnx").write_bytes(b"not a graph")
    run = base.target("ort").open(tmp_path, {"components": base.interface(program)}, None, OPTIONS)
    with pytest.raises(ArtifactError, match=r"vision\.onnx"):
        run("vision", {"pixel_values": torch.zeros(1, 3, 32, 32)})


def test_outputs_are_not_copied(folder, program):
    """The cache that a step returns is the runtime's own memory, and stays valid after the next call."""
    run = base.target("ort").open(folder, {"components": base.interface(program)}, None, OPTIONS)
    first = run("embed", {"input_ids": torch.tensor([[1, 2]])})["inputs_embeds"]
    kept = first.clone()
    run("embed", {"input_ids": torch.tensor([[5, 6]])})
    assert torch.equal(first, kept)


def test_a_linear_layer_with_a_computed_weight_is_left_alone():
    x, w = ir.val("x", ir.DataType.FLOAT, ["n", 4]), ir.val("w", ir.DataType.FLOAT, [3, 4])
    turned = ir.node("Transpose", [w], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    graph = ir.Graph([x, w], [product.outputs[0]], nodes=[turned, product], opset_imports={"": 23})
    assert ort_graph.keep_weight_layout(ir.Model(graph, ir_version=10)) == 0
