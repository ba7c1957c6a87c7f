"""Packed rows that kernels must get right."""

import numpy as np
import pytest

PACKINGS = {  # name -> one row's documents; a document's runs of patches (positive) and other tokens (negative)
    "one document": [[-200]],
    "adjacent images": [[40, 40, 9, -3, 31], [-5, 17, 17, 38]],  # also at the row's start and end
    "one-patch images": [[-3, 1, 1, 1, -20, 1, -60, 1], [1, -70, 1, -40]],
    "many documents": [[-n] for n in (1, 2, 30, 1, 1, 17, 8, 40, 3, 25, 33, 1, 38)],
    "image across blocks": [[-10, 150, -4], [-30, 6]],
}


@pytest.fixture(scope="session")
def packed():
    """packed(name, B, T, seed=0) -> segment_ids_BT, image_ids_BT (numpy); names: PACKINGS, padding, random."""

    def make(name: str, B: int, T: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        segments, images = np.zeros((2, B, T), np.int32)
        for b in range(B):
            documents = PACKINGS.get(name) or [
                [(-1) ** int(rng.integers(2)) * int(rng.integers(1, 60)) for _ in range(rng.integers(1, 6))]
                for _ in range(100)]
            at = image = 0
            for number, runs in enumerate(documents, start=1):
                for run in runs:
                    image += run > 0
                    segments[b, at : at + abs(run)] = number
                    images[b, at : at + abs(run)] = image * (run > 0)
                    at += abs(run)
        if name == "padding":
            segments[:, T * 2 // 3 :] = images[:, T * 2 // 3 :] = 0
        return segments, images

    return make
