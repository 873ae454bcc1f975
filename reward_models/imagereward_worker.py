"""The side of `imagereward` that runs in its own environment."""

import os


def load(config, device):
    return Scorer(config, device)


class Scorer:
    def __init__(self, config, device):
        import ImageReward
        from huggingface_hub import hf_hub_download

        names = ("ImageReward.pt", "med_config.json")
        if config["weights"] is None:
            paths = [hf_hub_download("THUDM/ImageReward", name, revision=config["revision"]) for name in names]
        else:
            paths = [os.path.join(config["weights"], name) for name in names]
        self.model = ImageReward.load(paths[0], device=device, med_config=paths[1])
        self.weights = paths[:1]

    def score(self, images, prompts):
        import torch

        with torch.no_grad():
            return [self.model.score(prompt, image) for image, prompt in zip(images, prompts, strict=True)]
