"""Command-line options that benchmarks share: one parser, and groups of options to add to it."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.lib import engines
from benchmarks.lib.record import RESULTS

PICTURE_TOO = "JSON file; the picture is written beside it"


def parser(
    module: str, description: str | None, out: str | None = None, out_help: str = "JSON file of the result",
    required: bool = True,
) -> argparse.ArgumentParser:  # fmt: skip
    """Return the parser of `python -m benchmarks.MODULE`, with `--out`.

    `out` names the default result file in benchmarks/results. Without it, `required` makes `--out` mandatory.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    default = RESULTS / out if out else None
    made.add_argument("--out", type=Path, metavar="FILE", default=default, required=required and out is None,
                      help=out_help)  # fmt: skip
    return made


def add_host(to: argparse.ArgumentParser) -> None:
    """Add `--host`, which is set by default on a machine without a GPU."""
    to.add_argument(
        "--host", action="store_true", default=not engines.has_gpu(), help="run on the CPU, with small sizes"
    )


def add_engines(to: argparse.ArgumentParser, logs: str) -> None:
    """Add `--host`, `--model` and `--logs`, for benchmarks that start engines as child processes."""
    add_host(to)
    to.add_argument("--model", type=Path, metavar="FOLDER",
                    help="folder of the model; default: one is made with the shape of Llama-8B")  # fmt: skip
    to.add_argument("--logs", type=Path, metavar="FOLDER", default=Path("build/bench") / logs,
                    help="folder for the engines' logs")  # fmt: skip


def add_engine(to: argparse.ArgumentParser) -> None:
    """Add `--engine`."""
    to.add_argument("--engine", choices=tuple(engines.CHILDREN), default="vllm")


def add_settings(to: argparse.ArgumentParser) -> None:
    """Add `--option NAME=VALUE`, which may be repeated; settings() reads it."""
    to.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a kvcached setting")


def settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the kvcached settings of `--option`."""
    return dict(pair.split("=", 1) for pair in options.option)


def add_requests(to: argparse.ArgumentParser, requests: int, kv_gib: float) -> None:
    """Add the options for the size of a round: requests, tokens of each request, and GiB of KV cache."""
    to.add_argument("--requests", type=int, default=requests, help="requests of a round, sent at once")
    to.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    to.add_argument("--generate", type=int, default=128, metavar="TOKENS")
    add_kv_gib(to, kv_gib)


def add_kv_gib(to: argparse.ArgumentParser, kv_gib: float) -> None:
    """Add `--kv-gib`."""
    to.add_argument("--kv-gib", type=float, default=kv_gib, metavar="GIB",
                    help="KV cache of each engine, on each rank")  # fmt: skip


def add_ranks(to: argparse.ArgumentParser) -> None:
    """Add `--tensor-parallel`."""
    to.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS")


def add_headroom(to: argparse.ArgumentParser) -> None:
    """Add `--headroom`."""
    to.add_argument("--headroom", metavar="SIZE", help="memory of the GPU that the engines leave unused")


def add_time_limit(to: argparse.ArgumentParser, seconds: float) -> None:
    """Add `--most-seconds`."""
    to.add_argument("--most-seconds", type=float, default=seconds, metavar="SECONDS",
                    help="time limit of the whole run")  # fmt: skip
