"""`sparserve compress`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from sparserve.cli.healing_display import HealingDisplay, tell_healed
from sparserve.cli.output import counting_bar, err, out, warn
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError
from sparserve.model.catalog import DEMO_MODEL

if TYPE_CHECKING:
    from sparserve.compression.matrix import MatrixReport
    from sparserve.compression.recipe import Recipe
    from sparserve.model.compress_folder import CompressedFolder
    from sparserve.model.pruning import Pruned


def _show_recipe(name: str | None) -> None:
    if name is None:
        return
    from sparserve.compression.recipe import SHIPPED

    if name not in SHIPPED:
        raise ConfigError(f"no recipe is named {name!r}; there are: {', '.join(SHIPPED)}")
    source = files("sparserve.compression") / "recipes" / f"{name}.yaml"
    print(source.read_text(encoding="utf-8"), end="")
    raise typer.Exit


def compress(
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The folder to make. All is written beside it, and gets this name once it is whole.",
            metavar="<folder>",
        ),
    ],
    model: Annotated[
        str,
        typer.Argument(
            help="A name from `sparserve models`, a Hugging Face folder, a .gguf file, or the id org/name[@revision] of "
            "a model in the Hugging Face cache.",
            metavar="MODEL",
            envvar="SPARSERVE_MODEL",
        ),
    ] = DEMO_MODEL,
    recipe: Annotated[
        str,
        typer.Option(
            help="fast (4 bits, the quickest), balanced (smaller groups, and each matrix makes up for those before it), "
            "quality (low-rank terms on top), none (what is pruned stays in 16 bits), or a YAML file of your own, which may "
            "also heal and calibrate.",
            metavar="<name or file>",
        ),
    ] = "balanced",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file like what will be served, to measure inputs of matrices on; may be given several times. "
            "16,384 tokens (70 kB of English) are enough for the named recipes.",
            metavar="<file>",
        ),
    ] = None,
    prune: Annotated[
        float | None,
        typer.Option(
            help="Remove heads and neurons that make up this share of all parameters before anything is rounded, such as "
            "0.2. Instead of the recipe's own `prune`.",
            metavar="<share>",
        ),
    ] = None,
    prune_heads: Annotated[
        float | None,
        typer.Option(help="The same, a share of the attention's parameters.", metavar="<share>"),
    ] = None,
    prune_mlp: Annotated[
        float | None,
        typer.Option(
            help="The same, a share of the feed-forward layers' parameters.", metavar="<share>"
        ),
    ] = None,
    show_recipe: Annotated[
        str | None,
        typer.Option(
            help="Print a named recipe and do nothing else: one of your own begins with "
            "`--show-recipe balanced > own.yaml`.",
            metavar="<name>",
            callback=_show_recipe,
            is_eager=True,
        ),
    ] = None,
) -> None:
    """Make a model smaller, once and ahead of time: a folder that --model of every command takes.

    A recipe says how many bits each kind of matrix gets, how they are rounded and what makes up for the error. One that
    uses gptq or qera, as the three named ones do, needs --text: what matters is measured on it, so take
    another one to evaluate with. One layer is in memory at a time. A run that was interrupted goes on where it
    stopped when it is started again, to the same bytes.
    """
    from sparserve.compression.recipe import read_pruning
    from sparserve.model.compress_folder import compress_folder
    from sparserve.model.compressed_writer import partial_of, refuse_existing

    followed = read_pruning(recipe, ratio=prune, heads=prune_heads, mlp=prune_mlp)
    texts = text or []
    if texts and not followed.reads_text:
        warn(f"the recipe {followed.name} needs no text: --text is not read")
    if not followed.is_one_step:
        _follow_steps(model, followed, texts, out_folder)
        return
    refuse_existing(out_folder)
    left = any(partial_of(out_folder).glob("layers/*.safetensors"))
    with counting_bar() as show:
        begun = False

        def on_layer(done: int, total: int) -> None:
            nonlocal begun
            if not begun and done:
                err.print(f"going on after {done} of {total} layers that an earlier run finished")
            elif not begun and left:
                err.print(
                    "beginning anew: what an earlier run left is of another model, recipe or text"
                )
            begun = True
            show("compressing layers", done, total)

        try:
            made = compress_folder(
                model,
                followed,
                texts,
                out_folder,
                on_layer=on_layer,
                on_prune=lambda done, total: show("pruning layers", done, total),
                on_choice=lambda done, total: show("choosing formats", done, total),
                on_download=show,
            )
        except KeyboardInterrupt:
            err.print("interrupted; the same command goes on where this one stopped")
            raise
    _print(made)
    _tell_next(out_folder)


def _follow_steps(model: str, recipe: Recipe, texts: Sequence[Path], out_folder: Path) -> None:
    """Of a recipe that heals or calibrates, too."""
    from sparserve.healing.steps import follow

    with HealingDisplay() as display:
        try:
            made = follow(
                model,
                recipe,
                texts,
                out_folder,
                EngineSettings(model=model),
                on_step=display.stage,
                on_healing=display.step,
            )
        except KeyboardInterrupt:
            err.print("interrupted; the same command goes on with the step that is not finished")
            raise
    for folder in (made.pruned, made.rounded):
        if folder is not None:
            _print(folder)
    if made.healed is not None:
        assert recipe.heal is not None
        tell_healed(made.healed, recipe.heal)
    _tell_next(out_folder, made.index)


def _tell_next(out_folder: Path, index: Path | None = None) -> None:
    err.print(f"written to {out_folder}; next:", markup=False, soft_wrap=True)
    command = f"  sparserve serve --model {shlex.quote(str(out_folder))}"
    if index is not None:
        command += f" --index {shlex.quote(str(index))}"
    err.print(command, markup=False, soft_wrap=True)


def _print(made: CompressedFolder) -> None:
    info = made.info
    table = Table(
        "matrices", "bits a weight", "error, rounded", "as stored", "worst layer",
        title=f"{info.source.name} by {info.recipe['name']}", box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for kind, reports in _by_kind(made.reports).items():
        table.add_row(
            kind,
            f"{_mean([own.bits for own in reports]):.2f}",
            _percent(_mean([own.rounded for own in reports])),
            _percent(_mean([own.compensated for own in reports])),
            _percent(max(own.compensated for own in reports)),
        )
    if made.reports and any(made.reports):
        out.print(table)
    if made.pruned is not None:
        _print_pruned(made.pruned)
    if made.predicted_kl is not None:
        out.print(
            f"formats chosen for each layer: a KL of {made.predicted_kl:.2g} is predicted, roughly"
        )
    out.print(
        f"{info.bits_per_decoder_weight:.2f} bits a weight of the layers, {info.bits_per_weight:.2f} of the whole "
        f"model; {made.seconds:.0f} s",
        soft_wrap=True,
    )


def _print_pruned(pruned: Pruned) -> None:
    config = pruned.model.config
    sizes = [own.size for own in pruned.layers]

    def span(values: Sequence[int]) -> str:
        least, most = min(values), max(values)
        return f"{least}" if least == most else f"{least} to {most}"

    share = pruned.parameters / (pruned.parameters + config.num_parameters)
    told = (
        f"pruned {_percent(share)} of the parameters: layers have {span([own.num_heads for own in sizes])} heads, "
        f"{span([own.num_kv_heads for own in sizes])} KV heads, {span([own.intermediate_size for own in sizes])} neurons"
    )
    fitted = [own for layer in pruned.layers for own in (layer.output, layer.down) if own]
    if fitted:
        kept = [own for own in fitted if own.restored < own.removed]
        before, after = (
            _mean([getattr(own, name) for own in fitted]) for name in ("removed", "restored")
        )
        alone = sum(own.weight is None for own in kept)
        told += (
            f"; {len(kept)} of {len(fitted)} matrices restored, {alone} by a bias alone (squared error on held-out text "
            f"{_percent(before)}, restored {_percent(after)}, means)"
        )
    out.print(told, soft_wrap=True)


def _by_kind(layers: Sequence[Sequence[MatrixReport]]) -> dict[str, list[MatrixReport]]:
    kinds: dict[str, list[MatrixReport]] = {}
    for layer in layers:
        for report in layer:
            kinds.setdefault(report.name.partition(": ")[2], []).append(report)
    return kinds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
