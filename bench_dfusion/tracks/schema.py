"""A track: everything a leaderboard holds equal. One versioned TOML file, its hash in every record."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from bench_dfusion import errors, registry
from bench_dfusion.errors import UsageError
from bench_dfusion.models.options import MemorySection, ModelSection, Section
from bench_dfusion.tracks.prompts import read_prompts, same, shared, twice, unprintable
from bench_dfusion.util import texts


class SamplerSection(Section):
    steps: int = Field(ge=1, description="denoising steps T (count)")
    kind: Literal["native", "cps"] = Field(
        "native",
        exclude_if=lambda value: value == "native",
        description="where the noise of a step comes from: native, the family's own (DDIM, or Flow-GRPO's SDE of a flow), or "
        "cps, coefficients-preserving sampling (2509.05952), whose latents have exactly the noise of their level",
    )
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="the sampler's noise, in [0, 1]: DDIM's eta, the share of the ancestral noise (None: 1), the noise level "
        "a of a flow's SDE (None: 0.7, Flow-GRPO's), or the share of a quarter turn by which cps makes a level's noise anew "
        "(None: 0.8, FlowCPS's). 0: the ODE, without noise, for algorithms that need no density of a step",
    )
    guidance: float = Field(
        1.0,
        ge=0,
        description="classifier-free guidance scale w; 1: no second branch. Networks distilled for guidance are told it "
        "and never have one",
    )


class JudgedSampler(SamplerSection):
    resolution: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda value: value is None,
        description="side of the pictures that are judged (pixels); None: that of training",
    )


class LoraSection(Section):
    rank: int = Field(
        4,
        ge=0,
        description="rank of the LoRA matrices (count); 0: no LoRA, the network's own weights are trained, in float32, and a "
        "copy of them stays as the reference; alpha and init then mean nothing",
    )
    alpha: float | None = Field(None, gt=0, description="LoRA scale numerator; None: the rank, so that the scale is 1")
    targets: tuple[str, ...] | None = Field(
        None, description="module name endings; None: attention projections, and with rank 0 the whole network"
    )
    init: Literal["peft", "gaussian"] = Field(
        "peft",
        exclude_if=lambda value: value == "peft",
        description="how the matrices A begin, B being 0: peft's uniform numbers (standard deviation 1/√(3 n), n the "
        "layer's inputs), or gaussian, of standard deviation 1/rank (ddpo-pytorch, D3PO, D-Fusion, Flow-GRPO). Adam's "
        "first steps change the network in proportion to it: at rank 4 a learning rate published for gaussian is 8 to 15 "
        "times weaker with peft's",
    )

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, values: Any) -> Any:
        """Without a LoRA, no alpha and no beginning, which a track may have for one."""
        if isinstance(values, dict) and values.get("rank") == 0:
            return {name: value for name, value in values.items() if name not in ("alpha", "init")}
        return values


def labels_of(heldout: Sequence[str], clusters: Mapping[str, str] | None) -> tuple[str, ...] | None:
    """See `PromptsSection.labels`."""
    return tuple(clusters.get(p, p) for p in heldout) if clusters else None


class PromptsSection(Section):
    train: tuple[str, ...] = Field(min_length=1, description="prompts trained on")
    validation: tuple[str, ...] = Field((), description="prompts for tuning and choosing designs")
    heldout: tuple[str, ...] = Field(min_length=2, description="prompts that rank, only ever reported")
    templates: dict[str, str] | None = Field(
        None, description="template of each held-out prompt, for figures by template"
    )
    clusters: dict[str, str] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="label of held-out prompts that belong together, one composition in several phrasings: they are no "
        "independent sample, each label counts once (docs/statistics.md)",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_heldout(cls, values: Any) -> Any:
        """Templates and clusters by the held-out prompts' own spelling."""
        heldout = values.get("heldout") if isinstance(values, dict) else None
        if not isinstance(heldout, list | tuple):
            return values
        own = {same(p): p for p in heldout if isinstance(p, str)}
        found = {}
        for key in ("templates", "clusters"):
            if isinstance(said := values.get(key), dict):
                spelt = {
                    own.get(same(p), p) if isinstance(p, str) and p not in heldout else p: t for p, t in said.items()
                }
                found[key] = {**spelt, **{p: t for p, t in said.items() if p in heldout}}
        return {**values, **found}

    @model_validator(mode="after")
    def _disjoint(self) -> PromptsSection:
        sets = {"train": self.train, "validation": self.validation, "heldout": self.heldout}
        for name, prompts in sets.items():
            if any(not same(p) for p in prompts):
                raise ValueError(f"prompts.{name} holds an empty prompt")
            strange = next((p for p in prompts if unprintable(p)), None)
            if strange is not None:
                raise ValueError(f"prompts.{name} holds a control character in {strange!a}: remove it")
            if twins := twice(prompts):
                raise ValueError(f"prompts.{name} holds {twins}{' twice' * (twins.first == twins.second)}")
        for a, b in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
            for twins in shared(sets[a], sets[b]):
                raise ValueError(f"prompts.{a} and prompts.{b} share {twins}: sets must be disjoint")
        strange = next((p for p in self.clusters or () if p not in self.heldout), None)
        if strange is not None:
            raise ValueError(f"prompts.clusters names {strange!r}, which is not held out")
        if self.clusters and len(set(self.labels or ())) < 2:
            raise ValueError("prompts.clusters puts every held-out prompt into one cluster: two or more are needed")
        return self

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The cluster of each held-out prompt, a prompt without one its own; None where the track has none."""
        return labels_of(self.heldout, self.clusters)


class BudgetSection(Section):
    reward_queries: int = Field(ge=1, description="images the training reward may score, targets included (count)")
    prompts_per_round: int = Field(ge=1, description="prompts sampled in a round (count)")
    samples_per_prompt: int = Field(
        16, ge=4, multiple_of=4, description="samples of a prompt in a round (D-Fusion: 16)"
    )
    rungs: tuple[int, ...] | None = Field(
        None,
        min_length=2,
        exclude_if=lambda value: value is None,
        description="budgets at which a run is judged and ranked on its way, rising; the last is reward_queries (reward "
        "queries); None: at the end alone",
    )

    @model_validator(mode="after")
    def _rising(self) -> BudgetSection:
        if self.rungs is None:
            return self
        if list(self.rungs) != sorted({*self.rungs}) or self.rungs[0] < 1:
            raise ValueError(f"rungs: budgets that rise, each 1 or more, not {list(self.rungs)}")
        if self.rungs[-1] != self.reward_queries:
            raise ValueError(f"rungs: the last is reward_queries, {self.reward_queries}, not {self.rungs[-1]}")
        return self

    @property
    def ladder(self) -> tuple[int, ...]:
        """The budgets at which a run is judged, rising; of a track without rungs its one budget (reward queries)."""
        return self.rungs or (self.reward_queries,)


class EvaluationSection(Section):
    judges: tuple[str, ...] = Field(min_length=1, description="rewards that judge base and trained; the first ranks")
    images_per_prompt: int = Field(4, ge=1, description="images of each held-out prompt (count)")
    base_images_per_prompt: int | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="images of each held-out prompt on which the base is judged, once for the track: its checked base, the "
        "first of them on the noise of a run's own (count); None: every run draws the base beside its own images",
    )

    sampler: JudgedSampler | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="the sampler of the pictures that are judged, as people draw with the model: the keys of [sampler], and "
        "resolution, the pictures' side (pixels; none: that of training); none: the sampler of training",
    )

    @model_validator(mode="after")
    def _enough(self) -> EvaluationSection:
        if self.base_images_per_prompt is not None and not 2 <= self.images_per_prompt <= self.base_images_per_prompt:
            raise ValueError(
                f"base_images_per_prompt: a checked base needs images_per_prompt of 2 or more and as many or more of its "
                f"own, not {self.images_per_prompt} and {self.base_images_per_prompt}"
            )
        return self


LOCAL = (
    "local"  # what stands in the place of a directory's path where a track is hashed: `model.sha256` says which model
)
NOT_FIXED = {"algorithms", "builders", "tuned", "tuning", "memory"}


class Track(Section):
    """What one TOML file says of a track, its prompts read and its model's path resolved."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="the track's name")
    version: int = Field(ge=1, description="raised with every change; records of different versions never mix")
    model: ModelSection = Field(description="the base model")
    sampler: SamplerSection = Field(description="how images are drawn, in training and evaluation")
    lora: LoraSection = Field(LoraSection(), description="what is trained")
    prompts: PromptsSection = Field(description="the three sets of prompts, or a source")
    budget: BudgetSection = Field(description="what a run may spend")
    evaluation: EvaluationSection = Field(description="how base and trained are judged")
    seeds: int = Field(5, ge=1, description="seeds a published row has: 0 to this minus 1 (count)")
    batch: int = Field(64, ge=1, description="samples in one forward (count); not part of the hash")
    memory: MemorySection = Field(
        MemorySection(), description="what saves memory of the device; numbers change by rounding at most"
    )
    algorithms: dict[str, dict[str, Any]] = Field({}, description="the track's defaults for algorithms' options")
    tuned: dict[str, dict[str, dict[str, Any]]] = Field(
        {}, description="what differs in an algorithm's options with one builder: [tuned.ALGORITHM.BUILDER]"
    )
    tuning: str = Field("", description="how options were chosen: under which budget, the same for all")
    builders: dict[str, dict[str, Any]] = Field({}, description="the track's defaults for builders' options")
    rewards: dict[str, dict[str, Any]] = Field({}, description="the track's defaults for rewards' options")

    @model_validator(mode="after")
    def _whole(self) -> Track:
        if self.lora.rank == 0:
            if self.model.dtype != "float32":
                raise ValueError(
                    "lora.rank 0 trains the network's own weights, and the optimiser's small steps are lost in "
                    f"{self.model.dtype}: set model.dtype to float32, and model.autocast to {self.model.dtype} for speed"
                )
            if self.memory.shard or self.memory.offload_network:
                raise ValueError(
                    "lora.rank 0 trains the network's own weights, which must be whole on the device: leave memory.shard and "
                    "memory.offload_network off, or train a LoRA"
                )
        return self

    @property
    def id(self) -> str:
        return f"{self.name}-v{self.version}"

    @property
    def fixed(self) -> dict[str, Any]:
        """Everything the track holds equal, JSON-able. The options it suggests for algorithms and builders are not in
        it: they are resolved in each cell, and a track can suggest some for another algorithm and stay what it is.
        Nor is how memory is saved. A model in a directory is what it holds, wherever it lies (see `LOCAL`)."""
        content = self.model_dump(mode="json", exclude=NOT_FIXED)
        folder = Path(self.model.id)
        if folder.is_absolute() and folder.is_dir():
            from bench_dfusion.models import layout

            content["model"] |= {"id": LOCAL, "revision": None, "sha256": layout.read(folder).sha256()}
        return content

    @property
    def hash(self) -> str:
        """SHA-256 of everything the track holds equal, prompts included."""
        return hash_of(self.fixed)


def check_rung(rung: int, ladder: Sequence[int], track: str) -> None:
    """Raise UsageError where a track's ladder of budgets has no rung of this number, counted from 1."""
    if not 1 <= rung <= len(ladder):
        has = f"{len(ladder)} rungs" if len(ladder) > 1 else "no rungs (budget.rungs), only its budget"
        raise UsageError(f"--rung {rung}: {track} has {has}")


SETS = ("train", "validation", "heldout")


def content_sha256(content: Any) -> str:
    """The hash of JSON-able content, whatever the order of its keys: of a track, of a cell's options."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_of(fixed: dict[str, Any]) -> str:
    """The hash of what a track holds equal, as `Track.fixed` gives it and a record has it."""
    return content_sha256({k: v for k, v in fixed.items() if k != "batch"})


def with_model_here(content: dict[str, Any]) -> dict[str, Any]:
    """A track's content with the path of a model that is a directory here made absolute, links and ~ resolved."""
    model = content.get("model")
    name = model.get("id") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str):
        return content
    from bench_dfusion.models import layout

    folder = layout.local(name)
    return content if folder is None or not folder.is_dir() else {**content, "model": {**model, "id": str(folder)}}


def read(source: str | Path) -> dict[str, Any]:
    """A track's content by registered name or TOML path: what it extends merged in, prompt files resolved.

    A `[prompts]` section with a `source` stays as it is: `prompt_sources.resolve` reads the user's copy.
    Raises UsageError.
    """
    return _read(str(source), Path(), ())


def _read(source: str, folder: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    path = folder / source if source.endswith(".toml") else Path(registry.load("tracks", source)())
    if not path.is_file():
        raise UsageError(f"no track file {path}")
    if path.resolve() in above:
        loop = " -> ".join(p.name for p in (*above[above.index(path.resolve()) :], path))
        raise UsageError(f"{path}: tracks extend each other in a loop, {loop}: remove one extends")
    content = read_toml(path)
    for part in ("model", "prompts"):
        if not isinstance(content.get(part, {}), dict):
            raise UsageError(f"{path}: {part} is a section: write [{part}] and its options below")
    if "prompts" in content:
        content["prompts"] = _with_files(content["prompts"], path.parent)
    for key in ("name", "version"):
        if key not in content:
            raise UsageError(f"{path}: a track needs its own {key}: {Track.model_fields[key].description}")
    if "extends" not in content:
        return content
    base = content.pop("extends")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{path}: extends takes a track's name or a TOML file, not {base!r}")
    try:
        under = _read(base, path.parent, (*above, path.resolve()))
    except UsageError as error:
        raise UsageError(f"{path}: extends: {error}") from None
    if (content["name"], content["version"]) == (under.get("name"), under.get("version")):
        raise UsageError(
            f"{path}: {base} is {content['name']} version {content['version']} already: give another name or version"
        )
    return deep_merge(_without_replaced(under, content), content)


def _with_files(prompts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A prompts section with the files it names read, relative to the file that names them."""
    found = dict(prompts)
    for key in () if "source" in prompts else SETS:
        if isinstance(found.get(key), str):
            found[key], templates = read_prompts(folder / found[key])
            if key == "heldout" and templates:
                found["templates"] = templates
    if isinstance(found.get("clusters"), str):
        found["clusters"] = read_prompts(folder / found["clusters"])[1]
    return found


def _without_replaced(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """What is extended without what belongs to something the extending file replaces."""
    under, prompts = dict(under), over.get("prompts", {})
    if "id" in over.get("model", {}) and "model" in under:
        under["model"] = {k: v for k, v in under["model"].items() if k not in ("sha256", "revision")}
    if prompts and "prompts" in under:
        old = under["prompts"]
        listed = any(isinstance(prompts.get(key), list) for key in SETS)
        if ("source" in prompts) != ("source" in old) and (listed or "source" in prompts):
            old = {}
        elif "heldout" in prompts:
            old = {k: v for k, v in old.items() if k not in ("templates", "clusters")}
        under["prompts"] = old
    return without_rungs(under, over)


def without_rungs(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A track's content without its rungs where `changes` give another budget: they led to the one that goes."""
    own, new = content.get("budget"), changes.get("budget")
    if not isinstance(own, dict) or not isinstance(new, dict) or "reward_queries" not in new:
        return content
    return {**content, "budget": {k: v for k, v in own.items() if k != "rungs"}}


def deep_merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it, table by table; lists and values are replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(texts.read(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from None


def validate(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """Build a pydantic model; its first error becomes one line that names the option and the near ones."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A misspelt name explains best why another is missing.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        name = ".".join(str(x) for x in first["loc"])
        fields = _fields(model, first["loc"][:-1])
        if first["type"] == "extra_forbidden":
            section = ".".join(str(x) for x in (where, *first["loc"][:-1]) if x)
            raise UsageError(errors.unknown(f"option {section}", str(first["loc"][-1]), fields)) from None
        if first["type"] == "missing":
            meaning = getattr(fields.get(str(first["loc"][-1])), "description", None)
            raise UsageError(
                f"{where}{'.' * bool(where)}{name} is missing{f': {meaning}' if meaning else ''}"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        given = f", not {first['input']!r}" if name and not isinstance(first["input"], dict) else ""
        raise UsageError(f"{where}{'.' if where and name else ''}{name}: {message}{given}") from None


def _fields(model: type[BaseModel], path: Sequence[object]) -> dict[str, Any]:
    """The fields of the model that lies at `path` within a model: none in a table of free keys."""
    for part in path:
        if str(part) not in model.model_fields:
            return {}
        annotation = model.model_fields[str(part)].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return dict(model.model_fields)
