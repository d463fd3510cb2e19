"""A conversation as the user of `sparserve chat` shapes it: messages, settings and /commands."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparserve.errors import SparserveError

# What /set takes.
SETTINGS: dict[str, type[int] | type[float] | type[str]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_tokens": int,
    "min_tokens": int,
    "policy": str,
    "density": float,
    "target_kl": float,
    "choose_by": str,
    "core_density": float,
    "predictor": str,
    "score": str,
    "refresh_interval": int,
    "draft": str,
    "draft_tokens": int,
}
COMMANDS = {
    "/help": "list the commands",
    "/system TEXT": "set the system message; without a text, remove it",
    "/reset": "forget the conversation, keep system message and settings",
    "/undo": "forget the last question and its answer",
    "/save FILE": "write the conversation as JSON",
    "/set NAME VALUE": f"one of {', '.join(SETTINGS)}; VALUE none: the server's default",
    "/quit": "leave (Ctrl-D too)",
}


class CommandError(SparserveError):
    """A command that cannot be carried out."""


class Quit(Exception):
    """The user wants to leave."""


@dataclass
class Dialogue:
    """Questions and answers alternate in `turns`; `settings` go with every request."""

    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, as a chat request takes it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        """The answer to the last question; without a text, the question was not answered."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; -> what to tell.

        Raises CommandError, InvalidRequest or Quit.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/help":
                width = max(map(len, COMMANDS))
                return "\n".join(f"{usage:{width}}  {what}" for usage, what in COMMANDS.items())
            case "/system":
                self.system = argument
                return "system message set" if argument else "system message removed"
            case "/reset":
                self.turns.clear()
                return "conversation forgotten"
            case "/undo":
                if not self.turns:
                    raise CommandError("nothing was said yet")
                del self.turns[-2:]
                return "last question and answer forgotten"
            case "/save":
                return self._save(argument)
            case "/set":
                return self._set(*argument.split())
            case "/quit":
                raise Quit
        raise CommandError(f"no command is named {name}; /help lists them")

    def _save(self, name: str) -> str:
        if not name:
            raise CommandError("/save needs the name of a file")
        path = Path(name).expanduser()
        text = json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CommandError(f"{path} cannot be written: {error}") from error
        return f"{len(self.messages)} messages written to {path}"

    def _set(self, *words: str) -> str:
        if not words:
            shown = [
                f"{name} {value}" for name, value in self.settings.items() if value is not None
            ]
            return ", ".join(shown) or "everything is the server's default"
        kind = SETTINGS.get(words[0])
        if kind is None or len(words) != 2:
            raise CommandError(f"/set takes a value for one of {', '.join(SETTINGS)}")
        name, value = words
        if value == "none":
            self.settings[name] = None
            return f"{name} is the server's default"
        try:
            number = kind(value)
        except ValueError as error:
            raise CommandError(f"{name} is a {kind.__name__}, not {value!r}") from error
        _check_range(name, number)
        self.settings[name] = number
        return f"{name} is {value}"


def _check_range(name: str, value: float | str) -> None:
    """As client and server will; what depends on the server is left to it. Raises InvalidRequest."""
    from sparserve.client import make_request
    from sparserve.engine.request import SamplingParams, StoppingParams

    fields: Any = {name: value}
    for kind in (SamplingParams, StoppingParams):
        if name in kind.__annotations__:
            kind(**fields)
            return
    make_request("", **fields)
