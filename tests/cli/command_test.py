#!/usr/bin/env python3
"""Runs the built command: command_test.py QUIRE README. Prints what failed, exits 1 if anything did."""

import json
import os
import re
import subprocess
import sys
import unittest

QUIRE, README = sys.argv[1:3]


def quire(*args, **env):
    return subprocess.run([QUIRE, *args], capture_output=True, text=True, timeout=60,
                          stdin=subprocess.DEVNULL, env={**os.environ, **env})


def columns(text):
    """A Markdown table: the first cell of each column -> all of its cells."""
    lines = [line for line in text.splitlines() if re.match(r"\| [^-]", line)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {column[0]: column for column in zip(*rows)}


class CommandTest(unittest.TestCase):
    def test_version(self):
        done = quire("--version")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"^quire \d+\.\d+\.\d+\n$")

    def test_help_names_the_commands(self):
        done = quire("--help")
        self.assertEqual(done.returncode, 0)
        for command in ("info", "generate", "verify", "bench"):
            self.assertIn(command, done.stdout)

    def test_mistakes_in_the_command_line_exit_with_2(self):
        for args in ([], ["nonsense"], ["info", "--nonsense"]):
            done = quire(*args)
            self.assertEqual(done.returncode, 2, args)
            self.assertNotEqual(done.stderr, "", args)

    def test_errors_are_one_line_and_exit_with_1(self):
        done = quire("generate", "--model", "does-not-exist.gguf", "--prompt", "Hello")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr, r"^quire: error: .*does-not-exist\.gguf.*\n$")

    def test_generate_says_why_there_is_no_cuda(self):
        backends = json.loads(quire("info", "--json").stdout)["backends"]
        cuda = next((b for b in backends if b["name"] == "cuda"), None)
        if cuda and cuda["available"]:
            self.skipTest("there is a CUDA device")
        # Before the model is looked for, which may not be there either.
        done = quire("generate", "--device", "cuda", "--model", "does-not-exist.gguf")
        self.assertEqual(done.returncode, 1, done.stderr)
        what_to_do = "nvidia-smi" if cuda else "-DQUIRE_CUDA=ON"
        self.assertRegex(done.stderr, rf"^quire: error: --device cuda cannot run here: .*"
                                      rf"{what_to_do}.*--device cpu\n$")

    def test_info_json(self):
        done = quire("info", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        info = json.loads(done.stdout)
        backends = {b["name"]: b for b in info["backends"]}
        self.assertGreaterEqual(info["threads"], 1)
        self.assertTrue(backends["cpu"]["available"])
        self.assertTrue(backends["reference"]["available"])
        self.assertIn("bfloat16", backends["cpu"]["dtypes"])

    def test_kernels_are_those_of_the_build(self):
        backends = {b["name"]: b for b in json.loads(quire("info", "--json").stdout)["backends"]}
        done = quire("info", "--kernels")
        self.assertEqual(done.returncode, 0, done.stderr)
        shown = [line.split("|")[2].strip() for line in done.stdout.splitlines()[2:]]
        self.assertEqual(len(set(shown)), len(shown))
        self.assertEqual(shown, [k["name"] for b in backends.values() for k in b["kernels"]])
        if "cuda" in backends:
            self.assertIn("fp32::attention", shown)

    def test_cuda_without_a_gpu_says_why_and_the_cpu_serves(self):
        backends = {b["name"]: b for b in json.loads(quire("info", "--json").stdout)["backends"]}
        if "cuda" in backends and backends["cuda"]["available"]:
            return  # this machine has a GPU
        done = quire("verify", "--device", "cuda", "--cases", "1")
        self.assertEqual(done.returncode, 1)
        if "cuda" not in backends:
            self.assertRegex(done.stderr, r"--device: expected one of cpu, reference, got cuda")
            return
        reason = backends["cuda"]["instruction_set"]
        self.assertRegex(reason, "NVIDIA driver|GPU")
        self.assertIn(f"backend cuda: not available ({reason}): the CPU serves\n",
                      quire("info").stdout)
        self.assertEqual(done.stderr, f"quire: error: --device cuda cannot run here: {reason}\n")
        done = quire("bench", "--device", "cuda")
        self.assertEqual(done.returncode, 1)
        self.assertIn(reason, done.stderr)
        self.assertEqual(quire("verify", "--cases", "5").returncode, 0)

    def test_threads_come_from_the_environment(self):
        info = json.loads(quire("info", "--json", QUIRE_NUM_THREADS="3").stdout)
        self.assertEqual(info["threads"], 3)

    def test_readme_shows_the_supported_table(self):
        shown = re.search(r"<!-- quire info -->\n(.*?)<!-- end -->",
                          open(README, encoding="utf-8").read(), re.S)
        self.assertIsNotNone(shown)
        readme = columns(shown.group(1))
        self.assertEqual(list(readme), ["backend", "cpu", "cuda", "reference"])
        for backend, column in columns(quire("info").stdout).items():  # of this build
            self.assertEqual(readme[backend], column, "run scripts/update_readme.py")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
