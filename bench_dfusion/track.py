"""A track: everything a leaderboard holds equal. One versioned TOML file, its hash in every record."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench_dfusion import registry
from bench_dfusion.registry import UsageError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    id: str = Field(description="'micro' (embedded), a local pipeline directory, or a Hub id")
    revision: str | None = Field(None, description="Hub revision (commit or tag); None: the default branch")
    sha256: str | None = Field(
        None, description="hash of the pipeline directory's weights and configs; None: not fixed"
    )
    dtype: str = Field("float32", description="dtype of the frozen weights: float32, bfloat16 or float16")
    autocast: str | None = Field(None, description="dtype of the network's arithmetic; None: its own")


class SamplerSection(Section):
    steps: int = Field(ge=1, description="denoising steps T (count)")
    eta: float = Field(1.0, gt=0, le=1, description="DDIM's eta: share of the ancestral noise, in (0, 1]")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance scale w; 1: no second branch")


class LoraSection(Section):
    rank: int = Field(4, ge=1, description="rank of the LoRA matrices (count)")
    alpha: float | None = Field(None, gt=0, description="LoRA scale numerator; None: the rank, so that the scale is 1")
    targets: tuple[str, ...] | None = Field(None, description="module name endings; None: attention projections")


class PromptsSection(Section):
    train: tuple[str, ...] = Field(min_length=1, description="prompts trained on")
    validation: tuple[str, ...] = Field((), description="prompts for tuning and choosing designs")
    heldout: tuple[str, ...] = Field(min_length=2, description="prompts that rank, only ever reported")
    templates: dict[str, str] | None = Field(
        None, description="template of each held-out prompt, for figures by template"
    )

    @model_validator(mode="after")
    def _disjoint(self) -> PromptsSection:
        sets = {"train": self.train, "validation": self.validation, "heldout": self.heldout}
        for name, prompts in sets.items():
            if len(set(prompts)) != len(prompts):
                double = next(p for p in prompts if prompts.count(p) > 1)
                raise ValueError(f"prompts.{name} holds {double!r} twice")
            if any(not p.strip() for p in prompts):
                raise ValueError(f"prompts.{name} holds an empty prompt")
        for a, b in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
            both = set(sets[a]) & set(sets[b])
            if both:
                raise ValueError(f"prompts.{a} and prompts.{b} share {sorted(both)[0]!r}: sets must be disjoint")
        return self


class BudgetSection(Section):
    reward_queries: int = Field(ge=1, description="images the training reward may score, targets included (count)")
    prompts_per_round: int = Field(ge=1, description="prompts sampled in a round (count)")
    samples_per_prompt: int = Field(
        16, ge=4, multiple_of=4, description="samples of a prompt in a round (D-Fusion: 16)"
    )


class EvaluationSection(Section):
    judges: tuple[str, ...] = Field(min_length=1, description="rewards that judge base and trained; the first ranks")
    images_per_prompt: int = Field(4, ge=1, description="images of each held-out prompt (count)")


SUGGESTIONS = {"algorithms", "builders", "tuned", "tuning"}


class Track(Section):
    """See the module."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="the track's name")
    version: int = Field(ge=1, description="raised with every change; records of different versions never mix")
    model: ModelSection
    sampler: SamplerSection
    lora: LoraSection = LoraSection()
    prompts: PromptsSection
    budget: BudgetSection
    evaluation: EvaluationSection
    seeds: int = Field(5, ge=1, description="seeds a published row has: 0 to this minus 1 (count)")
    batch: int = Field(64, ge=1, description="samples in one forward (count); not part of the hash")
    algorithms: dict[str, dict[str, Any]] = Field({}, description="the track's defaults for algorithms' options")
    tuned: dict[str, dict[str, dict[str, Any]]] = Field(
        {}, description="what differs in an algorithm's options with one builder: [tuned.ALGORITHM.BUILDER]"
    )
    tuning: str = Field("", description="how options were chosen: under which budget, the same for all")
    builders: dict[str, dict[str, Any]] = Field({}, description="the track's defaults for builders' options")
    rewards: dict[str, dict[str, Any]] = Field({}, description="the track's defaults for rewards' options")

    @property
    def id(self) -> str:
        return f"{self.name}-v{self.version}"

    @property
    def fixed(self) -> dict[str, Any]:
        """Everything the track holds equal, JSON-able. The options it suggests for algorithms and builders are not in
        it: they are resolved in each cell, and a track can suggest some for another algorithm and stay what it is."""
        return self.model_dump(mode="json", exclude=SUGGESTIONS)

    @property
    def hash(self) -> str:
        """SHA-256 of everything the track holds equal, prompts included."""
        content = {k: v for k, v in self.fixed.items() if k != "batch"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(source: str | Path) -> dict[str, Any]:
    """A track's content by registered name or TOML path, prompt files resolved. Raises UsageError."""
    path = Path(source)
    if not str(source).endswith(".toml"):
        path = Path(registry.load("tracks", str(source))())
    if not path.is_file():
        raise UsageError(f"no track file {path}")
    content = read_toml(path)
    prompts = content.get("prompts", {})
    for key, value in list(prompts.items()):
        if isinstance(value, str):
            prompts[key], templates = read_prompts(path.parent / value)
            if key == "heldout" and templates:
                prompts["templates"] = templates
    return content


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: {error}") from None


def read_prompts(path: Path) -> tuple[list[str], dict[str, str]]:
    """The prompts of a text file, one a line, a tab and the prompt's template may follow. Raises UsageError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UsageError(f"no prompts file {path}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"prompts file {path}: {error}") from None
    parts = [line.partition("\t") for line in lines if line]
    if not parts:
        raise UsageError(f"prompts file {path} holds no prompt (one a line)")
    return [p[0].strip() for p in parts], {p[0].strip(): p[2].strip() for p in parts if p[2].strip()}


def validate(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """Build a pydantic model; its first error becomes one line that names the option and the near ones."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(x) for x in first["loc"])
        if first["type"] == "extra_forbidden":
            known = model
            for part in first["loc"][:-1]:
                annotation = known.model_fields[str(part)].annotation
                known = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else known
            raise UsageError(registry.unknown(f"option {where}", str(first["loc"][-1]), known.model_fields)) from None
        message = first["msg"].removeprefix("Value error, ")
        given = f", not {first['input']!r}" if name and not isinstance(first["input"], dict) else ""
        raise UsageError(f"{where}{'.' if where and name else ''}{name}: {message}{given}") from None
