# SPDX-License-Identifier: Apache-2.0
"""Attention methods as values: frozen, hashable, validated, found by name in ``METHODS``.

A method says *what* is computed (docs/math.md) and holds no tensor: those live in ``SLAWeights``
and in the modules of ``sparline.nn``. The block shape belongs to the method, so that a checkpoint
means the same function on every machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

FEATURE_MAPS = ("softmax", "elu1", "relu", "identity", "hedgehog", "hedgehog_exp")
LINEAR_SCOPES = ("marginal", "complement", "all")
COMBINES = ("projection", "sum", "sparse", "linear")
COUNT_ROUNDINGS = ("floor", "round", "ceil")
SMOOTH_K_MODES = ("router", "all", "none")
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 16, 128

_T = TypeVar("_T", bound="_Method")


def _check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{owner}: {field} must be one of {', '.join(choices)}, got {value!r}. Pick one of "
            "these."
        )


def _check_ratio(owner: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{owner}: {field} must be a number in [0, 1], got {value!r}. Pass a fraction such as "
            "0.05."
        )
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError(
            f"{owner}: {field} must lie in [0, 1], got {value!r}. It is a fraction of the key "
            "blocks, not a percentage or a count."
        )


def _check_block(owner: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {field} must be an int, got {value!r}. Pass a number of rows.")
    if not MIN_BLOCK_ROWS <= value <= MAX_BLOCK_ROWS:
        raise ValueError(
            f"{owner}: {field} must lie in [{MIN_BLOCK_ROWS}, {MAX_BLOCK_ROWS}] rows, got "
            f"{value}. 64 is the published choice."
        )


@dataclasses.dataclass(frozen=True)
class _Method:
    """What all methods share: a name and a dictionary form for configs and checkpoints."""

    name: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Fields plus ``name``; ``from_dict`` restores an equal method."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[_T], data: Mapping[str, Any]) -> _T:
        fields = {key: value for key, value in data.items() if key != "name"}
        if data.get("name", cls.name) != cls.name:
            raise ValueError(
                f"{cls.__name__}.from_dict: name must be {cls.name!r}, got {data['name']!r}. Use "
                "sparline.methods.from_dict, which picks the class by name."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"{cls.__name__}: unknown option {', '.join(unknown)}. The options are "
                f"{', '.join(sorted(known))}."
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Dense(_Method):
    """Full softmax attention through the same kernels; the block shape only sets the tiling."""

    name: ClassVar[str] = "dense"

    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        _check_block("Dense", "block_q", self.block_q)
        _check_block("Dense", "block_k", self.block_k)


@dataclasses.dataclass(frozen=True)
class SLA(_Method):
    """Sparse-linear attention: exact softmax on critical blocks, linear attention on the rest,
    blended.

    Args:
        keep_ratio: fraction of the key blocks that each query block attends exactly (at least one
            block).
        negligible_ratio: fraction of the key blocks, lowest scores first, that the ``marginal``
            scope drops.
        feature_map: phi of the linear branch, one of ``FEATURE_MAPS``; the hedgehog maps have
            weights.
        linear_scope: blocks the linear branch sums over: class 0 (``marginal``), everything that is
            not critical (``complement``), or every block (``all``).
        block_q: rows of a query block.
        block_k: rows of a key block.
        count_rounding: how ratio x blocks becomes a count; ``round`` takes halves away from zero.
        smooth_k: subtract the mean key of the sequence in the ``router`` only, in ``all`` of the
            operator, or nowhere (``none``).
        epsilon: added to the linear denominator; None takes 1e-5 under ``all`` and 0 otherwise.
        combine: ``projection`` o_s + o_l W^T + b, ``sum`` o_s + o_l, ``sparse`` o_s, ``linear``
            o_l.
    """

    name: ClassVar[str] = "sla"

    keep_ratio: float = 0.05
    negligible_ratio: float = 0.10
    feature_map: str = "softmax"
    linear_scope: str = "marginal"
    block_q: int = 64
    block_k: int = 64
    count_rounding: str = "floor"
    smooth_k: str = "router"
    epsilon: float | None = None
    combine: str = "projection"

    def __post_init__(self) -> None:
        _check_ratio("SLA", "keep_ratio", self.keep_ratio)
        _check_ratio("SLA", "negligible_ratio", self.negligible_ratio)
        _check_choice("SLA", "feature_map", self.feature_map, FEATURE_MAPS)
        _check_choice("SLA", "linear_scope", self.linear_scope, LINEAR_SCOPES)
        _check_block("SLA", "block_q", self.block_q)
        _check_block("SLA", "block_k", self.block_k)
        _check_choice("SLA", "count_rounding", self.count_rounding, COUNT_ROUNDINGS)
        _check_choice("SLA", "smooth_k", self.smooth_k, SMOOTH_K_MODES)
        _check_choice("SLA", "combine", self.combine, COMBINES)
        if self.epsilon is not None and not (0.0 <= self.epsilon < math.inf):
            raise ValueError(
                f"SLA: epsilon must be finite and not negative, got {self.epsilon!r}. Pass None "
                "for the default of the linear scope."
            )

    @property
    def resolved_epsilon(self) -> float:
        """The epsilon in force: the given one, or the default of the linear scope."""
        if self.epsilon is not None:
            return float(self.epsilon)
        return 1e-5 if self.linear_scope == "all" else 0.0

    @property
    def has_linear_branch(self) -> bool:
        return self.combine != "sparse"

    @property
    def has_feature_weights(self) -> bool:
        return self.has_linear_branch and self.feature_map in ("hedgehog", "hedgehog_exp")

    @property
    def needs_block_map(self) -> bool:
        """False only where no output depends on the classes: linear attention over every block."""
        return not (self.combine == "linear" and self.linear_scope == "all")

    @classmethod
    def paper(cls, **options: Any) -> SLA:
        """The operator of the SLA paper: three classes (5 % critical, 10 % negligible), marginal
        scope.
        """
        return cls(**options)

    @classmethod
    def sla1(cls, **options: Any) -> SLA:
        """The released branch SLA-1: two classes, the linear branch over the complement, no
        epsilon.
        """
        return cls(**{"linear_scope": "complement", "negligible_ratio": 0.0, **options})

    @classmethod
    def sla_main(cls, **options: Any) -> SLA:
        """The released main branch: two classes, linear branch over every block, epsilon 1e-5."""
        return cls(**{"linear_scope": "all", "negligible_ratio": 0.0, **options})

    @classmethod
    def sparse_only(cls, **options: Any) -> SLA:
        """Block-sparse attention alone: o = o_s."""
        return cls(**{"combine": "sparse", "negligible_ratio": 0.0, **options})

    @classmethod
    def linear_only(cls, **options: Any) -> SLA:
        """Linear attention over every key: o = o_l."""
        return cls(
            **{"combine": "linear", "linear_scope": "all", "negligible_ratio": 0.0, **options}
        )

    @classmethod
    def linear_plus_sparse(cls, **options: Any) -> SLA:
        """The paper's L+S: o = o_s + o_l, the linear part over every key, no projection."""
        return cls(**{"combine": "sum", "linear_scope": "all", "negligible_ratio": 0.0, **options})


Method = Dense | SLA

#: Every method and preset by the name that configs and the command line use.
METHODS: dict[str, Callable[..., Method]] = {
    "dense": Dense,
    "sla": SLA,
    "sla1": SLA.sla1,
    "sla_main": SLA.sla_main,
    "sparse": SLA.sparse_only,
    "linear": SLA.linear_only,
    "linear_plus_sparse": SLA.linear_plus_sparse,
}


def method(name: str, **options: Any) -> Method:
    """The method called ``name`` in ``METHODS`` with the given options: ``method("sla",
    keep_ratio=0.1)``.
    """
    if name not in METHODS:
        raise ValueError(
            f"method: name must be one of {', '.join(METHODS)}, got {name!r}. Pick one of these."
        )
    known = {field.name for field in dataclasses.fields(Dense if name == "dense" else SLA)}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"method: {name} has no option {', '.join(unknown)}. Its options are "
            f"{', '.join(sorted(known))}."
        )
    return METHODS[name](**options)


def from_dict(data: Mapping[str, Any]) -> Method:
    """The method whose ``to_dict()`` is ``data``."""
    classes: dict[str, type[Dense] | type[SLA]] = {cls.name: cls for cls in (Dense, SLA)}
    name = data.get("name")
    if name not in classes:
        raise ValueError(
            f"methods.from_dict: name must be one of {', '.join(classes)}, got {name!r}. Pass "
            "what to_dict() returned."
        )
    return classes[name].from_dict(data)
