"""Runs an exported model with onnxruntime alone: run_onnx.py depth.onnx photo.jpg depth.png"""

import sys

import numpy as np
import onnxruntime
from PIL import Image


def main():
    graph, picture, out = sys.argv[1:]
    session = onnxruntime.InferenceSession(graph)
    _, _, height, width = session.get_inputs()[0].shape

    image = Image.open(picture).convert("RGB")
    x = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    [depth] = session.run(["depth"], {"image": x.transpose(2, 0, 1)[None]})  # 1,H,W, 1 = near

    depth = Image.fromarray(depth[0]).resize(image.size, Image.Resampling.BILINEAR)
    Image.fromarray((65535 * np.asarray(depth)).round().astype(np.uint16)).save(out)


if __name__ == "__main__":
    main()
