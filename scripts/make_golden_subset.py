#!/usr/bin/env python3
"""Picks the cases of stored golden files that fit a size limit and writes them as one file.

usage: make_golden_subset.py OUTPUT.safetensors INPUT.safetensors... [--limit BYTES]

One case of each feature first (the smallest), then the smallest of the rest until the limit.
tests/golden/README.md says what the files hold.
"""

import argparse
import json
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
    arguments = parser.parse_args()
    cases = [case for path in arguments.inputs for case in read(path)]
    chosen = choose(cases, arguments.limit)
    write(arguments.output, chosen)
    features = sorted({case["feature"] for case, _ in chosen})
    print(f"{len(chosen)} of {len(cases)} cases, {sum(map(size, chosen))} bytes: "
          + ", ".join(features))
    return 0


if __name__ == "__main__":
    sys.exit(main())
