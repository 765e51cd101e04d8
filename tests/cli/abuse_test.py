#!/usr/bin/env python3
"""The command under abuse: abuse_test.py QUIRE GOLDEN. Full disks, closed and broken pipes, files
that are no files, numbers that are none."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import unittest

QUIRE, GOLDEN = sys.argv[1:3]
SMALL_BENCH = ["bench", "--only", "dec_b1_8k", "--scale", "1e-6", "--min-time", "0",
               "--repeat", "1", "--threads", "1"]


def quire(*args, stdout=subprocess.PIPE, **env):
    return subprocess.run([QUIRE, *args], stdout=stdout, stderr=subprocess.PIPE, text=True,
                          timeout=300, stdin=subprocess.DEVNULL, env={**os.environ, **env})


def has_generate():
    return "generate" in quire("--help").stdout


class OutputTest(unittest.TestCase):
    COMMANDS = [["--version"], ["--help"], ["bench", "--help"], ["info"], ["info", "--json"],
                ["info", "--kernels"], ["verify", "--cases", "1"]]

    def test_a_full_disk_is_an_error(self):
        for args in self.COMMANDS:
            with self.subTest(args=args), open("/dev/full", "w") as full:
                done = quire(*args, stdout=full)
                self.assertEqual(done.returncode, 1)
                self.assertEqual(done.stderr, "quire: error: cannot write to standard output: "
                                              "No space left on device\n")

    def test_verify_ends_when_the_disk_is_full(self):
        with open("/dev/full", "w") as full:
            self.assertEqual(quire("verify", "--cases", "1000000000", stdout=full).returncode, 1)

    def test_a_reader_that_has_enough_ends_the_command_quietly(self):
        read, write = os.pipe()
        os.close(read)
        done = quire("info", stdout=write)
        os.close(write)
        self.assertEqual(done.returncode, -signal.SIGPIPE)
        self.assertEqual(done.stderr, "")

    def test_closed_standard_output(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "bench.json")
            done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", QUIRE, *SMALL_BENCH, "--json",
                                   path], stderr=subprocess.PIPE, text=True, timeout=300)
            self.assertEqual(done.returncode, 1)
            self.assertEqual(done.stderr, "quire: error: cannot write to standard output: "
                                          "Bad file descriptor\n")
            self.assertFalse(os.path.exists(path), "the table must not land in the JSON file")

    def test_progress_is_for_terminals(self):
        self.assertEqual(quire("verify", "--cases", "200").stderr, "")
        for args in (["verify", "--cases", "200"], SMALL_BENCH):
            with self.subTest(args=args):
                terminal, other_end = pty.openpty()
                process = subprocess.Popen([QUIRE, *args], stdout=subprocess.DEVNULL,
                                           stderr=other_end)
                os.close(other_end)
                shown = b""
                try:
                    while data := os.read(terminal, 4096):
                        shown += data
                except OSError:
                    pass  # all of it
                os.close(terminal)
                self.assertEqual(process.wait(), 0)
                self.assertRegex(shown, rb"\d+ of 200, 0 failed" if args[0] == "verify"
                                 else rb"\[1/1\] dec_b1_8k")
                self.assertTrue(shown.endswith(b"\r\x1b[K"), "the line is gone at the end")


class JsonTest(unittest.TestCase):
    def test_bench_writes_where_the_path_leads(self):
        with tempfile.TemporaryDirectory() as folder:
            link, target = os.path.join(folder, "link"), os.path.join(folder, "target")
            os.symlink("target", link)
            done = quire(*SMALL_BENCH, "--json", link)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stderr, "")
            self.assertTrue(os.path.islink(link))
            with open(target, encoding="utf-8") as file:
                self.assertEqual(len(json.load(file)["workloads"]), 1)

    def test_a_run_that_fails_leaves_the_file_as_it_was(self):
        runs = [SMALL_BENCH]
        if has_generate():
            runs.append(["generate", "--model", "/dev/null"])
        for args in runs:
            with self.subTest(args=args), tempfile.NamedTemporaryFile("w+") as file, \
                    open("/dev/full", "w") as full:
                file.write("old")
                file.flush()
                done = quire(*args, "--json", file.name, stdout=full)
                self.assertEqual(done.returncode, 1, done.stderr)
                with open(file.name, encoding="utf-8") as now:
                    self.assertEqual(now.read(), "old")

    def test_paths_that_cannot_be_written_cost_no_run(self):
        for command in ["bench", "generate"] if has_generate() else ["bench"]:
            done = quire(command, "--json", "/", "--threads", "1")
            self.assertEqual(done.returncode, 1)
            self.assertEqual(done.stderr, "quire: error: --json: cannot write /: Is a directory\n")


class CommandLineTest(unittest.TestCase):
    def refused(self, *args, code=2):
        done = quire(*args)
        self.assertEqual(done.returncode, code, (args, done.stderr))
        self.assertEqual(done.stdout, "", args)
        return done.stderr

    def test_unknown_subcommands_are_named(self):
        commands = "info, generate, verify, bench" if has_generate() else "info, verify, bench"
        for word in ("foo", "", "Info"):
            self.assertEqual(self.refused(word),
                             f"quire: error: unknown subcommand '{word}'; one of {commands}\n")

    def test_unknown_options_are_named(self):
        for args in (["--foo"], ["--foo", "3"], ["info", "--foo"], ["info", "foo"]):
            self.assertIn(args[-1], self.refused(*args))

    def test_seeds(self):
        for command in ["verify", "bench"] + (["generate"] if has_generate() else []):
            for seed in ("-1", "", "1.5", "0x", "ten", "1 ", "+1", "18446744073709551616"):
                self.assertIn("--seed: expected a whole number from 0 to 18446744073709551615, "
                              f'got "{seed}"\n', self.refused(command, "--seed", seed))
        done = quire("verify", "--cases", "1", "--seed", "18446744073709551615")
        self.assertEqual(done.returncode, 0, done.stderr)
        # In decimal, whatever it begins with.
        self.assertEqual(quire("verify", "--case", "0", "--seed", "010").stdout,
                         quire("verify", "--case", "0", "--seed", "10").stdout)

    def test_options_want_a_value_that_is_one(self):
        for command, option, values in (
                ("verify", "--cases", ("", "-1", "1e3", "many", "1" * 30)),
                ("verify", "--case", ("", "-1", "1" * 30)),
                ("verify", "--isa", ("",)),
                ("verify", "--golden", ("", "/nonexistent", "/")),
                ("bench", "--device", ("", "CPU", "cuda:0")),
                ("bench", "--scale", ("", "0", "-1", "2", "nan", "inf", "1e-300", "half")),
                ("bench", "--repeat", ("", "0", "-1", "1" * 30)),
                ("bench", "--min-time", ("", "-1", "nan", "inf")),
                ("bench", "--threads", ("", "-1", "4097", "1" * 30)),
                ("bench", "--dtype", ("", "int8", "0", "3")),
                ("bench", "--kv-cache-dtype", ("", "fp4")),
                ("bench", "--block-size", ("", "0", "-1", "1" * 30)),
                ("bench", "--workload", ("",)),
                ("bench", "--json", ("",))):
            for value in values:
                self.assertIn(option, self.refused(command, option, value), value)
            self.assertIn(option, self.refused(command, option))  # without one
        for first, second in (("--covering", "--cases=3"), ("--covering", f"--golden={GOLDEN}"),
                              ("--case=3", "--cases=3"), ("--seed=3", f"--golden={GOLDEN}")):
            self.assertIn("excludes", self.refused("verify", first, second))

    def test_help_lists_what_dtypes_there_are(self):
        text = quire("bench", "--help").stdout
        self.assertRegex(text, r"--dtype TEXT:\{bfloat16,float16,float32\}.*bfloat16")
        self.assertRegex(text, r"--kv-cache-dtype TEXT:\{auto,float16,.*\}.*auto")

    def test_environment(self):
        for count in ("0", "-1", "two", "1" * 30):
            self.assertEqual(quire("info", QUIRE_NUM_THREADS=count).stderr,
                             "quire: error: QUIRE_NUM_THREADS: expected a number of threads from 1 "
                             f"to 4096, got {count}\n")

    def test_files_of_other_kinds(self):
        with tempfile.TemporaryDirectory() as folder:
            fifo = os.path.join(folder, "fifo")
            os.mkfifo(fifo)
            self.assertIn(folder, self.refused("bench", "--workload", folder, code=1))
            if not has_generate():
                return
            for path, kind in ((folder, "a directory"), (fifo, "a FIFO"),
                               ("/dev/zero", "a device")):
                self.assertEqual(self.refused("generate", "--model", path, code=1),
                                 f"quire: error: {path}: expected a GGUF file, got {kind}\n")
            self.assertIn("--model", self.refused("generate", "--model", ""))
            self.assertIn("--prompts-file",
                          self.refused("generate", "--prompts-file", folder, code=1))


class VerifyTest(unittest.TestCase):
    def test_counts_are_those_of_the_cases(self):
        text = quire("verify", "--golden", GOLDEN, "--golden", GOLDEN).stdout
        once = quire("verify", "--golden", GOLDEN).stdout
        count = int(re.search(r"^(\d+) passed, 0 failed$", once, re.M).group(1))
        self.assertIn(f"\n{2 * count} passed, 0 failed\n", text)


class ThreadsTest(unittest.TestCase):
    def test_fewer_threads_than_asked_for(self):
        with open(QUIRE, "rb") as file:
            if b"__asan_init" in (data := file.read()) or b"__tsan_init" in data:
                self.skipTest("sanitizers reserve address space")
        limited = ["sh", "-c", 'ulimit -v 1500000 && exec "$@"', "sh", QUIRE]
        env = {**os.environ, "QUIRE_NUM_THREADS": "2000"}
        done = subprocess.run([*limited, "info"], capture_output=True, text=True, env=env,
                              timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"^quire [0-9.]+, \d+ threads \(asked for 2000, ")
        done = subprocess.run([*limited, "info", "--json"], capture_output=True, text=True, env=env,
                              timeout=60)
        info = json.loads(done.stdout)
        self.assertEqual(info["threads_asked_for"], 2000)
        self.assertLess(info["threads"], 2000)
        done = subprocess.run([*limited, "bench", "--threads", "2000"], capture_output=True,
                              text=True, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"^quire: error: num_threads: 2000 asked for, the calling "
                                      r"thread included, \d+ could be started: .*\n$")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
