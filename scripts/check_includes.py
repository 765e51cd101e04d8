#!/usr/bin/env python3
"""Checks who includes whom (docs/architecture.md, "Who may include whom").

Prints every offending #include as path:line and exits with 1 if there is one.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

C_HEADERS = {f"{n}.h" for n in """assert complex ctype errno fenv float inttypes iso646 limits locale
    math setjmp signal stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn
    string tgmath threads time uchar wchar wctype""".split()}

# Layers, most specific first: a file belongs to the first whose pattern matches its path.
LAYERS = [
    ("public", r"include/quire/"),
    ("semantics", r"src/semantics/"),
    ("plan", r"src/plan/"),
    ("params", r"src/(params|backend)\.h$"),
    ("backends", r"src/backends\.(cc|h)$"),
    ("reference", r"src/reference/"),
    ("cpu", r"src/cpu/"),
    ("cuda_ptx", r"src/cuda/ptx/"),
    ("cuda_plan", r"src/cuda/plan/"),
    ("cuda_kernel", r"src/cuda/kernel/"),
    # Every other folder holds the attention kernels of an architecture.
    ("architecture", r"src/cuda/[a-z0-9_]+/"),
    ("cuda_base", r"src/cuda/(check|device|kernel_params|kernel_table|kernels)\.h$"),
    ("cuda", r"src/cuda/"),
    ("api", r"src/api/"),
    ("c_api", r"src/c_api/"),
    ("src", r"src/"),
    ("conformance", r"conformance/"),
    ("tests", r"tests/"),
    ("generate", r"examples/llm/generate_command\.h$"),
    ("llm", r"examples/llm/"),
    ("examples", r"examples/"),
    ("command", r"cli/common/"),
    ("cli", r"cli/"),
    ("bench", r"bench/"),
    ("python", r"python/"),
]

CORE = {"public", "semantics", "plan", "params"}
LLM = {"llm", "generate", "command"}
ANY = {name for name, _ in LAYERS}

# layer -> layers it may include
ALLOWED = {
    "public": {"public"},
    "semantics": {"public", "semantics"},
    "plan": CORE,
    "params": CORE,
    "backends": CORE | {"backends", "reference", "cpu"},
    "reference": CORE | {"reference"},
    "cpu": CORE | {"cpu"},
    "cuda_ptx": CORE | {"cuda_ptx"},
    "cuda_base": CORE | {"cuda_base", "cuda_plan"},
    "cuda_plan": CORE | {"cuda_base", "cuda_plan"},
    "cuda_kernel": CORE | {"cuda_base", "cuda_plan", "cuda_ptx", "cuda_kernel"},
    "architecture": CORE | {"cuda_base", "cuda_plan", "cuda_ptx", "cuda_kernel", "architecture"},
    "cuda": CORE | {"cuda_base", "cuda_plan", "cuda_ptx", "cuda"},
    "api": CORE | {"api", "backends"},
    "c_api": {"public", "c_api"},
    "src": CORE | {"src"},
    "conformance": {"public", "conformance"},
    "tests": ANY,
    "generate": {"public"} | LLM,
    "llm": {"public"} | LLM,
    "examples": {"public", "examples"},
    "command": {"public", "command"},
    "cli": {"public", "cli", "command", "generate", "conformance", "bench"},
    "bench": {"public", "bench"},
    "python": {"public", "python", "command"},
}

# layer -> third-party headers (regex on the included path) besides the standard library's.
THIRD_PARTY = {
    "cpu": r"hwy/",
    "cuda": r"cuda",
    "cuda_base": r"cuda",
    "cuda_plan": r"cuda",
    "cuda_kernel": r"cuda",
    "cuda_ptx": r"cuda",
    "architecture": r"cuda",
    "llm": r"",
    "generate": r"CLI/",
    "examples": r"",
    "command": r"CLI/",
    "cli": r"CLI/|nlohmann/",
    "bench": r"",
    "python": r"",
    "conformance": r"cuda_runtime|cxxabi|nlohmann/|sanitizer/",
    "tests": r"",
}
# Operating-system headers: the thread pool and CPU detection need them, the edge may use them.
SYSTEM = r"(sys|linux)/|unistd\.h$|pthread\.h$|sched\.h$|fcntl\.h$|cpuid\.h$|immintrin\.h$"
SYSTEM_LAYERS = {"api", "cpu", "src", "llm", "command", "cli", "bench", "tests", "conformance", "examples"}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def layer_of(path):
    return next((name for name, pattern in LAYERS if re.match(pattern, path)), None)


def resolve(included, includer):
    """The repository's file that an include names, as a path from the root; None if it has none."""
    for base in (includer.parent, ROOT, ROOT / "include", ROOT / "src"):
        candidate = (base / included).resolve()
        if candidate.is_file() and candidate.is_relative_to(ROOT):
            return candidate.relative_to(ROOT).as_posix()
    return None


def problem(layer, included, includer):
    target = resolve(included, includer)
    if target is not None:
        target_layer = layer_of(target)
        if target_layer not in ALLOWED[layer]:
            return f"'{layer}' must not include '{target_layer or target}'"
        folders = [p.split("/")[2] for p in (target, includer.relative_to(ROOT).as_posix())
                   if layer == target_layer == "architecture"]
        if len(set(folders)) > 1:
            return f"'{folders[1]}' must not include '{folders[0]}': architectures share cuda/kernel"
        return None
    if re.match(r"(quire|src|cli|conformance|examples|tests|bench)/", included):
        return "no such file"
    if re.fullmatch(r"[a-z0-9_]+_(instances|architectures)\.inc", included):
        return None  # lists that CMake writes
    if included in C_HEADERS or re.fullmatch(r"[a-z_0-9]+", included):
        return None  # the standard library
    if layer in SYSTEM_LAYERS and re.match(SYSTEM, included):
        return None
    allowed = THIRD_PARTY.get(layer)
    if allowed is None or not re.match(allowed, included):
        return f"'{layer}' may use the standard library and Quire's own layers only"
    return None


def main():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    count = 0
    bad = 0
    for name in sorted(set(listed)):
        path = ROOT / name
        if not re.search(r"\.(h|cc|c|cu|cuh)$", name) or not path.is_file():
            continue
        layer = layer_of(name)
        if layer is None:
            print(f"{name}:1: outside the layers that docs/architecture.md names")
            bad += 1
            continue
        count += 1
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            reason = match and problem(layer, match.group(2), path)
            if reason:
                print(f"{name}:{number}: {line.strip()}: {reason}")
                bad += 1
    print(f"check_includes: {count} files, {bad} offences")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
