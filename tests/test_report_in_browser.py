"""The report in a real browser: at the widths of a desktop and a phone, without errors and without requests."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from observing import observe, small_config
from PIL import Image
from tiny import make_dataset

from detr_ray.engine.past_run import open_past_run
from detr_ray.engine.run_report.report import run_report
from detr_ray.tracking.event_log import EventLog

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")]

FRAME = """<!doctype html><body style="margin:0"><iframe src="report.html" style="width:WIDTHpx;height:3000px;border:0">
</iframe><pre id="seen"></pre><script>
const errors = []; addEventListener("error", event => errors.push(event.message));
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images];
  document.getElementById("seen").textContent = JSON.stringify({
    width: root.scrollWidth, broken: images.filter(image => !image.naturalWidth).length, images: images.length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name)
      .filter(name => !name.startsWith("data:")),
    columns: getComputedStyle(page.querySelector(".cards")).gridTemplateColumns.split(" ").length, errors,
  });
};
</script></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    data = make_dataset(folder / "shapes", num_train=16, num_val=4)
    seen = observe(small_config(data, folder / "runs", "run.name=mine", "train.epochs=2", "tracking.report=true"))
    log = EventLog(Path(seen.job.run.path) / "tracking")
    for step, metrics in seen.tracker.metrics:
        log.append("metrics", step=step, metrics=metrics)
    log.close()
    page = Path(seen.job.run.path, "report.html")
    page.write_text(run_report(open_past_run(seen.job.run.path), seen.job.data.val).html)
    return page


def browse(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files",
        "--enable-logging=stderr", f"--user-data-dir={folder}/profile", "--virtual-time-budget=8000", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("width", [1280, 390])
def test_it_reads_well_and_asks_for_nothing(report: Path, width: int, tmp_path: Path) -> None:
    frame = report.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    dom = browse("--dump-dom", frame.as_uri(), folder=tmp_path).stdout
    content = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert content is not None
    seen = json.loads(html.unescape(content[1]))
    assert seen["errors"] == [] and seen["requests"] == [] and seen["broken"] == 0 and seen["images"] >= 8
    assert seen["width"] <= width, "nothing sticks out to the side"
    assert (seen["columns"] >= 5) == (width == 1280)
    picture = tmp_path / "screen.png"
    browse(f"--screenshot={picture}", f"--window-size={width},3000", report.as_uri(), folder=tmp_path)
    assert len(Image.open(picture).convert("RGB").getcolors(1 << 24) or ()) > 50, "something is drawn"


def test_it_can_be_printed(report: Path, tmp_path: Path) -> None:
    browse(f"--print-to-pdf={tmp_path}/report.pdf", report.as_uri(), folder=tmp_path)
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF") and len(content) > 20_000
