"""Which peers there are, in which formats, and what is told where one is not."""

import sys

import pytest

from sparserve.bench.peers import PEERS, PeerSpec, open_peer, packages, parse_peers, wanted_peers
from sparserve.cli.bench import PEERS as SHOWN
from sparserve.errors import ConfigError


def test_the_command_shows_the_peers_that_there_are():
    assert tuple(PEERS) == SHOWN


def test_peers_are_named_alone_or_with_a_format():
    assert parse_peers("none") == []
    assert parse_peers("transformers, llama.cpp:Q8_0,openvino") == [
        PeerSpec("transformers"),
        PeerSpec("llama.cpp", "Q8_0"),
        PeerSpec("openvino"),
    ]


def test_a_peer_without_a_format_takes_the_data_types_that_we_are_measured_in():
    ours = ["bfloat16", "int4 (LM head int8)", "int4-g32 (LM head int8-g32)"]
    specs = [PeerSpec("openvino"), PeerSpec("llama.cpp", "Q4_0"), PeerSpec("openvino", "int4")]
    assert wanted_peers(specs, ours) == [
        ("openvino", "bfloat16"),
        ("openvino", "int4"),
        ("llama.cpp", "Q4_0"),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("llamacpp", "no peer is named 'llamacpp'; there are: llama.cpp, transformers, openvino"),
        ("transformers,", "no peer is named ''"),
        ("llama.cpp:int8", "llama.cpp has no format int8"),
        ("transformers:Q8_0", "of: float32, bfloat16, float16"),
    ],
)
def test_what_is_no_peer_is_told_with_those_that_are(text, told):
    with pytest.raises(ConfigError) as raised:
        parse_peers(text)
    assert told in str(raised.value)


def test_a_peer_that_lacks_our_format_is_told_with_the_way_out(tiny_model):
    with pytest.raises(ConfigError, match=r"openvino has no format float32; .* openvino:int4"):
        open_peer("openvino", "float32", lambda dtype: tiny_model, 1)


def test_a_missing_package_is_told_with_the_way_to_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError) as raised:
        packages.require("llama_cpp")
    assert "llama-cpp-python: pip install 'sparserve[bench]'" in str(raised.value)
    with pytest.raises(ConfigError, match="package no_such_thing: pip"):
        packages.require("no_such_thing.inner")
