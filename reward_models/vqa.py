"""The probability of yes: a vision-language model is asked whether the picture shows the prompt (Lin et al. 2024).

Any model of transformers' image-text-to-text classes with a chat template; written for the Qwen-VL family. By default
Qwen/Qwen2.5-VL-7B-Instruct of the Hub, branch main (Apache-2.0, 8.3 G parameters, 16.6 GB in bfloat16); the 3B of that
family is for research only. The answer's first token decides: softmax over the logits of yes and no in their usual
spellings, summed, in [0, 1]. The question is VQAScore's; its model (CLIP-FlanT5) is another, so scores are not its.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from bench_dfusion import weights
from bench_dfusion.registry import UsageError
from bench_dfusion.reward import Reward, RewardConfig

SPELLINGS = ("{}", " {}")  # of each of yes, Yes and YES


class VQAConfig(RewardConfig):
    model: str = Field("Qwen/Qwen2.5-VL-7B-Instruct", description="a directory or a Hub id")
    revision: str | None = Field(None, description="Hub revision (commit or tag); None: the default branch")
    question: str = Field(
        'Does this figure show "{prompt}"? Please answer yes or no.',
        description="what is asked; {prompt} stands for the prompt (VQAScore's)",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of the weights")
    batch: int = Field(8, ge=1, description="images in one forward (count)")

    @field_validator("question")
    @classmethod
    def _asks(cls, question: str) -> str:
        if "{prompt}" not in question:
            raise ValueError("write {prompt} where the prompt goes")
        return question


class VQA(Reward):
    name = "vqa"
    summary = "P(yes) of a vision-language model asked for the prompt (Qwen-VL family; Apache-2.0, 8.3 G parameters)"
    paper = "Lin et al. 2024 (VQAScore); Bai et al. 2025 (Qwen2.5-VL)"
    unit = "probability of yes, in [0, 1]"
    Config: ClassVar[type[RewardConfig]] = VQAConfig
    by_batch = True
    config: VQAConfig

    def __init__(self, config: VQAConfig, device: torch.device | str = "cpu"):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        super().__init__(config, device)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(config.model, revision=config.revision)
            model = AutoModelForImageTextToText.from_pretrained(
                config.model, revision=config.revision, dtype=getattr(torch, config.dtype)
            )
        except Exception as error:  # of transformers, the Hub's client, tokenizers: many kinds
            raise weights.missing(self.name, config.model, "model", error) from None
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.processor.tokenizer.padding_side = "left"  # the answer follows the last token of every row
        self.yes, self.no = self._tokens("yes"), self._tokens("no")

    def _tokens(self, word: str) -> list[int]:
        """The tokens that are a spelling of a word by themselves. Raises UsageError where there is none."""
        spelt = [s.format(w) for w in (word, word.capitalize(), word.upper()) for s in SPELLINGS]
        encoded = (self.processor.tokenizer.encode(s, add_special_tokens=False) for s in spelt)
        found = sorted({tokens[0] for tokens in encoded if len(tokens) == 1})
        if not found:
            raise UsageError(f"reward vqa: {self.config.model} has no token for {word}: take another model")
        return found

    def text(self, prompt: str) -> str:
        """The question in the model's chat format, up to the answer."""
        safe = prompt.replace("<|", "< |")  # a prompt that spells a control token is words, not control
        content = [{"type": "image"}, {"type": "text", "text": self.config.question.replace("{prompt}", safe)}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size, parts = self.config.batch, []
        for i in range(0, len(images), size):
            pictures = [Image.fromarray(p) for p in images[i : i + size].numpy()]
            texts = [self.text(p) for p in prompts[i : i + size]]
            inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self.device)
            with torch.no_grad():
                logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            yes, no = (logits[:, tokens].logsumexp(-1) for tokens in (self.yes, self.no))
            parts.append((yes - no).sigmoid().cpu())
        return torch.cat(parts)

    def fingerprint(self) -> str:
        if not hasattr(self, "_hash"):
            processor = self.processor.image_processor.to_dict()
            rules = (
                f"vqa {self.text('{prompt}')} {self.config.dtype} {self.yes} {self.no} "
                f"{sorted((k, str(v)) for k, v in processor.items() if not k.startswith('_'))} "
                f"{sorted(self.processor.tokenizer.get_vocab().items())}"
            )
            self._hash = weights.fingerprint(rules, self.model)
        return self._hash
