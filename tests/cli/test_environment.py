"""Variables named SPARSERVE_* that are no settings: slips, and those of Kubernetes."""

import pytest

from sparserve.cli.environment import check_environment
from sparserve.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SPARSERVE_MAX_RUNING", "; did you mean SPARSERVE_MAX_RUNNING"),
        ("sparserve_treads", "; did you mean SPARSERVE_THREADS"),
        ("SPARSERVE_CACHEDIR", "; did you mean SPARSERVE_CACHE_DIR"),
        ("SPARSERVE_ZZZZ", "changes nothing\n"),
    ],
)
def test_a_variable_that_is_no_setting_is_told_with_near_names(monkeypatch, capsys, name, meant):
    monkeypatch.setenv(name, "1")
    check_environment(())
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {name} is no setting and changes nothing")
    assert meant in err
    assert err.count("\n") == 1


KUBERNETES = {  # what a pod finds of Services named sparserve and sparserve-metrics
    "SPARSERVE_SERVICE_HOST": "10.0.0.7",
    "SPARSERVE_SERVICE_PORT": "50051",
    "SPARSERVE_SERVICE_PORT_GRPC": "50051",
    "SPARSERVE_PORT_50051_TCP": "tcp://10.0.0.7:50051",
    "SPARSERVE_PORT_50051_TCP_ADDR": "10.0.0.7",
    "SPARSERVE_METRICS_SERVICE_HOST": "10.0.0.8",
    "SPARSERVE_METRICS_PORT_9090_TCP_PROTO": "tcp",
    "SPARSERVE_OTHER_PORT": "tcp://10.0.0.9:1",
}


def test_settings_and_what_kubernetes_sets_are_no_slips(monkeypatch, capsys):
    known = {"SPARSERVE_THREADS": "2", "sparserve_max_running": "3", "SPARSERVE_CACHE_DIR": "/x"}
    for name, value in {**KUBERNETES, **known}.items():
        monkeypatch.setenv(name, value)
    check_environment(["port", "threads"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_a_port_of_kubernetes_is_told_with_the_ways_out(monkeypatch, run_main, setting):
    name, flag = f"SPARSERVE_{setting.upper()}", f"--{setting.replace('_', '-')}"
    monkeypatch.setenv(name, "tcp://10.0.0.7:50051")
    status, _, err = run_main("serve", "--model", "/nowhere")
    assert status == 1
    assert err.startswith(f"error: {name} is 'tcp://10.0.0.7:50051', which Kubernetes sets")
    assert "enableServiceLinks: false" in err
    _, _, err = run_main("serve", "--model", "/nowhere", flag, "1")
    assert "no model at '/nowhere'" in err
    with pytest.raises(ConfigError, match=flag):
        check_environment([setting])
    check_environment(())  # a command that listens nowhere


def test_a_command_tells_slips_and_goes_on(monkeypatch, run_main):
    monkeypatch.setenv("SPARSERVE_MAX_RUNING", "5")
    for command in ("serve", ["bench", "engine"], ["generate", "x"]):
        words = [command] if isinstance(command, str) else command
        status, _, err = run_main(*words, "--model", "/nowhere")
        assert status == 1
        assert "SPARSERVE_MAX_RUNING is no setting" in err
        assert "no model at '/nowhere'" in err
