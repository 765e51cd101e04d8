#!/usr/bin/env python3
"""Puts the supported table that `quire info` prints into README.md: that of a build with all
backends, so of the preset cuda.

usage: scripts/update_readme.py [path of the quire command]
"""

import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
quire = sys.argv[1] if len(sys.argv) > 1 else root / "build/cuda/bin/quire"
info = subprocess.run([quire, "info"], check=True, capture_output=True, text=True).stdout
table = "".join(line + "\n" for line in info.splitlines() if line.startswith("|"))
readme = root / "README.md"
text, count = re.subn(r"(?s)(<!-- quire info -->\n).*?(<!-- end -->)",
                      lambda m: m.group(1) + table + m.group(2), readme.read_text())
if count != 1:
    sys.exit("update_readme: README.md has no '<!-- quire info -->' ... '<!-- end -->'")
readme.write_text(text)
