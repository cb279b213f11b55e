"""What several test files need: made-up data sets, small models, short runs of the trainers."""

import io
import json
import sys
import tarfile

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import distill
import train_stage1
import train_stage2
from data.training_set import collate, open_training_set
from engine import job, run_folder
from nets import model_file
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2

HEIGHT, WIDTH, CROP = 30, 53, (24, 40)
SIZES = {"nyu": (480, 640), "kitti": (375, 1242), "eth3d": (40, 60), "scannet": (48, 64),
         "diode": (48, 64)}
TINY = dict(vae=dict(channels=(8, 8, 8, 8), layers=1, groups=4),
            unet=dict(channels=(16, 16), layers=1, attention=(False, True), heads=(1, 1),
                      text_width=8, groups=4), train_size=(48, 64), processing_res=64)
VAE = dict(channels=(8, 8, 8, 16), layers=1, groups=4)
UNET = dict(channels=(8, 16), layers=1, attention=(False, True), heads=(1, 2), text_width=6,
            groups=4)
VIT = dict(width=12, depth=1, heads=2, swiglu=False, grid=4)
SHORT = ["--batch", 4, "--micro-batch", 2, "--workers", 0, "--steps", 4, "--warmup", 2, "--lr",
         1e-3, "--log-every", 1, "--validate-every", 2, "--validate-images", 2, "--save-every", 2,
         "--device", "cpu", "--precision", "float32"]


# -------------------------------------------------------------------------- pictures and depth maps


def photo(height, width, channels=3, seed=0):
    """uint8 noise, smooth enough to survive JPEG."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, channels))
    return np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def boxes(height=61, width=83, holes=0.0, seed=0):
    """A slanted wall with boxes before it (edges in all four directions): depth_m, valid."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    depth_m = 6 + 0.01 * cols + 0.004 * rows
    for _ in range(6):
        top, left = rng.integers(2, height - 22), rng.integers(2, width - 22)
        box = np.s_[top : top + rng.integers(8, 20), left : left + rng.integers(8, 20)]
        depth_m[box] = rng.uniform(1.5, 4.5)
    valid = rng.random(depth_m.shape) >= holes
    return np.where(valid, depth_m, 0).astype(np.float32), valid


def in_space(depth_m, space):
    return {"sqrt_disparity": depth_m**-0.5, "disparity": 1 / depth_m, "depth": depth_m}[space]


def noisy(depth_m, space, seed=1):
    """A bad prediction in [0,1] with exact zeros, as float32; holes are filled."""
    rng = np.random.default_rng(seed)
    x = in_space(np.where(depth_m > 0, depth_m, 5.0), space)
    x = (x - x.min()) / (x.max() - x.min()) + 0.12 * rng.standard_normal(x.shape)
    return x.clip(0, 1).astype(np.float32)


# -------------------------------------------------------------- data sets in their official layouts


def write_street(root, trees=("", ""), scene="Scene02", variant="clone", camera=0, frame=0,
                 depth_cm=None):
    """Returns image and depth (uint16 centimetres; by default 100 to 4999)."""
    random = np.random.default_rng(frame)
    image = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    if depth_cm is None:
        depth_cm = random.integers(100, 5000, (HEIGHT, WIDTH)).astype(np.uint16)
    paths = [root / tree / scene / variant / "frames" / kind / f"Camera_{camera}" / file
             for tree, kind, file in zip(trees, ("rgb", "depth"), (
                 f"rgb_{frame:05d}.jpg", f"depth_{frame:05d}.png"))]
    for path, array in zip(paths, (image, depth_cm)):
        path.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(path, array)
    return iio.imread(paths[0]), depth_cm


def png(array):
    return iio.imwrite("<bytes>", array, extension=".png")


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def world_of(name, seed=0):
    """({name in the archive: bytes}, depth_m H,W, image H,W,3) of one image of a set."""
    rng = np.random.default_rng(seed)
    height, width = SIZES[name]
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    depth_m = rng.uniform(0.5, 12, (height, width)).astype(np.float32)
    if name == "nyu":
        depth_mm = np.round(1000 * depth_m).astype(np.uint16)
        return {f"test/kitchen_0004/rgb_000{seed}.png": png(image),
                f"test/kitchen_0004/depth_000{seed}.png": png(depth_mm),
                f"test/kitchen_0004/filled_000{seed}.png": png(depth_mm),
                f"train/kitchen_0001/rgb_000{seed}.png": png(image),
                f"train/kitchen_0001/depth_000{seed}.png": png(depth_mm)}, depth_mm / 1000, image
    if name == "kitti":
        raw = np.round(256 * depth_m).astype(np.uint16)
        raw[rng.random(raw.shape) < 0.7] = 0
        drive = "2011_09_26_drive_0002_sync"
        return {f"2011_09_26/{drive}/image_02/data/000000000{seed}.png": png(image),
                f"2011_09_26/{drive}/image_02/data/000000007{seed}.png": png(image),  # no truth
                f"{drive}/proj_depth/groundtruth/image_02/000000000{seed}.png": png(raw)
                }, raw / 256, image
    if name == "eth3d":
        depth_m[rng.random(depth_m.shape) < 0.3] = np.inf
        jpg = iio.imwrite("<bytes>", image, extension=".jpg", quality=95)
        scene = "courtyard"
        return {f"rgb/{scene}/images/dslr_images/DSC_028{seed}.JPG": jpg,
                f"depth/{scene}_dslr_depth/{scene}/ground_truth_depth/dslr_images/"
                f"DSC_028{seed}.JPG": depth_m.astype("<f4").tobytes()}, depth_m, iio.imread(jpg)
    if name == "scannet":
        depth_mm = np.round(1000 * depth_m).astype(np.uint16)
        jpg = iio.imwrite("<bytes>", image, extension=".jpg", quality=95)
        return {f"scene0568_00/color/00000{seed}.jpg": jpg,
                f"scene0568_00/depth/00000{seed}.png": png(depth_mm)
                }, depth_mm / 1000, iio.imread(jpg)
    stem = f"indoors/scene_00019/scan_00183/00019_00183_indoors_150_00{seed}"
    mask = (rng.random(depth_m.shape) > 0.2).astype(np.float64)
    return {f"{stem}.png": png(image), f"{stem}_depth.npy": npy(depth_m[..., None]),
            f"{stem}_depth_mask.npy": npy(mask)}, np.where(mask > 0, depth_m, np.nan), image


def write(folder, members, tar=None):
    """As a tar with ./ before the names, or as files."""
    folder.mkdir(parents=True, exist_ok=True)
    if tar:
        with tarfile.open(folder / tar, "w") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(f"./{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    else:
        for name, content in members.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


# ----------------------------------------------------------------------------- metrics.py once more


# Float64 numpy, as the papers say it; nothing is shared with metrics.py.


def numpy_align(pred, depth_m, valid, space, negative):
    p, d = pred.astype(np.float64), depth_m.astype(np.float64)
    fitted = valid & (p > 0) if space != "depth" else valid
    g = {"sqrt_disparity": lambda x: np.sqrt(1 / x), "disparity": lambda x: 1 / x,
         "depth": lambda x: x}[space](d[fitted])
    design = np.stack([p[fitted], np.ones(fitted.sum())], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(design, g, rcond=None)
    a = scale * p + shift
    if space == "depth":
        return a
    if space == "sqrt_disparity":
        a = np.maximum(a, 0) ** 2 if negative == "clamp" else a**2
    return 1 / np.maximum(a, 1e-3)


def numpy_f1(pred_m, depth_m, valid, mask):
    def edges(x, t):  # right, left, below, above; one comparison at a time
        x = 1 / np.maximum(x.astype(np.float64), 1e-6)
        return [x[:, 1:] / x[:, :-1] > t, x[:, :-1] / x[:, 1:] > t,
                x[1:] / x[:-1] > t, x[:-1] / x[1:] > t]

    first_x, second_x, first_y, second_y = valid[:, :-1], valid[:, 1:], valid[:-1], valid[1:]
    counts = {"pair": [first_x & second_x, first_x & second_x, first_y & second_y,
                       first_y & second_y],
              "owner": [first_x, second_x, first_y, second_y],
              "none": [np.ones_like(x) for x in (first_x, first_x, first_y, first_y)]}[mask]
    thresholds = np.linspace(1.05, 1.25, 10)
    f1 = []
    for t in thresholds:
        recalls, precisions = [], []
        for p, g, m in zip(edges(pred_m, t), edges(depth_m, t), counts):
            p, g = p & m, g & m
            recalls.append((p & g).sum() / max(g.sum(), 1))
            precisions.append((p & g).sum() / max(p.sum(), 1))
        r, p = np.mean(recalls), np.mean(precisions)
        f1.append(0.0 if r + p == 0 else 2 * r * p / (r + p))
    return np.sum(np.array(f1) * thresholds / thresholds.sum())


def numpy_score(pred, depth_m, valid, space, min_depth, max_depth, negative, f1_mask):
    pred_m = np.clip(numpy_align(pred, depth_m, valid, space, negative), min_depth, max_depth)
    p, d = pred_m[valid], depth_m[valid].astype(np.float64)
    e = np.log(p) - np.log(d)
    ratio = np.maximum(p / d, d / p)
    return {
        "abs_rel": np.mean(np.abs(p - d) / d), "sq_rel": np.mean((p - d) ** 2 / d),
        "rmse": np.sqrt(np.mean((p - d) ** 2)), "rmse_log": np.sqrt(np.mean(e**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        "irmse": np.sqrt(np.mean((1 / p - 1 / d) ** 2)),
        "silog": 100 * np.sqrt(np.mean(e**2) - np.mean(e) ** 2),
        "delta1": np.mean(ratio < 1.25), "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3),
        "boundary_f1": numpy_f1(pred_m, depth_m, valid, f1_mask),
    }


# ---------------------------------------------------------------------------------- models and runs


def save_tiny(path, **changes):
    """A random model of kind stage1 with small networks, as a file."""
    torch.manual_seed(0)
    model = DepthMaster(**TINY | changes)
    model.kind = "stage1"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with sd2, stage1 and dinov2.safetensors and pairs/ (train and val)."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = DepthMaster(vae=VAE, unet=UNET, train_size=(32, 48), processing_res=48)
    model.unet.text_embedding.normal_()
    model.save(folder / "sd2.safetensors")
    model.become("stage1")
    model.save(folder / "stage1.safetensors")
    model_file.save(folder / "dinov2.safetensors", DINOv2(**VIT).state_dict(),
                    dict(kind="dinov2", config=VIT, sources=[], licence=""))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("rgb", "depth"):
            (folder / "pairs" / split / kind).mkdir(parents=True)
        for number in range(count):
            depth_m = np.linspace(1, 5 + number, 40)[:, None] + rng.random((40, 60))
            image = (255 * np.stack([depth_m / 16, rng.random((40, 60)), depth_m / 20], -1))
            iio.imwrite(folder / f"pairs/{split}/rgb/{number}.png", image.astype(np.uint8))
            np.save(folder / f"pairs/{split}/depth/{number}.npy", depth_m.astype(np.float32))
    return folder


def run(monkeypatch, script, out, *options):
    """Runs a script's main() with SHORT; a later option overrides an earlier one. Rows logged."""
    words = [f"{script.__name__}.py", "--out", out, *SHORT, *options]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    script.main()
    return [json.loads(line) for line in (out / run_folder.LOG).read_text().splitlines()]


def call(monkeypatch, script, *arguments):
    """Runs a script (a module) in this process: the exit code."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    try:
        job.run(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


def comes_back(train, file):
    """Whether the same command, train(), writes a file that was lost again, to the byte."""
    train()
    whole = file.read_bytes()
    file.unlink()
    train()  # nothing else is left to do
    return file.read_bytes() == whole


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A folder of Virtual KITTI 2 with a few frames of 30x53 to train on and one held out."""
    folder = tmp_path_factory.mktemp("streets")
    for frame in range(5):
        write_street(folder, frame=frame)
    write_street(folder, scene="Scene01")
    return folder


def first_losses(objective, data, vkitti=None, size=(32, 48), dtype=torch.float32, **options):
    """{name: mean} of an objective's losses over the samples of a run's first step, one by one.

    options: of `open_training_set`.
    """
    samples = open_training_set(data, vkitti, size, batch=SHORT[1], **options)
    objective.to(memory_format=torch.channels_last)  # in bfloat16 the layout rounds differently
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        rows = [objective(collate([samples[k]])) for k in range(SHORT[1])]
    return {name: np.mean([row[name].item() for row in rows]) for name in rows[0]}


def gradient_that_adam_had(out):
    """Norm of the first step's gradient, of which Adam's first moment is a tenth."""
    moments = torch.load(out / "state.pt", weights_only=True)["optimizer"]["state"].values()
    return 10 * torch.cat([each["exp_avg"].flatten() for each in moments]).norm().item()


def opened(monkeypatch, script, train):
    """What a run, train(), reads and validates: training set, held-out reader, images, dtype."""
    found, original = [], script.read_batches

    def read_batches(training_set, *rest, **named):
        found.append(training_set)
        return original(training_set, *rest, **named)

    monkeypatch.setattr(script, "read_batches", read_batches)
    monkeypatch.setattr(script, "check", lambda model, *rest: found.extend(rest[:3]))
    train()
    return found


def compiled_calls(monkeypatch, train):
    """The modules whose calls go through what torch.compile made of them, once per call."""
    called = []

    def stand_in(function, **options):
        def counted(*arguments, **named):
            called.append(function.__self__)
            return function(*arguments, **named)
        return counted

    monkeypatch.setattr(torch, "compile", stand_in)
    train()
    return called


def interrupt(monkeypatch, steps):
    """Lets a run die after so many steps; returns a function that lets runs live again."""
    original, left = train_stage1.optimizer_step, iter(range(steps))

    def killed(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    replace_step(monkeypatch, killed)
    return lambda: replace_step(monkeypatch, original)


def replace_step(monkeypatch, function):
    """Another optimizer_step for all trainers."""
    for script in (train_stage1, train_stage2, distill):
        monkeypatch.setattr(script, "optimizer_step", function)
