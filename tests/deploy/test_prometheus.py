"""Dashboard, scrape configuration and alerts: metrics that exist, rules that fire when they should."""

import json
import re

import yaml
from prometheus_client import Histogram

from sparserve.metrics import TABLE


def exported() -> set[str]:
    names = {spec.exported for spec in TABLE}
    for spec in TABLE:
        if spec.kind is Histogram:
            names |= {spec.exported + part for part in ("_bucket", "_sum", "_count")}
    return names


def metrics_of(text: str) -> set[str]:
    return set(re.findall(r"\bsparserve_[a-z0-9_]+", text))


def test_the_dashboard_asks_for_metrics_that_exist_by_labels_that_they_have(
    deploy, program, tmp_path, run
):
    board = json.loads((deploy / "grafana/sparserve.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) > 20
    labels = {"model_name", "instance", "le", *(spec.label for spec in TABLE if spec.label)}
    for query in queries:
        assert metrics_of(query), query
        assert metrics_of(query) <= exported(), query
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert set(group.split(", ")) <= labels, query
    for variable in board["templating"]["list"][1:]:
        assert metrics_of(variable["query"]) <= exported()
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    # The queries as Prometheus reads them, with Grafana's variables filled in.
    filled = [
        re.sub(r"\$__\w+", "5m", q).replace("$model", "m").replace("$instance", "i")
        for q in queries
    ]
    rules = [{"record": f"panel:{i}:query", "expr": query} for i, query in enumerate(filled)]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]})
    )
    run(program("promtool"), "check", "rules", tmp_path / "rules.yaml")


def test_alerts_ask_for_metrics_that_exist_and_are_the_same_in_kubernetes(deploy):
    rules = yaml.safe_load((deploy / "prometheus/alerts.yaml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    for alert in alerts:
        assert metrics_of(alert["expr"]) <= exported(), alert["alert"]
        assert metrics_of(alert["expr"]) or alert["expr"].startswith("up{")
    tested = yaml.safe_load((deploy / "prometheus/alerts_test.yaml").read_text())["tests"]
    fired = {t["alertname"] for case in tested for t in case["alert_rule_test"] if t["exp_alerts"]}
    assert fired == {alert["alert"] for alert in alerts}
    rule = deploy / "kubernetes/components/monitoring/prometheusrule.yaml"
    assert yaml.safe_load(rule.read_text())["spec"] == rules


def test_prometheus_accepts_its_files_and_the_alerts_fire_as_their_tests_say(deploy, program, run):
    run(program("promtool"), "check", "config", deploy / "prometheus/prometheus.yaml")
    run(program("promtool"), "test", "rules", deploy / "prometheus/alerts_test.yaml")
