"""matplotlib without its global state: our colours, and figures as SVG or PNG. Knows no charts.

matplotlib is imported when the first picture is drawn. The same figure gives the same bytes, whatever style its user has set.
"""

import hashlib
import io
import logging
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours by name, on a light and on a dark page. Lines can be told apart with every kind of colour vision.
LINES = ("#0072b2", "#d55e00", "#00664f", "#cc5fa2", "#332288", "#6b3d00", "#88908a")
_DARK_LINES = ("#56b4e9", "#e8703a", "#1fd69a", "#f2b8dc", "#7d7bf5", "#f0e442", "#8f8578")
LIGHT = {"ink": "#14181d", "soft": "#4a5561", "rule": "#c9d0d8", "ground": "#ffffff", "card": "#f3f5f7", "warn": "#8a2c0d"}
DARK = {"ink": "#eef1f4", "soft": "#b3bdc8", "rule": "#3b4653", "ground": "#12161b", "card": "#1c222a", "warn": "#ffb59a"}
LIGHT |= {f"line{index}": colour for index, colour in enumerate(LINES)}
DARK |= {f"line{index}": colour for index, colour in enumerate(_DARK_LINES)}

_STYLE: dict[str, Any] = {
    f"{side}tick.{key}": LIGHT[name] for side in "xy" for key, name in (("color", "rule"), ("labelcolor", "ink"))
}
_STYLE |= {"text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["soft"]}
_STYLE |= {key: LIGHT["rule"] for key in ("axes.edgecolor", "grid.color")}
_STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False)
_STYLE |= {"font.family": ["DejaVu Sans"], "font.size": 13, "axes.titlesize": 14, "axes.titleweight": "bold"}
_STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "pqkv"}
_SVG = "http://www.w3.org/2000/svg"
_LONGEST_LABEL = 60


def require_matplotlib() -> None:
    """Import matplotlib, which then says nothing of its own.

    Raises
    ------
    UsageError
        If it cannot be imported.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells about its cache of fonts
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"no picture can be drawn: matplotlib cannot be imported ({error}); expected matplotlib 3.8 or newer: "
            "pip install 'matplotlib>=3.8'"
        ) from error


@contextmanager
def our_style() -> Iterator[None]:
    """Let matplotlib draw in our style alone, and leave its settings as they were.

    Raises
    ------
    UsageError
        If matplotlib cannot be imported.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks with which texts are measured; a reader's has them
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams  # typed by the names that one version of matplotlib has
        settings.update(_STYLE)
        yield


def label(text: str) -> str:
    """Return `text` as a picture can show it: not wider than most are, a question mark for what XML cannot hold."""
    short = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    return "".join(c if c.isprintable() else "?" for c in short)


@our_style()
def png(figure: "Figure") -> bytes:
    """Return `figure` as a PNG in the light colours."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, facecolor=LIGHT["ground"], metadata={"Software": None})
    return data.getvalue()


@our_style()
def svg(figure: "Figure", title: str, *, alone: bool = False) -> str:
    """Return `figure` as an SVG element in the colours of the page around it, or, `alone`, as a file that has its own."""
    data = io.BytesIO()
    figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(data.getvalue())
    for part in root.findall(f"{{{_SVG}}}metadata") + root.findall(f"{{{_SVG}}}defs[{{{_SVG}}}style]"):
        root.remove(part)  # that style would apply to all elements of the page
    _adapt(root, f"p{hashlib.sha256(data.getvalue()).hexdigest()[:8]}")
    box = root.attrib["viewBox"]
    root.attrib = {"role": "img", "aria-label": label(title), "viewBox": box, "stroke-linejoin": "round"}
    root.attrib |= {"width": box.split()[2], "height": box.split()[3]}
    if alone:
        root.set("xmlns", _SVG)
        root.insert(0, style := ET.Element("style"))
        style.text = colours_css() + "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif!important}"
    return ET.tostring(root, encoding="unicode") + "\n" * alone


def _adapt(root: ET.Element, own: str) -> None:
    """Make the elements part of a page: without name spaces, ids that begin with `own`, colours that are the page's."""
    variables = {colour: f"var(--{name},{colour})" for name, colour in LIGHT.items()}
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        named = {key.split("}")[-1]: value for key, value in element.attrib.items() if element.tag != "g" or key != "id"}
        for key, value in named.items():
            value = re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), value)
            named[key] = f"{own}-{value}" if key == "id" else re.sub(r"(url\(#|^#)", rf"\g<1>{own}-", value)
        element.attrib = named
        element.text, element.tail = element.text if element.tag == "text" else None, None  # no line breaks between elements


def colours_css() -> str:
    """Return a style sheet that defines our colours on light and dark pages."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in each.items()) for each in (LIGHT, DARK))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
