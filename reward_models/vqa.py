"""The probability of yes: a vision-language model is asked whether the picture shows the prompt (Lin et al. 2024).

Any model of transformers' image-text-to-text classes with a chat template; written for the Qwen-VL family. By default
Qwen/Qwen2.5-VL-7B-Instruct of the Hub, branch main (Apache-2.0, 8.3 G parameters, 16.6 GB in bfloat16); the 3B of that
family is for research only. The answer's first token decides: softmax over the logits of yes and no in their usual
spellings, summed, in [0, 1]. The question is VQAScore's; its model (CLIP-FlanT5) is another, so scores are not its.

With a file of questions the score is DSG's (Cho et al. 2024): the share of the prompt's questions that are answered with
yes, where one whose parent is answered with no counts as no.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from bench_dfusion.errors import UsageError
from bench_dfusion.rewards import weights
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.tracks.prompts import same
from bench_dfusion.util import files, hub, texts

SPELLINGS = ("{}", " {}")  # of each of yes, Yes and YES
ASKED = "{question} Please answer yes or no."
COLUMNS = ("text", "proposition_id", "dependency", "question_natural_language")  # of dsg-1k-anns.csv


class Question(NamedTuple):
    """One of a prompt's questions, and the places of those on which it depends."""

    text: str
    parents: tuple[int, ...]


def read_questions(path: Path) -> dict[str, tuple[Question, ...]]:
    """The questions of each prompt, of a CSV file as DSG's `dsg-1k-anns.csv`: a row a question, those of a prompt in a row;
    dependency is 0 or the proposition_ids of its parents, separated by commas. Raises ValueError.
    """
    try:
        table = csv.DictReader(io.StringIO(texts.read(path, "questions")))
        missing = [c for c in COLUMNS if c not in (table.fieldnames or ())]
        rows = [] if missing else [(table.line_num, row) for row in table]
    except csv.Error as error:
        raise ValueError(f"questions {path}: {error}") from None
    if missing or not rows:
        raise ValueError(f"questions {path}: " + (f"no column {missing[0]}" if missing else "no question"))
    groups: dict[tuple[str, str], list[tuple[int, dict[str, str]]]] = {}
    for line, row in rows:
        groups.setdefault((row["text"] or "", row.get("item_id") or ""), []).append((line, row))
    found: dict[str, tuple[Question, ...]] = {}
    for (prompt, _), own in groups.items():
        found.setdefault(_key(prompt), tuple(_questions(path, own)))  # of a prompt that is there twice the first
    return found


def _questions(path: Path, rows: Sequence[tuple[int, dict[str, str]]]) -> Iterator[Question]:
    places = {(row["proposition_id"] or "").strip(): i for i, (_, row) in enumerate(rows)}
    for line, row in rows:
        named = [name.strip() for name in (row["dependency"] or "").split(",")]
        parents = [name for name in named if name not in ("", "0")]
        unknown = [name for name in parents if name not in places]
        if unknown or not (row["question_natural_language"] or "").strip() or len(places) < len(rows):
            what = f"there is no proposition {unknown[0]!r}" if unknown else "no question, or a proposition_id twice"
            raise ValueError(f"questions {path}, line {line}: {what}")
        yield Question(row["question_natural_language"].strip(), tuple(places[name] for name in parents))


def _words(text: str) -> str:
    return text.replace("<|", "< |")  # what spells a control token is words, not control


def _key(prompt: str) -> str:
    return " ".join(prompt.split())


def gated(yes: Sequence[float], questions: Sequence[Question], graded: bool) -> float:
    """DSG's score of one picture from P(yes) to each question: a yes (above 1/2) counts 1, or P(yes) if `graded`, and 0
    where a parent is answered with no."""
    counted = [
        (p if graded else float(p > 0.5)) if all(yes[parent] > 0.5 for parent in question.parents) else 0.0
        for p, question in zip(yes, questions, strict=True)
    ]
    return sum(counted) / len(counted)


class VQAConfig(RewardConfig):
    model: str = Field("Qwen/Qwen2.5-VL-7B-Instruct", description="a directory or a Hub id")
    revision: str | None = Field(None, description="Hub revision (commit or tag); None: the default branch")
    question: str = Field(
        'Does this figure show "{prompt}"? Please answer yes or no.',
        description="what is asked; {prompt} stands for the prompt (VQAScore's)",
    )
    questions: str | None = Field(
        None,
        description="a CSV file of questions for each prompt, as DSG's dsg-1k-anns.csv; then `question` is not asked",
    )
    questions_sha256: str | None = Field(None, description="SHA-256 of that file (found, and checked where given)")
    graded: bool = Field(False, description="a question counts P(yes) in the place of 0 or 1: denser, to train on")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of the weights")
    batch: int = Field(8, ge=1, description="images in one forward (count)")

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, values: Any) -> Any:
        """A cell is that of the file's content."""
        if not isinstance(values, dict):
            return values
        path = values.get("questions")
        if path is None and values.get("graded"):
            raise ValueError("graded is for questions: give reward.questions")
        if not isinstance(path, str):
            return values
        read_questions(Path(path))
        digest = files.sha256(Path(path))
        if values.get("questions_sha256") not in (None, digest):
            raise ValueError(f"questions {path} hashes to {digest[:12]}…, not {values['questions_sha256'][:12]}…")
        return {**values, "questions_sha256": digest}

    @field_validator("question")
    @classmethod
    def _asks(cls, question: str) -> str:
        if "{prompt}" not in question:
            raise ValueError("write {prompt} where the prompt goes")
        return question


class VQA(Reward):
    name = "vqa"
    summary = (
        "P(yes) of a vision-language model asked for the prompt, or DSG's questions "
        "(Qwen-VL family; Apache-2.0, 8.3 G parameters)"
    )
    paper = "Lin et al. 2024 (VQAScore); Bai et al. 2025 (Qwen2.5-VL)"
    unit = "probability of yes, in [0, 1]"
    limits = (0.0, 1.0)
    Config: ClassVar[type[RewardConfig]] = VQAConfig
    by_batch = True
    one_judge = True  # the same model, asked in other words
    config: VQAConfig

    def __init__(self, config: VQAConfig, device: torch.device | str = "cpu"):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        super().__init__(config, device)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(hub.look(config.model), revision=config.revision)
            model = AutoModelForImageTextToText.from_pretrained(
                config.model, revision=config.revision, dtype=getattr(torch, config.dtype)
            )
        except Exception as error:  # of transformers, the Hub's client, tokenizers: many kinds
            raise weights.missing(self.name, config.model, "model", error) from None
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.processor.tokenizer.padding_side = "left"  # the answer follows the last token of every row
        self.yes, self.no = self._tokens("yes"), self._tokens("no")
        self.questions = read_questions(Path(config.questions)) if config.questions else None
        self._spelled = {same(prompt): prompt for prompt in reversed(self.questions or {})}

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts if self.questions is not None else ():
            self._asked(prompt)

    def _asked(self, prompt: str) -> tuple[Question, ...]:
        assert self.questions is not None
        own = prompt if _key(prompt) in self.questions else self._spelled.get(same(prompt))
        if own is None:
            raise ValueError(f"reward vqa: {self.config.questions} has no questions for {prompt!r}")
        return self.questions[_key(own)]

    def _tokens(self, word: str) -> list[int]:
        """The tokens that are a spelling of a word by themselves. Raises UsageError where there is none."""
        spelt = [s.format(w) for w in (word, word.capitalize(), word.upper()) for s in SPELLINGS]
        encoded = (self.processor.tokenizer.encode(s, add_special_tokens=False) for s in spelt)
        found = sorted({tokens[0] for tokens in encoded if len(tokens) == 1})
        if not found:
            raise UsageError(f"reward vqa: {self.config.model} has no token for {word}: take another model")
        return found

    def text(self, prompt: str) -> str:
        """The question for a prompt in the model's chat format, up to the answer."""
        return self._chat(self.config.question.replace("{prompt}", _words(prompt)))

    def _chat(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size, scores = self.config.batch, []
        for i in range(0, len(images), size):
            pictures = [Image.fromarray(p) for p in images[i : i + size].numpy()]
            part = prompts[i : i + size]
            if self.questions is None:
                scores.append(self._yes(pictures, [self.text(p) for p in part]))
                continue
            asked = [self._asked(p) for p in part]
            texts = [self._chat(ASKED.replace("{question}", _words(q.text))) for own in asked for q in own]
            seen = [picture for picture, own in zip(pictures, asked, strict=True) for _ in own]
            answers = [self._yes(seen[k : k + size], texts[k : k + size]) for k in range(0, len(texts), size)]
            each = torch.cat(answers).split([len(own) for own in asked])
            pairs = zip(each, asked, strict=True)
            scores.append(torch.tensor([gated(yes.tolist(), own, self.config.graded) for yes, own in pairs]))
        return torch.cat(scores)

    def _yes(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """P(yes) [B] of pictures and chats, in one forward."""
        inputs = self.processor(text=list(texts), images=list(pictures), padding=True, return_tensors="pt")
        with torch.no_grad():
            output = self.model(**inputs.to(self.device), use_cache=False, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        yes, no = (logits[:, tokens].logsumexp(-1) for tokens in (self.yes, self.no))
        return (yes - no).sigmoid().cpu()

    def fingerprint(self) -> str:
        if not hasattr(self, "_hash"):
            processor = self.processor.image_processor.to_dict()
            rules = (
                f"vqa {self.text('{prompt}')} {self.config.dtype} {self.yes} {self.no} "
                f"{sorted((k, str(v)) for k, v in processor.items() if not k.startswith('_'))} "
                f"{sorted(self.processor.tokenizer.get_vocab().items())}"
            )
            if self.questions is not None:
                rules += f" {ASKED} {sorted(self.questions.items())} {self.config.graded}"
            self._hash = weights.fingerprint(rules, self.model)
        return self._hash
