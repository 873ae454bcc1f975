"""`bench-dfusion list`: the plugins that are installed, and one plugin's options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from bench_dfusion import errors, registry
from bench_dfusion.cli.options import Plugins, load_files, out
from bench_dfusion.descriptions import describe
from bench_dfusion.errors import PluginError, UsageError


def list_plugins(
    kind: Annotated[str | None, typer.Argument(help="algorithms, rewards, builders, models or tracks.")] = None,
    name: Annotated[str | None, typer.Argument(help="One plugin, with its options.")] = None,
    plugin: Plugins = None,
) -> None:
    """Show the plugins that are installed, or one plugin's options."""
    load_files(plugin)
    if kind is not None and kind not in registry.KINDS:
        raise UsageError(errors.unknown("kind of plugin", kind, registry.KINDS))
    if kind == "tracks" and name and name.endswith(".toml"):
        _describe_track(name)
        return
    if kind and name:
        found = registry.plugins(kind)
        if name not in found:
            raise UsageError(errors.unknown(kind[:-1], name, found))
        _describe(kind, name, found[name])
        return
    for each in [kind] if kind else registry.KINDS:
        grid = Table(title=each, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "what it is", "source", "from"):
            grid.add_column(column, overflow="fold", no_wrap=column == "name")
        for plugin_name, found_plugin in registry.plugins(each).items():
            try:
                what = describe(found_plugin)
                summary, paper = what.summary, what.paper
            except PluginError as error:
                summary, paper = f"broken: {error}", ""
            grid.add_row(plugin_name, escape(summary), escape(paper), found_plugin.source)
        out.print(grid)
        out.print()


def _describe(kind: str, name: str, plugin: registry.Plugin) -> None:
    value = plugin.load()
    out.print(f"[bold]{name}[/bold]  ({plugin.source})\n{escape(describe(plugin).summary)}")
    if getattr(value, "paper", None):
        out.print(escape(f"source: {value.paper}"))
    if requirements := getattr(value, "requirements", ()):
        out.print(escape(f"needs: {', '.join(requirements)}"), soft_wrap=True, highlight=False)
    if kind == "tracks":
        _describe_track(name)
        return
    fields = getattr(getattr(value, "Config", None), "model_fields", {})
    if fields:
        section = {"algorithms": "algo", "builders": "builder", "rewards": "reward"}[kind]
        grid = Table(box=None, pad_edge=False)
        for column in ("option", "default", "meaning (unit; source)"):
            grid.add_column(column, overflow="fold")
        for option, info in fields.items():
            text = "; ".join(t for t in (info.description, _range(info.metadata), _searched(info.metadata)) if t)
            grid.add_row(f"{section}.{option}", str(info.default), escape(text))
        out.print(grid)
        _suggestions(kind, name)


def _describe_track(source: str) -> None:
    """A track's content, what it leaves to the user, and its hash where it leaves nothing."""
    from bench_dfusion.runs import config
    from bench_dfusion.tracks import schema as tracks
    from bench_dfusion.tracks import sources as prompt_sources

    content = tracks.read(source)
    prompts = content.get("prompts", {})
    if "source" in prompts:
        origin = prompt_sources.SOURCES[prompt_sources.check(prompts, source).source]
        out.print(
            escape(f"prompts: from {origin.title}, not in this package; {origin.hint}"), soft_wrap=True, highlight=False
        )
    elif "model" in content and prompts:
        settings = tracks.validate(tracks.Track, tracks.with_model_here(content), "track")
        config.judges_of(settings)
        out.print(f"{settings.id}, hash {settings.hash}", soft_wrap=True, highlight=False)
    else:
        out.print("leaves the model and the prompts to you: --model DIR_OR_HUB_ID, --prompts FILE", soft_wrap=True)
    out.print_json(json.dumps(content, default=str))


def _searched(metadata: Sequence[Any]) -> str:
    """Where tuning looks for an option."""
    from bench_dfusion.algorithm import Among, Between

    for where in metadata:
        if isinstance(where, Between):
            return f"tuned from {where.low:g} to {where.high:g}"
        if isinstance(where, Among):
            return f"tuned among {', '.join(map(str, where.values))}"
    return ""


def _range(metadata: Sequence[Any]) -> str:
    """The limits of an option as a reader would write them."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
    limits = [f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return ", ".join(limits)


def _suggestions(kind: str, name: str) -> None:
    """What tracks set in the place of a plugin's defaults."""
    from bench_dfusion.tracks import schema as tracks

    where: dict[str, list[str]] = {}
    for track_name in registry.plugins("tracks"):
        content = tracks.read(track_name)
        found = {"": content.get(kind, {}).get(name, {})}
        if kind == "algorithms":
            tuned = content.get("tuned", {}).get(name, {})
            found |= {f" with builder {builder}": options for builder, options in tuned.items()}
        for builder, options in found.items():
            if options:
                values = ", ".join(f"{option} {value}" for option, value in options.items())
                where.setdefault(f"{builder}: {values}", []).append(track_name)
    for what, names in where.items():
        out.print(escape(f"track{'s' * (len(names) > 1)} {', '.join(names)}{what}"), highlight=False)
