"""Measures the ways ONNX Runtime can run one attention layer over a growing cache, side by side, on this machine.

Every form computes the same thing: masked attention of S new tokens over P cached and S new keys, heads [B, G, *, d]
in the cache, a general mask given by positions (padding anywhere) except where the name says `causal`. The forms are
run in turns (form 1, form 2, ..., form 1, ...), so that noise of a shared machine falls on all of them alike, and
reported as medians.

    python benchmarks/ort_attention_forms.py --rounds 15 --threads 1 --out benchmarks/results/ort_attention_forms.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

REFUSALS = (native.Fail, native.InvalidArgument, native.InvalidGraph, native.NotImplemented, native.RuntimeException)

HEADS = KV_HEADS = 12
WIDTH = 64
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32
CASES = {
    "prefill 640": (640, 0),
    "prefill 128": (128, 0),
    "decode over 640": (1, 640),
    "decode over 128": (1, 128),
    "turn of 32 over 640": (32, 640),
}


def _constant(name: str, values: list[int]) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _gqa(bias: bool, causal: int = 1) -> list:
    inputs = ["q", "k", "v", "past_k", "past_v", "last", "total"] + (["", "", "", "bias"] if bias else [])
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS} | ({} if causal else {"causal": 0})
    return [
        helper.make_node("GroupQueryAttention", inputs, ["y", "new_k", "new_v"], domain="com.microsoft", **attributes)
    ]


def _multi_head() -> list:
    inputs = ["q", "k", "v", "", "", "bias", "past_k", "past_v"]
    return [
        helper.make_node("MultiHeadAttention", inputs, ["y", "new_k", "new_v"], domain="com.microsoft", num_heads=HEADS)
    ]


def _standard(mask: str) -> list:
    heads = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
    causal = {"is_causal": 1} if not mask else {}
    return [
        helper.make_node(
            "Attention", ["q", "k", "v", mask, "past_k", "past_v"], ["y", "new_k", "new_v"], **heads, **causal
        )
    ]


def _heads_first() -> list:
    """The ops that a traced model has around its attention: heads split and moved, the cache joined."""
    make, nodes = helper.make_node, []
    for name in ("q", "k", "v"):
        nodes += [
            make("Reshape", [name, "split"], [name + "4"]),
            make("Transpose", [name + "4"], [name + "h"], perm=[0, 2, 1, 3]),
        ]
    return [
        *nodes,
        make("Concat", ["past_k", "kh"], ["new_k"], axis=2),
        make("Concat", ["past_v", "vh"], ["new_v"], axis=2),
    ]


def _joined_outside() -> list:
    make = helper.make_node
    nodes = [*_heads_first(), make("Attention", ["qh", "new_k", "new_v", "mask"], ["o"])]
    return [*nodes, make("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]), make("Reshape", ["ot", "merge"], ["y"])]


def _plain() -> list:
    make, nodes = helper.make_node, _heads_first()
    nodes += [
        make("Transpose", ["new_k"], ["kt"], perm=[0, 1, 3, 2]),
        make("Mul", ["qh", "scale"], ["qs"]),
        make("MatMul", ["qs", "kt"], ["s"]),
    ]
    nodes += [
        make("Add", ["s", "bias"], ["sb"]),
        make("Softmax", ["sb"], ["p"], axis=-1),
        make("MatMul", ["p", "new_v"], ["o"]),
    ]
    return [*nodes, make("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]), make("Reshape", ["ot", "merge"], ["y"])]


def _chosen() -> list:
    """GroupQueryAttention without the bias when nothing is padded, chosen at run time."""

    def branch(bias: bool, prefix: str) -> object:
        node = _gqa(bias)[0]
        for i, name in enumerate(node.output):
            node.output[i] = prefix + name
        return helper.make_graph(
            [node], prefix, [], [helper.make_tensor_value_info(o, FLOAT, None) for o in node.output]
        )

    return [
        helper.make_node(
            "If", ["full"], ["y", "new_k", "new_v"], then_branch=branch(False, "a_"), else_branch=branch(True, "b_")
        )
    ]


FORMS: dict[str, Callable[[], list]] = {
    "GroupQueryAttention causal, no bias": lambda: _gqa(False),
    "GroupQueryAttention causal and bias": lambda: _gqa(True),
    "GroupQueryAttention bias alone": lambda: _gqa(True, causal=0),
    "If: GroupQueryAttention with or without bias": _chosen,
    "MultiHeadAttention bias": _multi_head,
    "Attention-23 causal": lambda: _standard(""),
    "Attention-23 bool mask": lambda: _standard("mask"),
    "Attention-23 bool mask, cache joined outside": _joined_outside,
    "Attention-23 float mask": lambda: _standard("bias"),
    "MatMul, Softmax, MatMul": _plain,
}


def _session(nodes: list, threads: int) -> onnxruntime.InferenceSession:
    def value(name: str, kind: int, shape: list) -> object:
        return helper.make_tensor_value_info(name, kind, shape)

    q, kv = ["b", "s", HEADS * WIDTH], ["b", "s", KV_HEADS * WIDTH]
    past = ["b", KV_HEADS, "p", WIDTH]
    inputs = [
        value("q", FLOAT, q),
        value("k", FLOAT, kv),
        value("v", FLOAT, kv),
        value("past_k", FLOAT, past),
        value("past_v", FLOAT, past),
    ]
    inputs += [value("last", INT32, ["b"]), value("total", INT32, [1]), value("bias", FLOAT, ["b", 1, "s", "t"])]
    inputs += [value("mask", TensorProto.BOOL, ["b", 1, "s", "t"]), value("full", TensorProto.BOOL, [])]
    outputs = [
        value("y", FLOAT, q),
        value("new_k", FLOAT, ["b", KV_HEADS, "t", WIDTH]),
        value("new_v", FLOAT, ["b", KV_HEADS, "t", WIDTH]),
    ]
    constants = [_constant("split", [0, 0, HEADS, WIDTH]), _constant("merge", [0, 0, -1])]
    constants.append(numpy_helper.from_array(np.array(WIDTH**-0.5, np.float32), "scale"))
    graph = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _feed(batch: int, length: int, past: int, padded: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    total = past + length
    mask = np.broadcast_to(
        np.arange(total)[None, :] <= (np.arange(length) + past)[:, None], (batch, 1, length, total)
    ).copy()
    if padded:
        mask[1:, :, :, : min(5, past or 5)] = False
        mask |= ~mask.any(-1, keepdims=True)
    bias = np.where(mask, np.float32(0), np.finfo(np.float32).min).astype(np.float32)
    kv = [normal(batch, length, KV_HEADS * WIDTH) for _ in range(2)]
    cache = [normal(batch, KV_HEADS, past, WIDTH) for _ in range(2)]
    feed = {"q": normal(batch, length, HEADS * WIDTH), "k": kv[0], "v": kv[1], "past_k": cache[0], "past_v": cache[1]}
    lengths = {"last": np.full(batch, total - 1, np.int32), "total": np.array([total], np.int32)}
    return feed | lengths | {"bias": bias, "mask": mask, "full": np.array(not padded)}


def check(threads: int) -> dict[str, dict[str, str]]:
    """Largest difference of each form from the plain one; the error where a form refuses the shapes."""
    found: dict[str, dict[str, str]] = {name: {} for name in FORMS}
    plain = _session(_plain(), threads)
    for label, args in {
        "prefill": (1, 40, 0, False),
        "padded batch, prefill": (3, 40, 0, True),
        "padded batch, decode": (3, 1, 40, True),
        "padded batch, turn": (3, 6, 40, True),
        "turn": (1, 6, 40, False),
    }.items():
        feed = _feed(*args)
        want = plain.run(None, feed)
        for name, build in FORMS.items():
            try:
                got = _session(build(), threads).run(None, feed)
                found[name][label] = f"{max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True)):.1e}"
            except REFUSALS as error:  # what the runtime says is the result: some forms refuse some batches
                found[name][label] = str(error).splitlines()[0][-160:]
    return found


def measure(rounds: int, threads: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each form for each case: median, least and the middle half's spread."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case, (length, past) in CASES.items():
        feed, times = _feed(1, length, past, False), {name: [] for name in FORMS}
        sessions = {name: _session(build(), threads) for name, build in FORMS.items()}
        repeat = 3 if length > 100 else 30
        for turn in range(rounds + 1):
            for name, session in sessions.items():
                start = time.perf_counter()
                for _ in range(repeat):
                    session.run(None, feed)
                if turn:
                    times[name].append((time.perf_counter() - start) / repeat * 1e3)
        results[case] = {}
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            results[case][name] = {"median_ms": middle, "least_ms": min(values), "spread_ms": high - low}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ort_attention_forms.json"))
    options = parser.parse_args()
    record = {
        "what": f"one attention layer, {HEADS} heads of {WIDTH}, {KV_HEADS} key-value heads, float32, CPU",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": options.threads,
        },
        "onnxruntime": onnxruntime.__version__,
        "rounds": options.rounds,
        "milliseconds": measure(options.rounds, options.threads),
        "difference_from_plain": check(options.threads),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for case, forms in record["milliseconds"].items():
        sys.stdout.write(
            f"{case}\n"
            + "".join(f"  {v['median_ms']:8.3f} ms (least {v['least_ms']:.3f})  {name}\n" for name, v in forms.items())
        )


if __name__ == "__main__":
    main()
