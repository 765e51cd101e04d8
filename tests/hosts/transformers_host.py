"""transformers: a folder of pytest files that runs in the environment of each version."""

import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HOSTS = ("tf518", "tf523", "tf524")
FOLDER = Path(__file__).resolve().parent / "transformers"


def files():
    """Names by which cases are chosen: the test files, without what they all begin with."""
    return [path.stem.removeprefix("test_") for path in sorted(FOLDER.glob("test_*.py"))]


def run(environments, host, names, report):
    """Each test of these files becomes a line."""
    runs = environments.root / "runs"
    runs.mkdir(exist_ok=True)
    model = str(environments.root / "model" / "hf-f32")
    env = {**environments.env(host), "QUIRE_TEST_MODEL": model}
    for name in names:
        results, log = (runs / f"{host}-{name}.{suffix}" for suffix in ("xml", "log"))
        results.unlink(missing_ok=True)
        command = [environments.python(host), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [FOLDER / f"test_{name}.py", f"--rootdir={FOLDER}", f"--junitxml={results}"]
        start = time.monotonic()
        with open(log, "w") as output:
            status = subprocess.run(command, stdout=output, stderr=output, env=env).returncode
        if not results.exists():
            words = f"pytest ended with {status}: {log}"
            report.add(host, name, False, words, time.monotonic() - start)
            continue
        tests = list(ElementTree.parse(results).iter("testcase"))
        for test in tests:
            _add(host, test, report, log)
        if not tests:
            report.add(host, name, False, f"no test ran: {log}", time.monotonic() - start)


def _add(host, test, report, log):
    wrong = [node for kind in ("failure", "error") for node in test.findall(kind)]
    skipped = test.findall("skipped")
    passed = False if wrong else (None if skipped else True)
    reasons = [node.get("message", "").splitlines()[:1] for node in wrong + skipped]
    words = f"{' '.join(reasons[0])} {log}" if reasons else ""
    name = f"tf-{test.get('name').removeprefix('test_')}"
    report.add(host, name, passed, words, float(test.get("time", 0)))
