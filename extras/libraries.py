"""The libraries that only some kinds of input and output need; imported when one is asked for."""

import importlib

LIBRARIES = {"EXR": "OpenEXR", "PLY": "plyfile", "GLB": "trimesh", "video": "av", "ONNX": "onnx",
             "ONNX Script": "onnxscript", "ONNX Runtime": "onnxruntime"}


def need(kind):
    """The library for files of a kind, imported. ValueError if it is not installed."""
    try:
        return importlib.import_module(LIBRARIES[kind])
    except ImportError as error:
        raise ValueError(f"{kind} needs {LIBRARIES[kind]}: pip install -r "
                         "extras/requirements.txt") from error
