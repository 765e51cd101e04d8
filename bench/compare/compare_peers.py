#!/usr/bin/env python3
"""Times Quire and the peers that are installed on the same workloads, in one run on one machine.

    bench/compare/compare_peers.py --quire build/cuda/bin/quire --json result.json
    bench/compare/compare_peers.py --device cpu --quire build/release/bin/quire --json result.json

Needs PyTorch. Peers on a GPU: vLLM's Triton kernel, FlashAttention-3 (vLLM's or
flash_attn_interface), FlashInfer, and over contiguous K and V cuDNN and torch's own kernels; on a
CPU: vLLM's CPU attention and torch's. Each one's output is compared with float32 on sampled rows
before it is timed. A peer that is not installed, refuses a workload or is wrong is listed with the
reason. README.md describes the JSON.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

try:
    import torch
except ImportError:
    sys.exit("compare_peers.py: PyTorch is needed: pip install torch")

from paged_batch import PagedBatch
from peers import PEERS, Refused, first_line
from peers_cpu import CPU_PEERS

DEFAULT_WORKLOADS = pathlib.Path(__file__).parent.parent / "cases" / "workloads.json"
# Of the largest value of a row and head. bf16 has steps of 0.4 %, and kernels round the weights to
# it as well as the output.
TOLERANCE = 0.02


def fail(message):
    sys.exit(f"compare_peers.py: {message}")


def geometric_mean(values):
    return math.exp(sum(math.log(value) for value in values) / len(values))


def summary(samples, error):
    """Of timed calls: not all the samples, so that results stay small enough to be kept."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"time_us": round(median, 3), "quartiles_us": [round(low, 3), round(high, 3)],
            "num_samples": len(samples), "error": error}


def run_quire(args, workload):
    """One workload through `quire bench`, with limits measured before and after it."""
    # cuBLAS, for the compute limit, is where pip put it for torch.
    libraries = pathlib.Path(torch.__file__).parent.parent.glob("nvidia/*/lib")
    path = os.pathsep.join([os.environ.get("LD_LIBRARY_PATH", ""), *map(str, libraries)])
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "quire.json"
        command = [args.quire, "bench", "--device", args.device, "--workload", args.workload,
                   "--only", workload["name"], "--block-size", str(args.block_size),
                   "--min-time", str(args.min_time), "--json", str(out)]
        if args.device == "cpu":
            command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "LD_LIBRARY_PATH": path})
        if done.returncode != 0:
            fail(f"{' '.join(command)}: {done.stderr.strip()}")
        return json.loads(out.read_text(encoding="utf-8"))


def largest_error(output, batch, expected):
    """Of the sampled rows, relative to the largest value of its row and head."""
    rows = output.reshape(batch.num_tokens, batch.num_heads, batch.head_size)
    errors = []
    for (sequence, row), wanted in expected.items():
        got = rows[batch.starts[sequence] + row].float()
        error = (got - wanted).abs().amax(dim=1) / wanted.abs().amax(dim=1)
        errors.append(error.max().item())
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def time_graph(call, num_caches, min_ms, min_repeats=3):
    """Microseconds of one call, by replays of a graph of calls over the caches in turn: as
    time_graph() in bench/cuda_bench.cc."""
    num_calls = max(num_caches, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i % num_caches)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        graph.replay()
    samples, total_ms = [], 0.0
    while total_ms < min_ms or len(samples) < min_repeats:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1000.0 * begin.elapsed_time(end) / num_calls)
        total_ms += begin.elapsed_time(end)
    return samples


def time_calls(call, num_caches, min_ms, min_repeats=3):
    """Microseconds of each call, over the caches in turn."""
    call(0)
    samples, total_us = [], 0.0
    while total_us < min_ms * 1e3 or len(samples) < min_repeats:
        begin = time.perf_counter_ns()
        call(len(samples) % num_caches)
        samples.append((time.perf_counter_ns() - begin) / 1e3)
        total_us += samples[-1]
    return samples


def measure_peer(peer, batch, expected, min_ms):
    """Its entry for a workload: checked and timed, or why not."""
    try:
        call = peer.prepare(batch)
        batch.output.fill_(math.nan)
        error = largest_error(call(0), batch, expected)
        if error > TOLERANCE:
            return {"refused": f"wrong: off by {error:.3g} of a row's largest value",
                    "error": error if math.isfinite(error) else None}
        for i in range(1, len(batch.caches)):
            call(i)
        if batch.device == "cpu":
            samples = time_calls(call, len(batch.caches), min_ms)
        else:
            torch.cuda.synchronize()
            samples = time_graph(call, len(batch.caches), min_ms)
    except Refused as reason:
        return {"refused": str(reason)}
    # Peers refuse by exceptions of all kinds.
    except Exception as reason:  # pylint: disable=broad-except
        if batch.device != "cpu":
            torch.cuda.synchronize()  # a broken device ends the run here
        return {"refused": first_line(reason)}
    return summary(samples, error)


def load_peers(candidates, names):
    """The peers that can be imported, and why the others cannot."""
    peers, missing = [], {}
    for peer in candidates:
        if names and peer.name not in names:
            continue
        try:
            peers.append(peer())
        except ImportError as error:
            missing[peer.name] = str(error)
    return peers, missing


def add_fractions(result):
    """What is derived from times and limits, the limits' medians being known."""
    samples = result["limits"]["samples"]
    for key in ("gb_per_s", "gflop_per_s"):
        result["limits"][key] = statistics.median(sample[key] for sample in samples)
    fractions = {}
    for workload in result["workloads"]:
        memory_us = workload["bytes"] / result["limits"]["gb_per_s"] * 1e-3
        compute_us = workload["flops"] / result["limits"]["gflop_per_s"] * 1e-3
        workload["limit_us"] = max(memory_us, compute_us)
        workload["bound"] = "memory" if memory_us >= compute_us else "compute"
        for name, entry in workload["results"].items():
            if "time_us" in entry:
                entry["fraction"] = workload["limit_us"] / entry["time_us"]
                fractions.setdefault(name, []).append(entry["fraction"])
    result["geometric_mean"] = {name: {"fraction": geometric_mean(values),
                                       "num_workloads": len(values)}
                                for name, values in fractions.items()}


def driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return "unknown"
    return lines.split("\n")[0]


def versions_of(device):
    if device == "cpu":
        return {"torch": torch.__version__}
    return {"driver": driver_version(), "cuda": torch.version.cuda}


def describe_run(args, peers, missing):
    on_cpu = args.device == "cpu"
    return {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "device": None if on_cpu else torch.cuda.get_device_name(),
            "versions": {**versions_of(args.device), **{peer.name: peer.version for peer in peers}},
            "not_installed": missing,
            "unpaged": [peer.name for peer in peers if not peer.paged],
            "options": {"dtype": "bfloat16", "block_size": args.block_size,
                        "min_time_ms": args.min_time, "tolerance": TOLERANCE},
            "limits": {"samples": []},
            "workloads": []}


def measure_workload(args, workload, model, peers):
    """What `quire bench` wrote, and the workload's entry."""
    if args.device != "cpu":
        torch.cuda.empty_cache()  # quire gets the memory
    quire = run_quire(args, workload)
    measured = quire["workloads"][0]
    # On CPUs `quire bench` runs a part of each batch.
    batch = PagedBatch({**workload, "batch": measured["batch"]}, model, args.block_size,
                       measured["num_caches"], args.device)
    expected = {sample: batch.expected(*sample) for sample in batch.sample()}
    results = {"quire": summary(measured["samples_us"], measured.get("max_error"))}
    for peer in peers:
        results[peer.name] = measure_peer(peer, batch, expected, args.min_time)
    entry = {key: measured[key] for key in ("name", "flops", "bytes", "num_caches")}
    return quire, {**entry, "results": results}


def run(args, workloads, models):
    peers, missing = load_peers(args.candidates, args.peers)
    result = describe_run(args, peers, missing)
    for index, workload in enumerate(workloads):
        if sys.stderr.isatty():
            print(f"\r\033[K[{index + 1}/{len(workloads)}] {workload['name']}", end="",
                  file=sys.stderr, flush=True)
        quire, entry = measure_workload(args, workload, models[workload["model"]], peers)
        result["workloads"].append(entry)
        result["versions"]["quire"] = quire["quire_version"]
        if args.device == "cpu":
            machine = quire["machine"]
            result["device"] = (f"{machine['cpu']}, {machine['num_threads']} threads, "
                                f"{machine['instruction_set']}")
        limits = result["limits"]
        limits["samples"] += quire["limits"]["samples"]
        for key in ("read_method", "flops_method"):
            limits[key] = quire["limits"][key]
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if "not measured" in result["limits"]["flops_method"]:
        fail("quire bench found no cuBLAS for the compute limit: add its folder to LD_LIBRARY_PATH")
    add_fractions(result)
    return result


def print_table(result):
    limits, names = result["limits"], list(result["workloads"][0]["results"])
    print(f"{result['device']}: read {limits['gb_per_s']:.4g} GB/s, "
          f"{limits['gflop_per_s'] / 1000:.3g} TFLOP/s ({limits['flops_method']}); "
          "microseconds (fraction of the limit)\n")
    print(f"{'workload':20}{'limit':>9}" + "".join(f"{name:>17}" for name in names))
    for workload in result["workloads"]:
        cells = [f"{entry['time_us']:.1f} ({entry['fraction']:.2f})" if "time_us" in entry else "-"
                 for entry in workload["results"].values()]
        print(f"{workload['name']:20}{workload['limit_us']:9.1f}"
              + "".join(f"{cell:>17}" for cell in cells))
    means = result["geometric_mean"]
    cells = [f"{means[name]['fraction']:.3f} of {means[name]['num_workloads']}"
             if name in means else "-" for name in names]
    print(f"{'geometric mean':29}" + "".join(f"{cell:>17}" for cell in cells))
    if result["unpaged"]:
        print(f"\n{', '.join(result['unpaged'])}: over contiguous K and V")
    for name, reason in result["not_installed"].items():
        print(f"{name}: not installed: {reason}")
    for name in names:
        reasons = {}
        for workload in result["workloads"]:
            reason = workload["results"][name].get("refused")
            if reason:
                reasons.setdefault(reason, []).append(workload["name"])
        for reason, refused in reasons.items():
            print(f"{name}: {reason}: {', '.join(refused)}")


def main():
    all_names = dict.fromkeys(peer.name for peer in [*PEERS, *CPU_PEERS])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quire", required=True, metavar="PROGRAM")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workload", default=str(DEFAULT_WORKLOADS), metavar="FILE")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...",
                        help="these workloads only")
    parser.add_argument("--peers", type=lambda text: text.split(","), metavar="NAME,...",
                        help="these peers only, of " + ", ".join(all_names))
    parser.add_argument("--block-size", type=int,
                        help="default 16; 32 on CPUs, the smallest that vLLM takes there")
    parser.add_argument("--min-time", type=float, default=300.0, metavar="MS",
                        help="of timed calls, at least, for each (default 300)")
    parser.add_argument("--json", metavar="FILE", help="write everything")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        fail("torch sees no CUDA device")
    if on_cpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    args.block_size = args.block_size or (32 if on_cpu else 16)
    args.candidates = CPU_PEERS if on_cpu else PEERS
    unknown = set(args.peers or ()) - {peer.name for peer in args.candidates}
    if unknown:
        fail(f"--peers: no peer is called {', '.join(sorted(unknown))}")
    with open(args.workload, encoding="utf-8") as file:
        cases = json.load(file)
    workloads = [workload for workload in cases["workloads"]
                 if args.only is None or workload["name"] in args.only]
    if not workloads:
        fail(f"--only: no such workload in {args.workload}")
    if args.json:
        try:
            open(args.json, "a", encoding="utf-8").close()  # fail now, not after minutes
        except OSError as error:
            fail(f"--json: {error}")
    torch.backends.cuda.matmul.allow_tf32 = False  # expected rows are float32
    result = run(args, workloads, cases["models"])
    print_table(result)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
