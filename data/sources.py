"""The evaluation sets: where each lies, what range it is scored in, what was published for it."""

from dataclasses import dataclass
from pathlib import Path

from data.hypersim import Hypersim, ProcessedHypersim
from data.pairs import FolderOfPairs
from data.training_set import check_usable, holds_pairs, holds_processed_hypersim
from data.vkitti import VirtualKITTI
from data.zeroshot import LAYOUTS, ZeroShot


@dataclass(frozen=True)
class Benchmark:
    """How a set is evaluated.

    folder: its name in the data root, and in a folder of predictions. min_depth, max_depth:
    metres, the range that predictions are clipped to. processing_res: longest side while
    predicting; 0: the image's own, None: the model's own. published: DepthMaster's scores
    (arXiv 2501.02576, Tables I and VI) as fractions. published_of: on what, where that differs
    from what is scored here.
    """

    folder: str
    min_depth: float
    max_depth: float
    processing_res: int | None
    published: dict
    published_of: str = ""


BENCHMARKS = {
    "nyu": Benchmark("nyuv2", 1e-3, 10.0, 0, {"abs_rel": 0.050, "delta1": 0.972}),
    "kitti": Benchmark("kitti", 1e-5, 80.0, 0, {"abs_rel": 0.082, "delta1": 0.937}),
    "eth3d": Benchmark("eth3d", 1e-5, float("inf"), 756, {"abs_rel": 0.053, "delta1": 0.974}),
    "scannet": Benchmark("scannet", 1e-3, 10.0, 0, {"abs_rel": 0.055, "delta1": 0.967}),
    "diode": Benchmark("diode", 0.6, 350.0, 640, {"abs_rel": 0.215, "delta1": 0.776}),
    "hypersim": Benchmark("hypersim", 1e-5, 65.0, 0, {"boundary_f1": 0.337},
                          "80 images, native, owner mask"),
    "vkitti": Benchmark("vkitti", 1e-5, 80.0, 0, {}),
    "pairs": Benchmark("pairs", 1e-5, float("inf"), None, {}),
    "miniature": Benchmark("hypersim", 1e-5, 65.0, None, {}),
}


def open_benchmark(name, folder, vkitti_crop=(352, 1216), hypersim_split="val", **pairs):
    """The reader of a set that lies in `folder`; pairs: keywords of FolderOfPairs, `exif` of all.

    A reader has a length, name(i), [i] -> sample, and `expected`, the number of images that the
    set should have (None: anything). Raises FileNotFoundError if the set is not there.
    """
    folder = Path(folder)
    if not folder.is_dir() and not (folder.is_file() and name in LAYOUTS):
        raise FileNotFoundError(f"{folder} is not there as a folder, but should hold the set "
                                f"{name}: give the folder that it lies in with --data.")
    if name in LAYOUTS:
        reader = ZeroShot(name, folder)
    elif name == "vkitti":
        reader = VirtualKITTI(folder, "val", vkitti_crop)
    elif name == "pairs":
        reader = FolderOfPairs(folder / "val" if holds_pairs(folder / "val") else folder, **pairs)
    else:
        entries = sorted(entry.name for entry in folder.iterdir())
        processed = holds_processed_hypersim(folder, entries)
        split = hypersim_split if name == "hypersim" else "val"
        reader = (ProcessedHypersim if processed else Hypersim)(folder, split)
        check_usable(reader)
    reader.exif = pairs.get("exif", "auto")
    return reader


def locate(name, root, alone):
    """The folder of a set under ROOT; of a set asked for alone, ROOT itself if it is not there."""
    inside = Path(root) / BENCHMARKS[name].folder
    return Path(root) if alone and not inside.is_dir() else inside


def find_benchmarks(root):
    """Names of the sets that have a folder under ROOT. FileNotFoundError if none has.

    ROOT may be the archive of one set, under its own name.
    """
    if Path(root).is_file():
        found = [name for name, layout in LAYOUTS.items() if layout.tar == Path(root).name]
        if not found:
            raise FileNotFoundError(f"{root} is a file: if it is the archive of a set, say which "
                                    "set it is with --datasets.")
        return found
    names = [name for name in BENCHMARKS if name != "miniature"]
    found = [name for name in names if (Path(root) / BENCHMARKS[name].folder).is_dir()]
    if not found:
        folders = ", ".join(BENCHMARKS[name].folder for name in names)
        raise FileNotFoundError(f"{root} holds none of the folders {folders}: give the folder "
                                "above them, or say which set it is with --datasets.")
    return found
