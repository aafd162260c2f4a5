"""The pods of examples/kubernetes: valid for Kubernetes, and able to run as a user without a name."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import kvcached_core
from kvcached_core.ledger import Runtime
from kvctl.parser import parse
from tools.wheels import ROOT

PATH = ROOT / "examples/kubernetes/kvcached.yaml"
# the versions of Kubernetes against which the pods are checked; None: the latest that the package has
VERSIONS = ("1.29", "1.33", None)
DOCUMENTS: list[Any] = list(yaml.safe_load_all(PATH.read_text()))
PODS = {each["metadata"]["name"]: each["spec"]["template"]["spec"]
        for each in DOCUMENTS if each["kind"] in ("Deployment", "DaemonSet")}  # fmt: skip
ENGINES = ("llama", "qwen")


def by_name(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return entries of a list by their names."""
    return {entry["name"]: entry for entry in entries}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_every_document(version: str | None) -> None:
    for each in DOCUMENTS:
        kubernetes_validate.validate(each, version or kubernetes_validate.latest_version(), strict=True)
    wrong = copy.deepcopy(DOCUMENTS[1])
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(wrong, version or kubernetes_validate.latest_version(), strict=True)


def test_every_workload_has_its_pods_and_its_service() -> None:
    kinds = [each["kind"] for each in DOCUMENTS]
    assert kinds == ["Namespace", *["Deployment", "Service"] * 2, "DaemonSet", "Service"]
    for workload, service in zip(DOCUMENTS[1::2], DOCUMENTS[2::2], strict=True):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
        ports = {
            port["name"] for c in PODS[workload["metadata"]["name"]]["containers"] for port in c["ports"]
        }
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
        assert {each["metadata"]["namespace"] for each in (workload, service)} == {"kvcached"}


def test_pods_on_a_node_share_the_directory() -> None:
    for pod in PODS.values():
        assert by_name(pod["volumes"])["kvcached"]["hostPath"] == {
            "path": "/run/kvcached", "type": "DirectoryOrCreate"
        }  # fmt: skip
        for container in [*pod["containers"], *pod["initContainers"]]:
            assert by_name(container["volumeMounts"])["kvcached"]["mountPath"] == "/run/kvcached"
        for container in pod["containers"]:
            assert {"name": "KVCACHED_RUNTIME_DIR", "value": "/run/kvcached"} in container["env"]


def test_no_pod_counts_on_what_has_no_effect_on_a_hostpath() -> None:
    for pod in PODS.values():
        assert pod["securityContext"] == {"runAsUser": 1000, "runAsGroup": 1000}, "fsGroup does nothing here"


def test_a_mount_has_a_volume_and_a_volume_a_mount() -> None:
    for pod in PODS.values():
        mounts = {m["name"] for c in [*pod["containers"], *pod["initContainers"]] for m in c["volumeMounts"]}
        assert mounts == set(by_name(pod["volumes"]))


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_runs_as_a_user_without_home_name_or_cache(name: str) -> None:
    (container,) = PODS[name]["containers"]
    variables, mounts = by_name(container["env"]), by_name(container["volumeMounts"])
    assert variables["HF_HOME"]["value"] == mounts["models"]["mountPath"]
    assert variables["HOME"]["value"] == "/tmp" and variables["USER"]["value"]
    secret = variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert (
        secret["optional"] and f"secret generic {secret['name']}" in (ROOT / "docs/operating.md").read_text()
    )
    assert mounts["shm"]["mountPath"] == "/dev/shm"


def test_images_have_the_tag_that_their_dockerfiles_name() -> None:
    for pod in PODS.values():
        for container in [*pod["containers"], *pod["initContainers"]]:
            image, _, tag = container["image"].partition(":")
            assert tag and tag != "latest", container["image"]
            if image == "busybox":
                continue
            assert tag == kvcached_core.__version__
            dockerfile = ROOT / "docker" / f"{image.removesuffix('-kvcached')}.Dockerfile"
            assert f"-t {image}:{tag} ." in dockerfile.read_text()


def test_names_of_services_do_not_become_settings() -> None:
    assert all(pod["enableServiceLinks"] is False for pod in PODS.values())


@pytest.mark.parametrize("name", PODS)
def test_the_container_that_prepares_a_node_makes_a_directory_that_engines_accept(
    tmp_path: Path, name: str
) -> None:
    (container,) = PODS[name]["initContainers"]
    assert container["securityContext"] == {"runAsUser": 0}
    shell, option, line = container["command"]
    for mount in by_name(container["volumeMounts"]).values():
        (tmp_path / mount["mountPath"].lstrip("/")).mkdir(0o755, parents=True)
        line = line.replace(mount["mountPath"], str(tmp_path) + mount["mountPath"])
    assert subprocess.run([shell, option, line.replace("chgrp 1000", f"chgrp {os.getgid()}")]).returncode == 0
    folder = tmp_path / "run/kvcached"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770 and Runtime.open(folder).shared


def test_kvctl_understands_the_arguments_that_pods_give_it() -> None:
    calls = [c["args"] for pod in PODS.values() for c in pod["containers"] if c["image"].startswith("kvctl:")]
    assert [parse(call).command for call in calls] == ["export"]
