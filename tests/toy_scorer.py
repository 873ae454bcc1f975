"""A scorer for tests/test_isolated.py, in an environment with another `toypkg`: what it does wrong, the prompt says."""

import os
import signal
import subprocess
import sys
import time

import toypkg  # of the environment that the reward declares


def load(config, device):
    print("loading on", device)  # a library's print must not reach the protocol
    if config["fail"]:
        raise RuntimeError("no weights here")
    return Scorer(config)


class Scorer:
    def __init__(self, config):
        self.config = config
        self.weights = [config["weights"]] if config["weights"] else []

    def score(self, images, prompts):
        print("scoring", len(prompts), sys.stdin.read())
        subprocess.run(["echo", "from a child"])
        word = prompts[0].split()[0]
        if word == "die-once" and not os.path.exists(self.config["note"]):
            open(self.config["note"], "w").close()
            print("about to die", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "die":
            print("my last words\x1b[31m", file=sys.stderr)
            os._exit(7)
        if word == "hang":
            child = subprocess.Popen(["sleep", "600"])
            with open(self.config["note"], "w") as file:
                file.write(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        if word == "raise":
            raise ValueError("cannot read this picture")
        scores = [sum(bytes(image)) / 1000 + len(prompt) for image, prompt in zip(images, prompts, strict=True)]
        if word == "nan":
            scores[0] = float("nan")
        return scores[1:] if word == "few" else [self.config["scale"] * score for score in scores]


assert toypkg.VERSION == "1.0", toypkg.VERSION
