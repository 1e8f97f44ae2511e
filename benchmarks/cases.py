"""What is measured, as data: layers of networks that people train, dense layers and odd ones."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Case:
    """One layer: x of shape (N, C, *S), how often its network has it, and the family it belongs to."""

    family: str
    shape: tuple[int, ...]
    count: int = 1

    @property
    def size(self) -> int:
        """Elements of x."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.family} {'x'.join(map(str, self.shape))}"


def square(family: str, batch: int, layers: tuple[tuple[int, ...], ...]) -> list[Case]:
    """Layers of (channels, edge) or (channels, edge, count) with square feature maps."""
    return [Case(family, (batch, c, edge, edge), *count) for c, edge, *count in layers]


RESNET50 = (
    (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5),
    (256, 28, 1), (256, 14, 11), (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4),
)  # fmt: skip
"""The 53 batch normalisation layers of ResNet-50."""

CASES = [
    *square("A ResNet-50", 32, RESNET50),
    *square("B VGG-16", 32, ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))),
    *square("C U-Net", 8, ((64, 512), (128, 256), (256, 128), (512, 64), (1024, 32))),
    Case("D R3D-18", (16, 64, 16, 56, 56)),
    Case("D R3D-18", (16, 128, 8, 28, 28)),
    Case("D R3D-18", (16, 256, 4, 14, 14)),
    Case("D R3D-18", (16, 512, 2, 7, 7)),
    Case("D 3-D U-Net", (2, 32, 128, 128, 128)),
    Case("D 3-D U-Net", (2, 64, 64, 64, 64)),
    Case("D 3-D U-Net", (2, 128, 32, 32, 32)),
    Case("E 1-D", (32, 256, 800)),
    Case("E 1-D", (32, 512, 400)),
    Case("E PointNet", (32, 64, 4096)),
    Case("E PointNet", (32, 1024, 4096)),
    Case("F dense", (1024, 1024)),
    Case("F dense", (8192, 512)),
    Case("F dense", (65536, 256)),
    Case("F dense", (100000, 32)),
    Case("F small", (32, 64)),
    *square("G odd channels", 128, ((24, 56), (40, 28), (144, 56), (200, 14), (1280, 7))),
]

QUICK = [
    case for case in CASES
    if case.shape in {(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (8192, 512), (32, 64), (128, 24, 56, 56)}
]  # fmt: skip
"""A minute's worth, one of each kind."""

CHANNELS_LAST = ("A", "D", "G")
"""Families also measured in channels-last memory."""

DTYPES = [Case("dtypes", shape) for shape in ((32, 64, 56, 56), (32, 256, 14, 14), (65536, 256))]
"""Measured in every element type."""

SCALING = [Case("scaling", (32, 64, edge, edge)) for edge in (11, 22, 44, 88, 176, 352)]
"""1 MB to 1 GB in factors of four, on one thread and on all."""
