"""data/zeroshot.py and data/archives.py: small worlds in each set's own layout, tar and folder."""

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import evaluate
from data import zeroshot
from data.archives import Tar
from data.sources import BENCHMARKS, open_benchmark
from data.transforms import BadSample
from tests.worlds import SIZES, npy, numpy_score, png, world_of, write

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "diode" / "val"


def expected_mask(name, depth_m):
    """The set's rule, from its documentation, a pixel at a time."""
    height, width = depth_m.shape
    mask = np.zeros((height, width), bool)
    for i in range(height):
        for j in range(width):
            d = depth_m[i, j]
            mask[i, j] = {"nyu": 1e-3 < d < 10 and 45 <= i < 471 and 41 <= j < 601,
                          "kitti": 1e-5 < d < 80 and 117 <= i < 321 and 43 <= j < 1172,
                          "eth3d": 1e-5 < d < np.inf, "scannet": 1e-3 < d < 10,
                          "diode": np.isfinite(d)}[name]
    return mask


@pytest.fixture(autouse=True)
def small_eth3d(monkeypatch):
    monkeypatch.setattr(zeroshot, "ETH3D_SIZE", SIZES["eth3d"])


@pytest.mark.parametrize("packed", ["tar", "folder", "inner folder"])
@pytest.mark.parametrize("name", SIZES)
def test_each_set_in_its_own_layout(name, packed, tmp_path):
    members, depth_m, image = world_of(name)
    tar = zeroshot.LAYOUTS[name].tar
    folder = tmp_path / BENCHMARKS[name].folder
    write(folder / tar[:-4] if packed == "inner folder" else folder, members,
          tar if packed == "tar" else None)
    reader = open_benchmark(name, folder)
    assert len(reader) == 1
    sample = reader[0]
    if name == "kitti":
        depth_m, image = depth_m[23:, 13:1229], image[23:, 13:1229]
        assert sample["uncropped"] == (375, 1242)
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), image)
    valid = sample["valid"][0].numpy()
    assert np.array_equal(valid, expected_mask(name, depth_m)) and 0 < valid.sum() < valid.size
    np.testing.assert_allclose(sample["depth"][0].numpy()[valid], depth_m[valid], rtol=1e-6)
    assert f"{sample['name']}.{reader.pairs[0][0].rsplit('.')[-1]}" in members


def test_names_and_counts_are_the_documented_ones(tmp_path):
    members, _, _ = world_of("nyu")
    reader = zeroshot.ZeroShot("nyu", write(tmp_path, members, "nyu_labeled_extracted.tar"))
    assert reader.name(0) == "test/kitchen_0004/rgb_0000"  # not train/, not filled_
    counts = {name: layout.images for name, layout in zeroshot.LAYOUTS.items()}
    assert counts == {"nyu": 654, "kitti": 652, "eth3d": 454, "scannet": 800, "diode": 771}


def test_order_does_not_depend_on_the_archive(tmp_path):
    members = {}
    for seed in (3, 1, 2):
        members |= world_of("diode", seed)[0]
    backwards = dict(reversed(members.items()))
    readers = [zeroshot.ZeroShot("diode", write(tmp_path / str(i), content, "diode_val.tar"))
               for i, content in enumerate((members, backwards))]
    names = [[reader.name(i) for i in range(3)] for reader in readers]
    assert names[0] == names[1] == sorted(names[0])


def test_an_archive_serves_several_processes(tmp_path):
    members, _, _ = world_of("scannet")
    archive = Tar(write(tmp_path, members, "a.tar") / "a.tar")
    name = "scene0568_00/depth/000000.png"
    assert archive.read(name) == members[name]
    other = pickle.loads(pickle.dumps(archive))
    assert other.read(name) == members[name]


def test_nothing_leads_out_of_an_archive(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("../outside.png", "/etc/absolute.png", "./inside.png"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"abcd"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo(f"special{kind.decode()}")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    assert Tar(tmp_path / "a.tar").names == {"inside.png"}


@pytest.mark.parametrize("spoil", ["cut", "nonsense", "compressed"])
def test_broken_archives_are_named(tmp_path, spoil):
    folder = write(tmp_path, world_of("scannet")[0], "scannet_val_sampled_800_1.tar")
    path = folder / "scannet_val_sampled_800_1.tar"
    content = path.read_bytes()
    if spoil == "compressed":
        import gzip
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content[:3000] if spoil == "cut" else b"\x01nonsense" * 100)
    with pytest.raises(ValueError, match="scannet_val_sampled_800_1.tar is not a complete"):
        zeroshot.ZeroShot("scannet", folder)


def test_an_archive_that_ends_early_is_never_a_short_one(tmp_path):
    """tarfile says nothing where an archive is cut between two files or a header is damaged."""
    members = world_of("scannet", 0)[0] | world_of("scannet", 1)[0]
    path = tmp_path / "scannet_val_sampled_800_1.tar"
    write(tmp_path, members, path.name)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmembers()[2].offset
    damaged = content[:second] + b"\7" * 512 + content[second + 512:]
    for spoiled in (content[:second], content[:second + 100], damaged):
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match="1.tar is not a complete.*its end is missing after 2"):
            zeroshot.ZeroShot("scannet", tmp_path)
    path.write_bytes(content)
    reader = zeroshot.ZeroShot("scannet", tmp_path)
    path.unlink()
    with pytest.raises(BadSample, match="000000.png is missing"):
        reader[0]


@pytest.mark.parametrize("name, ending, content, reason", [
    ("eth3d", "DSC_0280.JPG", b"1234", "has 4 bytes"),
    ("diode", "_depth.npy", npy(np.array([{}], dtype=object)), "can't be read"),
    ("diode", "_depth_mask.npy", npy(np.ones((4, 5))), "but its counterpart is"),
    ("kitti", "image_02/0000000000.png", b"no picture", "can't be read"),
    ("nyu", "kitchen_0004/depth_0000.png", png(np.zeros(SIZES["nyu"], np.uint16)),
     "no valid pixel"),
])
def test_bad_members_are_named(tmp_path, name, ending, content, reason):
    members = world_of(name)[0]
    spoiled = [member for member in members if member.endswith(ending)][-1]
    folder = write(tmp_path, members | {spoiled: content}, zeroshot.LAYOUTS[name].tar)
    with pytest.raises(BadSample, match=reason):
        zeroshot.ZeroShot(name, folder)[0]


def test_an_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="diode_val.tar"):
        zeroshot.ZeroShot("diode", tmp_path)


@pytest.mark.parametrize("negative, f1_mask", [("clamp", "pair"), ("square", "owner"),
                                               ("clamp", "none")])
@pytest.mark.parametrize("name", SIZES)
def test_scores_against_numpy_in_all_three_spaces(name, negative, f1_mask, tmp_path, monkeypatch):
    """evaluate.py on the archive and saved predictions, KITTI's of the whole image."""
    members, depth_m, _ = world_of(name)
    root, saved, out = tmp_path / "root", tmp_path / "saved", tmp_path / "out"
    benchmark = BENCHMARKS[name]
    write(root / benchmark.folder, members, zeroshot.LAYOUTS[name].tar)
    image = open_benchmark(name, root / benchmark.folder).name(0)
    rng = np.random.default_rng(1)
    seen = np.where(np.isfinite(depth_m) & (depth_m > 0), depth_m, 5)
    pred = 0.8 / np.sqrt(seen) - 0.2 + 0.05 * rng.normal(size=seen.shape)
    (saved / benchmark.folder / image).parent.mkdir(parents=True)
    np.save(saved / benchmark.folder / f"{image}.npy", pred.astype(np.float32))
    words = ["evaluate.py", "--predictions", saved, "--data", root, "--datasets", name, "--workers",
             0, "--align-negative", negative, "--f1-mask", f1_mask, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    evaluate.main()
    found = json.loads((out / "metrics.json").read_text())[name]
    pred = pred.astype(np.float32)
    if name == "kitti":
        depth_m, pred = depth_m[23:, 13:1229], pred[23:, 13:1229]
    truth = open_benchmark(name, root / benchmark.folder)[0]["depth"][0].numpy()
    valid = expected_mask(name, depth_m)
    for space, scores in {"sqrt_disparity": found, **found["other_alignments"]}.items():
        expected = numpy_score(pred, truth, valid, space, benchmark.min_depth, benchmark.max_depth,
                               negative, f1_mask)
        assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert (found["images"], found["expected_images"]) == (1, zeroshot.LAYOUTS[name].images)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real frames here")
def test_a_real_frame_of_diode():
    reader = zeroshot.ZeroShot("diode", SAMPLES)
    sample = reader[0]
    assert sample["name"].endswith("indoors/scene_00019/scan_00183/00019_00183_indoors_150_000")
    assert sample["image"].shape == (3, 768, 1024)
    depth_m = np.load(reader.root / f"{sample['name']}_depth.npy")[..., 0]
    valid = sample["valid"][0].numpy()
    assert np.count_nonzero((depth_m > 0) & ~valid) == 283
    assert 0.5 < sample["depth"][0].numpy()[valid].min() < 350


@pytest.mark.parametrize("packed", [True, False])
def test_what_a_mac_leaves_beside_files_is_passed_over(packed, tmp_path):
    members, _, _ = world_of("diode")
    folders = {name.rpartition("/")[0] for name in members}
    odd = {f"{folder}/._{name.rpartition('/')[2]}": b"x" for folder in folders for name in members
           if name.startswith(folder)}
    root = write(tmp_path, members | odd, "diode_val.tar" if packed else None)
    reader = zeroshot.ZeroShot("diode", root)
    assert len(reader) == sum(name.endswith("_depth.npy") for name in members)
    assert all(reader[i] for i in range(len(reader)))
