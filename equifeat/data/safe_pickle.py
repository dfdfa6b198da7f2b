"""Read pickles of strangers: plain containers and plain NumPy arrays, nothing that runs code.

Three walls, one behind the other. First the opcodes are listed without running them: only those
that build containers, numbers, text and bytes are let through, none may be longer than the file,
none may reserve memory beyond it. Then the unpickler knows no module at all: the few names of NumPy
that an array needs stand for recorders of our own, which cannot be given a state or an attribute.
Last, the recorders become arrays of plain numbers or bytes whose size must fit their data.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from equifeat.errors import EvalDataError

_MAX_BYTES = 32 * 2**30
_MAX_OPS = 20_000_000
_MAX_DEPTH = 16
# bool, signed, unsigned, float, bytes: no objects, records or dates.
_KINDS = "biufS"
_ALLOWED = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD"
)
_OPCODES = frozenset(_ALLOWED.split())


def load_safely(path: str | Path) -> Any:
    """Read a pickle that may hold dicts, lists, tuples, text, bytes, numbers and plain arrays.

    Args:
        path: The file.

    Returns:
        What it holds. Arrays are read-only; memory is at most about twice the file's size.

    Raises:
        EvalDataError: The file is missing, damaged or too large, or asks for anything else.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not 0 < size <= _MAX_BYTES:
            raise UnpicklingError(f"it has {size} bytes, not 1 to {_MAX_BYTES}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            _check_opcodes(view)
            view.seek(0)
            return _Plain(view).load_plain()
    except OSError as error:
        raise EvalDataError(f"{path}: cannot be read ({error}); check the path.") from error
    except MemoryError as error:
        raise EvalDataError(f"{path}: does not fit into memory.") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise EvalDataError(
            f"{path}: not a pickle of plain containers and arrays ({error}); get the official "
            "file again."
        ) from error


def _check_opcodes(view: mmap.mmap) -> None:
    """Walk through the opcodes without running them."""
    operations = pickletools.genops(cast("IO[bytes]", view))
    for count, (opcode, argument, position) in enumerate(operations, 1):
        if opcode.name not in _OPCODES:
            raise UnpicklingError(f"opcode {opcode.name} at byte {position} is not allowed")
        if count > _MAX_OPS:
            raise UnpicklingError(f"it has more than {_MAX_OPS} opcodes")
        # The memo is an array: a number out of the blue would reserve gigabytes.
        is_put = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if is_put and not (isinstance(argument, int) and 0 <= argument <= count):
            raise UnpicklingError(f"memo number {argument} at byte {position}")


class _Plain(Unpickler):
    """An unpickler that knows recorders only."""

    def __init__(self, view: mmap.mmap) -> None:
        super().__init__(view, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        for package in ("numpy._core.", "numpy.core."):
            module = module.replace(package, "numpy:", 1) if module.startswith(package) else module
        make = _KNOWN.get((module, name))
        if make is None:
            raise UnpicklingError(f"it asks for {module.replace(':', '.core.')}.{name}")
        return _Maker(make)

    def load_plain(self) -> Any:
        """Return the file's content with arrays in the recorders' places."""
        return _Arrays().of(self.load())


class _Maker:
    """A callable without attributes: what is called for a global of the pickle."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: object) -> None:
        raise UnpicklingError("it gives a state to a function")

    def __setattr__(self, name: str, value: object) -> None:
        raise UnpicklingError("it gives an attribute to a function")


class _Dtype(_Maker):
    """A plain type of array elements."""

    __slots__ = ("dtype",)
    dtype: np.dtype[Any]

    def __init__(self, code: object, *_flags: object) -> None:
        super().__init__(_refuse)
        if not isinstance(code, str) or code[:1] not in _KINDS or not code[1:].isdigit():
            raise UnpicklingError(f"array elements of type {code!r}")
        object.__setattr__(self, "dtype", np.dtype(code))

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 5 or any(x is not None for x in state[2:5]):
            raise UnpicklingError("array elements that are records")
        if state[1] in ("<", ">"):
            object.__setattr__(self, "dtype", self.dtype.newbyteorder(state[1]))


class _Array(_Maker):
    """An array, once its state is known."""

    __slots__ = ("value",)
    value: NDArray[Any] | None

    def __init__(self, *_arguments: object) -> None:
        super().__init__(_refuse)
        object.__setattr__(self, "value", None)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnpicklingError("an array without shape, type and data")
        _, shape, dtype, fortran, data = state
        # Python 2 wrote the data as text
        data = data.encode("latin1") if isinstance(data, str) else data
        object.__setattr__(self, "value", _array(data, dtype, shape, "F" if fortran else "C"))


def _array(data: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise UnpicklingError("an array of objects")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise UnpicklingError(f"an array of shape {shape!r}")
    count = 1
    for n in shape:
        count *= n
    if count * dtype.dtype.itemsize != len(data):
        raise UnpicklingError(f"an array of shape {shape} with {len(data)} bytes")
    if not len(data):
        return np.zeros(shape, dtype.dtype)
    flat = np.frombuffer(bytes(data) if isinstance(data, bytearray) else data, dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    made = _Array()
    object.__setattr__(made, "value", _array(data, dtype, shape, order))
    return made


def _scalar(dtype: object, data: object) -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    return _array(data, dtype, (1,), "C")[0].item()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """What protocol 2 writes bytes as."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


def _no_bytes(*arguments: object) -> bytes:
    """What protocol 2 writes empty bytes as; a length would reserve memory."""
    if arguments:
        raise UnpicklingError("bytes by their length")
    return b""


def _refuse(*_arguments: object) -> Any:
    raise UnpicklingError("it calls what is no function")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _refuse,  # only ever handed to _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("numpy:multiarray", "_reconstruct"): _Array,
    ("numpy:multiarray", "scalar"): _scalar,
    ("numpy:numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}


class _Arrays:
    """Puts arrays into the recorders' places; every container is copied once."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise UnpicklingError(f"containers nested more than {_MAX_DEPTH} deep")
        if isinstance(value, _Array):
            if value.value is None:
                raise UnpicklingError("an array without data")
            return value.value
        if isinstance(value, _Maker):
            raise UnpicklingError("a function or a type as a value")
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) not in self._done:
            below = depth + 1
            if isinstance(value, dict):
                if any(isinstance(key, _Maker | tuple) for key in value):
                    raise UnpicklingError("a dict with keys that are no text or number")
                made: Any = {key: self.of(item, below) for key, item in value.items()}
            else:
                made = type(value)(self.of(item, below) for item in value)
            self._done[id(value)] = made
        return self._done[id(value)]
