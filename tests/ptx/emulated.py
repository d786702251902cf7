"""Run the Triton kernels on CPU tensors, as the PTX that Triton compiles them to. This is a pytest plugin.

The kernels are backend ``triton``, and machine.py runs their PTX. dmfast's launch.py and Triton's own run time decide
which kernel is compiled, for which types and divisibilities, and how it is launched, as for a device. Compilation ends
at PTX, which is kept in DMFAST_PTX or build/ptx.

A kernel can reach only the elements of its tensors. What lies in the gaps of a strided tensor is outside.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["DMFAST_BACKEND"] = "triton"
CACHE = Path(os.environ.get("DMFAST_PTX", Path(__file__).resolve().parents[2] / "build" / "ptx"))
os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")

import machine
import module
import torch
import triton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

import dmfast.kernels.triton

_FORMATS = {"i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}  # these are formats of struct
arch = 90  # the next launch runs on this architecture
seed = 0  # the schedule of the next launch has this seed


class Compiler(CUDABackend):
    """Compile as NVIDIA's backend does, up to PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language):
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


@dataclass
class Launch:
    """Describe a launch that has ended: kernel, grid and warps, and what it did to the tensors that it was given."""

    name: str
    grid: int
    warps: int
    memory: machine.Memory
    places: dict[int, int]  # the address of a storage gives its place in memory

    def traffic(self, x: torch.Tensor) -> tuple[float, float]:
        """Return the reads and writes per byte of x, whose only dimension is contiguous."""
        storage = x.untyped_storage()
        at = self.places[storage.data_ptr()] + x.data_ptr() - storage.data_ptr()
        return self.memory.traffic(at, x.numel() * x.element_size())


launches: list[Launch] = []  # all launches since a test has cleared this


def _bytes_of(storage: torch.UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]


class Launcher:
    """Take the calls of Triton, with the grid and the arguments of a compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0 and metadata.num_ctas == 1
        self.kinds = list(src.signature.values())
        self.warps, self.shared = metadata.num_warps, metadata.shared

    def __call__(self, x, y, z, stream, program, packed, metadata, enter, leave, *arguments) -> None:
        assert y == z == 1
        memory = machine.Memory()
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in tensors}
        assert not any(address % 16 for address in storages), "torch's memory is less aligned than a device's"
        places = {
            address: memory.add(_bytes_of(storage), inside=_reached(storage, tensors))
            for address, storage in storages.items()
        }
        given = []
        for kind, a in zip(self.kinds, arguments, strict=True):
            if kind.startswith("*"):
                start = a.untyped_storage().data_ptr()
                given.append(struct.pack("Q", places[start] + a.data_ptr() - start))
            elif kind != "constexpr":
                given.append(struct.pack(_FORMATS[kind], a))
        given += [bytes(8)] * 2  # kernels may ask Triton for scratch memory, and these do not
        machine.launch(program, memory, x, 32 * self.warps, given, self.shared, seed)
        for address, storage in storages.items():
            raw = _bytes_of(storage)
            raw[:] = memory.get(places[address], raw)
        launches.append(Launch(program.kernel.name, x, self.warps, memory, places))


def _reached(storage: torch.UntypedStorage, tensors: list[torch.Tensor]) -> Any:
    """Return which bytes of a storage belong to an element of these tensors."""
    inside = torch.zeros(storage.nbytes(), dtype=torch.bool)
    for x in tensors:
        if x.untyped_storage().data_ptr() == storage.data_ptr():
            size = x.element_size()
            strides = [size * s for s in x.stride()]
            inside.as_strided((*x.shape, size), (*strides, 1), size * x.storage_offset()).fill_(True)
    return inside.numpy()


class Driver(DriverBase):
    """Show the machine to Triton as a device."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = self

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return arch  # Triton keeps kernels by device, and each architecture needs its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 163 << 10}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return the module, the function, its registers, its spills, and the most threads."""
        program = machine.Program(module.parse(ptx.decode())[name])
        return program, program, 0, 0, 1024

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


backends.clear()
backends["nvidia"] = Backend(Compiler, Driver)
triton.runtime.driver.set_active(Driver())
dmfast.kernels.triton.devices = lambda: ["cpu"]
