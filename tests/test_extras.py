"""Test what ``dmfast doctor`` says of extras, from made-up metadata and from those of the installation."""

from __future__ import annotations

from importlib import metadata

import pytest

from dmfast import cli, extras

REQUIRES = {
    "dmfast": [
        "torch>=2.6", 'transformers>=5.0; extra == "train"', 'dmfast[train]; extra == "vllm"',
        'vllm>=0.32; extra == "vllm"', 'ray>=2.60; extra == "ray"', 'dmfast[train]; extra == "ray"',
        'old>=3; python_version < "3" and extra == "train"', 'dmfast[vllm,ray]; extra == "all"',
        'Trl_Like>=1; extra == "trl"',
    ],
    "vllm": ["transformers<5.20", 'flash>=9; extra == "flash"', "ray>=3"],
    "transformers": None,
    "Trl_Like": ["torch>=9"],
    "torch": [],
}  # fmt: skip


def found(**versions: str) -> dict[str, str]:
    """Return the lines by extra, where these versions are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    return {each.name: str(each) for each in extras.extras("dmfast", lambda name: REQUIRES[name], version)}


def test_what_an_extra_would_bring() -> None:
    assert found(torch="2.13.0") == {
        "dmfast": "installed",
        "train": "would bring transformers>=5.0",
        "vllm": "would bring transformers>=5.0, vllm>=0.32",
        "ray": "would bring ray>=2.60, transformers>=5.0",
        "all": found()["all"],
        "trl": "would bring Trl_Like>=1",
    }
    assert set(found()["all"].removeprefix("would bring ").split(", ")) == {
        "transformers>=5.0", "vllm>=0.32", "ray>=2.60",
    }  # fmt: skip


def test_which_installed_versions_clash() -> None:
    said = found(transformers="5.24.0", vllm="0.32.0", flash="1.0")
    clash = "clash: vllm 0.32.0 wants transformers<5.20, and transformers 5.24.0 is installed"
    assert said["train"] == "installed" and said["vllm"] == clash
    assert said["ray"] == "would bring ray>=2.60"
    old = found(transformers="4.50", Trl_Like="2", torch="2.13.0")
    assert old["train"] == "clash: dmfast[train] wants transformers>=5.0, and transformers 4.50 is installed"
    assert old["trl"] == "clash: Trl_Like 2 wants torch>=9, and torch 2.13.0 is installed"


def test_dmfast_itself_may_clash() -> None:
    assert found(torch="2.4.0")["dmfast"] == "clash: dmfast wants torch>=2.6, and torch 2.4.0 is installed"
    assert found()["dmfast"] == "would bring torch>=2.6"


def test_a_release_candidate_of_a_later_version_is_enough() -> None:
    assert found(transformers="5.1rc1")["train"] == "installed"


def test_what_doctor_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(*_: object) -> None:
        raise metadata.PackageNotFoundError("dmfast")

    for each in (extras.Extra("ray", ("ray>=2.60",)), extras.Extra("train")):
        monkeypatch.setattr(extras, "extras", lambda each=each: [each])
        cli.doctor()
        assert f"  {each.name:12} {each}\n" in capsys.readouterr().out
    monkeypatch.setattr(extras, "extras", not_installed)
    cli.doctor()
    assert "unknown: dmfast runs from its sources" in capsys.readouterr().out


def test_the_extras_of_this_installation() -> None:
    try:
        names = [each.name for each in extras.extras()]
    except metadata.PackageNotFoundError:
        pytest.skip("dmfast is not installed")
    assert {"train", "ray", "deepspeed", "triton", "test"} <= set(names)
