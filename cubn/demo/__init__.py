"""The demo: a small convolutional network on handwritten digits, with and without batch normalisation.

`python -m cubn demo` runs it; the parts are here to be imported.  Importing loads neither scikit-learn
nor Matplotlib: `train` needs the one, `draw` the other (`pip install 'cubn[demo]'`).
"""

from cubn.demo.digits import Digits
from cubn.demo.figure import draw
from cubn.demo.network import Network
from cubn.demo.training import History, train

__all__ = ["Digits", "History", "Network", "draw", "train"]
