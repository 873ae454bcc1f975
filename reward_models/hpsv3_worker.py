"""The side of `hpsv3` that runs in its own environment."""


def load(config, device):
    return Scorer(config, device)


class Scorer:
    def __init__(self, config, device):
        from hpsv3 import HPSv3RewardInferencer
        from huggingface_hub import hf_hub_download

        path = config["weights"]
        if path is None:
            path = hf_hub_download("MizzenAI/HPSv3", "HPSv3.safetensors", revision=config["revision"])
        self.model = HPSv3RewardInferencer(checkpoint_path=path, device=device)
        self.weights = [path]

    def score(self, images, prompts):
        import torch

        with torch.no_grad():  # by name: the two arguments changed places after 1.0.0
            found = self.model.reward(prompts=prompts, image_paths=images)
        return found[:, 0].float().tolist()  # mean, uncertainty
