"""What `sparserve bench serve` makes of its flags: the load, who gets it, what is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparserve.cli.connection import Connection
from sparserve.cli.local import refuse_engine_flags, server_settings
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

if TYPE_CHECKING:
    from sparserve.bench.serve.datasets import FilePrompts, Prompts, Vocabulary
    from sparserve.bench.serve.load import Load
    from sparserve.bench.serve.targets import Target, Wish
    from sparserve.bench.served import ServerProcess

OWN = "own"  # in place of a server's address: one that is started for this
DATASETS = ("random", "prefix", "sharegpt", "text", "jsonl")
FROM_FILES = DATASETS[2:]
SWEEPS = ("concurrency", "rate")
NUM_PROMPTS = 100  # where neither flag ends a run


def make_loads(
    request_rate: float,
    burstiness: float,
    ramp_up: str,
    max_concurrency: int | None,
    num_prompts: int | None,
    duration: float | None,
    sweep: str,
    sweep_of: str,
) -> list[Load]:
    """Raises ConfigError."""
    from sparserve.bench.serve.arrivals import Arrivals, Ramp
    from sparserve.bench.serve.load import Load
    from sparserve.bench.serve.load import sweep as sweep_load

    if sweep_of not in SWEEPS:
        raise ConfigError(f"--sweep-of is {sweep_of!r}; it must be {' or '.join(SWEEPS)}")
    if num_prompts is None and duration is None:
        num_prompts = NUM_PROMPTS
    arrivals = Arrivals(request_rate, burstiness, Ramp.parse(ramp_up) if ramp_up else None)
    load = Load(arrivals, max_concurrency, num_prompts, duration)
    found = sweep_load(load, sweep_of, numbers("--sweep", sweep)) if sweep else [load]  # type: ignore[arg-type]
    for each in found:
        each.check()
    return found


def numbers(flag: str, text: str, most: float = math.inf) -> list[float]:
    """Of "1,2,4": each above 0 and below `most`, in their order. Raises ConfigError."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < most for number in found):
        limit = "" if most == math.inf else f" and below {most:g}"
        raise ConfigError(f"{flag} is {text!r}; it must be numbers above 0{limit}, such as 1,2,4")
    return list(dict.fromkeys(found))


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def own_server(
    server: str | None, openai: str, settings: EngineSettings
) -> AbstractContextManager[ServerProcess | None]:
    """One in a process of its own, where the flags ask for it. Raises ConfigError."""
    from sparserve.bench.served import ServerProcess

    if server == OWN or (server is None and not openai):
        return ServerProcess(server_settings(settings))
    refuse_engine_flags(settings)
    return nullcontext()


def make_targets(
    own: ServerProcess | None,
    there: Connection | None,
    server_pids: Sequence[int],
    openai: str,
    openai_model: str | None,
    openai_pids: Sequence[int],
    wish: Wish,
) -> list[Target]:
    """Raises ConfigError."""
    from sparserve.bench.serve.openai import OpenAi
    from sparserve.bench.serve.targets import Sparserve

    found: list[Target] = []
    if own is not None:
        found.append(Sparserve([f"127.0.0.1:{own.port}"], wish, [own.pid]))
    elif there is not None:
        if not (addresses := names(there.target)):
            raise ConfigError(f"--server is {there.target!r}; it must be host:port, or {OWN}")
        found.append(Sparserve(addresses, wish, server_pids, there.security))
    rivals = names(openai)
    if openai_pids and len(openai_pids) != len(rivals):
        raise ConfigError(
            f"--openai-pid has {len(openai_pids)} processes for {len(rivals)} servers; give one for each"
        )
    for place, rival in enumerate(rivals):
        name, given, url = rival.partition("=")
        if not given or "://" in name:  # an address may have the sign too
            name = url = rival
        pids = openai_pids[place : place + 1]
        found.append(OpenAi(name, url, wish, openai_model, pids))
    titles = [target.name for target in found]
    if len(set(titles)) < len(titles):
        raise ConfigError(f"--openai names a server twice; give them names: a={rivals[0]}")
    return found


@dataclass(frozen=True, slots=True)
class Asked:
    """What the flags say of prompts."""

    dataset: str
    path: Path | None
    tokenizer: Path | None
    input_len: int
    output_len: int | None
    range_ratio: float
    num_prefixes: int
    prefix_len: int
    suffix_len: int
    as_text: bool
    seed: int

    def check(self) -> None:
        """Raises ConfigError."""
        if self.dataset not in DATASETS:
            raise ConfigError(f"--dataset is {self.dataset!r}; there are: {', '.join(DATASETS)}")
        if (self.path is None) == (self.dataset in FROM_FILES):
            told = "needs --dataset-path" if self.path is None else "takes no --dataset-path"
            raise ConfigError(f"--dataset {self.dataset} {told}")

    @property
    def words(self) -> str:
        if self.path is not None:
            return f"{self.dataset} {self.path.name}"
        if self.dataset == "prefix":
            return f"{self.num_prefixes} prefixes of {self.prefix_len} + {self.suffix_len} + {self._output} tokens"
        spread = f" ± {self.range_ratio:.0%}" if self.range_ratio else ""
        return f"random, {self.input_len} + {self._output} tokens{spread}"

    @property
    def needs_vocabulary(self) -> bool:
        return self.dataset not in ("text", "jsonl")

    def prompts(self, vocabulary: Vocabulary | None) -> Prompts | FilePrompts:
        """Raises ConfigError."""
        from sparserve.bench.serve.datasets import (
            Lengths,
            as_texts,
            file_prompts,
            prefix_prompts,
            random_prompts,
        )

        if self.path is not None:
            kind: Any = self.dataset
            return file_prompts(kind, self.path, vocabulary, self.output_len, self.seed)
        assert vocabulary is not None, "what makes prompts up has one"
        made: Prompts
        if self.dataset == "random":
            lengths = Lengths(self.input_len, self._output, self.range_ratio)
            made = random_prompts(vocabulary, lengths, self.seed)
        else:
            parts = (self.num_prefixes, self.prefix_len, self.suffix_len)
            made = prefix_prompts(vocabulary, *parts, self._output, self.seed)
        return as_texts(made, vocabulary.tokenizer) if self.as_text else made

    @property
    def _output(self) -> int:
        from sparserve.bench.serve.datasets import OUTPUT_TOKENS

        return OUTPUT_TOKENS if self.output_len is None else self.output_len


async def find_vocabulary(targets: Sequence[Target], asked: Asked) -> Vocabulary | None:
    """Of --tokenizer, or of our server. Raises ConfigError where a dataset needs one and there is none."""
    from sparserve.bench.serve.datasets import Vocabulary, read_tokenizer
    from sparserve.bench.serve.targets import Sparserve

    if asked.tokenizer is not None:
        return Vocabulary.of(read_tokenizer(asked.tokenizer))
    for target in targets:
        if isinstance(target, Sparserve):
            await target.open()
            try:
                return await target.vocabulary()
            finally:
                await target.close()
    if asked.needs_vocabulary:
        raise ConfigError(
            f"--dataset {asked.dataset} needs the model's tokenizer, which --openai does not tell: give --tokenizer with "
            "its folder"
        )
    return None
