"""Healing in several processes that accelerate launches."""

import json
import subprocess
import sys

from sparserve.model.loader import load_model


def test_two_processes_learn_together(folder, text, tmp_path):
    out = tmp_path / "healed"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    flags = ["--text", text, "--out", out, "--through", "core:0.4", "--device", "cpu", "--threads", "1",
             "--kv-cache-gib", "0.01", "--generate", "8", "--window", "32", "--batch", "4", "--tokens", "2048",
             "--evaluations", "2", "--rank", "8", "--learning-rate", "0.005"]  # fmt: skip
    command = [sys.executable, *launch, "-m", "sparserve.cli", "heal", folder, *flags]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    looks = json.loads((out / "healing.json").read_text())
    assert looks[-1]["held_out"] < looks[0]["held_out"]
    assert load_model(str(out)).config.down_bias
    assert ran.stderr.count("step 8 of 16") == 1  # one of them tells
