"""Test that a checkpoint which could run code is refused before anything of it is read."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp
from trainer_job import digest, job

from dmfast.training import pickles

ROOT = Path(__file__).parents[1]


class Runs:
    """Make a folder when unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run with a whole checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    job(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.mark.parametrize(
    "name", ["dmfast_state.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"]
)
def test_a_file_that_would_run_code_is_refused_before_anything_is_read(run, tmp_path, name):
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    file, trace = tmp_path / "checkpoint-1" / name, tmp_path / "it ran"
    torch.save({"weight": torch.ones(2), "hidden": [Runs(trace)]}, file)
    # whoever writes a bad file can write the manifest as well
    manifest = tmp_path / "checkpoint-1" / "dmfast_manifest.json"
    listed = json.loads(manifest.read_text())
    listed["files"][name] = file.stat().st_size
    manifest.write_text(json.dumps(listed))
    trainer = job(tmp_path, max_steps=2)
    before = digest(trainer.model)
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} holds more than tensors .*it names (posix|nt)\.mkdir"
    ) as error:
        trainer.train(resume_from_checkpoint=True)
    assert "trust" in str(error.value) and not trace.exists() and digest(trainer.model) == before
    torch.load(file, weights_only=False)
    # the file was dangerous: a plain load runs its code
    assert trace.exists()


def test_what_torch_and_numpy_write_is_no_code(tmp_path):
    state = np.random.RandomState(0).get_state()
    plain = {
        "tensors": [torch.zeros(2, dtype=kind) for kind in (torch.bfloat16, torch.float64, torch.int64, torch.bool)],
        "parameter": torch.nn.Parameter(torch.ones(1)), "of numpy": [state, np.float64(1), np.arange(3)],
        "plain": {1, 2.0, "x", b"y", None}, "size": torch.Size([1]), "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }  # fmt: skip
    torch.save(plain, tmp_path / "state.pt")
    pickles.refuse_code(tmp_path)


class LossScaler:
    """Stand for the class of DeepSpeed with this name."""


def test_the_files_of_deepspeed_may_name_its_classes_and_nothing_else(tmp_path, monkeypatch):
    file, trace = tmp_path / "global_step3" / "mp_rank_00_model_states.pt", tmp_path / "it ran"
    file.parent.mkdir()
    name = "deepspeed.runtime.fp16.loss_scaler"
    for parent in itertools.accumulate(name.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace(LossScaler=LossScaler))
    monkeypatch.setattr(LossScaler, "__module__", name)
    torch.save({"weight": torch.ones(2), "scaler": LossScaler()}, file)
    pickles.refuse_code(tmp_path)
    torch.save({"scaler": LossScaler(), "hidden": Runs(trace)}, file)
    with pytest.raises(ValueError, match=r"it names (posix|nt)\.mkdir"):
        pickles.refuse_code(tmp_path)
    torch.save(LossScaler(), tmp_path / "optimizer.pt")
    file.unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt holds .* it names deepspeed\.runtime"):
        pickles.refuse_code(tmp_path)
    assert not trace.exists()


def in_front(trace):
    """Return a pickle that runs code and has a harmless file of torch.save behind it."""
    file = io.BytesIO(pickle.dumps(Runs(trace), protocol=2))
    harmless = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, harmless)
    with zipfile.ZipFile(file, "a") as out, zipfile.ZipFile(harmless) as records:
        for name in records.namelist():
            out.writestr(name, records.read(name))
    return file.getvalue()


class Script(torch.nn.Module):
    """Write a file when its TorchScript is loaded."""

    def __init__(self, trace):
        super().__init__()
        self.weight, self.trace = torch.ones(1), str(trace)

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.trace, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight, self.trace = state[0], state[1]
        torch.save(self.weight, self.trace)

    def forward(self, x: torch.Tensor):
        return x


def torch_script(file, trace):
    """Write TorchScript whose data are plain, and whose constants are a module that runs code when it is loaded."""
    torch.jit.save(torch.jit.script(Script(trace)), file)
    with zipfile.ZipFile(file) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    out = torch._C.PyTorchFileWriter(str(file))
    module = records["data.pkl"][:-1] + b"\x85."  # the tuple that constants have to be
    plain = pickle.dumps({"weight": 1}, protocol=2)
    for name, data in {**records, "data.pkl": plain, "constants.pkl": module}.items():
        if name in ("version", "byteorder") or name.startswith(".data"):
            continue
        if name.startswith("data/"):
            out.write_record(f"constants/{name.removeprefix('data/')}", data, len(data))
        out.write_record(name, data, len(data))
    out.write_end_of_file()


OTHER = {
    "another pickle": (lambda f, t: f.write_bytes(pickle.dumps(Runs(t))), "can't be read"),
    "a zip": (lambda f, t: f.write_bytes(b"PK\3\4" + pickle.dumps(Runs(t))), "can't be read"),
    "a pickle in front of a zip": (lambda f, t: f.write_bytes(in_front(t)), "not a file that torch.save writes"),
    "TorchScript": (torch_script, r"is a TorchScript archive, which torch\.load would run"),
    "by the name of a class": (
        lambda f, t: torch.save([np.random.RandomState, print], f),
        r"names __builtin__\.print, numpy\.",
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, what):
    write, said = OTHER[what]
    write(tmp_path / "optimizer.pt", tmp_path / "it ran")
    with pytest.raises(ValueError, match=said):
        pickles.refuse_code(tmp_path)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_shards_hold_no_code_in_their_metadata_or_beside_the_tensors(tmp_path):
    good, bad, worse = tmp_path / "good", tmp_path / "bad", tmp_path / "worse"
    state = {"model": {"weight": torch.randn(3, 4)}, "steps": 3, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    dcp.save(state, checkpoint_id=good / "optimizer_0")
    pickles.refuse_code(good)
    dcp.save(state | {"groups": Runs(tmp_path / "it ran")}, checkpoint_id=bad / "optimizer_0")
    with pytest.raises(ValueError, match=r"distcp, groups holds more than .*(posix|nt)\.mkdir"):
        pickles.refuse_code(bad)
    dcp.save(state, checkpoint_id=worse)
    (worse / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "it ran")))
    with pytest.raises(ValueError, match=r"\.metadata holds more than .*(posix|nt)\.mkdir"):
        pickles.refuse_code(worse)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_every_place_that_torch_reads_shards_from_is_looked_at(tmp_path):
    """These are the metadata of a rank, a folder behind a link, a pickle in front of a zip, and what is compressed."""
    trace, state = tmp_path / "it ran", {"weight": torch.zeros(2), "name": "x" * 9000}
    of_rank, link, front, packed = (tmp_path / name for name in ("rank", "link", "front", "packed"))
    dcp.save(state, checkpoint_id=of_rank / "shards")
    (of_rank / "shards" / ".metadata").unlink()
    (of_rank / "shards" / "__0.metadata").write_bytes(pickle.dumps(Runs(trace)))
    link.mkdir()
    (link / "shards").symlink_to(of_rank / "shards", target_is_directory=True)
    (link / "loop").symlink_to(link, target_is_directory=True)
    for folder in (of_rank, link):
        with pytest.raises(ValueError, match=r"__0\.metadata holds more than .*(posix|nt)\.mkdir"):
            pickles.refuse_code(folder)

    dcp.save(state, checkpoint_id=front)
    metadata = pickle.loads((front / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "name")
    data, hidden = bytearray((front / place.relative_path).read_bytes()), in_front(trace)
    data[place.offset : place.offset + len(hidden)] = hidden
    place.length = len(hidden)
    (front / place.relative_path).write_bytes(data)
    (front / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"not a file that torch\.save writes"):
        pickles.refuse_code(front)

    dcp.save(state, checkpoint_id=packed)
    place.transform_descriptors = ["stream.zstd"]
    (packed / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"can't be checked: name is stored with the transforms .*zstd"):
        pickles.refuse_code(packed)
    assert not trace.exists()
    with contextlib.suppress(dcp.CheckpointException):
        dcp.load(state, checkpoint_id=front)
    # the shard was dangerous: a plain load runs its code
    assert trace.exists()


def test_deepspeed_is_led_to_no_other_folder(tmp_path):
    latest = tmp_path / "latest"
    latest.write_text("global_step12\n")
    pickles.refuse_code(tmp_path)
    for tag in ("../elsewhere", "global_step12/../../elsewhere", "/elsewhere"):
        latest.write_text(tag)
        with pytest.raises(ValueError, match=r"latest names .*elsewhere', which is not a folder that DeepSpeed writes"):
            pickles.refuse_code(tmp_path)


def test_the_best_checkpoint_is_looked_at_as_well(tmp_path):
    """It is refused before a run goes on, and again before it is loaded at the end."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2,
                "load_best_model_at_end": True, "metric_for_best_model": "eval_kl_policy_base", "eval_samples": 6,
                "greater_is_better": False, "warmup_steps": 0}  # fmt: skip
    job(tmp_path, **settings).train()
    trace, best = tmp_path / "it ran", tmp_path / "checkpoint-1"
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    torch.save({"hidden": Runs(trace)}, best / "optimizer.pt")
    trainer = job(tmp_path, **settings | {"max_steps": 3})
    before = digest(trainer.model)
    with pytest.raises(ValueError, match=r"checkpoint-1/optimizer\.pt holds more than"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert digest(trainer.model) == before
    trainer.state.best_model_checkpoint = str(best)
    with pytest.raises(ValueError, match=r"checkpoint-1/optimizer\.pt holds more than"):
        trainer._load_best_model()
    assert not trace.exists()


READERS = r"(torch|np|numpy|pickle|joblib|dcp|torch\.distributed\.checkpoint|(?<!\.)checkpoint)"


def loads(path):
    """Yield each call in a file that could read a pickle, with its line."""
    source = path.read_text(encoding="utf-8")
    if not re.search(rf"\b{READERS}\.loads?\(", source):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "loads"):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if re.fullmatch(rf"{READERS}\.loads?", called):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}", called, given


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="no source tree")
def test_nothing_reads_pickles_but_the_pipe_between_two_processes_of_one_run():
    files = [path for part in ("dmfast", "scripts", "examples", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    found = [each for path in files for each in loads(path)]
    safe = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", None)}
    unsafe = [where for where, called, given in found
              if called not in safe or given.get(safe[called][0]) != safe[called][1]]  # fmt: skip
    shards = [where for where in unsafe if "load({'proposal': shards}" in where]  # they are read after refuse_code
    assert len(found) > 3 and len(shards) == 1 and shards[0].startswith("dmfast/training/checkpoint.py")
    others = [where for where in unsafe if where not in shards]
    assert others and all(where.startswith("dmfast/sampling/process.py") for where in others), others
