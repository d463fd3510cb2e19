"""The files under deploy/: valid for the programs that read them, and in step with the server's own names."""

import re
import shlex

import yaml

from sparserve.api import server as api_server
from sparserve.config import ServerSettings
from sparserve.engine import async_engine

SETTINGS = ServerSettings.model_fields
# After the drain: calls are read to their end, the last engine step ends.
END_SECONDS = (
    2 * api_server._LAST_ARRIVALS_SECONDS
    + api_server._GRACE_SECONDS
    + async_engine._LAST_STEP_SECONDS
)  # fmt: skip


def seconds(text: object) -> float:
    return float(str(text).removesuffix("s"))


def texts(deploy):
    return [
        path
        for path in sorted(deploy.rglob("*"))
        if path.is_file() and path.suffix in {"", ".yaml", ".conf", ".cfg", ".service", ".md"}
    ]


def test_every_setting_that_a_file_names_exists(deploy):
    found = {}
    for path in texts(deploy):
        for name in re.findall(r"\bSPARSERVE_([A-Z_]+)", path.read_text()):
            found.setdefault(name.lower(), path)
    assert {"host", "model", "drain_delay", "drain_timeout", "adapters"} <= set(found)
    assert {name: path for name, path in found.items() if name not in SETTINGS} == {}


def test_every_flag_of_the_server_that_a_file_names_exists(deploy, deployment):
    found = set()
    for path in texts(deploy):
        if path.name != "compose.yaml":  # smg's flags
            found |= set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", path.read_text()))
    # Of docker, pip, kubectl and Docker's own instructions.
    others = {
        "from", "mount", "target", "build", "read-only", "tmpfs", "gpus", "interval", "timeout",
        "start-period", "retries", "no-install-recommends", "now", "extra-index-url", "help",
    }  # fmt: skip
    unknown = {f for f in found - others if f.replace("-", "_") not in {*SETTINGS, "config"}}
    assert unknown == set()
    for overlay in ("cpu", "gpu"):
        args = deployment(overlay)[1]["args"]
        flags = dict(zip(args[::2], args[1::2], strict=True))
        ServerSettings(**{flag[2:].replace("-", "_"): value for flag, value in flags.items()})


def test_the_ports_of_all_files_are_the_servers(deploy, composed, deployment):
    grpc, metrics, adapters = (
        SETTINGS[name].default for name in ("port", "metrics_port", "adapters_port")
    )
    image = (deploy / "Dockerfile").read_text()
    assert f"EXPOSE {grpc} {metrics}\n" in image
    assert f"http://127.0.0.1:{metrics}/readyz" in image
    compose = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]
    workers = [name for name in compose if name.startswith("worker")]
    assert len(workers) == 2
    assert all(compose[name]["ports"][0].endswith(f":{grpc}") for name in workers)
    command = compose["gateway"]["command"]
    assert [f"grpc://{name}:{adapters}" for name in workers] == [
        part for part in command if part.startswith("grpc://")
    ]
    scraped = yaml.safe_load((deploy / "prometheus/prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scraped}
    assert targets["sparserve"] == [f"{name}:{metrics}" for name in workers]
    smg_port = next(p for p in command if p.startswith("--prometheus-port=")).split("=")[1]
    assert targets["smg"] == [f"gateway:{smg_port}"]
    manifests = composed("cpu")
    _, container, _ = deployment("cpu")
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert named == {"grpc": grpc, "metrics": metrics}
    assert {p["name"]: p["port"] for p in manifests["Service"]["spec"]["ports"]} == named
    assert {container[f"{p}Probe"]["grpc"]["port"] for p in ("startup", "readiness")} == {grpc}
    for config in ("envoy/envoy.yaml", "nginx/nginx.conf", "haproxy/haproxy.cfg"):
        assert re.search(rf"\b{grpc}\b", (deploy / config).read_text())


def test_the_services_whose_health_is_asked_are_the_servers(deploy, deployment):
    _, container, _ = deployment("cpu")
    assert container["readinessProbe"]["grpc"]["service"] in api_server.SERVICES
    envoy = yaml.safe_load((deploy / "envoy/envoy.yaml").read_text())
    (check,) = envoy["static_resources"]["clusters"][0]["health_checks"]
    assert check["grpc_health_check"]["service_name"] in api_server.SERVICES


def test_kubernetes_waits_longer_than_a_pod_takes_to_end(deployment):
    for overlay in ("cpu", "gpu"):
        pod, container, env = deployment(overlay)
        settings = ServerSettings(
            **{k.removeprefix("SPARSERVE_").lower(): v for k, v in env.items()}
        )
        longest = (
            container["lifecycle"]["preStop"]["sleep"]["seconds"]
            + settings.drain_delay
            + settings.drain_timeout
            + END_SECONDS
        )
        assert longest < pod["terminationGracePeriodSeconds"] < longest + 30
        # A drain is told before new requests are refused.
        probe = container["readinessProbe"]
        assert probe["periodSeconds"] <= container["lifecycle"]["preStop"]["sleep"]["seconds"]


def test_compose_and_systemd_wait_longer_than_a_worker_takes_to_end(deploy):
    compose = yaml.safe_load((deploy / "compose.yaml").read_text())
    unit = (deploy / "systemd/sparserve.service").read_text()
    environment = dict(
        pair.split("=", 1) for line in re.findall(r"^Environment=(.*)$", unit, re.M)
        for pair in shlex.split(line)
    )  # fmt: skip
    worker = compose["services"]["worker1"]
    for names, limit in (
        (worker["environment"], seconds(worker["stop_grace_period"])),
        (environment, seconds(re.search(r"^TimeoutStopSec=(.*)$", unit, re.M)[1])),
    ):
        drain = float(names["SPARSERVE_DRAIN_DELAY"]) + float(names["SPARSERVE_DRAIN_TIMEOUT"])
        assert drain + END_SECONDS < limit


def test_balancers_see_a_drain_within_the_delay_that_the_files_give_workers(deploy, deployment):
    delay = float(deployment("cpu")[2]["SPARSERVE_DRAIN_DELAY"])
    envoy = yaml.safe_load((deploy / "envoy/envoy.yaml").read_text())
    (check,) = envoy["static_resources"]["clusters"][0]["health_checks"]
    assert seconds(check["interval"]) < delay
    inter = re.search(r"check inter (\d+)s", (deploy / "haproxy/haproxy.cfg").read_text())
    assert int(inter[1]) < delay


def test_compose_follows_its_schema_and_mounts_files_that_exist(deploy, run, program):
    run(
        program("check-jsonschema"),
        "--builtin-schema",
        "vendor.compose-spec",
        deploy / "compose.yaml",
    )
    compose = yaml.safe_load((deploy / "compose.yaml").read_text())
    targets = set(re.findall(r" AS (\w+)$", (deploy / "Dockerfile").read_text(), re.M))
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            known = source in compose["volumes"] or source == "./models"
            assert known or (deploy / source).is_file(), (name, volume)
        assert set(service["networks"]) <= set(compose["networks"])
        if build := service.get("build"):
            assert build["target"] in targets
            assert (deploy / build["context"] / build["dockerfile"]).is_file()


def test_adapters_are_not_published_and_the_image_has_what_they_need(deploy):
    compose = yaml.safe_load((deploy / "compose.yaml").read_text())
    worker = compose["services"]["worker1"]
    assert worker["environment"]["SPARSERVE_ADAPTERS"] == "vllm"
    stage = f"FROM build AS build-{worker['build']['target']}\n"
    built = (deploy / "Dockerfile").read_text().partition(stage)[2].partition("\nFROM ")[0]
    assert "smg-grpc-proto" in built
    port = str(SETTINGS["adapters_port"].default)
    assert not any(port in published for published in worker["ports"])
    assert worker["environment"]["SPARSERVE_ALLOW_PUBLIC_ADAPTERS"] == "true"
    ServerSettings(
        **{
            k.removeprefix("SPARSERVE_").lower(): v
            for k, v in worker["environment"].items()
            if "$" not in v
        }
    )


def test_the_dockerfile_is_clean_and_copies_only_what_its_ignore_file_lets_through(
    deploy, program, run
):
    run(program("hadolint"), deploy / "Dockerfile")
    let_through = {
        line[1:]
        for line in (deploy / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", (deploy / "Dockerfile").read_text(), re.M):
        copied |= set(line.split()[:-1])
    assert copied == let_through
    assert all((deploy.parent / name).exists() for name in copied)


def test_systemd_accepts_the_unit(deploy, program, tmp_path, run):
    text = (deploy / "systemd/sparserve.service").read_text()
    assert text.count("/opt/sparserve/bin/sparserve serve") == 1
    # It looks for the program.
    (tmp_path / "sparserve.service").write_text(
        text.replace("/opt/sparserve/bin/sparserve", "/bin/true")
    )
    told = run(program("systemd-analyze"), "verify", tmp_path / "sparserve.service")
    assert "sparserve.service" not in told, told
    told = run(
        program("systemd-analyze"),
        "security",
        "--offline=true",
        "--threshold=25",
        tmp_path / "sparserve.service",
    )
    assert "OK" in told
