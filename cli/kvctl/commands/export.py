"""`kvctl export`: print metrics for Prometheus, or serve them."""

from __future__ import annotations

import argparse
import functools
import signal
import socket

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.exposition import generate_latest

from kvcached_core.ledger.file.runtime import Runtime
from kvctl.exit_codes import CommandError, ExitCode
from kvctl.metrics import LedgerCollector
from kvctl.output import print_json, say, write


def run_export(arguments: argparse.Namespace) -> ExitCode:
    """Print the metrics, or serve them until SIGINT or SIGTERM."""
    registry = CollectorRegistry()
    open_runtime = functools.partial(Runtime.open, arguments.runtime_dir, create=False)
    collector = LedgerCollector(open_runtime, arguments.device, say)
    registry.register(collector)
    if arguments.port is None:
        if arguments.json:
            print_json({"samples": _samples(registry)})
        else:
            write(generate_latest(registry).decode())
        return ExitCode.OK if collector.unreadable is None else ExitCode.FAILED
    if arguments.json:
        raise CommandError(ExitCode.USAGE, "export --port serves Prometheus' text format: leave --json out")
    return _serve(registry, arguments.bind, arguments.port)


def _samples(registry: CollectorRegistry) -> list[dict[str, object]]:
    return [
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for family in registry.collect()
        for sample in family.samples
    ]


def _serve(registry: CollectorRegistry, address: str, port: int) -> ExitCode:
    # Blocked before the server's threads start, which inherit the mask: every signal reaches sigwait().
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        server, thread = start_http_server(port, address, registry)
    except (OSError, socket.gaierror) as error:
        raise CommandError(
            ExitCode.FAILED,
            f"cannot serve at {address} port {port}: {error.strerror}. Choose another --port or --bind",
        ) from None
    else:
        host = f"[{address}]" if ":" in address else address
        say(f"serving http://{host}:{server.server_port}/metrics until Ctrl-C")
        generate_latest(registry)  # says now, not at the first scrape, if the ledgers cannot be read
        signal.sigwait(stop)
        server.shutdown()
        server.server_close()
        thread.join()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop)
    return ExitCode.OK
