"""Replay a target of deploy/Dockerfile without Docker: the same steps into a folder, then start what came out and ask it.

    python deploy/replay.py --target cpu --into /tmp/image [--arg TORCH_INDEX=] [--model FOLDER]

The steps are read from the Dockerfile itself. Its absolute paths (/opt, /src, /cache, /tmp) lie inside the folder; the
base image is this machine with this Python, so `apt-get` is left out and what it installs must be there. All stages
share the folder, because a virtual environment works only where it was made. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OWN = re.compile(r"(?<![\w.$}/-])/(opt|src|cache|tmp)(?=[/:\s'\"]|$)")
OTHER = re.compile(r"(?<![\w.$}/:-])/(?!dev/null)\w+")
START_SECONDS = 600.0
STOP_SECONDS = 60.0
NOT_BUILT = ("__pycache__", "*.so", "*.o")

ASK = """
import sys, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sparserve.client import Client
channel = grpc.insecure_channel(sys.argv[1])
asked = health_pb2.HealthCheckRequest(service="sparserve.v1.InferenceService")
status = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10).status
assert status == health_pb2.HealthCheckResponse.SERVING, status
with Client(sys.argv[1]) as client:
    generation = client.generate("The capital of France is", max_tokens=8, temperature=0, timeout=120)
print(repr(generation.text))
"""


@dataclass(frozen=True)
class Instruction:
    keyword: str
    text: str


@dataclass
class Stage:
    """What a stage's instructions have set so far; paths are the image's own."""

    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/tmp"
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)


class ReplayError(Exception):
    """The Dockerfile does something that cannot be replayed, or a step failed."""


def parse(dockerfile: str) -> dict[str, list[Instruction]]:
    """-> stage name -> its instructions, FROM first. Raises ReplayError."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.MULTILINE)
    stages: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        keyword, _, rest = line.strip().partition(" ")
        instruction = Instruction(keyword.upper(), " ".join(rest.split()))
        if instruction.keyword == "FROM":
            found = re.fullmatch(r"(\S+) AS (\w[\w-]*)", instruction.text, re.IGNORECASE)
            if not found:
                raise ReplayError(f"FROM {instruction.text}: every stage needs a name (AS …)")
            current = stages[found[2]] = []
        current.append(instruction)
    return stages


class Replay:
    """Runs stages into `root`."""

    def __init__(
        self, stages: dict[str, list[Instruction]], root: Path, args: dict[str, str]
    ) -> None:
        self._stages = stages
        self._root = root
        self._given = args
        self._done: dict[str, Stage] = {}
        base = root / "base"
        base.mkdir(parents=True)
        python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        (base / "python").symlink_to(python)
        (root / "tmp").mkdir()
        self._path = f"{base}:/usr/local/bin:/usr/bin:/bin"

    def stage(self, name: str) -> Stage:
        """The stage's end, after all that it builds on."""
        if name not in self._done:
            if name not in self._stages:
                raise ReplayError(
                    f"{name} is no stage; the Dockerfile has {', '.join(self._stages)}"
                )
            first, *rest = self._stages[name]
            parent = first.text.split()[0]
            stage = Stage()
            if parent in self._stages:
                stage = self.stage(parent)
                stage = replace(stage, env=dict(stage.env), args=dict(stage.args))
            for instruction in rest:
                self._step(instruction, stage)
            self._done[name] = stage
        return self._done[name]

    def inside(self, text: str) -> str:
        """The image's paths as they are here. Raises ReplayError for one that would lie outside."""
        if left := OTHER.search(OWN.sub("own", text)):
            raise ReplayError(
                f"{left[0]} in {text!r}: only /opt, /src, /cache and /tmp can be replayed"
            )
        return OWN.sub(lambda found: f"{self._root}{found[0]}", text)

    def environment(self, stage: Stage) -> dict[str, str]:
        """For a process of the stage: its ENV, and of this machine only how pip reaches its index."""
        own = {name: self.inside(value) for name, value in stage.env.items() if name != "PATH"}
        pip = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        path = self.inside(stage.env["PATH"]) if "PATH" in stage.env else "$PATH"
        home = {"HOME": str(Path.home())}
        return {**home, **pip, **own, "PATH": path.replace("$PATH", self._path)}

    def _step(self, instruction: Instruction, stage: Stage) -> None:
        keyword, text = instruction.keyword, instruction.text
        begun = time.monotonic()
        match keyword:
            case "ENV":
                stage.env |= dict(pair.split("=", 1) for pair in shlex.split(text))
            case "ARG":
                name, _, default = text.partition("=")
                stage.args[name] = self._given.get(name, default)
            case "WORKDIR":
                stage.workdir = text
                Path(self.inside(text)).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(text, stage)
            case "RUN":
                self._run(text, stage)
            case "ENTRYPOINT":
                stage.entrypoint = json.loads(text)
            case "HEALTHCHECK":
                stage.healthcheck = json.loads(text[text.index("CMD ") + 4 :])
            case "EXPOSE" | "VOLUME" | "STOPSIGNAL" | "USER":
                pass
            case _:
                raise ReplayError(f"{keyword} cannot be replayed")
        if keyword in ("RUN", "COPY"):
            print(f"{time.monotonic() - begun:7.1f} s  {keyword} {text[:90]}", flush=True)

    def _copy(self, text: str, stage: Stage) -> None:
        *sources, target = text.split()
        if sources[0].startswith("--from="):
            self.stage(sources[0].removeprefix("--from="))
            if sources[1:] != [target]:
                raise ReplayError(
                    f"COPY {text}: all stages share one folder, so it must keep its path"
                )
            return
        to = Path(self.inside(stage.workdir)) / target
        for source in (REPOSITORY / name for name in sources):
            if source.is_dir():
                ignore = shutil.ignore_patterns(*NOT_BUILT)
                shutil.copytree(source, to, dirs_exist_ok=True, ignore=ignore)
            else:
                into = to / source.name if target.endswith("/") else to
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, into)

    def _run(self, text: str, stage: Stage) -> None:
        command = re.sub(r"--mount=\S+ ", "", text)
        if "apt-get" in command:
            print(f"          left out: {command[:90]}")
            return
        done = subprocess.run(
            ["/bin/sh", "-ec", self.inside(command)],
            cwd=self.inside(stage.workdir),
            env={**self.environment(stage), **stage.args},
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise ReplayError(f"exit status {done.returncode} of RUN {text}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def ask(replay: Replay, stage: Stage, model: str | None) -> Iterator[str]:
    """Start the image's entry point, wait for its health check, ask it by gRPC, stop it. Yields what happened."""
    port, metrics, adapters = free_port(), free_port(), free_port()
    # Free ports, and not open to the network.
    env = replay.environment(stage) | {
        "SPARSERVE_HOST": "127.0.0.1",
        "SPARSERVE_PORT": str(port),
        "SPARSERVE_METRICS_PORT": str(metrics),
        "SPARSERVE_ADAPTERS": "vllm",  # as compose has it
        "SPARSERVE_ADAPTERS_PORT": str(adapters),
        **({"SPARSERVE_MODEL": model} if model else {}),
    }
    cwd = replay.inside(stage.workdir)
    check = [part.replace(":9090/", f":{metrics}/") for part in stage.healthcheck]

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        program = shutil.which(command[0], path=env["PATH"]) or command[0]
        return subprocess.run(
            [program, *command[1:]], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
        )

    program = shutil.which(stage.entrypoint[0], path=env["PATH"])
    if program is None:
        raise ReplayError(f"{stage.entrypoint[0]} is not in the image's PATH")
    begun = time.monotonic()
    server = subprocess.Popen([program, *stage.entrypoint[1:]], env=env, cwd=cwd)
    try:
        while run(check).returncode:
            if server.poll() is not None or time.monotonic() - begun > START_SECONDS:
                raise ReplayError("the server did not become healthy")
            time.sleep(0.5)
        yield f"healthy after {time.monotonic() - begun:.1f} s"
        answer = run(["python", "-c", ASK, f"127.0.0.1:{port}"])
        if answer.returncode:
            raise ReplayError(f"it does not answer: {answer.stderr}")
        yield f"Generate: {answer.stdout.strip()}"
        server.send_signal(signal.SIGTERM)
        if status := server.wait(STOP_SECONDS):
            raise ReplayError(f"exit status {status} after SIGTERM")
        yield "SIGTERM: ended with status 0"
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu", help="stage of the Dockerfile")
    parser.add_argument("--into", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as docker build --build-arg",
    )
    parser.add_argument("--model", help="what is served; default: the server's")
    options = parser.parse_args()
    if options.into.exists():
        parser.error(f"--into {options.into} is there already")
    begun = time.monotonic()
    try:
        stages = parse((REPOSITORY / "deploy/Dockerfile").read_text())
        given = dict(pair.partition("=")[::2] for pair in options.arg)
        replay = Replay(stages, options.into.resolve(), given)
        stage = replay.stage(options.target)
        print(f"built in {time.monotonic() - begun:.0f} s", flush=True)
        for told in ask(replay, stage, options.model):
            print(told, flush=True)
    except ReplayError as error:
        sys.exit(f"error: {error}")
    print(f"replayed in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
