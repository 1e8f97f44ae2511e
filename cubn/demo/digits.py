"""Handwritten digits: 1,797 real images that come with scikit-learn, so nothing is downloaded."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cubn.namespace import Array

TRAIN_IMAGES, TEST_IMAGES = 1437, 360
"""Four fifths and one fifth."""


@dataclass(frozen=True, eq=False)
class Digits:
    """The images, split once and for all.

    Attributes
    ----------
    train_images, test_images : array (N, 1, 8, 8), float32
        From -1 (paper) to 1 (ink).
    train_labels, test_labels : integer array (N,)
        0 to 9.
    """

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load(xp: Any = np) -> Digits:
    """The digits as arrays of `xp`.

    The split does not depend on the seed of a training run, so that all runs are tested on the same images.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.

    Raises
    ------
    ModuleNotFoundError
        If scikit-learn is not installed.
    """
    images, labels = _bundled()
    test, train = slice(None, TEST_IMAGES), slice(TEST_IMAGES, None)
    return Digits(*map(xp.asarray, (images[train], labels[train], images[test], labels[test])))


@lru_cache(maxsize=1)
def _bundled() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """All images and labels in one fixed random order, because the file is sorted by writer."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    pixels = (images[order] / 8 - 1).astype(np.float32)  # 0 to 16 in the file
    return pixels.reshape(-1, 1, 8, 8), labels[order].astype(np.int64)
