#!/usr/bin/env python3
"""Compares two results of `quire bench --json`, workload by workload.

    bench/compare/compare.py OLD NEW [--threshold PERCENT] [--fail]

Prints time, fraction of the limit and speed-up; `~` marks changes within the spread of the samples
or within the threshold. Exits with 1 if --fail is given and a workload became slower, with 2 if
the two cannot be compared.
"""

import argparse
import json
import math
import sys

# What must agree for times to mean the same work, as paths into the JSON.
SAME_WORK = [("options", "dtype"), ("options", "kv_cache_dtype"), ("options", "block_size")]
# What explains a difference, if it differs.
CONDITIONS = [("machine", "cpu"), ("machine", "device"), ("machine", "num_threads"),
              ("machine", "backend"), ("machine", "instruction_set"), ("options", "kv_layout"),
              ("options", "batch_invariant"), ("quire_version",)]


def load(path):
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        result["by_name"] = {workload["name"]: workload for workload in result["workloads"]}
        for path_in_json in SAME_WORK + CONDITIONS:
            get(result, path_in_json)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(fail(f"{path}: not a result of quire bench: {error!r}")) from error
    return result


def fail(message):
    print(f"compare.py: {message}", file=sys.stderr)
    return 2


def get(result, path):
    for key in path:
        result = result[key]
    return result


def quartiles(samples):
    ordered = sorted(samples)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def is_noise(old, new, threshold):
    """The medians are close, or the middle halves of the samples overlap."""
    if abs(new["time_us"] / old["time_us"] - 1.0) <= threshold:
        return True
    old_low, old_high = quartiles(old["samples_us"])
    new_low, new_high = quartiles(new["samples_us"])
    return new_low <= old_high and old_low <= new_high


def geometric_mean(values):
    return math.exp(sum(math.log(value) for value in values) / len(values))


def print_conditions(old, new):
    for name, key in (("read GB/s", "gb_per_s"), ("GFLOP/s", "gflop_per_s")):
        print(f"{'limit ' + name:24}{old['limits'][key]:12.1f}{new['limits'][key]:12.1f}")
    for path in CONDITIONS:
        if get(old, path) != get(new, path):
            print(f"note: {'.'.join(path)} differs: {get(old, path)} | {get(new, path)}")
    print()


def compare(old, new, threshold):
    """Prints the table; returns the names of the workloads that became slower."""
    print(f"{'workload':24}{'old us':>12}{'new us':>12}{'old frac':>10}{'new frac':>10}"
          f"{'speed-up':>10}")
    speedups, slower = [], []
    for name, before in old["by_name"].items():
        after = new["by_name"].get(name)
        if after is None or after["batch"] != before["batch"]:
            why = "not in NEW" if after is None else "another batch (scale?)"
            print(f"{name:24}{before['time_us']:12.1f}  {why}")
            continue
        speedup = before["time_us"] / after["time_us"]
        noise = is_noise(before, after, threshold)
        speedups.append(speedup)
        if speedup < 1.0 and not noise:
            slower.append(name)
        print(f"{name:24}{before['time_us']:12.1f}{after['time_us']:12.1f}"
              f"{before['fraction']:10.3f}{after['fraction']:10.3f}{speedup:9.2f}x"
              f"{' ~' if noise else ''}")
    for name in new["by_name"]:
        if name not in old["by_name"]:
            print(f"{name:24}{'':12}{new['by_name'][name]['time_us']:12.1f}  not in OLD")
    if speedups:
        print(f"\ngeometric mean of the speed-ups: {geometric_mean(speedups):.3f}x "
              f"({len(speedups)} workloads)")
    return slower


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--threshold", type=float, default=3.0, metavar="PERCENT",
                        help="changes up to this are noise (default 3)")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if something is slower")
    args = parser.parse_args()
    old, new = load(args.old), load(args.new)
    for path in SAME_WORK:
        if get(old, path) != get(new, path):
            return fail(f"{'.'.join(path)} differs: {get(old, path)} | {get(new, path)}")
    print_conditions(old, new)
    slower = compare(old, new, args.threshold / 100.0)
    if slower:
        print("slower: " + ", ".join(slower))
    return 1 if slower and args.fail else 0


if __name__ == "__main__":
    sys.exit(main())
