"""The Dockerfile's steps, done without Docker: what comes out starts and answers."""

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_dockerfile_replayed_starts_and_answers(deploy, tiny_folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable, deploy / "replay.py", "--target", "cpu", "--into", tmp_path / "image",
            "--arg", "TORCH_INDEX=", "--model", tiny_folder,
        ],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Generate: ", done.stdout, re.M)
    assert "ended with status 0" in done.stdout
    assert re.search(r"^replayed in \d+ s$", done.stdout, re.M)
