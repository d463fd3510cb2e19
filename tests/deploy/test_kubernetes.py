"""The Kubernetes manifests as Kustomize composes them."""

import re

import pytest
import yaml

from sparserve.metrics import TABLE


def test_manifests_follow_the_schemas_and_select_our_pods_alone(composed):
    validate = pytest.importorskip("kubernetes_validate")
    for overlay in ("cpu", "gpu"):
        manifests = composed(overlay)
        own = {"app.kubernetes.io/name": "sparserve"}
        for kind, manifest in manifests.items():
            if kind not in {"ServiceMonitor", "PrometheusRule"}:  # not of Kubernetes itself
                validate.validate(manifest, "1.34", strict=True)
            assert manifest["metadata"]["labels"].items() >= own.items()
        assert manifests["Deployment"]["spec"]["template"]["metadata"]["labels"] == own
        for kind, path in (
            ("Deployment", ("selector", "matchLabels")),
            ("Service", ("selector",)),
            ("PodDisruptionBudget", ("selector", "matchLabels")),
            ("NetworkPolicy", ("podSelector", "matchLabels")),
            ("ServiceMonitor", ("selector", "matchLabels")),
        ):
            found = manifests[kind]["spec"]
            for key in path:
                found = found[key]
            assert (kind, found) == (kind, own)
        target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        assert target == manifests["Deployment"]["metadata"]["name"]


def test_pods_are_hardened_and_the_images_user_is_theirs(deploy, deployment):
    user = re.search(r"^USER (\d+):", (deploy / "Dockerfile").read_text(), re.M)[1]
    for overlay, image in (("cpu", "cpu"), ("gpu", "cuda")):
        pod, container, _ = deployment(overlay)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert str(pod["securityContext"]["runAsUser"]) == user
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        # A Service of this name would put SPARSERVE_PORT=tcp://… into the environment.
        assert pod["enableServiceLinks"] is False
        assert container["image"] == f"sparserve:{image}"
        assert f"AS {image}\n" in (deploy / "Dockerfile").read_text()


def test_both_autoscalers_act_on_waiting_requests(composed, deploy):
    waiting = next(spec.exported for spec in TABLE if spec.attribute == "waiting")
    hpa = composed("cpu")["HorizontalPodAutoscaler"]["spec"]
    (metric,) = hpa["metrics"]
    assert metric["pods"]["metric"]["name"] == waiting
    components = deploy / "kubernetes/components"
    adapter = yaml.safe_load((components / "hpa/prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == waiting
    assert rule["seriesQuery"].startswith(waiting + "{")
    keda = yaml.safe_load((components / "keda/scaledobject.yaml").read_text())["spec"]
    (trigger,) = keda["triggers"]
    assert f"({waiting}[" in trigger["metadata"]["query"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (
        hpa["minReplicas"],
        hpa["maxReplicas"],
    )
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]
