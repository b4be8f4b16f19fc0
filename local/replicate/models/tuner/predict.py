"""`local/tuner`: says a sentence in the manner of the text that its weights were trained on; see `train.py`."""

import json
import random

from cog import BaseRunner, Input, Path


class Predictor(BaseRunner):
    """Follows one word by another, as often as the training text did."""

    def run(
        self,
        weights: Path = Input(description="The file of weights that a training gave."),  # noqa: B008 - the way of Cog
        words: int = Input(description="How many words to say.", default=12, ge=1, le=1000),
        seed: int = Input(description="Same weights and seed: same sentence.", default=0),
    ) -> str:
        """Say a sentence."""
        following = json.loads(weights.read_text())
        random_ = random.Random(seed)  # noqa: S311 - a sentence, not a secret
        said = [random_.choice(sorted(following))]
        while len(said) < words:
            counted = following.get(said[-1]) or dict.fromkeys(following, 1)
            said += random_.choices(list(counted), list(counted.values()))
        return " ".join(said)
