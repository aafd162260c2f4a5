"""kvctl export: its metrics, its server, and the dashboard and alert rules in a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from devkit.ledger_scene import CAST, GPUS, GRANULE, play
from kvcached_core.errors import LedgerError
from kvcached_core.histogram import MAP_BUCKETS, Histogram
from kvcached_core.ledger import Account, Runtime
from kvcached_core.units import GIB
from kvctl import metrics
from tests.cli.conftest import Run
from tests.cli.process import ROOT, line_of, start, until
from tests.ledger.helpers import attach, die
from tests.programs import program

pytestmark = pytest.mark.alone

MONITORING = ROOT / "examples" / "monitoring"
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


def fetch(url: str) -> str:
    """Return the body at a URL of this machine."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body.decode()


def values(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Return samples by metric and labels, in the order gpu, name, rank."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = tuple(sample.labels[name] for name in ("gpu", "name", "rank") if name in sample.labels)
            found.setdefault(sample.name, {})[key] = sample.value
    return found


@pytest.fixture
def scene(runtime: Runtime) -> list[Account]:
    return play(runtime)


def test_exported_metrics_equal_the_ledger(scene: list[Account], run: Run) -> None:
    code, out, err = run("export")
    assert (code, err) == (0, "")
    told = values(out)
    assert set(told) == set(metrics.names()), "every metric, whatever its value"
    assert told["kvcached_used_bytes"]["0", "qwen3-8b", "0"] == 310 * GRANULE
    assert told["kvcached_held_bytes"]["1", "llama-70b", "1"] == (1400 + 520 + 48) * GRANULE
    assert told["kvcached_demand_bytes"]["0", "qwen3-8b", "0"] == 3 * GIB
    assert told["kvcached_limit_bytes"]["1", "gemma-2b", "0"] == 200 * GRANULE
    assert told["kvcached_leases_total"]["0", "mistral-7b", "0"] == 1
    assert told["kvcached_device_capacity_bytes"][("0",)] == 80 * GIB
    assert told["kvcached_device_outside_bytes"][("1",)] == GIB
    assert told["kvcached_device_other_bytes"][("0",)] == 19 * GIB
    assert told["kvcached_device_sound"][("0",)] == 1 and len(scene) == len(CAST)
    labels = re.search(r"^kvcached_weight\{(.*?)\}", out, re.MULTILINE)
    assert labels and [pair.split("=")[0] for pair in labels[1].split(",")] == sorted(metrics.ENGINE_LABELS)


def test_durations_are_histograms_whose_buckets_add_up(scene: list[Account], run: Run) -> None:
    tally = Histogram(MAP_BUCKETS)
    for seconds in (15e-6, 30e-6, 40e-6, 3.0):
        tally.add(seconds)
    scene[2].publish(0, 0, map_times=tally.words())
    families = {family.name: family for family in text_string_to_metric_families(run("export")[1])}
    assert {name for name, family in families.items() if family.type == "histogram"} == {
        "kvcached_map_seconds", "kvcached_reclaim_seconds"
    }  # fmt: skip
    told = {
        (sample.name.rpartition("_")[2], sample.labels.get("le")): sample.value
        for sample in families["kvcached_map_seconds"].samples
        if sample.labels["name"] == "qwen3-8b"
    }
    bounds = [*(str(bound / 1e6) for bound in MAP_BUCKETS.bounds_us), "+Inf"]
    assert [told["bucket", bound] for bound in bounds] == [1, 3, 3, 3, 3, 3, 3, 3, 4]
    assert told["count", None] == 4 and told["sum", None] == pytest.approx(3.000085)
    code, out, _ = run("list", "qwen3-8b", "--json")
    shown = json.loads(out)["devices"][0]["engines"][0]["map_seconds"]
    assert code == 0 and (shown["count"], shown["buckets"]["5e-05"], shown["buckets"]["+Inf"]) == (4, 3, 4)


def test_names_and_types_follow_prometheus_rules(scene: list[Account], run: Run) -> None:
    families = list(text_string_to_metric_families(run("export")[1]))
    assert len(scene) and all(family.documentation.endswith(".") for family in families)
    for family in families:
        totals = [sample.name.endswith("_total") for sample in family.samples]
        assert all(totals) == (family.type == "counter") or not totals, family.name
        assert family.name.startswith("kvcached_") and "pid" not in str(family.samples)


def test_promtool_finds_no_problem(scene: list[Account], run: Run) -> None:
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=run("export")[1], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and scene


@pytest.mark.parametrize(
    "check", ["check rules alerts.yml", "test rules alerts_test.yml", "check config prometheus.yml"]
)
def test_promtool_accepts_rules_and_their_tests_and_the_configuration(check: str) -> None:
    done = subprocess.run(
        [program("promtool"), *check.split()], cwd=MONITORING, capture_output=True, text=True
    )
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_dead_ranks_are_counted_and_have_no_metrics(runtime: Runtime, run: Run) -> None:
    dead = attach(runtime, "a", name="llama")
    die(dead)
    told = values(run("export")[1])
    assert told["kvcached_device_stale_slots"][("0",)] == 1
    assert told.get("kvcached_held_bytes") is None
    attach(runtime, "b", name="qwen")
    assert list(values(run("export")[1])["kvcached_held_bytes"]) == [("0", "qwen", "0")]


def test_a_metric_reports_ledgers_that_cannot_be_read(runtime: Runtime, run: Run) -> None:
    attach(runtime, "a")
    assert values(run("export", "--device", "GPU-7")[1]) == {"kvcached_ledger_readable": {(): 0.0}}
    runtime.device("host").ledger.write_bytes(b"x" * 9000)
    told = values(run("export")[1])
    assert told["kvcached_device_sound"][("0",)] == 0 and told["kvcached_ledger_readable"][()] == 1


def test_an_export_that_cannot_read_the_ledgers_fails_and_says_why(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    code, out, err = run("export", "--runtime-dir", str(tmp_path / "file"))
    assert (code, values(out)) == (1, {"kvcached_ledger_readable": {(): 0.0}})
    assert "is not a directory; remove it" in err


def test_a_directory_that_becomes_safe_is_read_at_the_next_scrape(runtime: Runtime) -> None:
    """A pod's volume is mounted before the container that prepares it has run."""
    attach(runtime, "a", name="llama")
    runtime.path.chmod(0o777)
    with exporter(runtime) as address:
        for _ in range(2):
            assert values(fetch(f"{address}/metrics")) == {"kvcached_ledger_readable": {(): 0.0}}
        runtime.path.chmod(0o700)
        told = values(fetch(f"{address}/metrics"))
        assert told["kvcached_ledger_readable"] == {(): 1.0}
        assert list(told["kvcached_held_bytes"]) == [("0", "llama", "0")]


def test_the_reason_for_unreadable_ledgers_is_said_once_until_it_changes(tmp_path: Path) -> None:
    reasons: list[str] = []
    wrong = [LedgerError("a"), LedgerError("a"), LedgerError("b"), None, LedgerError("b")]

    def open_runtime() -> Runtime:
        if (error := wrong.pop(0)) is not None:
            raise error
        return Runtime(tmp_path)

    collector = metrics.LedgerCollector(open_runtime, None, reasons.append)
    while wrong:
        list(collector.collect())
    assert reasons == ["a", "b", "b"]


@contextlib.contextmanager
def exporter(runtime: Runtime, *more: str) -> Iterator[str]:
    """Serve on a free port during the block; yields the address."""
    process = start("export", "--port", "0", *more, runtime=runtime)
    try:
        found = _ADDRESS.search(line_of(process.stderr))
        assert found
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_export_serves_this_machine_only_and_ends_on_sigterm(runtime: Runtime, scene: list[Account]) -> None:
    with exporter(runtime) as address:
        before = values(fetch(f"{address}/metrics"))
        assert before["kvcached_used_bytes"]["0", "qwen3-8b", "0"] == 310 * GRANULE
        scene[2].publish(0, 9 * GIB)
        after = values(fetch(f"{address}/metrics"))
        assert after["kvcached_private_bytes"]["0", "qwen3-8b", "0"] == 9 * GIB, (
            "each scrape reads the ledger"
        )
        listening = Path("/proc/net/tcp").read_text().split()
        port = int(address.rsplit(":", 1)[1])
        assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening
        again = start("export", "--port", str(port), runtime=runtime)
        _, err = again.communicate(timeout=60)
        assert again.returncode == 1 and b"Address already in use. Choose another --port" in err


def panels() -> list[tuple[str, str]]:
    """Return title and expression of every target of the dashboard."""
    board = json.loads((MONITORING / "grafana/dashboards/kvcached.json").read_text())
    return [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]


def variables() -> list[tuple[str, str]]:
    """Return metric and label of each variable at the top of the dashboard."""
    board = json.loads((MONITORING / "grafana/dashboards/kvcached.json").read_text())
    queries = [each["query"]["query"] for each in board["templating"]["list"]]
    found = [re.fullmatch(r"label_values\((.*), (\w+)\)", query) for query in queries]
    assert len(found) == 2 and all(found), queries
    return [(match[1].replace("$UUID", ".*"), match[2]) for match in found if match]


def test_the_dashboard_and_the_rules_use_existing_metrics() -> None:
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    used = [expression for _, expression in panels()] + [rule["expr"] for rule in rules]
    names = {name for text in used for name in re.findall(r"kvcached_\w+", text)}
    assert names <= set(metrics.names()) and len(panels()) > 20 and len(rules) == 5
    for rule in rules:
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


class Prometheus:
    """A real Prometheus that scrapes an exporter every second."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(MONITORING / "alerts.yml", folder)
        self._process = subprocess.Popen(
            [program("prometheus"), f"--config.file={folder}/prometheus.yml",
             f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:0"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._address = ""
        while not self._address:
            line = line_of(self._process.stderr)
            assert line, "it ended"
            found = re.search(r"address=(127\.0\.0\.1:\d+)", line)
            self._address = f"http://{found[1]}" if found and "Listening" in line else ""

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an expression now; none while Prometheus starts."""
        text = urllib.parse.urlencode({"query": expression})
        try:
            answer = json.loads(fetch(f"{self._address}/api/v1/query?{text}"))
        except urllib.error.HTTPError as error:
            assert error.code == 503, f"{expression}: {error.read().decode()}"
            return []
        assert answer["status"] == "success"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def close(self) -> None:
        """End Prometheus."""
        self._process.terminate()
        self._process.communicate(timeout=60)


def test_prometheus_scrapes_kvctl_and_answers_every_query_of_the_dashboard(
    runtime: Runtime, scene: list[Account], tmp_path: Path
) -> None:
    with exporter(runtime) as address, contextlib.closing(Prometheus(tmp_path, address)) as server:
        until(lambda: bool(server.query("rate(kvcached_leases_total[1m])")), "two scrapes")
        for title, expression in panels():
            chosen = expression.replace("$UUID", ".*").replace("$name", ".*")
            assert server.query(chosen), f"{title}: {expression} is empty"
        for query, label in variables():
            assert [sample["metric"][label] for sample in server.query(query)], query
        (up,) = server.query("up")
        assert up["value"][1] == "1"
        (held,) = server.query(f'kvcached_held_bytes{{name="gemma-2b",UUID="{GPUS[1]}"}}')
        assert int(held["value"][1]) == 258 * GRANULE and held["metric"]["model"] == "google/gemma-2-2b"
        until(lambda: bool(server.query('ALERTS{alertname="KVCachedDemandUnmet"}')), "the rule is pending")
    assert len(scene) == len(CAST)
