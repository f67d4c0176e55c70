"""A Griffe extension: turns the roles of docstrings, as in :class:`~fusedopt.amp.GradScaler`, into links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package. A name is looked up where the docstring is."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called once the whole package is read."""
        self._rewrite(pkg, loader)

    def _rewrite(self, obj: griffe.Object, loader: griffe.GriffeLoader) -> None:
        docstring = obj.docstring
        if docstring is not None and ":`" in docstring.value:
            docstring.value = _ROLE.sub(lambda match: _link(obj, match, loader), docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, loader)


def _link(obj: griffe.Object, match: re.Match[str], loader: griffe.GriffeLoader) -> str:
    """A link, or code where the name has no page."""
    short, name = match.groups()
    text = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{_path(obj, name, loader)}" optional><code>{text}</code></autoref>'


def _path(obj: griffe.Object, name: str, loader: griffe.GriffeLoader) -> str:
    """Where a name is defined: as a member of the class itself, then as the module knows it."""
    if name in obj.members:
        return obj.members[name].path
    try:
        found = loader.modules_collection.get_member(obj.resolve(name))
        return found.final_target.path if found.is_alias else found.path
    except (griffe.GriffeError, KeyError):
        return name
