"""Nodes that compute the same become one, and no others."""

from __future__ import annotations

import torch
import torch.fx as fx

from tvc.graphs import join_equal

A = torch.ops.aten


def test_equal_nodes_become_one_and_types_of_numbers_count() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = [
        graph.call_function(A.mul.Tensor, (x, 2)),
        graph.call_function(A.mul.Tensor, (x, 2)),
        graph.call_function(A.mul.Tensor, (x, 2.0)),
        graph.call_function(A.add.Tensor, (x, x), {"alpha": 1}),
        graph.call_function(A.add.Tensor, (x, x), {"alpha": 2}),
    ]
    twice = [graph.call_function(A.neg.default, (node,)) for node in made[:2]]
    graph.output((*made, *twice))
    module = fx.GraphModule(torch.nn.Module(), graph)
    value = torch.arange(4)
    want = module(value)
    join_equal(graph)
    module.recompile()
    got = module(value)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert [t.tolist() for t in got] == [t.tolist() for t in want]
    names = [node.target for node in graph.nodes if node.op == "call_function"]
    assert [names.count(op) for op in (A.mul.Tensor, A.add.Tensor, A.neg.default)] == [2, 2, 1]


def test_random_numbers_stay_apart() -> None:
    graph = fx.Graph()
    graph.output(tuple(graph.call_function(A.rand.default, ([8],)) for _ in range(2)))
    join_equal(graph)
    first, second = fx.GraphModule(torch.nn.Module(), graph)()
    assert not torch.equal(first, second)


def test_a_graph_that_writes_into_a_tensor_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    before = graph.call_function(A.mul.Tensor, (x, 2))
    graph.call_function(A.add_.Tensor, (x, 1))
    graph.output((before, graph.call_function(A.mul.Tensor, (x, 2))))
    join_equal(graph)
    before, after = fx.GraphModule(torch.nn.Module(), graph)(torch.ones(2))
    assert (before.tolist(), after.tolist()) == ([2.0, 2.0], [4.0, 4.0])
