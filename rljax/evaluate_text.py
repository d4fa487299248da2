"""Held-out text: negative log-likelihood of a trained token, and perplexity."""

import numpy as np
from jaxtyping import Float, Int

from rljax.data.batches import DataPosition, SupervisedSource
from rljax.forward import Forward, make_score
from rljax.models.decoder import Params
from rljax.rewards.estimates import ratio_with_interval
from rljax.sharding import gather, to_global

RESAMPLES = 1000


class TextEvaluator:
    """One split's text and the program that scores it, ``rows`` rows a call; always in the same order."""

    tree = "policy"

    def __init__(self, forward: Forward, source: SupervisedSource, rows: int, pieces: int, bin_length: int | None):
        self.source, self.rows, self.layout = source, rows, forward.layout
        self._score = make_score(forward, 1, pieces, bin_length)

    def run(self, trees: dict[str, Params]) -> dict[str, float]:
        """Metrics of the split. Every process gets the same numbers."""
        logprobs, tokens = [], []
        position = DataPosition()
        for start in range(0, len(self.source), self.rows):
            _, batch, position = self.source.take(position, self.rows)
            host = {"tokens": batch.tokens, "valid": batch.valid, "loss_mask": batch.loss_mask}
            placed = {name: to_global(array, self.layout.rows) for name, array in host.items()}
            kept = slice(0, len(self.source) - start)  # the last call is filled up with the first rows
            found = gather(self._score(trees[self.tree], placed)).astype(np.float64)
            logprobs.append(found.sum(axis=1, where=batch.loss_mask)[kept])
            tokens.append(batch.loss_mask.sum(axis=1)[kept])
        return text_metrics(np.concatenate(logprobs), np.concatenate(tokens))


def text_metrics(logprobs: Float[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Of rows' summed log-probs and their counts of trained tokens: every token weighs the same.

    ``score`` is the mean log-prob of a token, ``nll`` its negative and ``perplexity`` exp(nll), each with its 95 %
    interval, a bootstrap over rows. Rows without a trained token are left out; {} if there are no others.
    """
    trained = tokens > 0
    if not trained.any():
        return {}
    score = ratio_with_interval("score", logprobs[trained], tokens[trained], resamples=RESAMPLES)
    mean, low, high = score.values()
    nll = {"nll": -mean, "nll_low": -high, "nll_high": -low}
    perplexity = {name.replace("nll", "perplexity"): float(np.exp(value)) for name, value in nll.items()}
    return {"n": int(trained.sum()), "tokens": int(tokens.sum()), **score, **nll, **perplexity}
