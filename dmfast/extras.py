"""Find what dmfast and each extra of it would install, and which installed versions clash with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

Requires = Callable[[str], "list[str] | None"]
Version = Callable[[str], str]


@dataclass(frozen=True)
class Extra:
    """One extra, or what the package needs without one.

    Attributes:
        name: its name, which stands in the brackets of ``dmfast[name]``, or that of the package.
        missing: the requirements that pip would install, such as ``ray>=2.60``.
        clashes: sentences, each about an installed version that the extra, or one of its installed packages, does not
            allow.
    """

    name: str
    missing: tuple[str, ...] = ()
    clashes: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = [f"would bring {', '.join(self.missing)}"] if self.missing else []
        said += [f"clash: {clash}" for clash in self.clashes]
        return "; ".join(said) or "installed"


def extras(
    package: str = "dmfast", requires: Requires = metadata.requires, version: Version = metadata.version
) -> list[Extra]:
    """Return what an installed package needs, and then its extras in their order.

    A package that is not installed tells nothing about what it wants in turn: pip finds those clashes when it resolves.

    Args:
        package: the distribution.
        requires: returns the requirements of a distribution.
        version: returns the version of a distribution.

    Raises:
        ModuleNotFoundError: ``packaging`` is not installed.
        importlib.metadata.PackageNotFoundError: the package runs from its sources and is not installed.
    """
    from packaging.requirements import Requirement

    wanted = [Requirement(each) for each in requires(package) or []]
    own = _canonical(package)
    names = list(dict.fromkeys(name for each in wanted for name in _extras_in(str(each.marker or ""))))

    def of_extra(name: str, seen: frozenset[str] = frozenset()) -> list[Requirement]:
        found: list[Requirement] = []
        for each in wanted:
            if _is_plain(each) or each.marker is None or not each.marker.evaluate({"extra": name}):
                continue
            if _canonical(each.name) == own:  # dmfast[train] within another extra
                for inner in each.extras - seen:
                    found += of_extra(inner, seen | {name, inner})
            else:
                found.append(each)
        return found

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except metadata.PackageNotFoundError:
            return None

    def compared(name: str, requirements: Iterable[Requirement]) -> Extra:
        missing, clashes = [], []
        who = package if name == package else f"{package}[{name}]"
        for each in requirements:
            now = installed(each.name)
            asked = f"{each.name}{each.specifier}"
            if now is None:
                missing.append(asked)
                continue
            if not each.specifier.contains(now, prereleases=True):
                clashes.append(f"{who} wants {asked}, and {each.name} {now} is installed")
            for inner in map(Requirement, requires(each.name) or []):
                theirs = installed(inner.name) if _is_plain(inner) else None
                if theirs is not None and not inner.specifier.contains(theirs, prereleases=True):
                    wants = f"{inner.name}{inner.specifier}"
                    clashes.append(f"{each.name} {now} wants {wants}, and {inner.name} {theirs} is installed")
        return Extra(name, tuple(dict.fromkeys(missing)), tuple(dict.fromkeys(clashes)))

    return [compared(package, filter(_is_plain, wanted)), *(compared(name, of_extra(name)) for name in names)]


def _is_plain(requirement: Any) -> bool:
    """Return whether a requirement applies to this system and belongs to no extra."""
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": ""}))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _extras_in(marker: str) -> list[str]:
    return re.findall(r"""extra == ["']([^"']+)["']""", marker)
