"""Healing in several processes that torch or accelerate launches."""

import json
import subprocess
import sys

import pytest

from sparserve.model.loader import load_model


@pytest.mark.parametrize("through", ["core:0.4", "token:0.6"])
def test_two_processes_learn_together(folder, text, tmp_path, through):
    out, looks = tmp_path / "healed", tmp_path / "looks"
    script = tmp_path / "run.py"
    # Each process tells all that it decided by.
    script.write_text(
        f"""
import json, sys
from pathlib import Path
from sparserve.compression.healing import Heal
from sparserve.config import EngineSettings
from sparserve.healing import pipeline

def told(*arguments, **named):
    healed = train(*arguments, **named)
    accelerator = arguments[6]
    looks = [own.held_out for own in healed.looks]
    Path(f"{looks}-{{accelerator.process_index}}").write_text(json.dumps([accelerator.num_processes, looks]))
    return healed

train, pipeline.train = pipeline.train, told
how = Heal(through={through!r}, tokens=2048, window=32, batch=4, generated=24, held_out=8, evaluations=4, rank=8,
           learning_rate=0.002)
settings = EngineSettings(model={str(folder)!r}, device="cpu", threads=1, kv_cache_gib=0.01, dtype="int8",
                          weight_planes="4+4")
tell = lambda progress: progress.look and print("look", progress.step, flush=True)
pipeline.heal({str(folder)!r}, how, [Path({str(text)!r})], Path({str(out)!r}), settings, on_step=tell)
"""
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    ran = subprocess.run([*launch, script], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    one, two = (json.loads(looks.with_name(f"looks-{n}").read_text()) for n in range(2))
    assert one == two  # or one would stop while the other waits for it
    assert one[0] == 2
    assert one[1][-1] < one[1][0]
    assert ran.stdout.count("look 8") == 1  # one of them tells
    assert load_model(str(out)).config.down_bias
