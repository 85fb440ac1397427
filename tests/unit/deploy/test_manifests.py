"""Manifests: what stands in them is what Kubernetes, KubeRay, compose and `rhizome` know."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from deploy import cli
from deploy.fleet.plan import plan_fleet
from deploy.fleet.reading import parse_fleet

DEPLOY = Path(cli.__file__).parent
KUBERNETES = "1.30"

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
POD_TEMPLATE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["spec"],
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},  # the rest as a Pod's, below
}
COUNT = {"type": "integer", "minimum": 0}
# The fields of RayCluster that a cluster for a fleet may need, after ray-operator/apis/ray/v1/raycluster_types.go of
# ray-project/kuberay (Apache-2.0).
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["headGroupSpec"],
            "properties": {
                "rayVersion": {"type": "string"},
                "enableInTreeAutoscaling": {"type": "boolean"},
                "suspend": {"type": "boolean"},
                "headGroupSpec": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["rayStartParams", "template"],
                    "properties": {
                        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                        "rayStartParams": TEXTS,
                        "template": POD_TEMPLATE,
                    },
                },
                "workerGroupSpecs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                        "properties": {
                            "groupName": {"type": "string"},
                            "replicas": COUNT,
                            "minReplicas": COUNT,
                            "maxReplicas": COUNT,
                            "numOfHosts": COUNT,
                            "rayStartParams": TEXTS,
                            "template": POD_TEMPLATE,
                        },
                    },
                },
            },
        },
    },
}
STRINGS = {"type": "array", "items": {"type": "string"}}
# The fields of a compose file that are used here, after schema/compose-spec.json of compose-spec/compose-spec
# (Apache-2.0).
COMPOSE = {
    "type": "object",
    "additionalProperties": False,
    "patternProperties": {"^x-": {}},
    "properties": {
        "name": {"type": "string"},
        "services": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "image": {"type": "string"},
                    "build": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"context": {"type": "string"}, "dockerfile": {"type": "string"}},
                    },
                    "command": STRINGS,
                    "environment": TEXTS,
                    "ports": STRINGS,
                    "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
                    "stop_grace_period": {"type": "string", "pattern": r"^\d+s$"},
                    "deploy": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"replicas": COUNT},
                    },
                    "depends_on": {
                        "type": "object",
                        "additionalProperties": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["condition"],
                            "properties": {"condition": {"enum": ["service_started", "service_healthy"]}},
                        },
                    },
                    "healthcheck": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "test": STRINGS,
                            "interval": {"type": "string"},
                            "timeout": {"type": "string"},
                            "retries": COUNT,
                        },
                    },
                },
            },
        },
    },
}


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def pod_specs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of whatever runs containers."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pod_specs(value)
    elif isinstance(document, list):
        for value in document:
            yield from pod_specs(value)


def check_command(words: list[str]) -> None:
    """A `rhizome …` with options that it has; placeholders stand for values."""
    assert words[0] == "rhizome"
    command: Any = typer.main.get_command(cli.app)
    words = [re.sub(r"\$\([^)]*\)|\$\$\([^)]*\)", "x", word) for word in words[1:]]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("rhizome", words)


@pytest.mark.parametrize("file", ["kubernetes/fleet.yaml", "kubernetes/raycluster.yaml"])
def test_manifests_are_what_kubernetes_knows(file: str) -> None:
    """Each object strictly by its schema: no field that is misspelt or stands in the wrong place."""
    kinds = set()
    for document in documents(file):
        kinds.add(document["kind"])
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.validate(document, RAY_CLUSTER)
            for spec in pod_specs(document):
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert kinds >= ({"RayCluster", "Service", "ConfigMap"} if "ray" in file else {"Deployment", "StatefulSet"})


def test_a_misspelt_field_is_found() -> None:
    """The schemas do look."""
    service, *_ = documents("kubernetes/fleet.yaml")
    service["spec"]["selectr"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, KUBERNETES, strict=True)


def test_services_select_pods_that_there_are() -> None:
    """By their labels, and at ports that these have open."""
    objects = documents("kubernetes/fleet.yaml")
    pods = [each["spec"]["template"] for each in objects if each["kind"] in ("Deployment", "StatefulSet")]
    for service in (each for each in objects if each["kind"] == "Service"):
        (pod,) = [pod for pod in pods if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        open_ports = {port["containerPort"] for each in pod["spec"]["containers"] for port in each["ports"]}
        assert {port["port"] for port in service["spec"]["ports"]} <= open_ports


def test_compose_is_what_compose_knows() -> None:
    """Strictly; what a service waits for is there, and has a health check."""
    (document,) = documents("compose.yaml")
    jsonschema.validate(document, COMPOSE)
    for service in document["services"].values():
        for needed in service.get("depends_on", {}):
            assert "healthcheck" in document["services"][needed]
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()


def test_commands_in_manifests_are_commands() -> None:
    """Every `rhizome …` in them has options that it knows."""
    checked = []
    for file in ("kubernetes/fleet.yaml", "kubernetes/raycluster.yaml"):
        for document in documents(file):
            for spec in pod_specs(document):
                containers = (*spec["containers"], *spec.get("initContainers", ()))
                ours = (each for each in containers if each["image"].startswith("rhizome") and "command" in each)
                checked += [[*container["command"], *container["args"]] for container in ours]
    (compose,) = documents("compose.yaml")
    for service in compose["services"].values():
        if service["command"][0] == "rhizome":
            checked.append(service["command"])
        elif service["command"][0] == "sh":
            script = service["command"][2].replace("$$(hostname -i | cut -d' ' -f1)", "x").replace("\\\n", "")
            checked += [shlex.split(found) for found in re.findall(r"\brhizome [^\n]*", script)]
    for words in checked:
        check_command(words)
    assert {words[1] for words in checked} == {"router", "worker", "model"}


def test_the_fleet_on_kuberay_fits_its_cluster() -> None:
    """Its file is right, and nodes have the resources that its servers ask for."""
    config, cluster, _ = documents("kubernetes/raycluster.yaml")
    plan = plan_fleet(parse_fleet(config["data"]["fleet.yaml"], "fleet.yaml"))
    head, (workers,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]

    def has(group: dict[str, Any]) -> dict[str, float]:
        params = group["rayStartParams"]
        # KubeRay writes it onto a shell's command line.
        custom = yaml.safe_load(shlex.split(params["resources"])[0])
        return {"CPU": float(params["num-cpus"]), **custom}

    nodes = has(head)
    assert sum(router.resources.cpus for router in plan.routers) <= nodes["CPU"]
    assert sum(router.resources.custom["front"] for router in plan.routers) <= nodes["front"]
    for worker in plan.workers:
        assert worker.resources.cpus <= has(workers)["CPU"]
        assert worker.resources.custom["place"] <= has(workers)["place"]
    assert len(plan.workers) <= workers["replicas"]
