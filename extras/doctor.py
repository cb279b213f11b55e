"""predict.py --doctor and --selftest: what this machine can do, whether a model file is whole."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.job import free_memory, start
from engine.terminal import tell
from extras.libraries import LIBRARIES
from extras.record import VERSION
from nets import model_file, selftest
from nets.depthmaster import KINDS, DepthMaster
from nets.inference.precision import choose
from storage import write_text

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
NEEDED = ("torch", "safetensors", "numpy", "pillow", "imageio", "einops", "h5py", "matplotlib")
PICTURES = {"HEIC": "pillow-heif"}  # read without being asked for
SD2 = 900_000_000  # parameters: for models of this size and more memory was measured
BYTES = {"float32": 900, "bfloat16": 450, "float16": 450}  # a pixel, --processing-res 0 (measured)
# Largest difference of a result, on [-1,1], from the one in the file, by precision.
CLOSE = {"float32": 2e-3, "bfloat16": 1e-1, "float16": 2e-2}


def examine(args):
    """What predict.py does with --doctor or --selftest."""
    device = start(args.device).device
    if args.doctor:
        doctor(args.ckpt, device, args.precision)
    if args.selftest:
        check(args.ckpt or WEIGHTS / "miniature.safetensors", device, args.precision)


def doctor(ckpt, device, precision):
    """Prints versions, devices, precision, memory, optional libraries and model files."""
    tell(f"version {VERSION}, Python {platform.python_version()}, {platform.platform()}")
    tell(", ".join(f"{name} {installed(name) or 'MISSING'}" for name in NEEDED))
    tell(f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
         f"{free_memory(torch.device('cpu')) / 2**30:.1f} GiB free")
    for index in range(torch.cuda.device_count()):
        free, total = (each / 2**30 for each in torch.cuda.mem_get_info(index))
        tell(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB "
             "free")
    if torch.backends.mps.is_available():
        tell("mps: there")
    chosen, why = choose(precision, device)
    tell(f"device {device}. {why or f'Precision: {chosen}, as asked for.'}")
    for path in dict.fromkeys([*([ckpt] if ckpt else []), *sorted(WEIGHTS.glob("*.safetensors"))]):
        tell(f"{path}: {describe_model(path, device, chosen)}")
    for kind, name in (PICTURES | LIBRARIES).items():
        found = installed(name)
        tell(f"{kind}: {name} {found}" if found else
             f"{kind}: {name} is not there (pip install -r extras/requirements.txt)")


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_model(path, device, precision):
    """Kind, target and weights of a model file, and the largest picture at its own size."""
    try:
        header = model_file.read_header(path)
        with model_file.open_weights(path) as file:
            count = sum(torch.Size(file.get_slice(name).get_shape()).numel()
                        for name in file.keys())
    except (ValueError, OSError) as error:
        return f"can't be used: {error}"
    size = f"{header['kind']}, {count:,} parameters"
    if header["kind"] not in KINDS:
        return f"{size}, for training"
    target = header["config"].get("target", "sqrt_disparity")
    use = "never trained for depth" if header["kind"] == "sd2" else f"predicts {target}"
    if count < SD2:
        return f"{size}, {use}"
    weights = count * getattr(torch, precision).itemsize
    pixels = (free_memory(torch.device(device)) - weights) / BYTES[precision]
    return (f"{size}, {use}; "
            f"--processing-res 0 fits up to about {max(pixels, 0) / 1e6:.0f} megapixels")


def check(path, device, precision):
    """Compares a model file with what it says of itself; ValueError says what differs.

    The tensors first, then the result on the CPU in float32, then as predict.py computes it. A file
    that says nothing (written before version 1.0) gets a file beside it that does.
    """
    header = model_file.read_header(path, KINDS)
    beside = path.with_name(f"{path.name}.selftest.json")
    said = header.get("selftest") or (json.loads(beside.read_text()) if beside.is_file() else None)
    with model_file.open_weights(path) as file:
        digests = {name: selftest.digest(file.get_tensor(name)) for name in file.keys()}
    if said and (difference := differing(said["digests"], digests)):
        raise ValueError(f"{path}: {difference}: copy or convert it again.")
    model = DepthMaster.from_file(path)
    result = selftest.result(model)
    if not said:
        write_text(beside, json.dumps({"digests": digests, "result": result}))
        tell(f"{path} is of an older version and says nothing of itself: {beside.name} was written "
             "from what it is now, for later self-tests.")
        return
    tell(f"{path}: all {len(digests)} tensors are as they were written.")
    stored = next(iter(digests.values())).split()[0]  # the weights were rounded to it
    compare(result, said["result"], "float32", stored, "the CPU", "a library computes something "
            "else (python predict.py --doctor says which are installed)")
    chosen, _ = choose(precision, device)
    del model
    fast = DepthMaster.from_file(path, device, getattr(torch, chosen)).for_inference(device, chosen)
    result = selftest.result(fast)
    compare(result, said["result"], chosen, stored, device, "try --precision float32")


def compare(found, expected, precision, stored, where, advice):
    """Says by how much a result differs; ValueError if that is more than rounding."""
    if found is None or expected is None:
        raise ValueError(f"The result on {where} in {precision} is not finite: {advice}.")
    difference = max(abs(a - b) for a, b in zip(found, expected))
    rounding = max(CLOSE[precision], CLOSE[stored])
    if difference > rounding:
        raise ValueError(f"The result on {where} in {precision} differs by {difference:.2g}, and "
                         f"rounding makes no more than {rounding}: {advice}.")
    tell(f"On {where} in {precision} the result differs by {difference:.1g} (up to {rounding} is "
         "rounding).")


def differing(written, found):
    """How digests {name: "dtype digits"} of tensors differ from the written ones; "" if nowhere."""
    odd = sorted(written.keys() ^ found.keys())
    if odd:
        return f"{len(odd)} tensors are missing or new, {odd[0]} first"
    changed = [name for name in found if found[name] != written[name]]
    cast = {(written[name].split()[0], found[name].split()[0]) for name in changed}
    cast = sorted(pair for pair in cast if pair[0] != pair[1])
    if cast:
        return f"its tensors were written as {cast[0][0]} and are {cast[0][1]} now"
    places = {written[name]: name for name in changed}
    moved = [(name, places[found[name]]) for name in changed if found[name] in places]
    if moved:
        return f"tensors were exchanged: {moved[0][0]} holds what {moved[0][1]} should"
    return changed and f"{len(changed)} tensors are not as they were written, {changed[0]} first"
