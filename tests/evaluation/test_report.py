"""The report: complete, self-contained, and unmoved by hostile names; in Chromium where there is one."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from paretune.errors import ArgumentError
from paretune.evaluation.figure import View, corner, png, svg
from paretune.evaluation.frontier import Frontier
from paretune.evaluation.points import Difference, Measurement
from paretune.evaluation.report import page, write_report
from paretune.evaluation.tables import csv_text, markdown

CATEGORIES = ("math", "code", "reading")
HOSTILE = (
    "<script>alert(1)</script><img src=http://{host}/a.png onerror=alert(2)>\"'&amp; $\\frac{{1}}{{$ #0072b2 0.123456 "
    "]]> --> </svg></title></style><style>body{{background:url(http://{host}/b)}}"
)


def made(
    name: str, reward: float, capability: float, family: str = "online", difference: float = -0.1, **more: Any
) -> Measurement:
    changes = {c: difference * (i + 1) / 3 for i, c in enumerate(CATEGORIES)}
    said = "loss" if difference < -0.05 else "within noise"
    compared: dict[str, Any] = {
        "tax": -difference,
        "tax_ci": (-difference - 0.02, -difference + 0.02),
        "tax_verdict": said,
        "reward_gain": reward - 0.4,
        "reward_gain_ci": (reward - 0.43, reward - 0.37),
        "reward_verdict": "gain",
        "by_category": {c: Difference(d, (d - 0.03, d + 0.03), 0.01, 0.03, said) for c, d in changes.items()},
    }
    fields: dict[str, Any] = {
        "capability_by_category": {c: 0.9 + d for c, d in changes.items()},
        "hyperparameters": {"lr": 1e-5, "beta": 0.1},
        "response_length": 20.0,
        "kl": 3.5,
        "seconds": 12.0,
        "measured": {"suite": "tiny-world", "fingerprint": name[:8]},
        **({} if family == "reference" else compared),
        **more,
    }
    bounds = [(value - 0.02, value + 0.02) for value in (reward, capability)]
    return Measurement(name, family, reward, bounds[0], capability, bounds[1], **fields)


def small(host: str = "evil.test") -> Frontier:
    name = HOSTILE.format(host=host)
    steps = [
        made(f"linear {a}", 0.4 + a / 2, 0.9 - a**3 / 3, "offline", -(a**3) / 3, path=name, label=str(a))
        for a in (0.2, 0.5, 0.8)
    ]
    return Frontier(
        [
            made("sft", 0.4, 0.9, "reference"),
            made("base", 0.1, 0.5, "base", -0.4),
            made("dpo", 0.8, 0.6, "control", -0.3),
            *steps,
            made(
                name, 0.85, 0.85, "</style><script>alert(3)</script>", -0.05,
                label="</text><script>x</script>", measured={"<b>suite</b>": "<script>alert(4)</script>"},
            ),
            made("\u202egnp.exe \x00\x07\ud800 漢字 😀 " + "x" * 400, 0.7, 0.95, difference=0.05),
        ]
    )  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_complete() -> None:
    front = small()
    tags = Tags(page(front, "Our sweep", (0.1, 0.2), notes=["Seven GPUs."]))
    expected = ["Our sweep", "Seven GPUs.", "hypervolume", "against (0.1, 0.2)", "What was lost where", "math", "Holm"]
    expected += ["reading", "response length", "KL to the reference", "tiny-world", "fingerprint", "lr 1e-05"]
    expected += ["on the front", "▼", "linear 0.5"]
    for said in expected:
        assert said in tags.text, said
    rows = sum(tag == "tr" for tag, _ in tags.found)
    assert rows >= 2 * len(front.points) + 2
    assert any(tag == "svg" for tag, _ in tags.found)


def test_hostile_names_stay_text() -> None:
    text = page(small(), "<script>alert(0)</script>", notes=["<img src=x>"])
    tags = Tags(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "b", "span", "ul", "li", "figure",
               "figcaption", "svg", "defs", "g", "path", "use", "text", "tspan", "clippath", "rect", "p", "table",
               "thead", "tbody", "tr", "th", "td", "i", "small", "dl", "dt", "dd", "details", "summary"}  # fmt: skip
    assert {tag for tag, _ in tags.found} <= allowed
    for tag, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        for name, value in attributes.items():
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#"), (tag, value)
            if name == "style":
                assert "url(http" not in (value or "")
    assert HOSTILE.format(host="evil.test")[:60] in tags.text  # shown as it is, digits and colours included
    assert "#0072b2 0.123456" in tags.text
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert not any("evil" in style or "alert" in style or "@import" in style for style in styles)
    assert "\u202e" not in text
    assert "\x00" not in text


def test_pictures_are_well_formed() -> None:
    for view in (View(), View(themed=True), View(4, 4, 9, names=False, corner=True)):
        text = svg(small(), view)
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg")
        assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "foreignObject"))]
    assert png(small(), View())[:8] == b"\x89PNG\r\n\x1a\n"
    assert svg(small(), View()) == svg(small(), View())  # the same bytes each time


@pytest.mark.parametrize("count", [1, 2, 12])
def test_pictures_of_odd_fronts(count: int) -> None:
    """One point, equal points, negative and huge values, no reference, no width."""
    points = [
        Measurement(f"p{i}", "x", -5.0 - i**3, (-5.0 - i**3,) * 2, 3.0, (3.0, 3.0), path="p", label=str(i))
        for i in range(count)
    ]
    front = Frontier(points)
    assert "points of 100" not in svg(front, View())
    assert "No point is marked as the reference" in page(front)
    assert corner(front) is None or count == 12


def test_200_points_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = [made("sft", 0.4, 0.9, "reference")]
    for i in range(199):
        reward, capability = rng.random(2)
        points.append(made(f"sweep-{i:03d} density=0.05 lr=1e-5", reward, capability, difference=-rng.random()))
    path = write_report(Frontier(points), tmp_path / "report.html")
    assert path.stat().st_size <= 500_000


def test_markdown() -> None:
    text = markdown(small(), notes=["By @someone"])
    assert "<script" not in text
    assert "@" not in text
    assert "http://" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(small().points)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)
    assert "**�gnp.exe" in text


def test_csv() -> None:
    front = Frontier([made("sft", 0.4, 0.9, "reference"), made('=cmd|"x", 1\n2', 0.5, 0.8)])
    rows = list(csv.DictReader(io.StringIO(csv_text(front))))
    assert [row["name"] for row in rows] == ["sft", '\'=cmd|"x", 1 2']
    assert float(rows[1]["reward"]) == 0.5
    assert float(rows[1]["tax_low"]) == pytest.approx(0.08)
    assert float(rows[1]["category:math"]) == pytest.approx(0.9 - 0.1 / 3)
    assert (rows[0]["tax"], rows[1]["on_front"]) == ("", "1")


def test_wrong_targets(tmp_path: Path) -> None:
    for target in ("x.pdf", "none/x.html", "x"):
        with pytest.raises(ArgumentError, match="output="):
            small().report(tmp_path / target)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ArgumentError, match="name a file"):
        small().report(tmp_path / "folder.html")


# -- in a browser --------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium")


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--disable-component-update", "--no-first-run", f"--user-data-dir={profile}",
               "--enable-logging=stderr", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture
def outside() -> Iterator[tuple[str, list[str]]]:
    """A server that nobody should ask, with what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@in_browser
@pytest.mark.slow
def test_in_chromium(tmp_path: Path, outside: tuple[str, list[str]]) -> None:
    """No console message (a blocked request would be one), no request, no element that a name made, a picture."""
    host, asked = outside
    path = write_report(small(host), tmp_path / "report.html", title=HOSTILE.format(host=host))
    for width in (400, 1400):
        shot = tmp_path / f"{width}.png"
        done = browse(path, tmp_path / f"p{width}", f"--window-size={width},2000", f"--screenshot={shot}")
        assert "CONSOLE" not in done.stderr, done.stderr
        from matplotlib import image

        pixels = image.imread(shot)
        assert pixels.shape[1] == width
        assert len(np.unique((pixels[..., :3] * 15).astype(int).reshape(-1, 3), axis=0)) > 20  # not one blank sheet
    dom = Tags(browse(path, tmp_path / "dom", "--dump-dom").stdout)
    assert not {"script", "img", "iframe", "object", "link"} & {tag for tag, _ in dom.found}
    assert "<script>alert(1)" in dom.text
    assert asked == []


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_screen(tmp_path: Path, width: int) -> None:
    """Only tables scroll sideways, inside their own frames. (The policy is taken out so that a script can measure.)"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page(small()))
    probe = "<script>parent.document.body.dataset.width=document.documentElement.scrollWidth</script></body>"
    inner = escape(text.replace("</body>", probe))
    path = tmp_path / "probe.html"
    # In a frame, since a window of Chromium's is never narrower than 500 pixels.
    path.write_text(f'<!doctype html><meta charset="utf-8"><body><iframe width={width} height=900 srcdoc="{inner}">')
    dom = Tags(browse(path, tmp_path / "profile", "--window-size=1600,2000", "--dump-dom").stdout)
    [body] = [attributes for tag, attributes in dom.found if tag == "body"]
    assert 0 < int(body.get("data-width") or 0) <= width
