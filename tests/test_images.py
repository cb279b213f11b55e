"""data/images.py: what a picture file is as RGB, out of predict.py and out of every reader."""

import struct
import sys
import zlib

import numpy as np
import pytest
from hypersim_files import frame_folder, write_frame, write_split_csv
from PIL import Image, PngImagePlugin

from data import images
from data.files import write_png
from data.hypersim import Hypersim, ProcessedHypersim
from data.images import TURNS, allow_pixels, read_picture, read_rgb
from data.pairs import FolderOfPairs
from data.transforms import BadSample
from data.vkitti import VirtualKITTI
from data.zeroshot import ZeroShot
from predict import decoded

HEIGHT, WIDTH = 48, 64
SHAPE = HEIGHT, WIDTH
DEPTH_MM = np.linspace(1000, 9000, HEIGHT * WIDTH).reshape(SHAPE).astype(np.uint16)
KINDS = ["PNG", "JPEG", "CMYK", "palette", "16 bits", "WEBP", "AVIF", "GIF", "TIFF", "transparent"]
# The mean error that a kind brings, where it is not 3.
ALLOWED = {"PNG": 0, "TIFF": 0, "16 bits": 0, "transparent": 0, "palette": 6, "GIF": 6}


def photo(height=HEIGHT, width=WIDTH):
    """Smooth, and another colour in each corner."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    return (np.stack([200 - 150 * rows, 40 + 180 * columns, 60 + 90 * rows * columns], -1)
            ).astype(np.uint8)


def png_of_16_bits(image):
    """The bytes of a PNG of 16 bits a channel (which Pillow does not write)."""
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image.astype(np.uint16) * 257)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0,
                                                               0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def save(path, image, kind="PNG", orientation=1):
    """Saves an upright picture, stored as a camera that was held that way stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture, exif = Image.fromarray(image), Image.Exif()
    if orientation > 1:
        turn = TURNS[orientation]
        picture = picture.transpose(images.BACK.get(turn, turn))
        exif[0x0112] = orientation
    if kind == "16 bits":
        return path.write_bytes(png_of_16_bits(np.array(picture)))
    if kind == "palette":
        picture, kind = picture.quantize(256), "PNG"
    elif kind == "CMYK":
        picture, kind = picture.convert("CMYK"), "JPEG"
    elif kind == "transparent":
        picture.putalpha(100)
        kind = "PNG"
    picture.save(path, format=kind, exif=exif, quality=95)


def upright(path):
    [(_, _, image)] = decoded(Now(), {"a": path}, 1)  # as predict.py reads it
    if isinstance(image, Exception):
        raise image
    return image


class Now:
    """A pool of no threads."""

    def submit(self, function, *arguments):
        class Done:
            def exception(self):
                try:
                    self.value = function(*arguments)
                except Exception as error:
                    return error

            def result(self):
                return self.value
        return Done()


# Each writes the one frame of a data set, with save(path of its picture), and opens its reader.


def pairs(root, save):
    save(root / "rgb/a.jpg")
    (root / "depth").mkdir()
    np.save(root / "depth/a.npy", DEPTH_MM.astype(np.float32) / 1000)
    return FolderOfPairs(root)


def processed(root, save):
    save(root / "ai_001_001/rgb_cam_00_fr0000.png")
    write_png(root / "ai_001_001/depth_plane_cam_00_fr0000.png", DEPTH_MM)
    return ProcessedHypersim(root)


def preview(root, save):
    write_frame(root)
    write_split_csv(root, [("ai_001_001", 0, "val")])
    (frame_folder(root, "ai_001_001", "final_hdf5") / "frame.0000.color.hdf5").unlink()
    save(frame_folder(root, "ai_001_001", "final_preview") / "frame.0000.tonemap.jpg")
    return Hypersim(root, "val")


def vkitti(root, save):
    frames = root / "Scene01/clone/frames"
    save(frames / "rgb/Camera_0/rgb_00000.jpg")
    (frames / "depth/Camera_0").mkdir(parents=True)
    write_png(frames / "depth/Camera_0/depth_00000.png", DEPTH_MM // 10)
    return VirtualKITTI(root, "val", crop=SHAPE)


def scannet(root, save):
    save(root / "scene0568_00/color/000000.jpg")
    (root / "scene0568_00/depth").mkdir()
    write_png(root / "scene0568_00/depth/000000.png", DEPTH_MM)
    return ZeroShot("scannet", root)


READERS = [pairs, processed, preview, vkitti, scannet]


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_gives_the_same_picture(kind, tmp_path):
    seen = [upright(tmp_path / "a")] if save(tmp_path / "a", photo(), kind) or True else []
    for number, reader in enumerate(READERS):
        opened = reader(tmp_path / str(number), lambda path: save(path, photo(), kind))
        seen.append(opened[0]["image"].numpy().transpose(1, 2, 0))
    assert all(np.array_equal(image, seen[0]) for image in seen)
    assert np.abs(seen[0].astype(int) - photo()).mean() <= ALLOWED.get(kind, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_reader_turns_a_picture_upright(orientation, kind, tmp_path):
    """What a picture on its side is told by its depth map's size; for the others --exif says it."""
    save(tmp_path / "a", photo(), kind, orientation)
    assert np.abs(upright(tmp_path / "a").astype(int) - photo()).mean() < 3
    for number, world in enumerate(READERS):
        reader = world(tmp_path / str(number), lambda path: save(path, photo(), kind, orientation))
        if 2 <= orientation <= 4:
            with pytest.raises(BadSample, match="EXIF.*--exif apply or --exif ignore"):
                reader[0]
            reader.exif = "apply"
        image = reader[0]["image"].numpy().transpose(1, 2, 0)
        assert np.abs(image.astype(int) - photo()).mean() < 3
        reader.exif = "ignore"
        if orientation <= 4:
            stored = reader[0]["image"].numpy().transpose(1, 2, 0)
            flipped = {1: photo(), 2: photo()[:, ::-1], 3: photo()[::-1, ::-1], 4: photo()[::-1]}
            assert np.abs(stored.astype(int) - flipped[orientation]).mean() < 3
        else:
            with pytest.raises(BadSample, match="64x48|48x64"):  # it no longer fits
                reader[0]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_depth_map_in_the_order_of_the_file_keeps_its_picture_so(orientation, tmp_path):
    """The picture is stored 64x48 and so is its depth map: what EXIF says holds for neither."""
    save(tmp_path / "rgb/a.jpg", photo(), "JPEG", orientation)
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth/a.npy", DEPTH_MM.T.astype(np.float32))
    image = FolderOfPairs(tmp_path)[0]["image"].numpy().transpose(1, 2, 0)
    stored = np.array(Image.open(tmp_path / "rgb/a.jpg"))
    assert image.shape == (WIDTH, HEIGHT, 3) and np.array_equal(image, stored)


def test_a_square_picture_on_its_side_is_ambiguous(tmp_path):
    save(tmp_path / "a.png", photo(40, 40), orientation=6)
    with pytest.raises(BadSample, match="a.png is turned by its EXIF orientation"):
        read_rgb(tmp_path / "a.png", exif="auto", size=(40, 40))
    assert np.array_equal(read_rgb(tmp_path / "a.png"), photo(40, 40))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"garbage",
                                  b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63"])
def test_malformed_exif_is_none(exif, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    for how in ("apply", "auto"):
        image = read_rgb(tmp_path / "a.jpg", exif=how, size=SHAPE)
        assert np.abs(image.astype(int) - photo()).mean() < 3


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_a_tiff_is_not_turned_twice(compression, tmp_path):
    """Pillow turns TIFF files itself."""
    picture = Image.fromarray(photo()).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.tif", exif=exif, compression=compression)
    assert np.abs(read_rgb(tmp_path / "a.tif").astype(int) - photo()).mean() < 6
    stored = read_rgb(tmp_path / "a.tif", exif="ignore")
    assert stored.shape == (WIDTH, HEIGHT, 3)
    assert np.abs(stored.astype(int) - np.array(picture)).mean() < 6


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_grey_is_stretched_to_the_bits_in_use(bits, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "STRETCHED", set())
    top = (1 << bits) - 1
    grey = np.linspace(0, top, 35).reshape(5, 7).astype(np.uint16)
    for name in ("a", "b"):
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
        image = read_rgb(tmp_path / f"{name}.png")
        assert np.array_equal(image[..., 0], (grey / top * 255).round().astype(np.uint8))
        assert np.array_equal(image, np.repeat(image[..., :1], 3, 2))
    assert caplog.text.count(f"of which {bits} are in use") == (bits < 16)  # once
    assert bits == 16 or "a.png" in caplog.text


def test_depth_keeps_its_numbers(tmp_path):
    for name, values in (("a.png", DEPTH_MM), ("b.tif", DEPTH_MM), ("c.tif", DEPTH_MM / 1000)):
        values = values.astype(np.float32) if name == "c.tif" else values
        Image.fromarray(values).save(tmp_path / name)
        found = read_picture(tmp_path / name)
        assert found.dtype == values.dtype and np.array_equal(found, values)


@pytest.mark.parametrize("megabytes, read", [(2, True), (70, False)])
@pytest.mark.parametrize("chunk", ["text", "profile"])
def test_large_metadata_is_read_within_bounds(chunk, megabytes, read, tmp_path):
    info, options = PngImagePlugin.PngInfo(), {}
    content = b"x" * (megabytes << 20)
    if chunk == "text":
        info.add_text("Comment", content.decode(), zip=True)
    else:
        options["icc_profile"] = content
    Image.fromarray(photo()).save(tmp_path / "a.png", pnginfo=info, **options)
    if read:
        assert np.array_equal(read_rgb(tmp_path / "a.png"), photo())
    else:
        with pytest.raises(BadSample, match="over 64 MiB, so save it without them") as caught:
            read_rgb(tmp_path / "a.png")
        assert "MAX_TEXT" not in str(caught.value)


def test_too_many_pixels_name_the_limit_and_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(tmp_path / "a.png", photo())
    with pytest.raises(BadSample, match="more than 2,000 pixels.*--max-pixels") as caught:
        read_rgb(tmp_path / "a.png")
    assert "DOS" not in str(caught.value)
    allow_pixels(HEIGHT * WIDTH)
    assert np.array_equal(read_rgb(tmp_path / "a.png"), photo())


@pytest.mark.filterwarnings("error")
def test_many_pixels_below_the_limit_are_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    save(tmp_path / "a.png", photo())
    assert read_rgb(tmp_path / "a.png").shape == (*SHAPE, 3)


@pytest.mark.parametrize("content, said", [
    (b"version https://git-lfs.github.com/spec/v1\n", "a.png is a Git LFS pointer.*git lfs pull"),
    (b"<!DOCTYPE html><html></html>", "a.png is a web page"),
    (b"nothing that is known", "a.png can't be read: cannot identify what kind")])
def test_what_is_no_picture_is_named(content, said, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    for given in (None, content):
        with pytest.raises(BadSample, match=said) as caught:
            read_rgb(tmp_path / "a.png", given)
        assert "BytesIO" not in str(caught.value)


def test_heic_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(BadSample, match="a.heic is a HEIC picture: install pillow-heif.*convert"):
        read_rgb(tmp_path / "a.heic")


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_heic(name, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(photo())).save(tmp_path / "a.heic", quality=95)
    (tmp_path / "a.heic").rename(tmp_path / name)
    assert np.abs(read_rgb(tmp_path / name).astype(int) - photo()).mean() < 3


def test_grey_beyond_sixteen_bits_is_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 70_000, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(BadSample, match="a.tif holds numbers from 70000 to 70000"):
        read_rgb(tmp_path / "a.tif")


def test_grey_of_sixteen_bits_with_white_as_zero_is_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 700, np.uint16)).save(tmp_path / "a.tif")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    place = content.index(bytes([6, 1, 3, 0]))  # the entry of tag 262, little-endian
    content[place + 8] = 0
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(BadSample, match="with white as 0"):
        read_rgb(tmp_path / "a.tif")
