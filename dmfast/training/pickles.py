"""Refuse checkpoints that hold more than tensors and plain values, because reading them could run code.

torch, transformers and ``torch.distributed.checkpoint`` write pickles, and a pickle can call any function of the
machine that reads it. torch reads most of them with ``weights_only=True``, which refuses such a call.
``torch.distributed.checkpoint`` (FSDP2) and DeepSpeed do not refuse it. ``refuse_code`` looks at a checkpoint before
any of it is read. It follows each pickle and replaces everything that the pickle names by stand-ins, so that nothing of
it runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_METADATA = ".metadata"  # torch.distributed.checkpoint also reads __<rank>.metadata
_ZIP = b"PK\x03\x04"  # torch.load takes a file that begins otherwise for a bare pickle, whatever follows
_OF_TORCHSCRIPT = "constants.pkl"  # torch.load takes a file with this record for TorchScript, and runs its code
_LATEST = "latest"  # the name of the folder of a checkpoint that DeepSpeed reads
_NEVER_READ = {"training_args.bin"}  # transformers writes this file for people and never reads it
_DEEPSPEED = re.compile(r"global_step\d+")
#: The names that a file of torch.save may hold.
_PLAIN = re.compile(
    r"collections\.(OrderedDict|defaultdict|Counter)|_codecs\.encode|"
    r"(builtins|__builtin__)\.(set|frozenset|bytearray|complex|int|float|bool|str|bytes|list|dict|tuple)|"
    r"torch\.(Size|device|\w*Storage|b?float\d+\w*|u?int\d+|bool|complex\d+)|torch\.storage\.(Untyped|Typed)Storage|"
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)|torch\._tensor\._rebuild_from_type_v2|"
    r"torch\.(Tensor|nn\.parameter\.Parameter)|torch\.serialization\._get_layout|"
    r"numpy\.(ndarray|dtype)|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)|numpy\.dtypes\.\w+DType"
)  # fmt: skip
#: The files that DeepSpeed writes may also hold objects of these classes of its own.
_OF_DEEPSPEED = re.compile(
    _PLAIN.pattern + r"|deepspeed\.runtime\.fp16\.loss_scaler\.(Dynamic)?LossScaler|"
    r"deepspeed\.runtime\.zero\.config\.ZeroStageEnum|deepspeed\.utils\.tensor_fragment\.fragment_address"
)
#: The names that the metadata of torch.distributed.checkpoint may hold.
_OF_METADATA = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|TensorStorageMetadata|BytesStorageMetadata|"
    r"ChunkStorageMetadata|TensorProperties|StorageMeta|_MEM_FORMAT_ENCODING)|"
    r"torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StoragePrefix)|pathlib\.(Pure)?(Posix)?Path|"
    r"torch\.(Size|b?float\d+\w*|u?int\d+|bool|complex\d+)|torch\.serialization\._get_layout|collections\.OrderedDict"
)  # fmt: skip


class _StandIn:
    """An object that stands for everything that a pickle names, and does nothing."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __new__(cls, *args: Any, **options: Any) -> _StandIn:
        return super().__new__(cls)

    def __call__(self, *args: Any, **options: Any) -> _StandIn:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __hash__(self) -> int:
        return 0

    def add(self, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _Follow(pickle.Unpickler):
    """An unpickler that follows a pickle without making the objects that it names.

    Attributes:
        refused: the names in the pickle that are not allowed.
    """

    def __init__(self, data: bytes, allowed: re.Pattern[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self.refused: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        """Note the name if it is not allowed, and return a stand-in."""
        if not self._allowed.fullmatch(f"{module}.{name}"):
            self.refused.append(f"{module}.{name}")
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        """Return a stand-in for the numbers of a tensor."""
        return _StandIn()


class _Metadata(pickle.Unpickler):
    """An unpickler of the metadata of torch.distributed.checkpoint, which ``_Follow`` has checked before."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the metadata.

        Raises:
            pickle.UnpicklingError: the name is not one of these classes.
        """
        if not _OF_METADATA.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check(data: bytes, allowed: re.Pattern[str], what: str) -> None:
    follow = _Follow(data, allowed)
    try:
        follow.load()
    except Exception as error:
        if not follow.refused:  # what follows a refused name need not make sense
            raise ValueError(f"{what} can't be read: {error}") from error
    if follow.refused:
        raise ValueError(
            f"{what} holds more than tensors and plain values: it names {', '.join(sorted(set(follow.refused)))}, and "
            "reading it could run code of whoever wrote it. A checkpoint of dmfast holds nothing of the kind; resume "
            "only from checkpoints that you trust"
        )


def _check_saved(source: Any, what: str, allowed: re.Pattern[str] = _PLAIN) -> None:
    """Check a file, or a buffer, that torch.save wrote."""
    with open(source, "rb") if isinstance(source, str) else contextlib.nullcontext(source) as opened:
        begins = opened.read(len(_ZIP))
        opened.seek(0)
    if begins != _ZIP:
        raise ValueError(f"{what} can't be read: it is not a file that torch.save writes today")
    try:
        # torch's own reader takes the same record from the file that torch.load would take
        reader = torch._C.PyTorchFileReader(source)
        records, data = reader.get_all_records(), reader.get_record("data.pkl")
    except RuntimeError as error:
        raise ValueError(f"{what} can't be read: {error}") from error
    if _OF_TORCHSCRIPT in records or any(name.startswith("code/") for name in records):
        raise ValueError(
            f"{what} is a TorchScript archive, which torch.load would run; torch.save does not write such files"
        )
    _check(data, allowed, what)


def _check_shards(path: Path) -> None:
    """Check a folder of torch.distributed.checkpoint. Its objects that are not tensors are pickles, too."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    data = path.read_bytes()
    _check(data, _OF_METADATA, str(path))
    metadata = _Metadata(io.BytesIO(data)).load()
    objects = {name for name, each in metadata.state_dict_metadata.items() if isinstance(each, BytesStorageMetadata)}
    for index, place in (metadata.storage_data or {}).items():
        transforms = getattr(place, "transform_descriptors", None)  # older releases of torch have no transforms
        if transforms:
            raise ValueError(f"{path} can't be checked: {index.fqn} is stored with the transforms {transforms}")
        if index.fqn in objects:
            file = path.parent / place.relative_path
            with open(file, "rb") as opened:
                opened.seek(place.offset)
                _check_saved(io.BytesIO(opened.read(place.length)), f"{file}, {index.fqn}")


def _files(folder: Path) -> Iterator[Path]:
    """Yield each file below a folder, also behind links, which whoever reads the checkpoint follows."""
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from filter(Path.is_file, (Path(where, name) for name in files))  # a link may lead nowhere


def refuse_code(folder: Path) -> None:
    """Check that no file of a checkpoint could run code when it is read. The check itself runs nothing of it.

    The files that DeepSpeed writes and reads itself may also name a few of its classes. Links are followed.

    Raises:
        ValueError: a file holds more than tensors and plain values, or can't be read.
    """
    for path in sorted(_files(folder)):
        if path.name in _NEVER_READ:
            continue
        if path.name.endswith(_METADATA):
            _check_shards(path)
        elif path.name == _LATEST:
            tag = path.read_text(encoding="utf-8", errors="replace").strip()
            if not _DEEPSPEED.fullmatch(tag):
                raise ValueError(
                    f"{path} names {tag!r}, which is not a folder that DeepSpeed writes, so it was not checked"
                )
        elif path.suffix in (".pt", ".pth", ".bin"):
            of_deepspeed = _DEEPSPEED.fullmatch(path.relative_to(folder).parts[0])
            _check_saved(str(path), str(path), _OF_DEEPSPEED if of_deepspeed else _PLAIN)
