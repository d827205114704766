"""Well-formed reports for the tests of report, matrix, compare and gate."""

from psigraph.bench.report import build_report
from psigraph.medpsy.comparator_report import build_comparator_report
from psigraph.medpsy.policy import admit, load_policy

REAL_SHA256 = "41ee947d9cce72ec657577219fd1798fabeabf0d832217fe23c9d6d3d18d5880"
SYNTH_SHA256 = "5" * 64


def a_report(
    rate=500.0, repeats=3, sha256=SYNTH_SHA256, gpu="NVIDIA H200", backend="cuda", idle=True, tokens=8, **options
):
    """A report of `tokens` tokens a run whose rates scatter around `rate` tokens per second."""
    tensors = {"token_embd.weight": "q6_k"} | {
        f"blk.0.{part}.weight": "q6_k" if part in ("attn_v", "ffn_down") else "q4_k"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    admission = admit(load_policy(), tensors, sha256, None, size_label="1.7b")
    times = [1e3 * tokens / rate * (1 + 0.01 * (index - (repeats - 1) / 2)) for index in range(repeats)]
    arguments = {
        "model_path": "medpsy.gguf",
        "model_size": "1.7b",
        "backend": backend,
        "prompt_ids": [151644],
        "max_new_tokens": tokens,
        "runs": [{"generated_tokens": list(range(tokens)), "total_ms": ms, "stopped_on_eos": False} for ms in times],
        "sha256": sha256,
        "policy": admission.record(),
        "environment": {"gpu": gpu, "gpu_idle": idle, "driver": "580", "host": "a-host"} if backend == "cuda" else {},
        "artifact": {"synthetic": sha256 != REAL_SHA256, "quant_mix": {"q4_k": 5, "q6_k": 3}, "bytes_per_token": 1.1e9},
        "timings": {"load_ms": 1.0, "compile_ms": 2.0, "capture_ms": 3.0, "first_token_ms": 4.0},
        "roofline": {"read_bandwidth_gb_s": 4200.0, "bytes_per_token": 1.1e9} if backend == "cuda" else None,
        "kernels": [{"name": "qkv", "us": 3.0, "bytes": 4718592}],
    }
    return build_report(**(arguments | options))


def a_comparator(rate=250.0, **options):
    """A comparator's report with three samples around `rate` tokens per second."""
    arguments = {
        "runtime": "llama.cpp llama-bench",
        "version": "b11434",
        "status": "measured",
        "sha256": SYNTH_SHA256,
        "synthetic": True,
        "session": "s1",
        "max_new_tokens": 512,
        "samples": [rate * 0.99, rate, rate * 1.01],
        "host": "a-host",
        "gpu": "NVIDIA H200",
        "gpu_idle": True,
        "work_per_token": "full logits on the host every token",
        "raw": [{}, {}, {}],
    }
    return build_comparator_report(**(arguments | options))
