"""What figures consist of: a few shapes, in units of a fixed width."""

from dataclasses import dataclass, field
from typing import ClassVar

# Figures scale to the width of the page: a letter of 12 units is 8 px on a telephone of
# 360 px, and 16 px where a figure is as wide as it gets.
WIDTH = 480.0


@dataclass(frozen=True)
class Box:
    """A rectangle.

    Attributes:
        x, y, width, height: Its place.
        style: Its class in the style sheet, which names its colour; "" for that of
            heat maps.
        title: What a pointer over it shows.
        opacity: Of its colour.
    """

    kind: ClassVar[str] = "box"
    x: float
    y: float
    width: float
    height: float
    style: str
    title: str = ""
    opacity: float = 1.0


@dataclass(frozen=True)
class Dot:
    """A point of data.

    Attributes:
        x, y: Its centre.
        style, title: As of a `Box`.
    """

    kind: ClassVar[str] = "dot"
    x: float
    y: float
    style: str
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A straight line.

    Attributes:
        x1, y1, x2, y2: Its ends.
        style, title: As of a `Box`.
        arrow: Whether it has a head at its end.
    """

    kind: ClassVar[str] = "line"
    x1: float
    y1: float
    x2: float
    y2: float
    style: str
    title: str = ""
    arrow: bool = False


@dataclass(frozen=True)
class Label:
    """A piece of text.

    Attributes:
        x, y: Where it is anchored, at its base line.
        text: The text.
        anchor: `start`, `middle` or `end`.
        turned: Whether it rises to the right.
    """

    kind: ClassVar[str] = "label"
    x: float
    y: float
    text: str
    anchor: str = "start"
    turned: bool = False


Shape = Box | Dot | Line | Label


@dataclass
class Figure:
    """A figure, to which shapes are added.

    Attributes:
        label: What it shows, for those who do not see it.
        height: Its height; its width is `WIDTH`.
        shapes: In the order in which they are drawn.
    """

    label: str
    height: float
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Add shapes on top of those that are there."""
        self.shapes += shapes
