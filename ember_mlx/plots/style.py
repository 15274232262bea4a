"""How every picture of the project looks: sizes, colours and units, light and dark.

A picture is a function ``draw(figure, theme)``. ``save_picture`` gives it an empty figure in the theme's style and
saves a PNG, and ``save_light_and_dark`` does both themes, for a README:

    <picture>
      <source media="(prefers-color-scheme: dark)" srcset="loss-dark.png">
      <img alt="what it shows, in words" src="loss-light.png" width="800">
    </picture>

Lines that are drawn one after the other differ in more than colour: ``axes.plot(x, y, label=...)`` takes the next
colour, dash and marker by itself.

matplotlib is imported when something is drawn, never before; nothing of its global state is changed, no window opens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ember_mlx.shared.errors import InputError

if TYPE_CHECKING:
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

__all__ = [
    "DASHES",
    "MARKERS",
    "THEMES",
    "Theme",
    "check_path",
    "literal",
    "picture_paths",
    "require_matplotlib",
    "save_light_and_dark",
    "save_picture",
    "thousands",
    "units",
]

WIDTH, HEIGHT = 8.0, 4.5  # inches
DPI = 160  # 1280 pixels, shown at 800: sharp where a screen has two pixels to a point, and 11 pt are then 15 pixels
DASHES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Theme:
    """The colours of a picture: ``lines`` are told apart in the usual kinds of colour-blindness, too."""

    name: str
    background: str
    text: str
    grid: str
    lines: tuple[str, ...]


# The colours of Okabe and Ito, "Color Universal Design", 2008; on each background those that stand out from it, most of
# them at the same place in both. The backgrounds are GitHub's own.
THEMES = {
    "light": Theme(
        name="light",
        background="#ffffff",
        text="#1f2328",
        grid="#d1d9e0",
        lines=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    ),
    "dark": Theme(
        name="dark",
        background="#0d1117",
        text="#f0f6fc",
        grid="#3d444d",
        lines=("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#F0E442", "#ffffff"),
    ),
}


def require_matplotlib() -> None:
    """Call this before long work whose result will be drawn.

    Raises:
        InputError: when matplotlib is not installed, with the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from error


def save_picture(
    path: str | Path, draw: Callable, theme: str = "light", width: float = WIDTH, height: float = HEIGHT
) -> Path:
    """Draw one picture and save it.

    Args:
        path (str or Path): A name that ends in .png, in a folder that exists.
        draw (callable): ``draw(figure, theme)``, an empty ``matplotlib.figure.Figure`` with constrained layout and a
            :class:`Theme`.
        theme (str): "light" or "dark".
        width, height (float): In inches, 160 pixels each.

    Raises:
        InputError: without matplotlib, and for such a path.
        OSError: when it cannot be written.
    """
    path = check_path(path)
    require_matplotlib()
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = THEMES[theme]
    # "default" first: a matplotlibrc of the user's own would change the picture.
    with style.context(["default", _style(colours)]):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, colours)
        figure.savefig(path, metadata={"Software": None})
    return path


def save_light_and_dark(path: str | Path, draw: Callable, width: float = WIDTH, height: float = HEIGHT) -> list[Path]:
    """As :func:`save_picture`, in both themes: NAME.png becomes NAME-light.png and NAME-dark.png, which it returns."""
    paths = picture_paths(check_path(path))
    return [save_picture(each, draw, name, width, height) for each, name in zip(paths, THEMES, strict=True)]


def picture_paths(path: Path) -> list[Path]:
    """Where both pictures of ``NAME.png`` go: NAME-light.png and NAME-dark.png."""
    return [path.with_name(f"{path.stem}-{name}.png") for name in THEMES]


def check_path(path: str | Path) -> Path:
    """Raises InputError for a path that no picture can be saved to."""
    path = Path(path)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise InputError(f"picture {path}: must be the name of a PNG file, such as runs.png")
    if not path.parent.is_dir():
        raise InputError(f"picture {path}: folder {path.parent} does not exist; make it first")
    return path


def literal(text: str) -> str:
    """Text of the user's as it is to be read: matplotlib takes what stands between two dollars for mathematics."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def units(unit: str) -> "EngFormatter":
    """A formatter that writes 3.1e9 as "3.1 GB" for the unit "B", and 0.02 as "20 ms" for "s", in powers of 1000.

    For the ticks of an axis, ``axes.yaxis.set_major_formatter(units("B"))``, and for text, ``units("B")(3.1e9)``.
    """
    require_matplotlib()
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit=unit)


def thousands() -> "StrMethodFormatter":
    """A formatter that writes 12000 as "12,000", for ticks and for text."""
    require_matplotlib()
    from matplotlib.ticker import StrMethodFormatter

    return StrMethodFormatter("{x:,.0f}")


def _style(theme):
    """matplotlib's settings, over its defaults."""
    from cycler import cycler

    count = len(theme.lines)
    # Each marker a little further along its line: where lines lie on each other, all of them show.
    places = [(0.02 * i, 0.15) for i in range(count)]
    text = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style = {
        "axes.edgecolor": theme.text,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "savefig.dpi": DPI,
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "figure.titlesize": 13,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "legend.handlelength": 3.5,  # long enough to show the dashes
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "axes.prop_cycle": cycler(color=theme.lines)
        + cycler(linestyle=DASHES[:count])
        + cycler(marker=MARKERS[:count])
        + cycler(markevery=places),
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    return style | dict.fromkeys(text, theme.text)
