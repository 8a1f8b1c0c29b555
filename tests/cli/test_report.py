"""``pqkv report``, and how a real browser shows it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture
def run(exported: Path, texts: tuple[Path, Path], pqkv: Callable, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(exported, tmp_path / "RUN"))
    line = ("eval", run, "--task", "passkey", "--task", "kld", "--data", texts[1], "--context", 128, "--limit", 1)
    assert pqkv(*line).code == 0
    return run


def test_a_run_becomes_a_page(pqkv: Callable, run: Path, tmp_path: Path) -> None:
    answer = pqkv("report", run)
    assert answer.code == 0, answer.err
    assert answer.out == f"{run / 'report.html'}: 4 results\n"
    first = (run / "report.html").read_bytes()
    found = pqkv("report", run, "-o", tmp_path / "other.html", "--json", "-").json
    assert found == {"schema": "pqkv.report/1", "path": str(tmp_path / "other.html"), "records": 4, "other_records": 0}
    assert (tmp_path / "other.html").read_bytes() == first


def test_results_of_another_artifact_are_left_out(pqkv: Callable, run: Path) -> None:
    file = run / "results" / "kld-all.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"artifact_sha256": "0" * 64}))
    assert "3 results; 1 results of other artifacts are left out" in pqkv("report", run).out
    assert "1 results of other artifacts in the same place are not shown" in (run / "report.html").read_text()


def test_an_artifact_alone_has_a_page(pqkv: Callable, run: Path) -> None:
    assert pqkv("report", run / "artifact").code == 0
    assert "Layers and heads" in (run / "artifact" / "report.html").read_text()


def test_results_of_another_form_say_what_to_do(pqkv: Callable, run: Path) -> None:
    file = run / "results" / "kld-all.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "metrics"}))
    answer = pqkv("report", run)
    assert (answer.code, answer.out) == (1, "")
    assert f"the results in {run / 'results'} cannot be drawn (KeyError: 'metrics')" in answer.err.replace("\n", " ")
    assert "measure again" in answer.err


def test_what_cannot_be_reported(pqkv: Callable, run: Path, tiny_model: Path) -> None:
    (run / "results" / "kld-all.json").write_text("{half")
    damaged = pqkv("report", run)
    assert (damaged.code, "delete it and evaluate again" in damaged.err) == (1, True)
    shutil.rmtree(run / "artifact")
    missing = pqkv("report", run)
    assert (missing.code, f"make it with: pqkv export {run}" in missing.err) == (1, True)
    assert (pqkv("report", tiny_model).code, pqkv("report", "nowhere").code) == (1, 2)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: the page is not looked at in a browser")
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light")])
def test_a_browser_shows_it_without_scrolling_sideways(
    width: int, scheme: str, pqkv: Callable, run: Path, tmp_path: Path
) -> None:
    assert pqkv("report", run).code == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<!doctype html><iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{escape(text)}"></iframe><script>'
        "document.getElementById('f').onload = e => { const d = e.target.contentDocument, r = d.documentElement;"
        " const seen = [...d.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 40).length;"
        " document.title = JSON.stringify({wide: r.scrollWidth, pictures: d.querySelectorAll('svg').length, seen,"
        " size: parseFloat(getComputedStyle(d.body).fontSize), ground: getComputedStyle(d.body).backgroundColor,"
        " ink: getComputedStyle(d.querySelector('svg text')).fill}); };</script>",
        encoding="utf-8",
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
        f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}",
    ]
    done = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title is not None, done.stdout[:300]
    seen = json.loads(title[1])
    assert seen["wide"] <= width
    assert seen["seen"] == seen["pictures"] >= 6
    assert seen["size"] >= 16
    ground, ink = (sum(map(int, re.findall(r"\d+", seen[part])[:3])) / 765 for part in ("ground", "ink"))
    assert (ground < 0.2 and ink > 0.8) if scheme == "dark" else (ground > 0.8 and ink < 0.2)
