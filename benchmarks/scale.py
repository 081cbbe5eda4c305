"""What large models ask of a machine: seconds of a plan and of the reduced graphs, memory of a compile.

    python benchmarks/scale.py [--policy NAME] [--output FILE]

The 7B-shaped model lives on the meta device: no weights, all graphs. The 3B-shaped one is written to a temporary
directory in bfloat16 and compiled from there in a process of its own, whose peak memory is set against the bytes of the
weights. Results go to `benchmarks/results/scale.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

import torch
import transformers

import tvc
from tvc import compiler
from tvc.policy import load_policy, resolve
from tvc.report.timing import environment
from tvc.trace.load import meta_copy
from tvc.trace.survey import survey

HERE = pathlib.Path(__file__).parent

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TEXT = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "3b": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32, "num_attention_heads": 20},
}

# Weights are mapped into memory: a compile does not read them, a call does.
COMPILE = """
import resource, sys, time
import torch, tvc
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
started = time.perf_counter()
compiled = tvc.compile(sys.argv[1], sys.argv[2], verify=False)
seconds, compiling = time.perf_counter() - started, peak()
ids = torch.tensor([[1] * 8 + [32000] * 576 + [1] * 8])
compiled(input_ids=ids, pixel_values=torch.zeros(1, 3, 336, 336, dtype=torch.bfloat16))
print(seconds, compiling, peak())
"""


def configuration(size: str) -> transformers.LlavaConfig:
    text = {"model_type": "llama", "vocab_size": 32064, **TEXT[size]}
    return transformers.LlavaConfig(text_config=text, vision_config=VISION, image_token_index=32000)


def plan_seconds(policy: str) -> float:
    """A plan of the 7B-shaped model from its config.json alone, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        configuration("7b").save_pretrained(folder)
        started = time.perf_counter()
        tvc.plan(folder, policy)
        return time.perf_counter() - started


def trace_seconds(policy: str) -> dict[str, float]:
    """Survey, trace, and passes of the 7B-shaped model without weights."""
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration._from_config(
            configuration("7b"), dtype=torch.bfloat16
        ).eval()
    seconds: dict[str, float] = {}
    since = time.perf_counter()
    surveyed = survey(meta_copy(model))
    seconds["survey"], since = time.perf_counter() - since, time.perf_counter()
    resolved = resolve(load_policy(policy), surveyed.layout)
    program = compiler.trace(model, surveyed, resolved, lambda _line: None)
    seconds["trace"], since = time.perf_counter() - since, time.perf_counter()
    compiler.lower(compiler.reduce(program, resolved, lambda _line: None), "torch", lambda _line: None)
    seconds["insert, rebind, lower"] = time.perf_counter() - since
    return seconds


def compile_memory(policy: str) -> dict[str, float]:
    """Seconds and peak memory of compiling the 3B-shaped model for torch, from a directory, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            model = transformers.LlavaForConditionalGeneration._from_config(configuration("3b"), dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder)
        del model
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, folder, policy], capture_output=True, text=True, check=True
        )
    seconds, compiling, calling = map(float, done.stdout.split()[-3:])
    return {
        "seconds": seconds,
        "weight_bytes": weights,
        "peak_bytes": compiling,
        "peak_over_weights": compiling / weights,
        "peak_bytes with one call": calling,
        "peak_over_weights with one call": calling / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="fastv")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results" / "scale.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {
        "environment": environment(),
        "policy": options.policy,
        "plan 7B, seconds": plan_seconds(options.policy),
        "graphs 7B, seconds": trace_seconds(options.policy),
        "compile 3B bfloat16 from a directory": compile_memory(options.policy),
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
