"""The one helper that makes nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.ir.graph import KEY, set_tag, tag
from fxquant.ir.records import Tag as Tag


@dataclass(frozen=True)
class Builder:
    """The one helper that makes nodes: copies meta, sets site, origin and what they are made from.

    Args:
        origin: name of the pass that builds.
        site: path of the site that it builds at.
        made_from: the nodes that the new ones stand for; they may go afterwards.
    """

    gm: GraphModule
    origin: str
    site: str
    made_from: tuple[Node, ...] = ()

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        name: str | None = None,
        is_output: bool = False,
    ) -> Node:
        node = self.gm.graph.create_node("call_function", target, args, name=self._named(name))
        return self._tagged(node, is_output)

    def method(self, name: str, *args: Any) -> Node:
        return self._tagged(self.gm.graph.create_node("call_method", name, args))

    def attribute(self, name: str) -> Node:
        """Read buffer ``name`` of the site's QuantizedParameters."""
        node = self.gm.graph.create_node("get_attr", f"{self.site}.{name}", name=self._named(name))
        return self._tagged(node)

    def tensor(self, path: str, name: str) -> Node:
        """Read the parameter or buffer at ``path``, wherever it lives."""
        node = self.gm.graph.create_node("get_attr", path, name=self._named(name))
        set_tag(node, Tag(self.site, self.origin))
        return node

    def item(self, source: Node, index: int, name: str) -> Node:
        return self.call(operator.getitem, source, index, name=name)

    def module(self, path: str, *args: Node, name: str = "observer") -> Node:
        node = self.gm.graph.create_node("call_module", path, args, name=self._named(name))
        return self._tagged(node)

    def replace(self, old: Node, new: Node) -> None:
        """Let the users of ``old`` use ``new``, which takes its meta, and erase ``old``."""
        meta = {key: value for key, value in old.meta.items() if key != KEY}
        new.meta = {**meta, **new.meta}
        made_from = tuple(dict.fromkeys((*tag(new).made_from, old.name)))
        scope = tag(old).scope
        set_tag(new, replace(tag(new), made_from=made_from, replaces=old.name, scope=scope))
        old.replace_all_uses_with(new)
        self.gm.graph.erase_node(old)
        if re.fullmatch(rf"{re.escape(old.name)}_\d+", new.name):
            new.name = old.name  # torch.fx numbered it only because both stood

    def _tagged(self, node: Node, is_output: bool = False) -> Node:
        made_from = tuple(source.name for source in self.made_from)
        set_tag(node, Tag(self.site, self.origin, is_output, made_from))
        return node

    def _named(self, name: str | None) -> str | None:
        return None if name is None else f"{self.site.replace('.', '_')}_{name}"
