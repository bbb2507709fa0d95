"""Scheme: what to do at the sites of a model, as a frozen dataclass, as text and as JSON.

    scheme = ("fp" | "fp32-gemm" | alias | format | weight ["/" activation]) {"+" pass}

docs/schemes.md has the whole grammar; ``Scheme.parse`` and ``str`` are inverse to each other.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fxquant.errors import SchemeError
from fxquant.files.doors import Location, as_path, kind_of, parse_json, read_text
from fxquant.schemes.specs import FLOAT, SiteSpec
from fxquant.schemes.spelling import (
    Options,
    Scanner,
    check_repair,
    expand_alias,
    scan_repair,
    scan_site,
    spell_repair,
    spell_site,
)

Role = Literal["linear", "head", "embeddings", "matmul"]
ROLES: tuple[Role, ...] = ("linear", "head", "embeddings", "matmul")


def matches(pattern: str, path: str, role: Role) -> bool:
    """Whether an override's pattern covers a site: its role, or a glob over its path.

    A glob, so ``*`` too, covers linears, the head and attention's products. An embedding, which
    has no input to quantize, is covered by its role or exact path only.
    """
    if pattern in ROLES:
        return pattern == role
    if role == "embeddings":
        return pattern == path
    return fnmatch.fnmatchcase(path, pattern)


@dataclass(frozen=True)
class Scheme:
    """What to do at the sites of a model.

    Attributes:
        spec: for every linear inside the decoder blocks.
        repairs: passes to run, in order: (name, ((option, value), ...)) pairs.
        overrides: (pattern, SiteSpec) pairs; a pattern is a glob over site paths or a role, see
            ``matches``; head and embeddings stay float otherwise. The last match counts.
        fp32_gemm: every site's GEMM in fp32 inside an fp16 or bf16 model; excludes spec.
    """

    spec: SiteSpec = FLOAT
    repairs: tuple[tuple[str, Options], ...] = ()
    overrides: tuple[tuple[str, SiteSpec], ...] = ()
    fp32_gemm: bool = False

    def __post_init__(self) -> None:
        if self.fp32_gemm and (self.spec != FLOAT or self.overrides):
            raise SchemeError("fp32-gemm leaves every site in float; it takes no other spec")
        for repair in self.repairs:
            check_repair(*repair)
        patterns = [pattern for pattern, _ in self.overrides]
        for pattern, spec in self.overrides:
            if patterns.count(pattern) > 1:
                raise SchemeError(f"the override {pattern!r} is given twice")
            if pattern == "embeddings" and spec.activation is not None:
                raise SchemeError("an embedding is a lookup: it has a weight, but no activation")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme's text, or its JSON form where it begins with ``{``.

        Raises SchemeError with a caret under the place where the text is not understood.
        """
        if not isinstance(text, str):
            raise _no_scheme(text)
        text = text.strip()
        if text.startswith("{"):
            return cls.from_json(text)
        scanner = Scanner(expand_alias(text))
        fp32_gemm = scanner.accept("fp32-gemm")
        float_ = fp32_gemm or (not scanner.peek("fp8") and scanner.accept("fp"))
        spec = FLOAT if float_ else scan_site(scanner)
        repairs = []
        while scanner.accept("+"):
            repairs.append(scan_repair(scanner))
        if not scanner.at_end():
            scanner.fail("unexpected text")
        return cls(spec, tuple(repairs), fp32_gemm=fp32_gemm)

    def __str__(self) -> str:
        if self.overrides:
            return self.to_json()
        return self._base()

    def _base(self) -> str:
        base = "fp32-gemm" if self.fp32_gemm else spell_site(self.spec)
        return "+".join((base, *(spell_repair(*repair) for repair in self.repairs)))

    def to_json(self) -> str:
        """``{"scheme": text, "overrides": {pattern: text, ...}}``."""
        overrides = {pattern: spell_site(spec) for pattern, spec in self.overrides}
        return json.dumps({"scheme": self._base(), "overrides": overrides})

    @classmethod
    def from_json(cls, text: str | bytes) -> Scheme:
        """The inverse of to_json; raises SchemeError.

        An object ``made_by``, in which ``fxquant plan`` says what it was chosen on, is read over.
        """
        if not isinstance(text, str | bytes):
            raise _bad_json(f"it is a {type(text).__name__}, not text")
        try:
            data = parse_json(text, unique=True)
        except (ValueError, TypeError) as error:
            raise _bad_json(f"{type(error).__name__}: {error}") from error
        if not isinstance(data, dict):
            raise _bad_json(f"it is {kind_of(data)}, not an object")
        unknown = sorted(set(data) - {"scheme", "overrides", "made_by"})
        if "scheme" not in data or unknown:
            missing = [] if "scheme" in data else ["no key 'scheme'"]
            strange = [f"unknown keys {unknown}"] if unknown else []
            raise _bad_json(", ".join(missing + strange))
        base, overrides = data["scheme"], data.get("overrides", {})
        for name, each in (("overrides", overrides), ("made_by", data.get("made_by", {}))):
            if not isinstance(each, dict):
                raise _bad_json(f"{name} is {kind_of(each)}, not an object")
        pairs = tuple(overrides.items())
        texts = (base, *(spec for _, spec in pairs))
        if not all(isinstance(each, str) and not each.lstrip().startswith("{") for each in texts):
            raise _bad_json("a scheme inside JSON is text such as 'w8'")
        scheme = cls.parse(base)
        specs = tuple((pattern, _parse_site(spec)) for pattern, spec in pairs)
        return cls(scheme.spec, scheme.repairs, specs, scheme.fp32_gemm)

    def spec_for(self, path: str, role: Role) -> SiteSpec:
        """The spec of the site at ``path``."""
        spec = self.spec if role == "linear" else FLOAT
        for pattern, override in self.overrides:
            if matches(pattern, path, role):
                spec = override
        return spec

    def check_overrides(self, sites: Iterable[tuple[str, Role]]) -> None:
        """Raise SchemeError if an override matches none of the (path, role) pairs."""
        found = list(sites)
        for path, role in found:
            if role == "embeddings" and self.spec_for(path, role).activation is not None:
                raise SchemeError(f"{path} is a lookup: it has a weight, but no activation")
        for pattern, _ in self.overrides:
            if not any(matches(pattern, *site) for site in found):
                raise SchemeError(
                    f"the override {pattern!r} matches no site of this model; its sites are "
                    f"{', '.join(path for path, _ in found[:8])}{', ...' if len(found) > 8 else ''}"
                    f"{_about_embeddings(pattern, found)}"
                )

    @property
    def specs(self) -> tuple[SiteSpec, ...]:
        """Every spec that may occur."""
        return (self.spec, *(spec for _, spec in self.overrides))

    @property
    def needs_calibration(self) -> bool:
        """Whether any activation is static."""
        return any(spec.activation and not spec.activation.dynamic for spec in self.specs)


def _about_embeddings(pattern: str, sites: Iterable[tuple[str, Role]]) -> str:
    """What to write where a glob was meant for an embedding."""
    meant = [
        path for path, role in sites if role == "embeddings" and matches(pattern, path, "head")
    ]
    return f" ({meant[0]} is an embedding: write 'embeddings' or its path)" if meant else ""


def _bad_json(reason: str) -> SchemeError:
    return SchemeError(
        f"scheme JSON not understood ({reason}); expected "
        '{"scheme": "w8", "overrides": {"head": "w8", "*.fc2": "fp"}}'
    )


def _parse_site(text: str) -> SiteSpec:
    scheme = Scheme.parse(text)
    if scheme.repairs or scheme.overrides or scheme.fp32_gemm:
        raise SchemeError(f"an override is one site's spec such as 'w8' or 'fp', not {text!r}")
    return scheme.spec


def brief(scheme: str) -> str:
    """A scheme's text as a table shows it: more than two overrides are counted, not listed."""
    if not scheme.startswith("{") or len(parsed := Scheme.parse(scheme).overrides) <= 2:
        return scheme
    known = hashlib.sha256(scheme.encode()).hexdigest()[:8]
    return f"{json.loads(scheme)['scheme']}, {len(parsed)} overrides (sha256:{known})"


SchemeLike = Location | Mapping[str, Any] | Scheme


def as_scheme(scheme: SchemeLike) -> Scheme:
    """What users hand over as a scheme: a Scheme as it is; text, JSON text and its dict parsed; the
    path of a JSON file (text that ends in ``.json``) read. Raises SchemeError for anything else."""
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, (str, os.PathLike, Mapping)):
        raise _no_scheme(scheme)
    if isinstance(scheme, str) and scheme.strip().endswith(".json"):
        return _read_scheme(as_path(scheme.strip(), "scheme", SchemeError))
    if isinstance(scheme, os.PathLike):
        return _read_scheme(as_path(scheme, "scheme", SchemeError))
    if isinstance(scheme, str):
        return Scheme.parse(scheme)
    try:
        text = json.dumps(dict(scheme))
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad_json(f"{type(error).__name__}: {error}") from error
    return Scheme.from_json(text)


def _no_scheme(given: object) -> SchemeError:
    several = isinstance(given, list | tuple) and len(given) > 1
    return SchemeError(
        f"a scheme is text such as 'w8a8-static', a fxquant.Scheme or its JSON form as a dict, not "
        f"a {type(given).__name__}{': convert once for each' if several else ''}"
    )


def _read_scheme(path: Path) -> Scheme:
    try:
        text = read_text(path, SchemeError)
    except SchemeError as error:
        raise SchemeError(f"scheme: {error}") from error
    try:
        return Scheme.from_json(text)
    except SchemeError as error:
        raise SchemeError(f"{path}: {error}") from error
