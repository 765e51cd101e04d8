#!/usr/bin/env python3
"""What libquire.so exports: every function of the C headers and the C++ names that the public headers
mark QUIRE_API, and nothing else; and that its soname has the version's first two numbers.

usage: exported_symbols_test.py LIBRARY INCLUDE_DIR NM READELF CXXFILT
"""

import re
import subprocess
import sys
from pathlib import Path


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def declared(headers):
    """The names that follow QUIRE_API: C functions, and classes and functions of namespace quire."""
    c_functions, cpp_names = set(), set()
    for header in headers:
        text = without_comments(header.read_text())
        for rest in re.findall(r"(?:^|[^\w])QUIRE_API\s([^;{]*)", text):
            name = re.search(r"(\w+)\s*(?:\(|final\b|:(?!:)|$)", rest.strip()).group(1)
            (c_functions if header.name.startswith("quire_c") else cpp_names).add(name)
    return c_functions, cpp_names


def name_in_quire(symbol):
    """The class or function of namespace quire that a demangled symbol belongs to, or None."""
    symbol = re.sub(r"^(vtable|typeinfo|typeinfo name) for ", "", symbol)
    found = re.match(r"quire::(?:detail::)?(\w+)", symbol)
    return found and found.group(1)


def main():
    library, include_dir, nm, readelf, cxxfilt = sys.argv[1:]
    headers = sorted(Path(include_dir).rglob("*.h"))
    c_functions, cpp_names = declared([h for h in headers if h.name != "export.h"])
    exported = {line.split()[-1] for line in
                output_of(nm, "-D", "--defined-only", library).splitlines()}
    exported_c = {s for s in exported if not s.startswith("_Z")}
    mangled = sorted(exported - exported_c)
    demangled = subprocess.run([cxxfilt], input="\n".join(mangled), check=True,
                               capture_output=True, text=True).stdout.splitlines()

    problems = [f"exported, but not a function of the C headers: {s}"
                for s in sorted(exported_c - c_functions)]
    problems += [f"declared in the C headers, but not exported: {s}"
                 for s in sorted(c_functions - exported_c)]
    owners = {symbol: name_in_quire(symbol) for symbol in demangled}
    problems += [f"exported, but not marked QUIRE_API in a public header: {symbol}"
                 for symbol, owner in owners.items() if owner not in cpp_names]
    problems += [f"marked QUIRE_API, but nothing of it is exported: quire::{name}"
                 for name in sorted(cpp_names - set(owners.values()))]

    version = re.search(r'QUIRE_VERSION_STRING "(\d+\.\d+)', (
        Path(include_dir) / "quire" / "version.h").read_text()).group(1)
    soname = re.search(r"Library soname: \[(.*)\]", output_of(readelf, "-d", library)).group(1)
    if soname != f"libquire.so.{version}":
        problems.append(f"soname {soname}, expected libquire.so.{version}")

    print(f"{len(exported_c)} C functions, {len(mangled)} C++ symbols of {len(cpp_names)} names")
    print("\n".join(problems))
    return 1 if problems or not c_functions or not cpp_names else 0


if __name__ == "__main__":
    sys.exit(main())
