"""Measures the Triton providers against their references, eager and under torch.compile, and writes one JSON.

    python benchmarks/kernels.py [--op top_keep] [--tokens 576 --tokens 2304] [--no-compile]
    python benchmarks/kernels.py --tune      # searches block sizes first and rewrites kernels/providers/table.json

Each provider is compared with the reference on the same tensors before it is measured. `device_ms` is the provider's
time on the device alone (calls replayed from a CUDA graph), the others are whole calls from Python. `bandwidth` is the
bytes that an op has to read and write at least, by `device_ms`, as a share of what a copy of 1 GiB reaches there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from tvc.kernels import OPS
from tvc.kernels.providers import _table, support
from tvc.kernels.tolerances import tolerance
from tvc.report.timing import Variant, environment, measure, text

HERE = pathlib.Path(__file__).resolve().parent
DEVICE = "cuda"
TIMES = ("device_ms", "provider_ms", "eager_ms", "compiled_ms")
COLUMNS = ("op", "case", "tokens", *TIMES, "speedup", "bandwidth", "agreement", "note")
TOKENS = (576, 2304, 9216, 16384, 65536)
CALLS = 10  # in one turn, so that waiting for the device is not what is measured
AGREEMENT = 0.99  # of the indices: two orders of summation may settle a near tie differently
# What --tune tries: kernel -> (op, case, candidates).
CANDIDATES: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "attend.part": ("attend", "one query", {"block_n": (32, 64, 128), "warps": (2, 4, 8)}),
    "attend.join": ("attend", "one query", {"warps": (1, 2, 4)}),
    "pack": ("top_keep", "25%", {"block": (512, 1024, 2048, 4096, 8192), "warps": (2, 4, 8)}),
    "top_keep": ("top_keep", "25%", {"block": (1024, 4096, 8192, 16384), "warps": (4, 8, 16)}),
    "attention_score.stats": ("attention_score", "last", {"block_n": (32, 64, 128), "warps": (2, 4, 8)}),
    "attention_score.gather": ("attention_score", "last", {"block_v": (32, 64, 128), "warps": (2, 4, 8)}),
    "attention_score.columns": (
        "attention_score",
        "text",
        {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "warps": (4, 8)},
    ),
    "attention_score.pool": ("attention_score", "text", {"block_v": (64, 128, 256), "warps": (2, 4, 8)}),
    "shorten.places": ("shorten", "25%", {"block": (32, 64, 128), "warps": (2, 4, 8)}),
    "shorten.along": ("shorten", "25%", {"block_s": (4, 8, 16), "block_d": (256, 512, 1024), "warps": (2, 4, 8)}),
    "assign": (
        "merge_nearest",
        "kept",
        {"block_a": (16, 64, 128), "block_c": (32, 64, 128), "block_d": (64, 128), "warps": (4, 8)},
    ),
    "merge_rows": ("merge_nearest", "kept", {"block_v": (32, 64, 128), "block_d": (64, 128, 256), "warps": (2, 4, 8)}),
    "density_keep": (
        "density_keep",
        "55%",
        {"block_a": (32, 64, 128), "block_c": (32, 64, 128), "block_d": (32, 64, 128), "warps": (4, 8)},
    ),
    "merge_clusters": ("merge_clusters", "30%", {"numbers": (1024, 4096, 16384), "warps": (2, 4, 8, 16)}),
    "segment_pool": ("segment_pool", "64", {"block_v": (32, 64, 128), "block_d": (32, 64, 128), "warps": (4, 8)}),
    "change_score": ("change_score", "frames", {"block_v": (4, 8, 16), "block_d": (128, 256, 512), "warps": (2, 4, 8)}),
    "threshold_keep": ("threshold_keep", "half", {"block": (1024, 4096, 8192), "warps": (4, 8, 16)}),
    "window_merge": ("window_merge", "3 x 3", {"block_d": (128, 256, 512, 1024), "warps": (2, 4, 8)}),
    "novelty_score": (
        "novelty_score",
        "frames",
        {"block_v": (4, 8, 16), "block_d": (128, 256, 512), "warps": (2, 4, 8)},
    ),
    "pagerank_score": (
        "pagerank_score",
        "all",
        {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "warps": (4, 8)},
    ),
    "density_keep.centres": ("density_keep", "55%", {"warps": (4, 8, 16)}),
    "apart": ("medoids_keep", "64", {"block": (32, 64, 128), "block_d": (16, 32, 64), "warps": (4, 8)}),
    "medoids_keep": ("medoids_keep", "64", {"block_v": (4, 16, 32), "block_k": (64, 128, 256), "warps": (4, 8)}),
    "greedy": ("max_min_keep", "64", {"warps": (2, 4, 8, 16)}),
    "coverage_keep": ("coverage_keep", "64", {"rows": (64, 128, 256), "warps": (4, 8)}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one size; `unread` is how many bytes of its arguments it has no need to read."""

    op: str
    name: str
    tokens: int
    arguments: tuple[Any, ...]
    unread: int = 0

    def moved(self, results: tuple[torch.Tensor, ...]) -> int:
        """Bytes that are read and written at least."""
        tensors = [value for value in (*self.arguments, *results) if isinstance(value, torch.Tensor)]
        return sum(value.numel() * value.element_size() for value in tensors) - self.unread


class Tokens:
    """What the cases at one number of visual tokens share, in the widths of a decoder of 7 billion parameters."""

    text, width, kept = 64, 3584, 64

    def __init__(self, number: int):
        self.number = number
        self.segment = torch.zeros(1, number, dtype=torch.int64, device=DEVICE)
        self.counts = torch.tensor([[number]], device=DEVICE)
        self.score = torch.randn(1, number, device=DEVICE)
        self.place = torch.arange(number, device=DEVICE)
        self.size = torch.ones(1, number, device=DEVICE)
        self.chosen = self.place[None, :: number // self.kept][:, : self.kept]
        self.scope = (self.segment, self.counts)
        self.budget = (*self.scope, 0, self.kept, self.kept)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)

    def feature(self) -> torch.Tensor:
        return self.draw(1, self.number, self.width)

    def case(self, op: str, name: str, *arguments: Any, unread: int = 0) -> Case:
        return Case(op, name, self.number, arguments, unread)


Made = Iterator[tuple[str, Callable[[], Case]]]


def cases(tokens: int) -> Made:
    """Op and maker of each case at one number of visual tokens."""
    at = Tokens(tokens)
    yield from scores(at)
    yield from selections(at)
    yield from merges(at)


def scores(at: Tokens) -> Made:
    def attention(rows: int) -> Case:
        length = at.number + at.text
        query, key = at.draw(1, length, 32, 128).transpose(1, 2), at.draw(1, length, 8, 128).transpose(1, 2)
        mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None] if rows < length else None
        which = torch.arange(length - rows, length, device=DEVICE)[None]
        unread = (length - rows) * 32 * 128 * 2 + (0 if mask is None else (length - rows) * length)
        given = (query, key, mask, which, at.place[None, :, None], 128**-0.5, "mean")
        return at.case("attention_score", {1: "last", at.text: "text"}.get(rows, "all"), *given, unread=unread)

    def one_query() -> Case:
        length = at.number + at.text
        query, key, value = (at.draw(1, n, rows, 128) for n, rows in ((32, 1), (8, length), (8, length)))
        places = torch.arange(length, device=DEVICE)[None]
        return at.case("attend", "one query", query, key, value, places[:, -1:], places, None, 128**-0.5)

    def walk() -> Case:
        length = at.number + at.text
        query, key = at.draw(1, length, 32, 128).transpose(1, 2), at.draw(1, length, 8, 128).transpose(1, 2)
        mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
        rows = torch.arange(length, device=DEVICE)[None]
        return at.case("pagerank_score", "all", query, key, mask, rows, at.place[None, :, None], 128**-0.5, 0.1, 5)

    frames = (at.place[None] // 144, at.place[None] % 144)
    yield "attend", one_query
    yield "attention_score", lambda: attention(1)
    yield "attention_score", lambda: attention(at.text)
    yield "attention_score", lambda: attention(at.number + at.text)
    yield "pagerank_score", walk
    yield "change_score", lambda: at.case("change_score", "frames", at.feature(), *at.scope, *frames, 0)
    yield "novelty_score", lambda: at.case("novelty_score", "frames", at.feature(), *at.scope, frames[0])


def selections(at: Tokens) -> Made:
    def coverage() -> Case:
        words = at.draw(1, at.text, at.width)
        valid = torch.ones(1, at.text, dtype=torch.bool, device=DEVICE)
        settings = (0.02, 0.2, 0.5, 0, at.kept, at.kept)
        return at.case("coverage_keep", "64", at.feature(), words, valid, *at.scope, *settings)

    def density() -> Case:
        # The keys of 8 heads around as many directions as tokens are kept elsewhere.
        near = at.draw(1, at.kept, 1024)[:, at.place % at.kept] + 0.3 * at.draw(1, at.number, 1024)
        return at.case("density_keep", "55%", near, at.score, *at.scope, 550, 0, 0.21)

    def shorten() -> Case:
        slots = torch.arange(at.number + at.text, device=DEVICE)[None]
        residual, every = at.draw(1, at.number + at.text, at.width), at.place[None, ::4].contiguous()
        chunk = (slots, slots, slots[:, : at.text], slots[:, at.text :].contiguous(), *at.scope, at.place[None])
        unread = 2 * at.width * (at.number - every.shape[1])
        return at.case("shorten", "25%", every, residual, None, *chunk, unread=unread)

    yield "top_keep", lambda: at.case("top_keep", "25%", at.score, *at.scope, 250, 0, at.number // 4)
    yield "threshold_keep", lambda: at.case("threshold_keep", "half", at.score, *at.scope, 0.0, False)
    yield "shorten", shorten
    yield "max_min_keep", lambda: at.case("max_min_keep", "64", at.feature(), *at.budget)
    yield "max_sum_keep", lambda: at.case("max_sum_keep", "64", at.feature(), at.score, *at.budget)
    yield "log_det_keep", lambda: at.case("log_det_keep", "64", at.feature(), at.score.abs(), *at.budget)
    yield "medoids_keep", lambda: at.case("medoids_keep", "64", at.feature(), *at.budget, 100)
    yield "coverage_keep", coverage
    yield "density_keep", density


def merges(at: Tokens) -> Made:
    def nearest(name: str, *how: Any) -> Case:
        values = at.feature()
        return at.case("merge_nearest", name, values, values, at.size, *at.scope, at.chosen, at.score, *how)

    def bipartite() -> Case:
        budget = (0, at.number // 4, at.number - at.number // 4, "size_weighted", True)
        return at.case("bipartite_merge", "25%", at.feature(), at.feature(), at.size, *at.scope, *budget)

    def clusters() -> Case:
        pool = (300, 10, at.number * 300 // 1000 + 1, at.number * 300 // 10000 + 1)
        return at.case("merge_clusters", "30%", at.feature(), at.size, *at.scope, at.chosen, at.score, *pool)

    def pool() -> Case:
        logits = torch.randn(1, 1, at.number, at.kept, device=DEVICE)
        return at.case("segment_pool", "64", logits, at.feature(), *at.scope, at.chosen)

    def windows() -> Case:
        # Rows of windows that are copies and rows of windows that are not, in turn.
        feature = at.feature()
        alike = torch.where((at.place // 72 % 2 == 0)[:, None], feature[:, :1], feature)
        rows = torch.full_like(at.scope[0], 24)
        return at.case("window_merge", "3 x 3", alike, at.size, *at.scope, rows, 3, 0.5)

    yield "merge_nearest", lambda: nearest("stride", "stride", 10, 10, "target_mean")
    yield "merge_nearest", lambda: nearest("kept", "kept", 0, 0, "mean")
    yield "bipartite_merge", bipartite
    yield "merge_clusters", clusters
    yield "segment_pool", pool
    yield "window_merge", windows


def made(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that were asked for, one in memory at a time; what does not fit is said and left out."""
    for tokens in options.tokens or TOKENS:
        for op, make in cases(tokens):
            if options.op and op not in options.op:
                continue
            torch.manual_seed(0)
            try:
                case = make()
            except torch.OutOfMemoryError:
                print(f"{op}: a case with {tokens} tokens does not fit the device", flush=True)
                continue
            yield case
            del case
            torch.cuda.empty_cache()


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def agreement(case: Case, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """The share of all numbers that are equal, floats within the table of tolerances."""
    equal = total = 0
    for value, expected in zip(got, want, strict=True):
        if value.shape != expected.shape:  # a size that the values decide
            return 0.0
        if value.is_floating_point():
            bar = tolerance(case.op, value.dtype)
            same = torch.isclose(value.float(), expected.float(), rtol=bar.rtol, atol=bar.atol, equal_nan=True)
        else:
            same = value == expected
        equal, total = equal + int(same.sum()), total + same.numel()
    return equal / max(total, 1)


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The median over turns of CALLS calls each."""

    def several(_: Any) -> None:
        for _ in range(CALLS):
            call()

    return measure({"": Variant(several)}, repeats, synchronize=torch.cuda.synchronize)[""].median / CALLS


def on_device(call: Callable[[], Any], repeats: int) -> float:
    """The same without what Python takes to launch: the calls are recorded once and replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    replay = Variant(lambda _: graph.replay())
    return measure({"": replay}, repeats, synchronize=torch.cuda.synchronize)[""].median / CALLS


def attempt(call: Callable[[], Any], repeats: int) -> tuple[float | None, str]:
    """(milliseconds, "") or (None, why there are none)."""
    try:
        return milliseconds(call, repeats), ""
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        return None, str(error).splitlines()[0]


def row(case: Case, copied: float, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured of one case; `copied` is the bandwidth of a copy in bytes a millisecond."""
    entry = OPS[case.op]
    found: dict[str, Any] = {"op": case.op, "case": case.name, "tokens": case.tokens, "note": ""}
    served = support(case.op, *case.arguments)
    if not served.ok:
        return found | {"note": f"reference: {served.reason}"}
    got = outputs(entry.overload(*case.arguments))
    try:
        found["agreement"] = agreement(case, got, outputs(entry.reference(*case.arguments)))
    except torch.OutOfMemoryError:
        found["note"] = "the reference runs out of memory"
    if found.get("agreement", 1.0) < AGREEMENT:
        return found | {"note": "not measured: the provider differs from its reference"}
    moved = case.moved(got)
    found["provider_ms"] = milliseconds(lambda: entry.overload(*case.arguments), options.repeats)
    found["device_ms"] = on_device(lambda: entry.overload(*case.arguments), options.repeats)
    found["bandwidth"] = moved / found["device_ms"] / copied
    found["bytes"] = moved
    if "agreement" in found:
        found["eager_ms"], _ = attempt(lambda: entry.reference(*case.arguments), options.repeats)
        found["speedup"] = found["eager_ms"] / found["provider_ms"] if found["eager_ms"] else None
        if not options.no_compile:
            torch.compiler.reset()
            compiled = torch.compile(entry.reference, dynamic=False)
            found["compiled_ms"], why = attempt(lambda: compiled(*case.arguments), options.repeats)
            found["note"] = f"compiled: {why}" if why else ""
    return found


def copy_bandwidth() -> float:
    """Bytes a millisecond that are read and written by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), 20)


def tune(options: argparse.Namespace) -> None:
    """Tries the candidates of each kernel at each size, keeps the fastest and rewrites the table."""
    table = _table.table()
    for kernel, (op, name, candidates) in CANDIDATES.items():
        if options.op and op not in options.op:
            continue
        best: list[dict[str, Any]] = []
        for case in made(argparse.Namespace(op=[op], tokens=options.tokens)):
            if case.name == name and support(op, *case.arguments).ok:
                # A class reaches beyond its size: blocks that suit it suit what is a little larger.
                best.append({"up_to": 2 * case.tokens, **_fastest(kernel, case, candidates)})
        best[-1]["up_to"] = None
        table[kernel] = best
        _table.setting.cache_clear()
        print(kernel, best, flush=True)
        _write_table(table)


def _fastest(kernel: str, case: Case, candidates: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The numbers that one launch of the case is fastest with."""
    tried = []
    for values in itertools.product(*candidates.values()):
        numbers = dict(zip(candidates, values, strict=True))
        _table.table()[kernel] = [{"up_to": None, **numbers}]
        _table.setting.cache_clear()
        try:
            tried.append((on_device(lambda: OPS[case.op].overload(*case.arguments), 5), numbers))
        except OutOfResources:  # more shared memory or registers than a program may have
            continue
    return min(tried, key=lambda pair: pair[0])[1]


def _write_table(table: dict[str, list[dict[str, Any]]]) -> None:
    lists = ",\n".join(
        f'  "{kernel}": [\n' + ",\n".join(f"   {json.dumps(entry)}" for entry in classes) + "\n  ]"
        for kernel, classes in table.items()
    )
    device = json.dumps(torch.cuda.get_device_name())
    _table.PATH.write_text(f'{{\n "tuned_on": {device},\n "kernels": {{\n{lists}\n }}\n}}\n', encoding="utf-8")


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device, and torch finds none.", file=sys.stderr)
        sys.exit(2)
    if options.tune:
        tune(options)
    facts, copied, measured = environment(HERE), copy_bandwidth(), []
    facts["copy_gb_per_s"] = copied / 1e6
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for case in made(options):
        measured.append(row(case, copied, options))
        print(text(measured[-1:], COLUMNS), flush=True)
        content = json.dumps({"environment": facts, "rows": measured}, indent=1)
        options.output.write_text(content + "\n", encoding="utf-8")
    print(text(measured, COLUMNS))
    print(options.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", action="append")
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the references out")
    parser.add_argument("--tune", action="store_true", help="search block sizes first and rewrite the stored table")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results" / "kernels.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
