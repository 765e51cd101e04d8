#!/usr/bin/env python3
"""quire verify as a user meets it: verify_test.py QUIRE GOLDEN."""

import os
import pty
import re
import subprocess
import sys
import tempfile
import unittest

QUIRE, GOLDEN = sys.argv[1:3]


def verify(*args, **env):
    return subprocess.run([QUIRE, "verify", *args], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env={**os.environ, **env})


def last_line(done):
    return done.stdout.splitlines()[-1]


class VerifyTest(unittest.TestCase):
    def test_random_cases(self):
        for device in ("cpu", "reference"):
            done = verify("--device", device, "--cases", "25", "--seed", "3")
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertEqual(last_line(done), "25 passed, 0 failed")

    def test_one_case_says_what_it_is(self):
        done = verify("--seed", "3", "--case", "4")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("case 4: ", done.stdout)
        self.assertEqual(last_line(done), "1 passed, 0 failed")

    def test_covering_counts_its_cases(self):
        terminal, other_end = pty.openpty()
        process = subprocess.Popen([QUIRE, "verify", "--covering"], stdout=subprocess.PIPE,
                                   stderr=other_end, text=True)
        os.close(other_end)
        progress = b""
        try:
            while data := os.read(terminal, 4096):
                progress += data
        except OSError:
            pass  # the program has ended
        os.close(terminal)
        out, _ = process.communicate()
        self.assertEqual(process.returncode, 0, out)
        passed = re.fullmatch(r"(\d\d) passed, 0 failed", out.splitlines()[-1]).group(1)
        self.assertEqual(set(re.findall(rb" of (\d+), ", progress)), {passed.encode()})

    def test_isa(self):
        done = verify("--isa", "SCALAR", "--cases", "3")
        self.assertIn("backend cpu on SCALAR\n", done.stdout)
        self.assertEqual(done.returncode, 0)
        done = verify("--isa", "no-such-isa", "--cases", "3")
        self.assertEqual(done.returncode, 1)
        self.assertIn("QUIRE_CPU_ISA: expected one of", done.stderr)

    def test_golden(self):
        done = verify("--golden", GOLDEN)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(last_line(done), r"^\d+ passed, 0 failed$")

    def verify_changed(self, pattern, replacement, times=0):
        """Runs the golden file with other text of the same length in its header."""
        with open(GOLDEN, "rb") as file:
            data = bytearray(file.read())
        length = int.from_bytes(data[:8], "little")
        header = data[8:8 + length].decode()
        changed, count = re.subn(pattern, replacement, header, count=times)
        self.assertGreater(count, 0)
        data[8:8 + length] = changed.encode()
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as broken:
            broken.write(data)
            broken.flush()
            return verify("--golden", broken.name)

    def test_golden_with_what_is_not_known_fails_that_case_by_name(self):
        for pattern, replacement, problem in (
                ('use_alibi_sqrt', 'use_alibi_cbrt', 'unknown field use_alibi_cbrt'),
                (r'(\\"kv_cache_dtype\\": \\")auto', r'\g<1>int4', 'unknown kv_cache_dtype int4')):
            done = self.verify_changed(pattern, replacement, times=1)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stdout, rf"FAILED .*/\d+ \w+: {problem}\n")
            self.assertRegex(last_line(done), r"^\d\d passed, 1 failed$")

    def test_golden_with_other_outputs_fails(self):
        # Another softmax scale than the one that the outputs were made with.
        done = self.verify_changed(r'(\\"softmax_scale\\": 0\.)1', r'\g<1>9')
        self.assertEqual(done.returncode, 1)
        self.assertIn("FAILED ", done.stdout)
        failed = int(re.match(r"^\d+ passed, (\d+) failed$", last_line(done)).group(1))
        self.assertGreater(failed, 0)

    def test_mistakes(self):
        done = verify("--device", "abacus")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"--device: expected one of .*cpu.*, got abacus")
        self.assertEqual(verify("--cases", "-3").returncode, 2)
        self.assertEqual(verify("--golden", "does-not-exist").returncode, 2)
        done = verify("--golden", QUIRE)
        self.assertEqual(done.returncode, 1)
        self.assertIn("does not fit into the file", done.stderr)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
