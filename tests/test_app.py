"""app.py, extras/visit.py, extras/page.py: without a browser, over HTTP, once in a browser."""

import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError, URLError

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import app
import predict
from data.images import allow_pixels
from extras import visit
from extras.metric import fit
from tests import worlds
from tests.worlds import files, photo, save_tiny

ROOT = Path(app.__file__).parent
SIZE = 40, 56
TAKE = dict(name="tiny", processing_res=None, tell=lambda share, text: None)
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def desk(ckpt, tmp_path):
    (tmp_path / "desk").mkdir()
    return visit.Desk(tmp_path / "desk", {"tiny": ckpt}, torch.device("cpu"))


@pytest.fixture
def upload(tmp_path):
    iio.imwrite(tmp_path / "a.png", photo(*SIZE))
    return tmp_path / "a.png"


def left(desk):
    """Names of what lies in the desk's folder."""
    return sorted(path.name for path in desk.folder.iterdir())


# ------------------------------------------------------------- a picture, its points, its files


def test_metres_from_two_points(desk, upload):
    picture = visit.take(desk, "a", upload, **TAKE)
    near = np.tile(np.linspace(0, 1, SIZE[1], dtype=np.float32), (SIZE[0], 1))
    np.save(picture.folder / "values.npy", near)
    metres = (0.6 * near.astype(np.float64) + 0.2) ** -2
    assert "no metres yet" in visit.report(picture)
    visit.look(picture, 10.5, 20.5)
    visit.know(picture, metres[20, 10])
    assert "give another" in visit.report(picture)
    visit.know(picture, metres[20, 10] + 1e-9)  # corrected: it stays one point
    assert len(picture.points) == 1
    visit.look(picture, 50.5, 5.5)
    visit.know(picture, metres[5, 50])
    assert "2 of 2 distances fit" in visit.report(picture)
    visit.look(picture, 30.5, 33.5)
    assert visit.report(picture).startswith(f"At x 30.5, y 33.5: {near[33, 30]:.4f}, "
                                           f"{metres[33, 30]:.2f} m")
    np.testing.assert_allclose(picture.found.metres(near), metres, rtol=1e-4)
    visit.forget(picture)
    assert picture.place and " m\n" in visit.report(picture) and picture.found is None


def test_what_the_fit_refuses_is_said(desk, upload):
    picture = visit.take(desk, "a", upload, **TAKE)
    for x in (3.5, 40.5):
        visit.look(picture, x, 9.5)
        visit.know(picture, 2)
    assert "No metres: the points are all 2 m away" in visit.report(picture)


@pytest.mark.parametrize("action, words", [
    (lambda picture: visit.look(picture, 57, 3), "x must be from 0 to 56"),
    (lambda picture: visit.look(picture, float("nan"), 3), "x must be"),
    (lambda picture: visit.know(picture, 2), "Choose a point first"),
    (lambda picture: (visit.look(picture, 1, 1), visit.know(picture, 0)), "a number above 0"),
    (visit.forget, "no known distance"),
    (lambda picture: visit.write_files(picture, [], "turbo", 0), "at least one kind"),
    (lambda picture: visit.write_files(picture, ["npy"], "turbo", 200), "field of view"),
])
def test_mistakes_are_sentences(desk, upload, action, words):
    picture = visit.take(desk, "a", upload, **TAKE)
    with pytest.raises(ValueError, match=words):
        action(picture)


@pytest.mark.parametrize("metric", [False, True])
def test_files_are_those_of_predict(desk, upload, ckpt, tmp_path, monkeypatch, metric):
    pytest.importorskip("OpenEXR"), pytest.importorskip("plyfile")
    picture = visit.take(desk, "a", upload, **TAKE)
    options = ["--save", *visit.FILES.values(), "--colormap", "turbo", "--fov", 70]
    if metric:
        values = picture.values()
        for place in (np.unravel_index(pick(), SIZE) for pick in (values.argmin, values.argmax)):
            visit.look(picture, place[1] + 0.5, place[0] + 0.5)
            visit.know(picture, (0.6 * float(values[place]) + 0.2) ** -2)
        assert "Metres are known" in visit.report(picture)
        rows = [",".join(map(repr, point)) for point in picture.points]
        (tmp_path / "points.csv").write_text("\n".join(["x,y,metres", *rows]))
        options += ["--metric", tmp_path / "points.csv"]
    files = visit.write_files(picture, list(visit.FILES.values()), "turbo", 70)
    assert worlds.call(monkeypatch, predict, upload, "--ckpt", ckpt, "--out", tmp_path / "out",
                       *options) == 0
    assert len(files) == (7 if metric else 5)
    for path in files:
        same = tmp_path / "out" / path.name.replace("depth", "a", 1)
        assert path.read_bytes() == same.read_bytes(), path.name


def test_pictures_for_the_browser(desk, upload):
    picture = visit.take(desk, "a", upload, **TAKE)
    shown = visit.colour(picture, "turbo")
    assert {Image.open(path).size for path in shown} == {(visit.SHOWN, visit.SHOWN * 40 // 56)}
    before = np.array(Image.open(visit.mark(picture, depth=True)))
    visit.look(picture, 28, 20)
    visit.know(picture, 3)
    after = np.array(Image.open(visit.mark(picture, depth=True)))
    changed = np.argwhere(np.abs(after.astype(int) - before).max(axis=2) > 60)
    np.testing.assert_allclose(changed.mean(axis=0), np.array(after.shape[:2]) / 2, atol=3)
    assert len(list(picture.folder.glob("marked_*"))) == 1


def test_values_under_the_cursor(desk, upload):
    picture = visit.take(desk, "a", upload, **TAKE)
    width, height = picture.shown_size()

    def read():
        return np.fromfile(visit.codes(picture), "<u2").reshape(-1, height, width)
    near, = read() / 65535
    for y, x in (0, 0), (height - 1, width - 1), (500, 1000):
        expected = picture.values()[y * SIZE[0] // height, x * SIZE[1] // width]
        assert near[y, x] == pytest.approx(expected, abs=1e-5)
    picture.found = fit(np.array([[0, 1]], np.float32), [[0.5, 0.5, 10], [1.5, 0.5, 2]])
    assert np.abs(read()[1] / 100 - picture.found.metres(near)).max() < 0.02
    assert len(list(picture.folder.glob("codes_*"))) == 1


def test_mesh_in_metres_without_what_is_far(desk, upload):
    trimesh = pytest.importorskip("trimesh")
    picture = visit.take(desk, "a", upload, **TAKE)
    near = np.full(SIZE, 0.5, np.float32)
    near[:5] = 0.02
    np.save(picture.folder / "values.npy", near)
    picture.found = fit(near, [[9.5, 9.5, 2], [9.5, 2.5, 200]])
    path, distance = visit.write_mesh(picture, 0)
    mesh = trimesh.load(path, force="mesh")
    np.testing.assert_allclose(mesh.vertices[:, 2], -2, rtol=1e-4)
    assert distance == pytest.approx(2, rel=1e-4)


# ------------------------------------------------------------- visitors, models, the time left


def test_visitors_are_apart_and_leave_nothing(desk, upload, monkeypatch):
    first, second = (visit.take(desk, session, upload, **TAKE) for session in "ab")
    assert first.folder != second.folder and len(first.folder.name) > 20
    visit.look(first, 3, 4)
    assert not second.place
    with pytest.raises(ValueError, match="no picture"):
        desk.picture("c")
    desk.leave("a")
    assert left(desk) == [second.folder.name] and upload.exists()  # equal uploads are one file
    third = visit.take(desk, "b", second.photo, **TAKE)  # another model or resolution
    assert left(desk) == [third.folder.name] and third.photo.exists()
    desk.leave("b")
    assert left(desk) == [] and not desk.pictures
    monkeypatch.setattr(visit, "MOST_PICTURES", 2)
    iio.imwrite(upload, photo(*SIZE))
    for session in "abc":
        visit.take(desk, session, upload, **TAKE)
    assert list(desk.pictures) == ["b", "c"] and len(left(desk)) == 2


def test_models(ckpt, tmp_path, files, monkeypatch):
    assert list(visit.find_models()) == ["miniature.safetensors"]  # no sd2, no dinov2
    assert list(visit.find_models(ckpt).values()) == [ckpt, visit.MINIATURE]
    monkeypatch.setattr(visit, "WEIGHTS", files)
    assert list(visit.find_models()) == ["stage1.safetensors"]
    with pytest.raises(OSError, match="give a model file"):
        visit.find_models(tmp_path / "none.safetensors")


def test_time_left_is_told_from_the_second_picture_on(desk, upload):
    told = []
    desk.model("tiny").predict = lambda *_: time.sleep(0.5) or np.zeros(SIZE, np.float32)
    take = partial(visit.take, desk, "a", upload, "tiny", None)
    take(lambda share, text: told.append((share, text)))
    assert (None, "predicting for 0 s") in told and not any(share for share, _ in told)
    iio.imwrite(upload, photo(*SIZE))
    take(lambda share, text: told.append((share, text)))
    assert any(share and 0 < share < 1 and "s left" in text for share, text in told)


# ------------------------------------------------------------- what is refused


def bomb(path):
    """A PNG of a few bytes that says it has 10,000 x 10,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I",
                                                                        zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]))


@pytest.mark.parametrize("write, words", [
    (bomb, "more than 64,000,000 pixels"),
    (lambda path: path.write_text("hello, this is no picture"), "can't be read"),
    (lambda path: path.write_bytes(b""), "can't be read"),
    (lambda path: iio.imwrite(path, photo(4, 90), extension=".png"), "too thin"),
    (lambda path: path.write_bytes(bytes(9000)), "more than 0 MB"),
])
def test_uploads_that_are_refused_leave_nothing(desk, tmp_path, monkeypatch, write, words):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(visit, "MOST_BYTES", 8000)
    allow_pixels(visit.MOST_PIXELS)
    write(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=words) as refused:
        visit.take(desk, "a", tmp_path / "a.jpg", **TAKE)
    assert str(tmp_path) not in str(refused.value)
    assert left(desk) == [] and not (tmp_path / "a.jpg").exists() and not desk.pictures


def test_more_pixels_than_allowed_in_a_format_without_limit(desk, upload, monkeypatch):
    monkeypatch.setattr(visit, "MOST_PIXELS", 2000)
    with pytest.raises(ValueError, match="more than 2,000 pixels"):
        visit.take(desk, "a", upload, **TAKE)


@pytest.mark.parametrize("port", [(), ("0",), ("70000",), ("http",)])
def test_a_port_that_is_none(monkeypatch, capsys, port):
    assert worlds.call(monkeypatch, app, "--port", *port) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: --port must be a number from 1 to 65535, such as 7860."]


def test_a_port_in_use_and_a_host_that_is_none(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert worlds.call(monkeypatch, app, "--port", taken.getsockname()[1]) == 1
    assert "in use" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert worlds.call(monkeypatch, app, "--host", "999.1.1.1") == 1
    assert "--host 999.1.1.1" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_gradio_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # set back afterwards
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert worlds.call(monkeypatch, app, "--port", free_port()) == 1
    said = capsys.readouterr().err
    assert "app.py needs gradio: pip install" in said and said.count("\n") == 1


# ------------------------------------------------------------- over HTTP


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def fetch(url, data=None, headers=()):
    """(status, body) of a request."""
    try:
        with NO_PROXY.open(urllib.request.Request(url, data, dict(headers)), timeout=10) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """app.py with the miniature: (address, its temporary folder); afterwards nothing is left."""
    if not find_spec("gradio"):
        pytest.skip("gradio is not installed")
    scratch = tmp_path_factory.mktemp("scratch")
    url = f"http://127.0.0.1:{(port := free_port())}"
    running = subprocess.Popen([sys.executable, "app.py", "--port", str(port), "--device", "cpu"],
                               cwd=ROOT, env=os.environ | {"TMPDIR": str(scratch)})
    try:
        until(lambda: running.poll() is not None or answers(url), 60)
        assert running.poll() is None
        yield url, scratch
    finally:
        running.terminate()
        try:
            running.wait(15)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
    assert not list(scratch.glob("depth_page_*"))


def answers(url):
    try:
        return fetch(url)[0] == 200
    except (URLError, OSError):
        return False


def until(condition, seconds=20):
    """Waits until condition() is true and returns it; errors on the way count as false."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if last := condition():
                return last
        except Exception as error:  # a part of the page is just being replaced
            last = error
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {last}")


def send(url, name, content):
    """Uploads a file as the page does -> (status, body)."""
    body = (f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
            ).encode() + content + b"\r\n--x--\r\n"
    return fetch(f"{url}/gradio_api/upload", body,
                 {"Content-Type": "multipart/form-data; boundary=x"})


def test_uploads_stay_in_the_folder_and_below_the_limit(server):
    url, scratch = server
    status, body = send(url, "../../evil.png", b"text")
    path = Path(json.loads(body)[0])
    assert status == 200 and path.resolve().is_relative_to(scratch) and path.name == "evil.png"
    assert not list(scratch.glob("evil*")) and not list(scratch.parent.glob("evil*"))
    assert send(url, "big.png", bytes(visit.MOST_BYTES + 1))[0] == 413
    for header, value in (("Content-Length", 2 << 30), ("Transfer-Encoding", "chunked")):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/gradio_api/upload")
        connection.putheader(header, value)
        connection.endheaders()  # refused before the file is sent
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (413, b"A request may have at most 64 MB.")
        connection.close()
    assert fetch(f"{url}/gradio_api/file={ROOT / 'app.py'}")[0] in (403, 404)


def test_the_browser_may_load_nothing_from_elsewhere(server):
    with NO_PROXY.open(server[0], timeout=10) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        text = answer.read().decode()
    assert "src=\"http" not in text and "<link rel=\"preconnect\"" not in text


# ------------------------------------------------------------- in a browser


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "no-proxy-server",
                 "disable-background-networking", "window-size=1200,1000"):
        options.add_argument(f"--{word}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_page_load_timeout(20)
    yield browser
    browser.quit()


def test_a_visit(server, browser, tmp_path):
    """Upload, depth, two known distances by mouse and by keyboard, metres, each file."""
    pytest.importorskip("OpenEXR"), pytest.importorskip("plyfile")
    from selenium.webdriver import ActionChains, Keys
    url, scratch = server

    def find(selector):
        return browser.find_elements("css selector", selector)

    def said():
        return find("#said textarea")[0].get_attribute("value")

    def drawn(selector):
        return [each for each in find(selector) if each.get_property("naturalWidth") > 1]

    def typed(selector, *keys):
        find(selector)[0].send_keys(Keys.CONTROL + "a" + Keys.NULL, *keys)

    browser.get(url)
    iio.imwrite(tmp_path / "text.png", photo(90, 120))
    (tmp_path / "bad.jpg").write_text("no picture")
    until(lambda: find("#photo input[type=file]"))[0].send_keys(str(tmp_path / "bad.jpg"))
    until(lambda: "can't be read" in said())
    until(lambda: find("#photo input[type=file]"))[0].send_keys(str(tmp_path / "text.png"))
    until(lambda: len(drawn("#shown img")) >= 2 and drawn("#marked img"))
    near = np.load(next(scratch.glob("depth_page_*/*/values.npy")))
    assert near.shape == (90, 120)
    lowest, highest = (np.unravel_index(index, near.shape)[::-1]
                       for index in (near.argmin(), near.argmax()))

    for name, text in ("colours", "turbo"), ("res", "256"):  # with the keyboard
        before = [each.get_attribute("src") for each in drawn("#shown img")]
        typed(f"#{name} input", text, Keys.ENTER)
        until(lambda: before[1] not in [each.get_attribute("src") for each in drawn("#shown img")])
    until(lambda: drawn("#marked img"))
    near = np.load(next(scratch.glob("depth_page_*/*/values.npy")))

    picture = find("#marked img")[0]  # the first point with the mouse
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    width, height = picture.size["width"], picture.size["height"]
    ActionChains(browser).move_to_element_with_offset(
        picture, int((lowest[0] + 0.5) / 120 * width - width / 2),
        int((lowest[1] + 0.5) / 90 * height - height / 2)).click().perform()
    until(lambda: said().startswith("At x"))
    x, y = (float(find(f"#{name} input")[0].get_attribute("value")) for name in "xy")
    assert abs(x - lowest[0] - 0.5) < 1 and abs(y - lowest[1] - 0.5) < 1
    typed("#metres input", "6", Keys.ENTER)
    until(lambda: "give another" in said())
    typed("#x input", f"{highest[0] + 0.5}")  # the second with the keyboard alone
    typed("#y input", f"{highest[1] + 0.5}", Keys.ENTER)
    until(lambda: f"At x {highest[0] + 0.5:g}, y {highest[1] + 0.5:g}: {near.max():.4f}" in said())
    typed("#metres input", "2", Keys.ENTER)
    until(lambda: "2 of 2 distances fit" in said())
    assert "2.00 m" in said().splitlines()[0]

    for box in find("#kinds input"):
        if not box.is_selected():
            box.send_keys(Keys.SPACE)
    find("#write")[0].send_keys(Keys.ENTER)
    links = until(lambda: len(links := find("#files a")) == 7 and links)
    files = {}
    for link in [link.get_attribute("href") for link in links]:
        name = link.rpartition("/")[2]
        (tmp_path / name).write_bytes(fetch(link)[1])
        files[name] = tmp_path / name
    np.testing.assert_array_equal(np.load(files["depth.npy"]), near)
    metres = np.load(files["depth_metres.npy"])
    assert metres[highest[::-1]] == pytest.approx(2, rel=1e-3)
    np.testing.assert_allclose(iio.imread(files["depth.png"]) / 65535, near, atol=1e-5)
    np.testing.assert_allclose(iio.imread(files["depth_metres.png"])[highest[::-1]], 2000, atol=2)
    assert iio.imread(files["depth_color.png"]).ndim == 3
    import OpenEXR
    import plyfile
    with OpenEXR.File(str(files["depth.exr"]), separate_channels=True) as file:
        np.testing.assert_array_equal(file.channels()["Z"].pixels, metres)
    assert len(plyfile.PlyData.read(files["depth.ply"])["vertex"]) > 1000

    def tip():
        return browser.find_element("id", "tip").text
    for selector in "#shown img", "#marked img":
        hover = find(selector)[0]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", hover)
        ActionChains(browser).move_to_element(hover).perform()
        until(lambda: tip().endswith(" m"))
        assert float(tip().split(",")[0]) == pytest.approx(near[45, 60], abs=2e-3)
        assert float(tip().split()[1]) == pytest.approx(metres[45, 60], rel=1e-2)
    ActionChains(browser).move_to_element(find("#write")[0]).perform()
    assert not tip()

    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(each => each.name)")
    assert loaded and all(each.startswith((url, "data:", "blob:")) for each in loaded)
    browser.get("about:blank")  # leaves: the pictures go
    until(lambda: not list(scratch.glob("depth_page_*/*/photo")))
    assert not list(scratch.glob("depth_page_*/*/text.png"))
