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


def table_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


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

    def test_threads_come_from_the_environment(self):
        info = json.loads(quire("info", "--json", QUIRE_NUM_THREADS="3").stdout)
        self.assertEqual(info["threads"], 3)

    def test_readme_shows_the_supported_table(self):
        shown = re.search(r"<!-- quire info -->\n(.*?)<!-- end -->",
                          open(README, encoding="utf-8").read(), re.S)
        self.assertIsNotNone(shown)
        self.assertEqual(table_of(shown.group(1)), table_of(quire("info").stdout),
                         "run scripts/update_readme.py")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
