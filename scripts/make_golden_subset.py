#!/usr/bin/env python3
"""Picks the cases of stored golden files that fit a size limit and writes them as one file.

usage: make_golden_subset.py OUTPUT.safetensors INPUT.safetensors... [--limit BYTES]
       make_golden_subset.py OUTPUT.safetensors INPUT.safetensors... --cases 002,008 --trim

One case of each feature first (the smallest), then the smallest of the rest until the limit; or the
cases that are named. --trim cuts each to its first two sequences, four query heads a kv head and the
blocks that they use, without the key and value that were written: what is left is what it was.
tests/golden/README.md says what the files hold.
"""

import argparse
import json
import math
import struct
import sys


def read(path):
    """The cases of a file: [(description, {tensor name: (header entry, bytes)})]."""
    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    body = data[8 + length:]
    cases = []
    for case in json.loads(header["__metadata__"]["cases"]):
        prefix = case["case"] + "."
        tensors = {}
        for name, entry in header.items():
            if name.startswith(prefix):
                begin, end = entry["data_offsets"]
                tensors[name] = (entry, body[begin:end])
        cases.append((case, tensors))
    return cases


def size(case):
    return sum(len(data) for _, data in case[1].values())


def choose(cases, limit):
    cases = sorted(cases, key=size)
    chosen, features, used = [], set(), 0
    for first_of_feature in (True, False):
        for case in cases:
            is_new = case[0]["feature"] not in features
            if case in chosen or is_new != first_of_feature or used + size(case) > limit:
                continue
            chosen.append(case)
            features.add(case[0]["feature"])
            used += size(case)
    return sorted(chosen, key=lambda case: case[0]["case"])


def take(tensor, axis, indices):
    """The entries `indices` of one axis."""
    entry, data = tensor
    shape = entry["shape"]
    outer = math.prod(shape[:axis])
    inner = len(data) // (outer * shape[axis])
    parts = [data[(i * shape[axis] + index) * inner:(i * shape[axis] + index + 1) * inner]
             for i in range(outer) for index in indices]
    return {**entry, "shape": [*shape[:axis], len(indices), *shape[axis + 1:]]}, b"".join(parts)


def numbers(tensor):
    return struct.unpack(f"<{len(tensor[1]) // 4}i", tensor[1])


def trim(case, sequences=2, group=4):
    description, named = dict(case[0]), dict(case[1])
    prefix = description["case"] + "."
    tensors = {name[len(prefix):]: tensor for name, tensor in named.items()}
    for name in ("key", "value"):
        tensors.pop(name, None)
    sequences = min(sequences, tensors["seq_lens"][0]["shape"][0])
    starts = numbers(tensors["query_start_loc"])
    lens = numbers(tensors["seq_lens"])
    tensors["query_start_loc"] = take(tensors["query_start_loc"], 0, range(sequences + 1))
    for name in ("seq_lens", "block_table", "mm_prefix_range", "rswa_prefix_lens", "causal"):
        if name in tensors:
            tensors[name] = take(tensors[name], 0, range(sequences))
    whole = description["num_heads"] // description["num_kv_heads"]
    heads = [h for h in range(description["num_heads"]) if h % whole < group]
    description["num_heads"] = len(heads)
    for name in ("query", "output"):
        tensors[name] = take(take(tensors[name], 0, range(starts[sequences])), 1, heads)
    width = tensors["block_table"][0]["shape"][1]
    table = list(numbers(tensors["block_table"]))
    used = {}
    for s in range(sequences):
        for b in range(width):
            named_here = b * description["block_size"] < lens[s]
            at = s * width + b
            table[at] = used.setdefault(table[at], len(used)) if named_here else 0
    tensors["block_table"] = tensors["block_table"][0], struct.pack(f"<{len(table)}i", *table)
    for name in ("kv_cache", "k_scale_cache", "v_scale_cache"):
        if name in tensors:
            tensors[name] = take(tensors[name], 0, list(used))
    return description, {prefix + name: tensor for name, tensor in tensors.items()}


def write(path, cases):
    # Wider elements first, so that every tensor is aligned to its element size.
    tensors = sorted(((name, entry, data) for _, group in cases
                      for name, (entry, data) in group.items()),
                     key=lambda item: (-{"32": 4, "16": 2}.get(item[1]["dtype"][-2:], 1), item[0]))
    header = {"__metadata__": {"cases": json.dumps([case for case, _ in cases])}}
    offset = 0
    for name, entry, data in tensors:
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"],
                        "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors:
            file.write(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--limit", type=int, default=2_950_000)
    parser.add_argument("--cases")
    parser.add_argument("--trim", action="store_true")
    arguments = parser.parse_args()
    cases = [case for path in arguments.inputs for case in read(path)]
    if arguments.cases:
        chosen = [case for case in cases if case[0]["case"] in arguments.cases.split(",")]
    else:
        chosen = choose(cases, arguments.limit)
    if arguments.trim:
        chosen = [trim(case) for case in chosen]
    write(arguments.output, chosen)
    features = sorted({case["feature"] for case, _ in chosen})
    print(f"{len(chosen)} of {len(cases)} cases, {sum(map(size, chosen))} bytes: "
          + ", ".join(features))
    return 0


if __name__ == "__main__":
    sys.exit(main())
