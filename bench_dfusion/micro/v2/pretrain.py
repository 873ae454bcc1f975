"""The recipe of the second world's weights: `python -m bench_dfusion.micro.v2.pretrain --work DIR`.

It shares the networks and the training loops of `bench_dfusion.micro.pretrain`. Every stage resumes after a kill
(a checkpoint every two minutes; every step seeded by its number):

- autoencoder: the first world's, trained on with the new backgrounds;
- pictures: latents of renders of every picture that a train composition can be, kept in shards in the work directory;
- denoiser: with its text encoder, from the first world's weights or from none, with true captions at a constant
  learning rate, so that `--steps denoiser=N` may be raised as long as there is time;
- listening: the same networks learn what they predict with guidance of what a picture shows, at the sampler's levels,
  from captions that are wrong at the rates of `listening.NOISY`: a base that draws sharply in one call and listens badly;
- decoder: the autoencoder's, trained on with the encoder's latents and noise; it may follow at any time;
- CLIP: on renders of all compositions with true captions, from the first world's or from none;
- the package, a diffusers pipeline directory and an open_clip directory.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from bench_dfusion import micro
from bench_dfusion.errors import UsageError
from bench_dfusion.micro import pretrain as first
from bench_dfusion.micro.scenes import RELATIONS
from bench_dfusion.micro.v2 import grammar, listening
from bench_dfusion.micro.v2.grammar import Spec
from bench_dfusion.micro.v2.scenes import render, sample_scene
from bench_dfusion.util import files

MIX = {"single": 0.1, "count": 0.2, "attributes": 0.2, "relation": 0.25, "mixed": 0.25}
BATCH = 128
SHARD = 10_000  # pictures a file of latents
RENDERS = {"autoencoder": 20_000, "pictures": 60_000, "clip": 45_000}
STEPS = {"autoencoder": 1000, "denoiser": 855, "listening": 740, "decoder": 2000, "clip": 300}  # what was shipped has
RATES = {"autoencoder": (1.5e-3, 7e-4), "denoiser": (1.5e-3, 1e-3), "listening": (1e-3, 1e-3)}  # from none, from v1's
GUIDANCE, SAMPLER_STEPS = 3.0, 8  # of the predictions that are distilled, of the track's sampler


# ---------------------------------------------------------------- data


def pictures() -> dict[str, list[Spec]]:
    """Every picture of the train compositions by template: the specs that `Spec.picture` gives."""
    result: dict[str, list[Spec]] = {}
    for template in MIX:
        specs = grammar.compositions()["train"][grammar.family(template)]
        if template == "relation":
            specs = tuple(Spec(template, s.things, relation=r) for s in specs for r in RELATIONS)
        result[template] = list(dict.fromkeys(s.picture for s in specs))
    return result


def picture(index: int, seed: int) -> Spec:
    """What picture number `index` shows: templates at the rates of `MIX`, every picture of a template equally often."""
    rng = random.Random(f"{seed}:{index}")
    return rng.choice(_PICTURES[rng.choices(list(MIX), list(MIX.values()))[0]])


_PICTURES = pictures()


def _draw(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    index, seed = job
    spec = picture(index, seed)
    scene = sample_scene(spec, random.Random(f"{seed}:{index}:scene"))
    return render(scene), first.thing_places(spec, scene.objects)


def draw_pictures(start: int, stop: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders uint8 [N, 64, 64, 3] and the places of their things [N, 2, 64] of the pictures `start` to `stop`."""
    images, places = zip(*first.rendered(_draw, [(i, seed) for i in range(start, stop)]), strict=True)
    return np.stack(images), np.stack(places)


def encode_pictures(work: Path, vae: AutoencoderTiny, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [N, 16, 8, 8] and places [N, 2, 64] of `n` pictures, from the work directory's shards or made there."""
    parts = []
    for start in range(0, n, SHARD):
        stop = min(n, start + SHARD)
        path = work / f"pictures-{start}-{stop}.safetensors"
        if not path.exists():
            images, places = draw_pictures(start, stop, seed)
            tensors = {"latents": first.encode(vae, images), "places": torch.from_numpy(places)}
            files.save_tensors(path, tensors, {})
        parts.append(files.load_tensors(path)[0])
    return torch.cat([p["latents"] for p in parts]), torch.cat([p["places"] for p in parts])


def _captioned(job: tuple[int, int]) -> tuple[np.ndarray, Spec]:
    index, seed = job
    rng = random.Random(f"{seed}:{index}")
    spec = grammar.random_spec(rng.choices(list(MIX), list(MIX.values()))[0], rng)
    return render(sample_scene(spec, rng)), spec


def everything(n: int, seed: int) -> first.World:
    """`n` renders of compositions of every split with their captions: what a judge is trained on."""
    images, specs = zip(*first.rendered(_captioned, [(i, seed) for i in range(n)]), strict=True)
    return first.World(np.stack(images), list(specs), np.zeros((n, 2, 0), np.float16))


class Heard:
    """Batches of captions of the train compositions, each with a picture of what `listening.shown` says it shows."""

    def __init__(
        self, latents: Tensor, places: Tensor, tokenizer: CLIPTokenizer, rates: listening.Rates, seed: int
    ) -> None:
        self.latents, self.places, self.tokenizer, self.rates, self.seed = latents, places, tokenizer, rates, seed
        self.rows: dict[Spec, list[int]] = {}
        for i in range(len(latents)):
            self.rows.setdefault(picture(i, seed), []).append(i)
        self.encoded: dict[str, Tensor] = {}

    def __call__(self, step: int) -> first.Batch:
        rng = random.Random(f"{self.seed}:{step}")
        chosen: list[int] = []
        ids: list[Tensor] = []
        order: list[list[int]] = []
        truths: list[Tensor] = []
        while len(chosen) < BATCH:
            template = rng.choices(list(MIX), list(MIX.values()))[0]
            caption = grammar.draw(template, "train", rng)
            shown = listening.shown(caption, self.rates, rng)
            if rows := self.rows.get(shown.picture):  # a short trial has not every picture
                chosen.append(rng.choice(rows))
                ids.append(self.tokens(caption.prompt))
                told = caption if shown.picture == caption.picture else shown.picture
                truths.append(self.tokens(told.prompt))
                # which of the picture's places each thing of the caption has; 2 is none
                order.append([2 if o is None else o for o in (*shown.owners, None)[:2]])
        tokens, truth = torch.stack(ids), torch.stack(truths)
        longest = int((torch.cat([tokens, truth]) != self.tokenizer.pad_token_id).sum(1).max()) + 1
        tokens, truth = tokens[:, :longest], truth[:, :longest]
        places = self.places[chosen].float()
        places = torch.cat([places, torch.zeros_like(places[:, :1])], 1)
        places = places[torch.arange(BATCH)[:, None], torch.tensor(order)]
        things = first.token_things(tokens, self.tokenizer)
        return first.Batch(self.latents[chosen].float(), tokens, first.token_places(things, places), truth)

    def tokens(self, prompt: str) -> Tensor:
        if prompt not in self.encoded:
            encoded = self.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids[0]
            self.encoded[prompt] = encoded
        return self.encoded[prompt]


# ---------------------------------------------------------------- stages


def hold(done: float) -> float:
    """A constant learning rate: where training ends may be decided later."""
    return 1.0


def autoencoder(
    work: Path, images: Callable[[], np.ndarray], steps: int, seed: int, warm: bool, device: torch.device
) -> AutoencoderTiny:
    """The autoencoder, from the work directory where it is done."""
    done = work / "autoencoder"
    if not done.exists():
        start = AutoencoderTiny.from_pretrained(micro.PIPELINE / "vae") if warm else None
        vae = first.train_autoencoder(work, images(), steps, seed, start, RATES["autoencoder"][warm], device)
        part = work / "autoencoder.part"
        shutil.rmtree(part, ignore_errors=True)
        vae.save_pretrained(part)
        part.rename(done)
    return AutoencoderTiny.from_pretrained(done).to(device).eval()


def networks(warm: bool, tokenizer: CLIPTokenizer, seed: int) -> tuple[CLIPTextModel, PixArtTransformer2DModel]:
    """Text encoder and denoiser: the first world's, or new ones."""
    torch.manual_seed(seed)
    text, net = first.make_text_encoder(tokenizer), first.make_denoiser()
    if warm:
        pipe = DiffusionPipeline.from_pretrained(micro.PIPELINE)
        text.load_state_dict(pipe.text_encoder.state_dict())
        net.load_state_dict(pipe.transformer.state_dict())
    return text, net


def checkpointed(work: Path) -> tuple[AutoencoderTiny, CLIPTextModel, PixArtTransformer2DModel, dict[str, int]]:
    """Autoencoder, text encoder and denoiser of a run that may still go on, averaged, and each stage's steps so far.

    Networks of stages that have not begun are untrained. Raises UsageError where nothing has been kept yet.
    """
    steps: dict[str, int] = {}

    def load(stage: str, modules: dict[str, torch.nn.Module]) -> None:
        path = work / f"{stage}.safetensors"
        if path.exists():
            tensors, meta = files.load_tensors(path)
            steps[stage] = meta["step"]
            for name, module in modules.items():
                prefix = f"ema.{name}."
                module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
                module.eval()

    vae = first.make_autoencoder().eval()
    text, net = networks(False, first.make_tokenizer(), 0)
    load("autoencoder", {"ae": vae})
    if not steps:
        raise UsageError(f"{work} holds no pre-training, or one of less than {first.CHECKPOINT_EVERY:.0f} s")
    if (work / "autoencoder").exists():  # its latents standardised
        vae = AutoencoderTiny.from_pretrained(work / "autoencoder").eval()
    load("denoiser", {"text": text, "net": net})
    load("listening", {"text": text, "net": net})
    load("decoder", {"decoder": vae.decoder})
    return vae, text, net, steps


def parse_steps(words: list[str]) -> dict[str, int]:
    """`denoiser=20000` over the recipe's own steps. Raises UsageError for a stage that is none or no number."""
    steps = dict(STEPS)
    for word in words:
        stage, _, number = word.partition("=")
        if stage not in STEPS or not number.isdigit() or int(number) < 1:
            raise UsageError(f"--steps {word}: it reads STAGE=NUMBER with a stage of {', '.join(STEPS)}")
        steps[stage] = int(number)
    return steps


def same_recipe(work: Path, recipe: dict[str, object]) -> None:
    """Note what a work directory holds. Raises UsageError where it holds something else."""
    path = work / "recipe.json"
    if path.exists() and files.read_json(path) != recipe:
        raise UsageError(f"{work} holds a run of {files.read_json(path)}, not of {recipe}: give another --work")
    files.write_json(path, recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; the same directory resumes a killed run")
    parser.add_argument("--out", type=Path, default=Path("micro-v2-weights"), help="where pipeline/ is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", choices=("micro-v1", "none"), default="micro-v1", help="weights to train on from")
    parser.add_argument("--device", type=torch.device, default=first.CPU, help="where networks train, as cuda")
    parser.add_argument("--steps", nargs="*", default=[], metavar="STAGE=N", help=f"other steps than {STEPS}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the recipe's steps and renders, for a trial")
    args = parser.parse_args()
    try:
        steps = {stage: max(1, round(n * args.scale)) for stage, n in parse_steps(args.steps).items()}
    except UsageError as error:
        parser.error(str(error))
    renders = {stage: max(500, round(n * args.scale)) for stage, n in RENDERS.items()}
    work, seed, device, warm = args.work, args.seed, args.device, args.start == "micro-v1"
    work.mkdir(parents=True, exist_ok=True)
    with files.locked(work, f"{work}: another run trains there"):
        same_recipe(work, {"seed": seed, "start": args.start, "renders": renders})
        tokenizer = first.make_tokenizer()
        images = cache(lambda: draw_pictures(0, renders["autoencoder"], seed + 1)[0])
        vae = autoencoder(work, images, steps["autoencoder"], seed, warm, device)
        latents, places = encode_pictures(work, vae, renders["pictures"], seed + 2)
        text, net = networks(warm, tokenizer, seed)
        true, wrong = (
            Heard(latents, places, tokenizer, rates, seed + 2) for rates in (listening.CLEAN, listening.NOISY)
        )
        rate = RATES["denoiser"][warm]
        first.train_denoiser(
            work, text, net, tokenizer, true, steps["denoiser"], seed, "denoiser", rate, 0.999, hold, device=device
        )
        guided = first.Guided(text, net, GUIDANCE, SAMPLER_STEPS, device)
        rate, falling = RATES["listening"][warm], first.warm_then_cosine
        first.train_denoiser(
            work,
            text,
            net,
            tokenizer,
            wrong,
            steps["listening"],
            seed,
            "listening",
            rate,
            0.995,
            falling,
            device=device,
            guided=guided,
        )
        first.train_decoder(work, vae, first.encode(vae, images()), images(), steps["decoder"], seed, device)
        for module in (vae, text, net):
            module.cpu()
        first.package(args.out / "pipeline", tokenizer, vae, text, net)
        start = load_file(micro.CLIP / "open_clip_model.safetensors") if warm else None
        world = everything(renders["clip"], seed + 3)
        judge = first.train_clip(work, world, tokenizer, steps["clip"], seed, start=start)
        first.package_clip(args.out / "clip", judge, tokenizer)
    print(f"{args.out}: pipeline {files.tree_sha256(args.out / 'pipeline')}")


if __name__ == "__main__":
    main()
