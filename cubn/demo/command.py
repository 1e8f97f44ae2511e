"""`python -m cubn demo`: check the options, train, print the table, save the figure."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from math import isfinite
from pathlib import Path
from time import perf_counter

from cubn.demo import parallel
from cubn.demo.digits import TEST_IMAGES, TRAIN_IMAGES
from cubn.demo.figure import draw, typical_sigmoid
from cubn.demo.training import BATCH, RATES, STEPS, History, train
from cubn.errors import DeviceError
from cubn.namespace import namespace

SUMMARY = "train on handwritten digits, with and without batch normalisation"
TARGET, PROMISE = 0.95, 0.97
FIGURE = "digits.png"

DESCRIPTION = f"""\
Train a small convolutional network with sigmoids on the 1,797 handwritten digits that come with
scikit-learn, once with and once without batch normalisation at each of several learning rates.
Nothing is downloaded.  Initial weights and batches depend on the seed alone, so both networks
start from the same weights and see the same images.

Prints how many steps each took to {TARGET:.0%} test accuracy and where it ended, and saves a figure:
accuracy against steps, and the 15th, 50th and 85th percentile of what enters a typical sigmoid,
as in Figure 1 of Ioffe & Szegedy (2015)."""

EXAMPLES = f"""\
examples:
  python -m cubn demo                            the whole comparison, under a minute on two cores
  python -m cubn demo --rates 1 --steps 200      one rate, a few seconds
  python -m cubn demo --seed 7 --out /tmp/seven  other weights and batches, figure elsewhere
  python -m cubn demo --device cuda              the same text on CuPy
  python -m cubn demo --no-figure                the table alone, without Matplotlib
  python -m cubn demo --ranks 2                  data-parallel under MPI, beside one process

exit status:
  0  done;  1  at the default rates, steps and batch, no network with batch normalisation
  ended at {PROMISE:.0%} test accuracy;  2  the options or what is installed do not allow it"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Tell the parser of this command what it takes."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "--rates",
        type=_rate,
        nargs="+",
        default=RATES,
        metavar="RATE",
        help=f"learning rates (default: {' '.join(f'{rate:g}' for rate in RATES)})",
    )
    parser.add_argument(
        "--steps",
        type=_whole("steps", 1, example=STEPS),
        default=STEPS,
        help="batches to train each network on (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=_whole("batch", 2, TRAIN_IMAGES, example=BATCH),
        default=BATCH,
        help="images in a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_whole("seed", 0, example=7),
        default=0,
        help="of initial weights and batches (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="NumPy (cpu) or CuPy (cuda); auto is CuPy where it finds a device",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("cubn-demo"),
        metavar="FOLDER",
        help=f"where {FIGURE} goes (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=_whole("ranks", 1, example=2),
        metavar="N",
        help="train on N processes of MPI, each with its share of every batch, and show that the curve is that of one "
        "process; one rate, no figure",
    )
    parser.add_argument("--no-figure", action="store_true", help="print the table only; Matplotlib is not needed")
    parser.set_defaults(error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Do what the options say; the exit status."""
    path: Path | None = None if options.no_figure or options.ranks else options.out / FIGURE
    try:
        xp = namespace(options.device)
        _require_libraries(figure=path is not None)
        if path is not None:
            _require_writable(path)
    except (DeviceError, ImportError, OSError) as error:
        options.error(str(error))
    if options.ranks:
        return parallel.run(options)
    rates = tuple(sorted(set(options.rates)))

    print(
        f"{2 * len(rates)} sigmoid networks, {options.steps} steps of {options.batch} digits each, "
        f"seed {options.seed}, {xp.__name__} {xp.__version__}",
        flush=True,
    )
    start = perf_counter()
    histories = _train_all(rates, options)
    seconds = perf_counter() - start
    print(f"\n{table(histories)}\n\n{conclusion(histories)}\n{seconds:.1f} s of training.")

    if path is not None:
        try:
            draw(histories, target=TARGET).savefig(path)
        except OSError as error:
            options.error(f"the figure goes to {path}, which cannot be written ({error}); pass another --out.")
        rate, unit = typical_sigmoid(histories)
        print(f"\nFigure: {path.resolve()}\n(the sigmoid shown is that of hidden unit {unit + 1} at rate {rate:g})")

    as_promised = (rates, options.steps, options.batch) == (RATES, STEPS, BATCH)
    best = max(history.final_accuracy for history in histories if history.with_bn)
    if as_promised and best < PROMISE:
        print(
            f"error: the best network with batch normalisation ended at {best:.1%}, but {PROMISE:.0%} is what these "
            f"rates, steps and batch must give; report this with the output of python -m cubn info.",
            file=sys.stderr,
        )
        return 1
    return 0


def table(histories: Sequence[History]) -> str:
    """A line for each rate: steps to the target and final accuracy, without and with batch normalisation.

    Examples
    --------
    >>> import numpy as np
    >>> steps, nothing = np.array([0, 10]), np.full((2, 3, 32), np.nan)
    >>> print(table([
    ...     History(with_bn, 0.1, steps, steps / 100, np.array([0.1, 0.96 if with_bn else 0.5]), nothing, False)
    ...     for with_bn in (False, True)
    ... ]))                                                              # doctest: -NORMALIZE_WHITESPACE
              without batch norm     with batch norm
      rate    95 % after    final    95 % after    final
       0.1             –   50.0 %      10 steps   96.0 %
    """
    lines = [
        f"{'':10}{'without batch norm':<23}{'with batch norm'}",
        f"{'rate':>6}" + 2 * f"    {TARGET * 100:.0f} % after    final",
    ]
    runs = {(history.with_bn, history.rate): history for history in histories}
    for rate in sorted({history.rate for history in histories}):
        lines.append(f"{rate:>6g}" + "".join(_cells(runs[with_bn, rate]) for with_bn in (False, True)))
    return "\n".join(lines)


def _cells(history: History) -> str:
    first = history.steps_to(TARGET)
    reached = "–" if first is None else f"{first} steps"
    final = "diverged" if history.diverged else f"{history.final_accuracy * 100:.1f} %"
    return f"    {reached:>10} {final:>8}"


def conclusion(histories: Sequence[History]) -> str:
    """What the table says, in words."""
    lines = []
    for with_bn in (False, True):
        runs = [history for history in histories if history.with_bn == with_bn]
        reached = [(steps, run.rate) for run in runs if (steps := run.steps_to(TARGET)) is not None]
        best = max(run.final_accuracy for run in runs)
        line = f"reaches {TARGET * 100:.0f} % at {len(reached)} of {len(runs)} rates"
        if reached:
            steps, rate = min(reached)
            line += f", soonest after {steps} steps (rate {rate:g})"
        line += f", and ends at {best * 100:.1f} % at best"
        lines.append(f"{'With' if with_bn else 'Without'} batch normalisation the network {line}.")
    lines.append(f"One of the {TEST_IMAGES} test images is {100 / TEST_IMAGES:.2f} %; they were in no training batch.")
    return "\n".join(lines)


def _train_all(rates: Sequence[float], options: argparse.Namespace) -> list[History]:
    """Without and with batch normalisation at every rate, under one progress bar."""
    from tqdm import tqdm

    histories = []
    with tqdm(total=2 * len(rates) * options.steps, unit="step", leave=False, dynamic_ncols=True) as bar:
        for rate in rates:
            for with_bn in (False, True):
                bar.set_description(f"rate {rate:g} {'with' if with_bn else 'without'} batch norm")
                history = train(
                    with_bn=with_bn,
                    rate=rate,
                    steps=options.steps,
                    batch=options.batch,
                    seed=options.seed,
                    device=options.device,
                    on_step=bar.update,
                )
                bar.update(options.steps - int(history.steps[-1]))  # one that diverged stopped early
                histories.append(history)
    return histories


def _require_libraries(*, figure: bool) -> None:
    """Raise ImportError unless everything that will be needed is there."""
    needed = [("sklearn.datasets", "scikit-learn", "brings the digits", ""), ("tqdm", "tqdm", "shows the progress", "")]
    if figure:
        needed.append(("matplotlib.figure", "Matplotlib", "draws the figure", ", or pass --no-figure"))
    for module, library, purpose, otherwise in needed:
        try:
            import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{library} cannot be imported ({error}), but it {purpose}; pip install 'cubn[demo]'{otherwise}."
            ) from error


def _require_writable(path: Path) -> None:
    """Raise OSError unless a file can be written there; makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(None, f"{path.name} in it is a folder")
    except OSError as error:
        raise OSError(
            f"--out is {path.parent}, but no figure can be written there ({error.strerror}); "
            f"pass a folder that you may write to, or --no-figure."
        ) from error


def _rate(text: str) -> float:
    """A learning rate from the command line."""
    try:
        rate = float(text)
    except ValueError:
        rate = float("nan")
    if not (isfinite(rate) and rate > 0):
        raise argparse.ArgumentTypeError(
            f"a rate is {text!r}, but it scales the gradient; pass finite numbers above 0, such as 0.1 1."
        )
    return rate


def _whole(name: str, least: int, most: int | None = None, *, example: int) -> Callable[[str], int]:
    """What turns the text of an option into a whole number between `least` and `most`."""
    limits = f"from {least}" + ("" if most is None else f" to {most}")

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(
                f"{name} is {text!r}, which is no whole number {limits}; pass one, such as {example}."
            )
        return number

    return whole
