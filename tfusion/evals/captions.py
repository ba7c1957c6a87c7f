"""CIDEr of the captions that a model writes for held-out pictures: `cider`, times 100 as papers print it.

CIDEr-D of Vedantam et al. 2015 as coco-caption computes it: n-grams of up to four words, weighted by how rare
they are among all references of the evaluation, clipped, and with a penalty on another length. Words are what
stands between spaces, in lower case, without the full stop (coco-caption's own tokenizer is a Java program).
References are those that the data hold: one caption a picture. Rareness depends on all pictures that are scored
together, so only figures of the same held-out captions compare. Captions right word for word score up to 1000.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfusion import inference
from tfusion.evals import figure, scenes
from tfusion.evals.base import Evaluator, Options, register
from tfusion.evals.documents import pairs
from tfusion.inference.trained import Trained

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # words: of the penalty on another length
SCALE = 10.0  # coco-caption's; figures are another 100 times as large


def words(text: str) -> list[str]:
    return text.lower().strip(" .").split()


def ngrams(text: str) -> Counter:
    """{n-gram: how often}, for n = 1 .. LONGEST."""
    found = words(text)
    return Counter(tuple(found[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(found) - n + 1))


class Vector(NamedTuple):
    """A caption: {n-gram: weight} and its norm for each n; and its length in pairs of words, as there."""

    weights: list[dict]
    norms: list[float]
    length: int


def vector(counts: Counter, documents: Counter, total: float) -> Vector:
    """documents: of how many pictures an n-gram stands in a reference; total: log of how many there are."""
    weights = [{} for _ in range(LONGEST)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * (total - math.log(max(1, documents[ngram])))
    norms = [math.sqrt(sum(x * x for x in some.values())) for some in weights]
    return Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def similarity(said: Vector, reference: Vector) -> float:
    """Mean over n of the clipped cosine."""
    values = [sum(min(x, theirs[ngram]) * theirs[ngram] for ngram, x in ours.items() if ngram in theirs)
              / (a * b or 1.0)
              for ours, theirs, a, b in zip(said.weights, reference.weights, said.norms, reference.norms)]
    return sum(values) / LONGEST * math.exp(-((said.length - reference.length) ** 2) / (2 * SIGMA**2))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The score of each caption, float64 (n,), as coco-caption has it (not yet times 100); their mean is CIDEr.

    references: of each picture, one or more.
    """
    counts = [[ngrams(text) for text in texts] for texts in references]
    documents = Counter(ngram for texts in counts for ngram in set().union(*texts))
    total = math.log(len(references)) if references else 0.0
    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        said = vector(ngrams(caption), documents, total)
        found = [similarity(said, vector(text, documents, total)) for text in texts]
        scores.append(SCALE * sum(found) / len(found))
    return np.array(scores)


def figure_of(title: str, captions: Sequence[str], references: Sequence[str]) -> dict:
    """Times 100, with the 95 % interval of a mean over pictures, and as chance what the same captions get where
    each is given to the picture before: those of a model that does not look."""
    single, texts = [[text] for text in references], list(captions)
    scores, chance = 100 * cider(texts, single), 100 * cider(texts[1:] + texts[:1], single)
    half = float(figure.Z95 * scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else 0.0
    mean = float(scores.mean())
    return figure.number(title, mean, "higher", n=len(scores)) | {
        "low": max(0.0, mean - half), "high": mean + half, "chance": float(chance.mean())}


def of_scenes(run: Trained, folder: Path, options: Options) -> dict:
    """Of the captions that evals/scenes.py had written."""
    text = (folder.parent / "scenes" / scenes.TOLD_LINES).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return {"cider": figure_of("Told: CIDEr of scenes (x 100)", [line["told"] for line in lines],
                               [line["scene"] for line in lines])}


def of_documents(run: Trained, folder: Path, options: Options) -> dict:
    """Of the other sources' documents of one text and one picture."""
    texts, pictures = pairs(run, options.number)
    told = inference.decoder(run).describe(run, pictures)
    return {"cider_documents": figure_of("Told: CIDEr of held-out documents (x 100)", told, texts)}


register(Evaluator("captions", ("scenes",), of_scenes, order=11))
register(Evaluator("captions_of_documents", ("data", "describe"), of_documents, order=23))
