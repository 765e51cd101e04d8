#!/usr/bin/env python3
"""quire verify as a user meets it: verify_test.py QUIRE GOLDEN."""

import json
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
        passed = re.fullmatch(r"(\d+) passed, 0 failed", out.splitlines()[-1]).group(1)
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

    def read_golden(self):
        """The golden file's bytes and the length of its header's text, which begins at byte 8."""
        with open(GOLDEN, "rb") as file:
            data = bytearray(file.read())
        return data, int.from_bytes(data[:8], "little")

    def verify_bytes(self, data):
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(data)
            file.flush()
            return verify("--golden", file.name)

    def verify_changed(self, pattern, replacement, times=0):
        """Runs the golden file with other text of the same length in its header."""
        data, length = self.read_golden()
        header = data[8:8 + length].decode()
        changed, count = re.subn(pattern, replacement, header, count=times)
        self.assertGreater(count, 0)
        data[8:8 + length] = changed.encode()
        return self.verify_bytes(data)

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

    def test_golden_caches_are_compared_bit_for_bit(self):
        # The last bit of the first element of a tensor. Only int8 codes may be off by one.
        data, length = self.read_golden()
        header = json.loads(data[8:8 + length])
        dtypes = {case["case"]: case["kv_cache_dtype"]
                  for case in json.loads(header["__metadata__"]["cases"])
                  if f"{case['case']}.key" in header}  # its cache is written, then compared
        for dtype, tensor, problem in (("fp8", "kv_cache", "byte 0 of the cache reads"),
                                       ("fp8_pth", "kv_cache", "byte 0 of the cache reads"),
                                       ("fp8_pth", "v_scale_cache", "a scale is"),
                                       ("int8_pth", "k_scale_cache", "a scale is"),
                                       ("int8_pth", "kv_cache", None)):
            case = next(name for name in dtypes if dtypes[name] == dtype)
            at = 8 + length + header[f"{case}.{tensor}"]["data_offsets"][0]
            changed = bytearray(data)
            changed[at] ^= 1
            done = self.verify_bytes(changed)
            with self.subTest(case=case, dtype=dtype, tensor=tensor):
                self.assertEqual(done.returncode, 1 if problem else 0, done.stdout)
                if problem:
                    self.assertIn(f"/{case} {dtype}", done.stdout)
                    self.assertIn(f"write_kv_cache: {problem}", done.stdout)

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
