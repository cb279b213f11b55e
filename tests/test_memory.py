"""nets/inference/memory.py: other C libraries."""

from nets.inference import memory


def test_other_c_libraries_have_no_mallopt(monkeypatch):
    looked = []
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: looked.append(name) or object())
    memory.keep_freed_memory(768)
    memory.give_back()
    assert looked == [None, None]  # and went on
