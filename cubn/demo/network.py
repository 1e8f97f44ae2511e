"""A small convolutional network with every gradient written out, for NumPy and CuPy alike.

A layer is called with x and returns y; `backward(dy)` returns dx and leaves the gradient of each learned
array `name` in `name_grad`.  `cubn.BatchNorm` is such a layer, so it stands in the network like any other.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from cubn.layer import BatchNorm
from cubn.namespace import Array
from cubn.sync import Sync

LEARNED = ("weight", "bias", "gamma", "beta")
"""The names under which layers keep what they learn."""

FILTERS = (8, 16)
"""Feature maps after the first and the second convolution."""

HIDDEN = 32
"""Units of the last hidden layer."""

CLASSES = 10
"""One output for each digit."""

SIGMOID_GAIN = 4.0
"""Of the initial weights before a sigmoid, whose slope at 0 is 1/4 (Glorot & Bengio 2010).

The signal then keeps its variance from layer to layer.  Batch normalisation does not need this; it is
the initialisation that serves the network without it best.
"""


class Layer(Protocol):
    """What stands in a network."""

    def __call__(self, x: Array) -> Array:
        """Return y, and keep what the backward pass needs."""

    def backward(self, dy: Array) -> Array:
        """Return dx, and keep the gradients of what is learned."""


class Dense:
    """y = x @ weight + bias for x of (N, inputs).

    Parameters
    ----------
    weight : array (inputs, outputs)
    bias : array (outputs,), optional
        Left out before batch normalisation, whose mean would take it away again (section 3.2 of the paper).
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Array) -> Array:
        """Return y of (N, outputs)."""
        self.x = x
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array:
        """Return dx; set weight_grad and bias_grad."""
        self.weight_grad = self.x.T @ dy
        if self.bias is not None:
            self.bias_grad = dy.sum(axis=0)
        return dy @ self.weight.T


class Convolution:
    """Correlate x of (N, inputs, H, W) with 3 x 3 filters, zeros around the border; y is (N, outputs, H, W).

    Every 3 x 3 window becomes one row of a matrix, so that the convolution is one matrix product.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.
    weight : array (outputs, inputs, 3, 3)
    bias : array (outputs,), optional
        As in `Dense`.
    """

    def __init__(self, xp: Any, weight: Array, bias: Array | None = None) -> None:
        self.xp, self.weight, self.bias = xp, weight, bias

    def __call__(self, x: Array) -> Array:
        """Return y, a view whose channels lie innermost in memory; cubn reads it in place."""
        self.rows = self._windows(x)
        y = self._correlate(self.rows, self.weight, x.shape)
        return y if self.bias is None else y + self.bias[:, None, None]

    def backward(self, dy: Array) -> Array:
        """Return dx, which is dy correlated with the filters turned by 180°; set weight_grad and bias_grad."""
        dy_rows = self.xp.moveaxis(dy, 1, -1).reshape(-1, len(self.weight))
        self.weight_grad = (dy_rows.T @ self.rows).reshape(self.weight.shape)
        if self.bias is not None:
            self.bias_grad = dy_rows.sum(axis=0)
        turned = self.weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        return self._correlate(self._windows(dy), turned, dy.shape)

    def _windows(self, x: Array) -> Array:
        """(N, C, H, W) to (N * H * W, C * 9): the window around each pixel as a row."""
        padded = self.xp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = self.xp.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 9 * x.shape[1])

    def _correlate(self, rows: Array, weight: Array, shape: tuple[int, ...]) -> Array:
        """Each filter with each window, as one matrix product; (N, outputs, H, W)."""
        n, _, h, w = shape
        y = (rows @ weight.reshape(len(weight), -1).T).reshape(n, h, w, len(weight))
        return self.xp.moveaxis(y, -1, 1)


class Pool:
    """The mean of every 2 x 2 block: (N, C, H, W) to (N, C, H/2, W/2)."""

    def __call__(self, x: Array) -> Array:
        """Return y."""
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))

    def backward(self, dy: Array) -> Array:
        """Return dx."""
        return dy.repeat(2, axis=2).repeat(2, axis=3) / 4


class Flatten:
    """(N, C, H, W) to (N, C * H * W)."""

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        """Return dx."""
        return dy.reshape(self.shape)


class Sigmoid:
    """y = 1 / (1 + exp(-x)).  Keeps `x`, which is what the paper's Figure 1 watches."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def __call__(self, x: Array) -> Array:
        """Return y; by way of tanh, because exp(-x) overflows."""
        self.x = x
        self.y = (self.xp.tanh(x / 2) + 1) / 2
        return self.y

    def backward(self, dy: Array) -> Array:
        """Return dx = dy * y * (1 - y)."""
        return dy * self.y * (1 - self.y)


class Network:
    """Two convolutions and a hidden layer with sigmoids, the network of the demo.

        1 x 8 x 8  ->  8 x 8 x 8, pooled to 4 x 4  ->  16 x 4 x 4, pooled to 2 x 2  ->  32  ->  10 logits

    Each of the three hidden layers is weights, then batch normalisation or a bias, then a sigmoid.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.
    rng : numpy.random.Generator
        Of the initial weights.  They are drawn on the CPU and do not depend on `with_bn`.
    with_bn : bool
        Normalise the input of every sigmoid.
    dtype : {"float32", "float64"}
        Of everything.
    sync : Sync, optional
        Takes the statistics of batch normalisation over several ranks; see `cubn.sync`.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn.demo.network import Network
    >>> network = Network(np, np.random.default_rng(0), with_bn=True)
    >>> network(np.zeros((5, 1, 8, 8), "float32")).shape
    (5, 10)
    >>> sum(values.size for values, _ in network.learned())
    3714
    """

    layers: list[Layer]

    def __init__(
        self, xp: Any, rng: np.random.Generator, *, with_bn: bool, dtype: str = "float32", sync: Sync | None = None
    ) -> None:
        def weight(*shape: int, fan_in: int, gain: float = SIGMOID_GAIN) -> Array:
            return xp.asarray(rng.normal(scale=gain / fan_in**0.5, size=shape).astype(dtype))

        def bias(outputs: int) -> Array | None:
            return None if with_bn else xp.zeros(outputs, dtype)

        def batch_norm(features: int) -> list[Layer]:
            device = "cpu" if xp is np else "cuda"
            return [BatchNorm(features, channel_axis=1, dtype=dtype, device=device, sync=sync)] if with_bn else []

        first, second = FILTERS
        flat = second * 2 * 2
        self.last_sigmoid = Sigmoid(xp)
        self.layers = [
            Convolution(xp, weight(first, 1, 3, 3, fan_in=9), bias(first)),
            *batch_norm(first),
            Sigmoid(xp),
            Pool(),
            Convolution(xp, weight(second, first, 3, 3, fan_in=9 * first), bias(second)),
            *batch_norm(second),
            Sigmoid(xp),
            Pool(),
            Flatten(),
            Dense(weight(flat, HIDDEN, fan_in=flat), bias(HIDDEN)),
            *batch_norm(HIDDEN),
            self.last_sigmoid,
            Dense(weight(HIDDEN, CLASSES, fan_in=HIDDEN, gain=1.0), xp.zeros(CLASSES, dtype)),
        ]

    def __call__(self, x: Array) -> Array:
        """Return the logits (N, 10) of the images x (N, 1, 8, 8)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Return the gradient of the loss with respect to the images; set all others."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def learned(self) -> Iterator[tuple[Array, Array]]:
        """Every learned array and its gradient (None before the first backward pass), always in this order."""
        for layer in self.layers:
            for name in LEARNED:
                values = getattr(layer, name, None)
                if values is not None:
                    yield values, getattr(layer, f"{name}_grad", None)

    def replace_gradients(self, gradients: Sequence[Array]) -> None:
        """Set the gradients of all learned arrays, in the order of `learned`."""
        following = iter(gradients)
        for layer in self.layers:
            for name in LEARNED:
                if getattr(layer, name, None) is not None:
                    setattr(layer, f"{name}_grad", next(following))

    def train(self, mode: bool = True) -> "Network":
        """Normalise with the statistics of each batch from now on; returns the network."""
        for layer in self.layers:
            if isinstance(layer, BatchNorm):
                layer.train(mode)
        return self

    def eval(self) -> "Network":
        """Normalise with the running statistics from now on; returns the network."""
        return self.train(False)


def softmax_cross_entropy(xp: Any, logits: Array, labels: Array) -> tuple[float, Array]:
    """Mean of -log(softmax(logits)[label]) over the batch, and its gradient.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.
    logits : array (N, classes)
    labels : integer array (N,)

    Returns
    -------
    loss : float
    dlogits : array (N, classes)

    Examples
    --------
    >>> import numpy as np
    >>> loss, dlogits = softmax_cross_entropy(np, np.zeros((1, 2)), np.array([0]))
    >>> round(loss, 4), dlogits
    (0.6931, array([[-0.5,  0.5]]))
    """
    logits = logits - logits.max(axis=1, keepdims=True)  # exp of a large logit overflows
    log_softmax = logits - xp.log(xp.exp(logits).sum(axis=1, keepdims=True))
    truth = labels[:, None] == xp.arange(logits.shape[1])
    loss = -log_softmax[truth].mean()
    return float(loss), (xp.exp(log_softmax) - truth) / len(labels)


class Descent:
    """Stochastic gradient descent with momentum; the arrays of the network change in place.

        velocity = momentum * velocity - rate * gradient,    array = array + velocity

    Parameters
    ----------
    network : Network
    rate : float
    momentum : float
        The part of the velocity that stays, not to be confused with that of `cubn.BatchNorm`.
    """

    def __init__(self, network: Network, rate: float, momentum: float = 0.9) -> None:
        self.network, self.rate, self.momentum = network, rate, momentum
        self.velocities = [0 * values for values, _ in network.learned()]

    def step(self) -> None:
        """Go one step down the gradients of the last backward pass."""
        for (values, grad), velocity in zip(self.network.learned(), self.velocities, strict=True):
            velocity *= self.momentum
            velocity -= self.rate * grad
            values += velocity
