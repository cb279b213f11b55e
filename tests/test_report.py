"""extras/report.py: what the page holds, and how it behaves in a browser, if Chromium is there."""

import csv
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import metrics
from data.sources import BENCHMARKS
from extras.report import COLUMNS, PICTURES, PUBLISHED, SYSTEMS, shrink, write_report

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
ODD = "deep/odd \"<script>alert('1')</script><!--&amp; ünï深"


def save_evaluation(out, names, expected=None):
    """An evaluation as evaluate.py writes it, of {set: names}; image i has AbsRel (i + 1) / 100."""
    results, rows = {}, []
    for dataset, images in names.items():
        for number, image in enumerate(images):
            scores = dict.fromkeys(metrics.SCORES, 0.5)
            scores |= {"abs_rel": (number + 1) / 100, "delta1": 1 - number / 100}
            rows.append((dataset, image, *scores.values()))
            save_pictures(out / "pictures" / dataset / image, seed=number)
        results[dataset] = dict(
            images=len(images), expected_images=expected, skipped=0, limit=None,
            align="sqrt_disparity", align_negative="clamp", f1_mask="pair", f1_resolution="30x40",
            processing_res=768, precision="float32", paradigm="single", **scores,
            other_alignments={"depth": scores})
    out.mkdir(exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(results))
    with open(out / "per_image.csv", "w", newline="") as file:
        csv.writer(file).writerows([("dataset", "image", *metrics.SCORES), *rows])
    return results


def save_pictures(folder, seed):
    folder.mkdir(parents=True)
    for name in PICTURES:
        picture = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
        iio.imwrite(folder / f"{name}.jpg", np.kron(picture, np.ones((10, 10, 1), np.uint8)))


def page_of(out):
    write_report(out)
    assert not list(out.glob("*.tmp"))
    return (out / "report.html").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def lines_of(page, dataset):
    """{label: sentence} of how a set was scored."""
    return {way["set"]: dict(way["lines"]) for way in data_of(page)["ways"]}[dataset]


# ---------------------------------------------------------------------------- what the page holds


def test_page_needs_nothing_else(tmp_path):
    save_evaluation(tmp_path, {"hypersim": ["a", ODD], "vkitti": ["b"]})
    page = page_of(tmp_path)
    assert not re.search(r"https?:|\b(src|href)\s*=\s*[\"']|<link|@import|url\(", page)
    assert "default-src 'none'" in page  # the browser refuses what was overlooked


def test_names_cannot_leave_the_data(tmp_path):
    save_evaluation(tmp_path, {"hypersim": [ODD]})
    page = page_of(tmp_path)
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page)) == 2
    assert "alert('1')<" not in page and "<!--" not in page
    assert data_of(page)["images"][0]["image"] == ODD


def test_data_is_complete(tmp_path):
    names = {"kitti": ["a", "b/c"], "vkitti": ["b/c"]}
    save_evaluation(tmp_path, names)
    data = data_of(page_of(tmp_path))
    assert [column["key"] for column in data["columns"]] == list(COLUMNS)
    assert set(COLUMNS) == set(metrics.SCORES)
    assert [(each["dataset"], each["image"]) for each in data["images"]] == [
        (dataset, image) for dataset, images in names.items() for image in images]
    assert [each["abs_rel"] for each in data["images"]] == [0.01, 0.02, 0.01]
    assert all(set(metrics.SCORES) <= set(each) for each in data["images"])
    assert all(tuple(each["pictures"]) == PICTURES for each in data["images"])
    cells = [row["cells"] for row in data["scores"]["rows"]]
    assert [row[:5] for row in cells[:3]] == [
        ["kitti", "2", "sqrt disparity", "2.00", "99.00"], ["", "", "depth", "2.00", "99.00"],
        ["vkitti", "1", "sqrt disparity", "1.00", "100.00"]]


def test_missing_pictures(tmp_path):
    save_evaluation(tmp_path, {"hypersim": ["a", "b"]})
    (tmp_path / "pictures/hypersim/a/truth.jpg").unlink()
    first, second = data_of(page_of(tmp_path))["images"]
    assert first["pictures"] is None and second["pictures"]


def test_published_rows(tmp_path):
    save_evaluation(tmp_path, {"diode": ["a"], "hypersim": ["a"]})
    table = data_of(page_of(tmp_path))["published"]
    assert table["head"] == ["System", "DIODE AbsRel", "DIODE δ1", "Hypersim F1", "From"]
    ours, first, second, *_ = [row["cells"] for row in table["rows"]]
    assert len(table["rows"]) == 16
    assert ours == ["This evaluation", "1.0", "100.0", "50.0 at 30x40", ""]
    assert first[:3] == ["DepthMaster", "21.5", "77.6"] and "Table VI" in first[-1]
    assert first[3:-1] == ["33.7 (80 images, native, owner mask)"]
    assert second == ["Lotus-D (final)", "22.8", "73.8", "–", "Lotus, ICLR 2025"]


def test_published_numbers():
    assert all(len(numbers.split()) == 2 * len(PUBLISHED) for _, numbers, _ in SYSTEMS)
    for name, systems in PUBLISHED.items():
        expected = [BENCHMARKS[name].published[key] for key in ("abs_rel", "delta1")]
        assert systems["DepthMaster"] == pytest.approx(expected)
        assert all(abs_rel < 0.4 and 0.6 < delta1 < 1 for abs_rel, delta1 in systems.values())


def test_no_published_rows(tmp_path):
    save_evaluation(tmp_path, {"vkitti": ["a"]})
    assert data_of(page_of(tmp_path))["published"] is None


def test_says_how(tmp_path):
    results = save_evaluation(tmp_path, {"hypersim": ["a"], "vkitti": ["a"]}, expected=2)
    results["vkitti"] |= dict(expected_images=1, processing_res=None, precision=None,
                              paradigm=None, align="depth", f1_mask="owner", skipped=3)
    (tmp_path / "metrics.json").write_text(json.dumps(results))
    page = page_of(tmp_path)
    first, second = lines_of(page, "hypersim"), lines_of(page, "vkitti")
    assert first["Images"] == "1 of 2." and second["Images"] == "1 of 1."
    assert first["Note"] == "These are fewer images than the set has." and "Note" not in second
    assert first["Prediction"] == "With the longest side at 768 px, in float32; a single pass."
    assert second["Prediction"] == "Saved predictions." and second["Left out"].startswith("3 ")
    assert "square-root disparity: scale and shift by least squares" in first["Alignment"]
    assert "In depth" in second["Alignment"] and "above 0" not in second["Alignment"]
    assert "became 0 (far)" in first["Negative"] and "Negative" not in second
    assert first["Clipping"].endswith("then depth to 1e-05 m at least, 65 m at most.")
    assert first["Boundary F1"].startswith("At 30x40; ") and "farther" in second["Boundary F1"]


@pytest.mark.parametrize("size", [(320, 320), (321, 640), (7, 961)])
def test_small_pictures_are_means_of_what_is_known(size):
    x = np.random.default_rng(0).random(size)
    x[np.random.default_rng(1).random(size) < 0.8] = np.nan
    cell = -(-max(size) // 320)
    expected = [[np.nan if np.isnan(part).all() else np.nanmean(part) for part in (
        x[i : i + cell, j : j + cell] for j in range(0, size[1], cell))]
        for i in range(0, size[0], cell)]
    np.testing.assert_allclose(shrink(x), expected)
    assert shrink(np.stack([x, x], axis=-1)).shape == (*np.shape(expected), 2)


@pytest.mark.parametrize("name", ["metrics.json", "per_image.csv"])
def test_missing_file(tmp_path, name):
    save_evaluation(tmp_path, {"hypersim": ["a"]})
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}: give the --out"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["", "dataset,image\na,b\n", "dataset,image,abs_rel\na,b,x\n"])
def test_no_rows(tmp_path, content):
    save_evaluation(tmp_path, {"hypersim": ["a"]})
    (tmp_path / "per_image.csv").write_text(content)
    with pytest.raises(ValueError, match="evaluate.py again|not of one evaluation"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_files_of_two_evaluations(tmp_path):
    results = save_evaluation(tmp_path, {"hypersim": ["a"]})
    results["hypersim"]["images"] = 2
    (tmp_path / "metrics.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="are not of one evaluation"):
        write_report(tmp_path)


# ---------------------------------------------------------------------------- in a browser


class Browser:
    """Headless Chromium, by the WebDriver protocol."""

    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}/session"
        flags = ("headless no-sandbox disable-gpu no-first-run disable-background-networking "
                 "disable-component-update disable-sync window-size=1280,900").split()
        options = {"binary": str(CHROMIUM), "args": [
            *(f"--{flag}" for flag in flags), f"--user-data-dir={profile}"]}
        try:
            self.wait_until_ready(f"http://127.0.0.1:{port}/status")
            session = self.post("", {"capabilities": {"alwaysMatch": {
                "goog:chromeOptions": options}}})
        except BaseException:
            self.process.kill()
            raise
        self.url += "/" + session["sessionId"]

    def wait_until_ready(self, url):
        for _ in range(100):
            try:
                return urllib.request.urlopen(url, timeout=60)
            except urllib.error.URLError:
                time.sleep(0.2)
        raise TimeoutError("chromedriver does not answer")

    def post(self, path, body):
        return self.request(path, json.dumps(body).encode(), "POST")

    def request(self, path, body, method):
        request = urllib.request.Request(self.url + path, body, method=method,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.post("/execute/sync", {"script": f"return {script}", "args": []})

    def find(self, selector):
        found = self.post("/element", {"using": "css selector", "value": selector})
        return next(iter(found.values()))

    def click(self, selector):
        self.post(f"/element/{self.find(selector)}/click", {})

    def type(self, selector, text):
        self.post(f"/element/{self.find(selector)}/value", {"text": text})

    def close(self):
        try:
            self.request("", None, "DELETE")
        finally:
            self.process.terminate()
            self.process.wait(60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM.exists() or not DRIVER.exists():
        pytest.skip("needs Chromium and its driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture()
def page(browser, tmp_path):
    """The browser, showing a report of 60 images of hypersim and 3 of kitti, two without."""
    names = {"hypersim": [f"scene/{i:02d}" for i in range(60)], "kitti": ["a", "scene/7", ODD]}
    save_evaluation(tmp_path, names)
    for name in ("scene/59", "scene/00"):
        (tmp_path / "pictures/hypersim" / name / "error.jpg").unlink()
    write_report(tmp_path)
    browser.post("/url", {"url": (tmp_path / "report.html").as_uri()})
    return browser


def shown(page):
    """Names of the images that are there, from top to bottom."""
    return page.run("[...document.querySelectorAll('tbody th.words[scope=row]')]"
                    ".map((each) => each.firstChild.data)")


def test_browser_shows_all(page):
    assert len(shown(page)) == 50
    assert page.run("document.querySelectorAll('.compare').length") == 49
    page.click("#more")
    assert len(set(shown(page))) == 63 and ODD in shown(page)
    assert page.run("document.getElementById('more').hidden")
    assert page.run("[...document.images].every((each) => each.src.startsWith('data:'))")
    page.post("/execute/async", {"args": [], "script": """const done = arguments[0];
        Promise.all([...document.images].map((each) => each.decode())).then(() => done(0))"""})
    assert page.run("performance.getEntriesByType('resource')"
                    ".filter((each) => !each.name.startsWith('data:')).length") == 0
    assert page.post("/se/log", {"type": "browser"}) == []
    text = page.run("document.body.innerText")
    assert "63 images of hypersim, kitti." in text and "Lotus-D" in text


def test_browser_sorts(page):
    head = "document.getElementById('by_{}').getAttribute('aria-sort')"
    assert shown(page)[:2] == ["scene/59", "scene/58"]
    assert page.run(head.format("abs_rel")) == "descending"
    page.click("#best")
    assert shown(page)[0] in ("scene/00", "a")
    assert page.run("document.getElementById('best').getAttribute('aria-pressed')") == "true"
    assert page.run("document.getElementById('worst').getAttribute('aria-pressed')") == "false"
    page.click("#by_delta1 button")  # higher is better: the worst is the lowest
    assert shown(page)[0] == "scene/59"
    assert page.run(head.format("delta1")) == "ascending"
    assert page.run(head.format("abs_rel")) is None
    page.type("#by_delta1 button", "\ue007")  # Enter
    assert shown(page)[0] in ("scene/00", "a")
    page.click("#worst")
    assert shown(page)[0] == "scene/59"
    page.click("#by_image button")
    assert shown(page)[:2] == ["a", ODD]
    assert page.run("document.querySelectorAll('[aria-pressed=true]').length") == 0


def test_browser_filters(page):
    page.type("#set", "kitti")
    assert shown(page) == [ODD, "scene/7", "a"]
    page.type("#name", "SCENE")
    assert shown(page) == ["scene/7"]
    assert page.run("document.getElementById('status').textContent") == "1 of 63 images."
    page.type("#name", "no such name")
    assert shown(page) == [] and "No image" in page.run("document.body.innerText")


def test_browser_redraws_histogram(page):
    counts = ("[...document.querySelectorAll('rect title')]"
              ".map((each) => Number(each.textContent.split(': ')[1]))")
    before = page.run(counts)
    assert sum(before) == 63
    page.type("#score", "δ1")
    assert page.run("document.getElementById('summary').textContent").startswith("δ1 in %")
    assert page.run(counts) != before and sum(page.run(counts)) == 63
    page.type("#set", "kitti")
    assert sum(page.run(counts)) == 3
    page.type("#score", "log10")  # all of one value
    assert sum(page.run(counts)) == max(page.run(counts)) == 3


def test_browser_reveals(page):
    clip = "getComputedStyle(document.querySelectorAll('.compare img')[1]).clipPath"
    middle = page.run(clip)
    page.type(".compare input", "\ue010")  # End
    everything = page.run(clip)
    page.type(".compare input", "\ue011\ue014")  # Home, arrow to the right
    assert len({middle, everything, page.run(clip)}) == 3
    assert page.run("document.querySelector('.compare').style.getPropertyValue('--reveal')") == "1%"


def test_browser_fits_a_phone(page):
    page.post("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": dict(
        width=360, height=700, deviceScaleFactor=1, mobile=True)})
    try:
        assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    finally:
        page.post("/goog/cdp/execute",
                  {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})
