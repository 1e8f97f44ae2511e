"""Train the same network with and without batch normalisation, and keep what the figures need."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cubn.demo import digits
from cubn.demo.network import HIDDEN, Descent, Network, softmax_cross_entropy
from cubn.namespace import Array, namespace
from cubn.sync import Sync

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
STEPS = 600
BATCH = 60
"""As in section 4.1 of the paper."""

TEST_EVERY = 10
PERCENTILES = (15, 50, 85)
"""As in Figure 1 of the paper."""


@dataclass(frozen=True, eq=False)
class History:
    """One training run.

    Attributes
    ----------
    with_bn : bool
    rate : float
    steps : array (T,)
        After how many steps the network was tested; starts with 0.
    loss : array (T,)
        Mean training loss of the batches since the test before; NaN at step 0.
    accuracy : array (T,)
        Share of the test images that are recognised, from 0 to 1, with the running statistics.
    percentiles : array (T, 3, HIDDEN)
        15th, 50th and 85th percentile of what entered each sigmoid of the last hidden layer in training, over
        the batches since the test before; NaN at step 0.
    diverged : bool
        The loss became infinite or NaN, and training ended there.
    """

    with_bn: bool
    rate: float
    steps: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    percentiles: npt.NDArray[np.float64]
    diverged: bool

    @property
    def final_accuracy(self) -> float:
        """Of the last test."""
        return float(self.accuracy[-1])

    def steps_to(self, accuracy: float) -> int | None:
        """Steps before the first test that came to this accuracy; None if none did."""
        there = np.flatnonzero(self.accuracy >= accuracy)
        return int(self.steps[there[0]]) if len(there) else None

    def __repr__(self) -> str:
        end = "diverged" if self.diverged else f"final accuracy {self.final_accuracy:.1%}"
        return f"History(with_bn={self.with_bn}, rate={self.rate:g}: {end} after {self.steps[-1]} steps)"


def train(
    *,
    with_bn: bool,
    rate: float,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    device: str = "cpu",
    test_every: int = TEST_EVERY,
    on_step: Callable[[], object] | None = None,
    dtype: str = "float32",
    sync: Sync | None = None,
) -> History:
    """Train the network of the demo on the digits.

    Initial weights and batches depend on the seed alone: with and without batch normalisation, and at every
    rate, they are the same.

    Parameters
    ----------
    with_bn : bool
        Normalise the input of every sigmoid.
    rate : float
        Of stochastic gradient descent with momentum 0.9.
    steps, batch : int
        How many batches of how many images.
    seed : int
        Of the initial weights and the batches.
    device : {"cpu", "cuda", "auto"}
        NumPy or CuPy.
    test_every : int
        Steps from one test to the next.
    on_step : callable, optional
        Called after every step, for a progress bar.
    dtype : {"float32", "float64"}
        Of the network and the images.
    sync : Sync, optional
        Train data-parallel: every rank takes its share of each batch, and all ranks end with the same network, that
        which one process would have trained.

    Returns
    -------
    History

    Examples
    --------
    >>> from cubn.demo import train
    >>> history = train(with_bn=True, rate=1.0)    # doctest: +SKIP
    >>> history.steps_to(0.95)                     # doctest: +SKIP
    150
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    xp = namespace(device)
    data = digits.load(xp)
    data = replace(
        data, train_images=data.train_images.astype(dtype), test_images=data.test_images.astype(dtype)
    )  # fmt: skip
    network = Network(xp, np.random.default_rng([seed, 0]), with_bn=with_bn, dtype=dtype, sync=sync)
    descent = Descent(network, rate)
    order = batches(np.random.default_rng([seed, 1]), len(data.train_labels), batch)

    at, loss, accuracy, percentiles = [0], [np.nan], [test(network, data)], [np.full((3, HIDDEN), np.nan)]
    losses: list[float] = []  # since the last test
    inputs: list[Array] = []
    diverged = False
    # The matrices are small: a second thread of BLAS gains nothing, and beside another busy process it waits
    # for it and takes three times as long.  A rate too high shows in the history, and needs no warning.
    with threadpool_limits(1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, steps + 1):
            whole = next(order)
            chosen = xp.asarray(whole if sync is None else share(whole, sync))
            logits = network(data.train_images[chosen])
            batch_loss, dlogits = softmax_cross_entropy(xp, logits, data.train_labels[chosen])
            if sync is None:
                network.backward(dlogits)
            else:
                weight = len(chosen) / len(whole)
                network.backward(weight * dlogits)
                batch_loss = add_up(xp, network, weight * batch_loss, sync)
            losses.append(batch_loss)
            inputs.append(network.last_sigmoid.x)
            diverged = not np.isfinite(batch_loss)
            if not diverged:
                descent.step()
            if diverged or step % test_every == 0 or step == steps:
                at.append(step)
                loss.append(float(np.mean(losses)))
                accuracy.append(test(network, data))
                seen = xp.concatenate(inputs)
                if sync is not None:
                    seen = xp.concatenate([xp.asarray(part) for part in sync.all_gather(seen.ravel())])
                percentiles.append(_to_numpy(xp.percentile(seen.reshape(-1, HIDDEN), PERCENTILES, axis=0)))
                losses, inputs = [], []
            if on_step is not None:
                on_step()
            if diverged:
                break
    return History(with_bn, rate, np.array(at), np.array(loss), np.array(accuracy), np.array(percentiles), diverged)


def batches(rng: np.random.Generator, images: int, batch: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of one batch after the other, without end.

    Every epoch is shuffled anew; what is left at its end is too small for a batch and left out.

    Examples
    --------
    >>> import numpy as np
    >>> from itertools import islice
    >>> [len(chosen) for chosen in islice(batches(np.random.default_rng(0), 10, 4), 3)]
    [4, 4, 4]
    """
    while True:
        order = rng.permutation(images)
        for start in range(0, images - batch + 1, batch):
            yield order[start : start + batch]


def share(batch: npt.NDArray[np.int64], sync: Sync) -> npt.NDArray[np.int64]:
    """The images of a batch that this rank takes: as many as any other, or one more or less."""
    return np.array_split(batch, sync.size)[sync.rank]


def add_up(xp: Any, network: Network, loss: float, sync: Sync) -> float:
    """Sum the loss and every gradient over all ranks, in rank order: one all-gather, the same bits on each."""
    gradients = [grad for _, grad in network.learned()]
    payload = xp.concatenate([xp.full(1, loss, gradients[0].dtype), *(grad.ravel() for grad in gradients)])
    first, *others = (xp.asarray(part) for part in sync.all_gather(payload))
    total = first.copy()
    for part in others:
        total += part
    ends = np.cumsum([grad.size for grad in gradients])[:-1]
    network.replace_gradients(
        [part.reshape(grad.shape) for part, grad in zip(xp.split(total[1:], ends), gradients, strict=True)]
    )
    return float(total[0])


def test(network: Network, data: digits.Digits) -> float:
    """Share of the test images that the network recognises, with the running statistics."""
    answers = network.eval()(data.test_images).argmax(axis=1)
    network.train()
    return float((answers == data.test_labels).mean())


def _to_numpy(values: Array) -> npt.NDArray[np.float64]:
    return np.asarray(values.get() if hasattr(values, "get") else values, np.float64)
