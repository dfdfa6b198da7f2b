"""Pickles of strangers: plain data comes back, anything else is refused and nothing runs."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equifeat.data.safe_pickle import load_safely
from equifeat.errors import EvalDataError

PLAIN: dict[Any, Any] = {
    "video": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
    "points": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 2, 2),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(3, dtype=">i4"),
    "occluded": np.array([[True, False]]),
    "files": np.array([b"\xff\xd8ab", b"\xff\xd8c"]),
    "empty": np.zeros((0, 3)),
    0: [1, 2.5, "t", None, True, b"x", b"", (1, 2), np.float32(3.5), -(2**40)],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "a.pkl"
    shared = [1, 2]
    file.write_bytes(pickle.dumps([PLAIN, shared, shared], protocol))
    found, one, two = load_safely(file)
    assert one == [1, 2]
    assert one is two
    for key, value in PLAIN.items():
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value


def test_names_of_old_numpy_are_known(tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    data = pickle.dumps(np.arange(3), 2)
    assert b"numpy._core.multiarray" in data
    file.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(load_safely(file), np.arange(3))


class Calls:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


class Changes:
    """Pickles as a NumPy function that is given a state."""

    def __reduce__(self) -> Any:
        return np.dtype, ("f8",), {"shape": 1}


HOSTILE: dict[str, Any] = {
    "posix.system": Calls(os.system, "touch pwned"),
    "getattr": Calls(getattr, "a", "join"),
    "exec": Calls(builtins.exec, "open('pwned', 'w')"),
    "numpy.zeros": Calls(np.zeros, (10**12,)),
    "calls what is no function": Calls(np.ndarray, (10**12,)),
    "'O8'": np.array([object, None]),
    "'M8'": np.zeros(2, "datetime64[s]"),
    "'V4'": np.zeros(2, [("a", "i4")]),
    "records": Changes(),
    "complex": 1j,
    "bytearray": Calls(bytearray, 10**12),
    "builtin__.bytes|by their length|builtins.bytes": Calls(bytes, 10**12),
    "type as a value": np.dtype("f8"),
    "keys": {(1, 2): 3},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("named", HOSTILE)
def test_hostile_objects_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(HOSTILE[named], protocol))
    with pytest.raises(EvalDataError, match=named) as caught:
        load_safely(file)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def array_state(shape: tuple[int, ...], data: bytes) -> bytes:
    """A pickle of an array whose shape does not fit."""
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\ntU\x01bR"
    sizes = b"".join(b"I%d\n" % n for n in shape)
    dtype = b"cnumpy\ndtype\n(U\x02f8tR"
    raw = b"U" + bytes([len(data)]) + data
    return (
        head.replace(b"tU\x01bR", b"tU\x01btR").replace(
            b"(cnumpy\nndarray\nI0\nt", b"(cnumpy\nndarray\n(I0\nt"
        )
        + b"(I1\n("
        + sizes
        + b"t"
        + dtype
        + b"I00\n"
        + raw
        + b"tb."
    )


RAW = {
    "empty": (b"", "0 bytes"),
    "text": (b"abc", "not a pickle"),
    "cut off": (pickle.dumps(PLAIN)[:-40], "not a pickle"),
    "a memo of gigabytes": (b"\x80\x04}r" + struct.pack("<I", 2**31) + b".", "memo number"),
    "a long bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "bytearray8"),
    "long bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".", "bytes8"),
    "an extension": (b"\x80\x04\x82\x01.", "EXT1"),
    "a persistent id": (b"Pfoo\n.", "PERSID"),
    "an instance": (b"(ios\nsystem\n.", "INST"),
    "a new object": (b"\x80\x02cnumpy\ndtype\n)\x81.", "NEWOBJ"),
    "a list in itself": (b"\x80\x04]\x94h\x00a.", "nested"),
    "an array larger than its data": (array_state((10**12,), b"12345678"), "8 bytes"),
    "a state for a function": (b"\x80\x02cnumpy\ndtype\n}b.", "state to a function"),
    "a slot for a function": (
        b"\x80\x02cnumpy\ndtype\nN}U\x05_makeNs\x86b.",
        "state to a function",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_hostile_bytes_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.pkl"
    data, said = RAW[name]
    file.write_bytes(data)
    with pytest.raises(EvalDataError, match=said):
        load_safely(file)


def test_the_handmade_array_is_read_when_it_fits(tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(array_state((2,), struct.pack("<2d", 1.5, -2.0)))
    np.testing.assert_array_equal(load_safely(file), [1.5, -2.0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalDataError, match="cannot be read"):
        load_safely(tmp_path / "none.pkl")
