# SPDX-License-Identifier: Apache-2.0
"""Attention methods as values: frozen, hashable, validated, found by name in ``METHODS``.

A method says *what* is computed (docs/math.md) and holds no tensor: those live in ``Weights``
and in the modules of ``sparline.nn``. Every method comes down to a ``Recipe`` for the same sparse
and linear pieces: a router that picks blocks, a policy for each tile, a combination. The block
shape belongs to the method, so that a checkpoint means the same function on every machine.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

FEATURE_MAPS = ("softmax", "elu1", "relu", "identity", "hedgehog", "hedgehog_exp")
LINEAR_SCOPES = ("marginal", "complement", "all")
COMBINES = ("projection", "sum", "sparse", "linear")
COUNT_ROUNDINGS = ("floor", "round", "ceil")
SMOOTH_K_MODES = ("router", "all", "none")
SELECTIONS = ("top_k", "top_p", "union", "intersection")
ALPHA_SHAPES = ("block", "head", "token")
ROUTER_MODES = ("hard", "soft", "straight_through")
TOKEN_ORDERS = ("raster", "cubes", "hilbert")
TILE_ORDERS = ("ascending", "reverse", "diagonal_first", "sink_first")
PARTITIONS = ("cycle", "1d", "2d", "3d")
CHUNK_MODES = ("query_head", "head_global", "overall")
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 16, 128

_T = TypeVar("_T", bound="Method")


# What a method comes down to --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LowBit:
    """INT8 q k^T and FP8 e4m3 p v in the forward of the sparse branch; the backward is 16-bit.

    Args:
        q_rows: query rows that share a scale, a multiple of 16; 0 is the whole query block.
        p_range: what the largest probability of a row is scaled to before rounding.
        v_range: what the largest value of a channel is scaled to. 448 is the range of e4m3; kernels
            that accumulate in float16 need 2.25.
        recompute_lse: the backward takes the lse of the unquantised scores instead of the forward's
            (for exactness studies; costs another forward).
    """

    q_rows: int = 0
    p_range: float = 448.0
    v_range: float = 448.0
    recompute_lse: bool = False

    def __post_init__(self) -> None:
        _check_group("LowBit", "q_rows", self.q_rows)
        _check_flag("LowBit", "recompute_lse", self.recompute_lse)
        for field in ("p_range", "v_range"):
            value = getattr(self, field)
            _check_number("LowBit", field, value)
            if not 0.0 < value <= 448.0:
                raise ValueError(
                    f"LowBit: {field} must lie in (0, 448], the range of e4m3, got {value!r}. The "
                    "published pairs are (448, 448), (448, 2.25) and (224, 4.5)."
                )


@dataclasses.dataclass(frozen=True)
class BlockRouter:
    """Picks key blocks for each query block from pooled scores; see ``SLA`` and ``SLA2``."""

    selection: str = "top_k"
    keep_ratio: float = 0.05
    keep_count: int | None = None  # takes the place of keep_ratio
    keep_mass: float = 1.0
    negligible_ratio: float = 0.0
    count_rounding: str = "floor"
    smooth_k: bool = True
    longest_prefix: bool = False
    min_similarity: float | None = None
    mode: str = "hard"
    temperature: float = 0.1
    softmax: bool = False
    trains_qk: bool = False


@dataclasses.dataclass(frozen=True)
class ChunkRouter:
    """Picks chunks of the token grid for each query; see ``VMoBA``."""

    partition: str
    chunk: tuple[int, int, int]
    mode: str
    threshold: float
    num_chunks: int | None
    pool_queries: bool


@dataclasses.dataclass(frozen=True)
class Skip:
    """Drops tiles inside the loop; see ``DynSparse`` and ``BLASST``."""

    reference: str  # "running_max" or "kept_lse"
    log_threshold: float
    rows: int = 0
    tile_order: str = "ascending"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parts of the one operator that a method uses."""

    block_q: int
    block_k: int
    router: BlockRouter | ChunkRouter | None = None  # None: every block is critical
    skip: Skip | None = None
    low_bit: LowBit | None = None
    combine: str = "sparse"
    feature_map: str = "softmax"
    linear_scope: str = "complement"
    epsilon: float = 0.0
    smooth_k: bool = False  # of the whole operator
    token_order: str = "raster"
    cube: tuple[int, int, int] = (4, 4, 4)
    has_cube_blocks: bool = False  # each cube is a block of its own
    has_coarse_branch: bool = False
    alpha_shape: str = "block"

    @property
    def has_linear_branch(self) -> bool:
        return self.combine != "sparse"

    @property
    def has_feature_weights(self) -> bool:
        return self.has_linear_branch and self.feature_map in ("hedgehog", "hedgehog_exp")

    @property
    def needs_grid(self) -> bool:
        return self.token_order != "raster" or isinstance(self.router, ChunkRouter)


# Checks -----------------------------------------------------------------------------------------


def _check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{owner}: {field} must be one of {', '.join(choices)}, got {value!r}. Pick one of "
            "these."
        )


def _check_number(owner: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {field} must be a number, got {value!r}. Pass a float.")


def _check_ratio(owner: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{owner}: {field} must be a number in [0, 1], got {value!r}. Pass a fraction such as "
            "0.05."
        )
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError(
            f"{owner}: {field} must lie in [0, 1], got {value!r}. It is a fraction, not a "
            "percentage or a count."
        )


def _check_flag(owner: str, field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {field} must be True or False, got {value!r}. Pass one of them.")


def _check_count(owner: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {field} must be an int, got {value!r}. Pass a count.")
    if value < 1:
        raise ValueError(f"{owner}: {field} must be at least 1, got {value}. Keep something.")


def _check_block(owner: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {field} must be an int, got {value!r}. Pass a number of rows.")
    if not MIN_BLOCK_ROWS <= value <= MAX_BLOCK_ROWS:
        raise ValueError(
            f"{owner}: {field} must lie in [{MIN_BLOCK_ROWS}, {MAX_BLOCK_ROWS}] rows, got "
            f"{value}. 64 is the published choice."
        )


def _check_group(owner: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value % 16:
        raise ValueError(
            f"{owner}: {field} must be 0 or a multiple of 16 rows, got {value!r}. 0 takes the "
            "whole query block."
        )


def _check_box(owner: str, field: str, value: object) -> tuple[int, int, int]:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 3
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value)
    ):
        raise ValueError(
            f"{owner}: {field} must hold three positive ints (frames, height, width), got "
            f"{value!r}. (4, 4, 4) is the published choice."
        )
    return (value[0], value[1], value[2])


# Methods ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods share.

    Args:
        token_order: the order in which tokens are cut into blocks: as they are stored
            (``raster``), in boxes of ``cube`` tokens (``cubes``), or along a ``hilbert`` curve. The
            latter two need the token grid of the call.
        cube: (frames, height, width) of a box.
        low_bit: ``LowBit(...)`` runs the sparse branch's forward in INT8 and FP8; also True, a
            dictionary of its options, or None for off.
    """

    name: ClassVar[str] = ""

    token_order: str = "raster"
    cube: tuple[int, int, int] = (4, 4, 4)
    low_bit: LowBit | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _check_choice(owner, "token_order", self.token_order, TOKEN_ORDERS)
        object.__setattr__(self, "cube", _check_box(owner, "cube", self.cube))
        low_bit: object = self.low_bit
        if isinstance(low_bit, bool):
            low_bit = LowBit() if low_bit else None
        elif isinstance(low_bit, Mapping):
            known = [field.name for field in dataclasses.fields(LowBit)]
            if unknown := sorted(set(low_bit) - set(known)):
                raise ValueError(
                    f"{owner}: low_bit has no option {', '.join(unknown)}. Its options are "
                    f"{', '.join(known)}."
                )
            low_bit = LowBit(**low_bit)
        if not (low_bit is None or isinstance(low_bit, LowBit)):
            raise TypeError(
                f"{owner}: low_bit must be sparline.LowBit, True or None, got {low_bit!r}. Pass "
                "low_bit=sparline.LowBit()."
            )
        object.__setattr__(self, "low_bit", low_bit)

    @property
    def recipe(self) -> Recipe:
        """The parts of the operator that this method uses."""
        raise NotImplementedError

    def for_layer(self, layer: int) -> Method:
        """The method of one layer of a model, where layers differ."""
        return self

    def _recipe(self, block_q: int, block_k: int, **parts: Any) -> Recipe:
        if self.low_bit is not None and self.low_bit.q_rows > block_q:
            raise ValueError(
                f"{type(self).__name__}: low_bit.q_rows must be at most block_q = {block_q}, got "
                f"{self.low_bit.q_rows}. 0 takes the whole query block."
            )
        shared = {"token_order": self.token_order, "cube": self.cube, "low_bit": self.low_bit}
        return Recipe(block_q, block_k, **{**shared, **parts})

    def _check_blocks(self, block_q: int, block_k: int) -> None:
        _check_block(type(self).__name__, "block_q", block_q)
        _check_block(type(self).__name__, "block_k", block_k)

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
        if unknown := sorted(set(fields) - set(options_of(cls))):
            raise ValueError(
                f"{cls.__name__}: unknown option {', '.join(unknown)}. The options are "
                f"{', '.join(sorted(options_of(cls)))}."
            )
        return cls(**fields)


def options_of(cls: type[Method]) -> tuple[str, ...]:
    """Names of a method's options."""
    return tuple(field.name for field in dataclasses.fields(cls))


@dataclasses.dataclass(frozen=True)
class Dense(Method):
    """Full softmax attention through the same kernels; the block shape only sets the tiling."""

    name: ClassVar[str] = "dense"

    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_blocks(self.block_q, self.block_k)

    @property
    def recipe(self) -> Recipe:
        return self._recipe(self.block_q, self.block_k, smooth_k=self.low_bit is not None)


@dataclasses.dataclass(frozen=True)
class SLA(Method):
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
        selection: how critical blocks are picked from the pooled scores: the ``top_k`` of them by
            ``keep_ratio``, the fewest with ``keep_mass`` of the pooled softmax (``top_p``), the
            ``union`` or the ``intersection`` of both.
        keep_mass: p of top-p, in [0, 1].
        longest_prefix: SpargeAttn's top-p: the longest prefix whose sum is at most p.
        min_similarity: SpargeAttn's theta: blocks whose rows are less alike than this mean cosine
            are always computed. None ranks all.
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
    selection: str = "top_k"
    keep_mass: float = 0.5
    longest_prefix: bool = False
    min_similarity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio("SLA", "keep_ratio", self.keep_ratio)
        _check_ratio("SLA", "negligible_ratio", self.negligible_ratio)
        _check_ratio("SLA", "keep_mass", self.keep_mass)
        _check_choice("SLA", "feature_map", self.feature_map, FEATURE_MAPS)
        _check_choice("SLA", "linear_scope", self.linear_scope, LINEAR_SCOPES)
        self._check_blocks(self.block_q, self.block_k)
        _check_choice("SLA", "count_rounding", self.count_rounding, COUNT_ROUNDINGS)
        _check_choice("SLA", "smooth_k", self.smooth_k, SMOOTH_K_MODES)
        _check_choice("SLA", "combine", self.combine, COMBINES)
        _check_choice("SLA", "selection", self.selection, SELECTIONS)
        _check_flag("SLA", "longest_prefix", self.longest_prefix)
        if self.low_bit is not None and self.combine == "linear":
            raise ValueError(
                "SLA: low_bit needs a sparse branch, which combine='linear' has not: only q k^T "
                "and p v are quantised. Leave low_bit None."
            )
        if self.epsilon is not None and not (0.0 <= self.epsilon < math.inf):
            raise ValueError(
                f"SLA: epsilon must be finite and not negative, got {self.epsilon!r}. Pass None "
                "for the default of the linear scope."
            )
        if self.min_similarity is not None:
            _check_number("SLA", "min_similarity", self.min_similarity)
            if not -1.0 <= self.min_similarity <= 1.0:
                raise ValueError(
                    "SLA: min_similarity must lie in [-1, 1], the range of a cosine, got "
                    f"{self.min_similarity!r}. Pass None to rank every block."
                )

    @property
    def resolved_epsilon(self) -> float:
        """The epsilon in force: the given one, or the default of the linear scope."""
        if self.epsilon is not None:
            return float(self.epsilon)
        return 1e-5 if self.linear_scope == "all" else 0.0

    @property
    def needs_block_map(self) -> bool:
        """False only where no output depends on the classes: linear attention over every block."""
        return not (self.combine == "linear" and self.linear_scope == "all")

    @property
    def recipe(self) -> Recipe:
        router = BlockRouter(
            selection=self.selection,
            keep_ratio=self.keep_ratio,
            keep_mass=self.keep_mass,
            negligible_ratio=self.negligible_ratio,
            count_rounding=self.count_rounding,
            smooth_k=self.smooth_k != "none",
            longest_prefix=self.longest_prefix,
            min_similarity=self.min_similarity,
        )
        return self._recipe(
            self.block_q,
            self.block_k,
            router=router if self.needs_block_map else None,
            combine=self.combine,
            feature_map=self.feature_map,
            linear_scope=self.linear_scope,
            epsilon=self.resolved_epsilon,
            # Free where nothing but the softmax sees the keys, and int8 wants it.
            smooth_k=self.smooth_k == "all"
            or (self.low_bit is not None and self.combine == "sparse"),
        )

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
        return cls(**{**_PRESETS["sla1"], **options})

    @classmethod
    def sla_main(cls, **options: Any) -> SLA:
        """The released main branch: two classes, linear branch over every block, epsilon 1e-5."""
        return cls(**{**_PRESETS["sla_main"], **options})

    @classmethod
    def sparse_only(cls, **options: Any) -> SLA:
        """Block-sparse attention alone, by top-k: o = o_s."""
        return cls(**{**_PRESETS["sparse"], **options})

    @classmethod
    def top_p(cls, **options: Any) -> SLA:
        """Block-sparse attention on the fewest blocks with ``keep_mass`` of the pooled softmax."""
        return cls(**{**_PRESETS["top_p"], **options})

    @classmethod
    def hybrid(cls, **options: Any) -> SLA:
        """SpargeAttention2's union of top-k (3 %) and top-p (20 %), sparse branch only."""
        return cls(**{**_PRESETS["hybrid"], **options})

    @classmethod
    def sparge(cls, **options: Any) -> SLA:
        """SpargeAttn's block selection: top-p 0.98 among blocks that are alike inside (0.6)."""
        return cls(**{**_PRESETS["sparge"], **options})

    @classmethod
    def linear_only(cls, **options: Any) -> SLA:
        """Linear attention over every key: o = o_l."""
        return cls(**{**_PRESETS["linear"], **options})

    @classmethod
    def linear_plus_sparse(cls, **options: Any) -> SLA:
        """The paper's L+S: o = o_s + o_l, the linear part over every key, no projection."""
        return cls(**{**_PRESETS["linear_plus_sparse"], **options})


@dataclasses.dataclass(frozen=True)
class SLA2(Method):
    """SLA2: a learned router, and a learned ratio between the branches,
    o = alpha o_s + (1 - alpha) o_l.

    Args:
        keep_ratio: fraction of the key blocks that each query block attends exactly.
        feature_map: phi of the linear branch.
        block_q: rows of a query block.
        block_k: rows of a key block.
        count_rounding: how ratio x blocks becomes a count.
        alpha_shape: alpha for each query ``block``, ``head`` or ``token``.
        num_alphas: learned values for each head, interpolated to the query blocks or tokens of a
            call; the number of those at training time gives each its own. One with ``head``.
        router_per_head: one pair of router matrices for each head instead of one for all.
        router_mode: ``hard`` top-k; ``soft`` SoftTop-k, which trains the router (stage 1); or
            ``straight_through``, hard forward with the gradient of the soft one.
        temperature: tau of SoftTop-k.
        router_softmax: SoftTop-k on the softmax of the scores (Alg. 2) instead of the scores.
        router_trains_qk: let the router's gradient flow on into q and k.
    """

    name: ClassVar[str] = "sla2"

    keep_ratio: float = 0.05
    feature_map: str = "softmax"
    block_q: int = 128
    block_k: int = 64
    count_rounding: str = "floor"
    alpha_shape: str = "block"
    num_alphas: int = 64
    router_per_head: bool = False
    router_mode: str = "hard"
    temperature: float = 0.1
    router_softmax: bool = False
    router_trains_qk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio("SLA2", "keep_ratio", self.keep_ratio)
        _check_choice("SLA2", "feature_map", self.feature_map, FEATURE_MAPS)
        self._check_blocks(self.block_q, self.block_k)
        _check_choice("SLA2", "count_rounding", self.count_rounding, COUNT_ROUNDINGS)
        _check_choice("SLA2", "alpha_shape", self.alpha_shape, ALPHA_SHAPES)
        _check_count("SLA2", "num_alphas", self.num_alphas)
        _check_choice("SLA2", "router_mode", self.router_mode, ROUTER_MODES)
        for flag in ("router_per_head", "router_softmax", "router_trains_qk"):
            _check_flag("SLA2", flag, getattr(self, flag))
        _check_number("SLA2", "temperature", self.temperature)
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"SLA2: temperature must be positive and finite, got {self.temperature!r}. The "
                "paper's is 0.1."
            )
        if self.low_bit is not None and self.router_mode != "hard":
            raise ValueError(
                f"SLA2: low_bit needs router_mode='hard', got {self.router_mode!r}. Train the "
                "router in 16 bits, then switch to low_bit for stage 2."
            )

    @property
    def recipe(self) -> Recipe:
        router = BlockRouter(
            keep_ratio=self.keep_ratio,
            count_rounding=self.count_rounding,
            smooth_k=True,
            mode=self.router_mode,
            temperature=self.temperature,
            softmax=self.router_softmax,
            trains_qk=self.router_trains_qk,
        )
        return self._recipe(
            self.block_q,
            self.block_k,
            router=router,
            combine="blend",
            feature_map=self.feature_map,
            smooth_k=True,
            alpha_shape=self.alpha_shape,
        )


@dataclasses.dataclass(frozen=True)
class _InLoop(Method):
    """What the two in-loop methods share."""

    _reference: ClassVar[str] = ""

    log_threshold: float
    block_q: int = 128
    block_k: int = 64
    decide_rows: int = 0
    tile_order: str = "ascending"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        self._check_blocks(self.block_q, self.block_k)
        _check_number(owner, "log_threshold", self.log_threshold)
        if not self.log_threshold < 0.0:  # also refuses NaN
            raise ValueError(
                f"{owner}: log_threshold must be negative, got {self.log_threshold!r}. It is a "
                "natural logarithm; float('-inf') skips nothing."
            )
        _check_group(owner, "decide_rows", self.decide_rows)
        if self.decide_rows > self.block_q:
            raise ValueError(
                f"{owner}: decide_rows must be at most block_q = {self.block_q}, got "
                f"{self.decide_rows}. 0 takes the whole tile."
            )
        _check_choice(owner, "tile_order", self.tile_order, TILE_ORDERS)

    @property
    def recipe(self) -> Recipe:
        skip = Skip(self._reference, float(self.log_threshold), self.decide_rows, self.tile_order)
        return self._recipe(
            self.block_q, self.block_k, skip=skip, smooth_k=self.low_bit is not None
        )


@dataclasses.dataclass(frozen=True)
class DynSparse(_InLoop):
    """Training-free: inside the flash loop, drop tiles whose best score is far below the energy
    that the row has gathered, max S - lse < log_threshold.

    Args:
        log_threshold: lambda, natural log, negative. It does not transfer between models or tile
            sizes; ``from_budget`` computes it from a budget of lost energy.
        block_q: rows of a query tile.
        block_k: keys of a tile.
        decide_rows: rows that decide together, a multiple of 16; 0 is the whole tile. On Hopper 0
            and 64 have kernels of their own.
        tile_order: in which tiles are visited, one of ``TILE_ORDERS``.
    """

    name: ClassVar[str] = "dynsparse"
    _reference: ClassVar[str] = "kept_lse"

    @classmethod
    def from_budget(
        cls, p_real: float, num_keys: int, *, block_k: int = 64, **options: Any
    ) -> DynSparse:
        """lambda = ln(p_real) + ln(block_k / num_keys): skip below ``p_real`` times the fair share
        of a tile."""
        _check_number("DynSparse.from_budget", "p_real", p_real)
        _check_count("DynSparse.from_budget", "num_keys", num_keys)
        if not 0.0 < p_real < math.inf:
            raise ValueError(
                f"DynSparse.from_budget: p_real must be positive and finite, got {p_real!r}. "
                "Larger is sparser."
            )
        threshold = math.log(p_real) + math.log(block_k / num_keys)
        return cls(log_threshold=threshold, block_k=block_k, **options)


@dataclasses.dataclass(frozen=True)
class BLASST(_InLoop):
    """Training-free: drop tiles whose best score is far below the running maximum of the row,
    max S - m < log_threshold = ln lambda. Options as in ``DynSparse``; ``sparline.calibration``
    finds the threshold for a sparsity.
    """

    name: ClassVar[str] = "blasst"
    _reference: ClassVar[str] = "running_max"


@dataclasses.dataclass(frozen=True)
class VSA(Method):
    """Video sparse attention: dense attention among cube means, block-sparse attention on the best
    cubes of each row, o = gate_coarse o_c + gate_fine o_f.

    Args:
        keep_ratio: fraction of the cubes that each cube attends exactly, rounded up.
        num_cubes: their number, in place of ``keep_ratio``.
        cube: (frames, height, width) of a cube: 16 to 128 tokens.
    """

    name: ClassVar[str] = "vsa"

    keep_ratio: float = 0.125
    num_cubes: int | None = None
    token_order: str = dataclasses.field(default="cubes", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio("VSA", "keep_ratio", self.keep_ratio)
        if self.num_cubes is not None:
            _check_count("VSA", "num_cubes", self.num_cubes)
        if self.token_order != "cubes":
            raise ValueError(
                f"VSA: token_order must be 'cubes', got {self.token_order!r}. Its blocks are cubes."
            )
        if not MIN_BLOCK_ROWS <= math.prod(self.cube) <= MAX_BLOCK_ROWS:
            raise ValueError(
                f"VSA: cube must hold {MIN_BLOCK_ROWS} to {MAX_BLOCK_ROWS} tokens, got {self.cube} "
                f"with {math.prod(self.cube)}. (4, 4, 4) is the published choice."
            )

    @property
    def recipe(self) -> Recipe:
        rows = math.prod(self.cube)
        router = BlockRouter(
            keep_ratio=self.keep_ratio,
            keep_count=self.num_cubes,
            count_rounding="ceil",
            smooth_k=False,
        )
        return self._recipe(
            rows,
            rows,
            router=router,
            smooth_k=self.low_bit is not None,
            has_cube_blocks=True,
            has_coarse_branch=True,
        )


@dataclasses.dataclass(frozen=True)
class VMoBA(Method):
    """Video mixture of block attention: each query token attends its own chunk of the token grid
    and the chunks that its gate q . mean(k) prefers.

    Args:
        threshold: cumulative share of the min-max normalised gate that the chosen chunks reach.
        mode: the scores that are normalised and ranked together: those of one query
            (``query_head``, the released configuration), of one head (``head_global``, the paper),
            or of all heads (``overall``).
        num_chunks: a fixed number of chunks for each query, in place of ``threshold``.
        partition: chunks are runs of frames (``1d``), columns through all frames (``2d``) or boxes
            (``3d``); ``cycle`` takes them in turn, layer by layer.
        frames_1d: frames of a 1d chunk.
        window_2d: (height, width) of a 2d chunk.
        box_3d: (frames, height, width) of a 3d chunk.
        pool_queries: an approximation: whole query blocks choose, by their mean query.
        block_q: rows of a query block.
        block_k: rows of a key block; blocks end where chunks end.
    """

    name: ClassVar[str] = "vmoba"

    threshold: float = 0.25
    mode: str = "query_head"
    num_chunks: int | None = None
    partition: str = "cycle"
    frames_1d: int = 2
    window_2d: tuple[int, int] = (3, 4)
    box_3d: tuple[int, int, int] = (4, 6, 4)
    pool_queries: bool = False
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio("VMoBA", "threshold", self.threshold)
        _check_choice("VMoBA", "mode", self.mode, CHUNK_MODES)
        _check_choice("VMoBA", "partition", self.partition, PARTITIONS)
        if self.num_chunks is not None:
            _check_count("VMoBA", "num_chunks", self.num_chunks)
        _check_count("VMoBA", "frames_1d", self.frames_1d)
        _check_flag("VMoBA", "pool_queries", self.pool_queries)
        window: object = self.window_2d
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(
                f"VMoBA: window_2d must hold two positive ints (height, width), got {window!r}. "
                "(3, 4) is the published choice."
            )
        box = _check_box("VMoBA", "window_2d with its 1 frame", (1, *window))
        object.__setattr__(self, "window_2d", box[1:])
        object.__setattr__(self, "box_3d", _check_box("VMoBA", "box_3d", self.box_3d))
        self._check_blocks(self.block_q, self.block_k)
        if self.token_order != "raster":
            raise ValueError(
                f"VMoBA: token_order must be 'raster', got {self.token_order!r}. The partition "
                "sets the order of the tokens."
            )

    def for_layer(self, layer: int) -> VMoBA:
        if self.partition != "cycle":
            return self
        return dataclasses.replace(self, partition=("1d", "2d", "3d")[layer % 3])

    @property
    def recipe(self) -> Recipe:
        if self.partition == "cycle":  # a call outside a model is that of the first layer
            return self.for_layer(0).recipe
        # A 0 stands for the whole length of the axis.
        chunk = {
            "1d": (self.frames_1d, 0, 0),
            "2d": (0, *self.window_2d),
            "3d": self.box_3d,
        }[self.partition]
        router = ChunkRouter(
            self.partition, chunk, self.mode, self.threshold, self.num_chunks, self.pool_queries
        )
        return self._recipe(
            self.block_q, self.block_k, router=router, smooth_k=self.low_bit is not None
        )


# By name ----------------------------------------------------------------------------------------

_TWO_CLASSES: dict[str, Any] = {"negligible_ratio": 0.0}
_SPARSE: dict[str, Any] = {**_TWO_CLASSES, "combine": "sparse"}
_PRESETS: dict[str, dict[str, Any]] = {
    "sla1": {**_TWO_CLASSES, "linear_scope": "complement"},
    "sla_main": {**_TWO_CLASSES, "linear_scope": "all"},
    "sparse": _SPARSE,
    "top_p": {**_SPARSE, "selection": "top_p"},
    "hybrid": {
        **_SPARSE,
        "selection": "union",
        "keep_ratio": 0.03,
        "keep_mass": 0.2,
        "block_q": 128,
    },
    "sparge": {
        **_SPARSE,
        "selection": "top_p",
        "keep_mass": 0.98,
        "longest_prefix": True,
        "min_similarity": 0.6,
        "block_q": 128,
    },
    "linear": {**_TWO_CLASSES, "combine": "linear", "linear_scope": "all"},
    "linear_plus_sparse": {**_TWO_CLASSES, "combine": "sum", "linear_scope": "all"},
    "vmoba_block": {"pool_queries": True},
}

#: What a preset is, where its class's own words would mislead.
SUMMARIES: dict[str, str] = {
    "sla1": "SLA's released branch SLA-1: two classes, the linear branch over the complement.",
    "sla_main": "SLA's released main branch: two classes, the linear branch over every block.",
    "sparse": "Block-sparse attention alone, on the top-k blocks of each row.",
    "top_p": "Block-sparse attention on the fewest blocks with a share of the pooled softmax.",
    "hybrid": "SpargeAttention2's selection, top-k or top-p; the sparse branch alone.",
    "sparge": "SpargeAttn's selection: top-p among blocks whose rows are alike, all others kept; "
    "the sparse branch alone.",
    "linear": "Linear attention over every key, and nothing else.",
    "linear_plus_sparse": "Block-sparse plus linear attention over every key; no projection.",
    "vmoba_block": "VMoBA by blocks, an approximation: whole query blocks choose their chunks.",
}

#: Every class of methods by its own name.
CLASSES: dict[str, type[Method]] = {
    cls.name: cls for cls in (Dense, SLA, SLA2, DynSparse, BLASST, VSA, VMoBA)
}

#: Every method and preset by the name that configs and the command line use: its class.
METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "sla": SLA,
    "sla1": SLA,
    "sla_main": SLA,
    "sla2": SLA2,
    "dynsparse": DynSparse,
    "blasst": BLASST,
    "sparse": SLA,
    "top_p": SLA,
    "hybrid": SLA,
    "sparge": SLA,
    "vsa": VSA,
    "vmoba": VMoBA,
    "vmoba_block": VMoBA,
    "linear": SLA,
    "linear_plus_sparse": SLA,
}


def summary(name: str) -> str:
    """What the method called ``name`` is, in a sentence."""
    text = SUMMARIES.get(name) or inspect.cleandoc(METHODS[name].__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def method(name: str, **options: Any) -> Method:
    """The method called ``name`` in ``METHODS`` with the given options: ``method("sla",
    keep_ratio=0.1)``.
    """
    if name not in METHODS:
        raise ValueError(
            f"method: name must be one of {', '.join(METHODS)}, got {name!r}. Pick one of these."
        )
    cls = METHODS[name]
    known = options_of(cls)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"method: {name} has no option {', '.join(unknown)}. Its options are "
            f"{', '.join(sorted(known))}."
        )
    if issubclass(cls, _InLoop) and "log_threshold" not in options:
        raise ValueError(
            f"method: {name} needs log_threshold, a negative number; no value suits every model. "
            "Try -6, or find one with sparline.calibration."
        )
    return cls(**{**_PRESETS.get(name, {}), **options})


def from_dict(data: Mapping[str, Any]) -> Method:
    """The method whose ``to_dict()`` is ``data``."""
    name = data.get("name")
    if name not in CLASSES:
        raise ValueError(
            f"methods.from_dict: name must be one of {', '.join(CLASSES)}, got {name!r}. Pass "
            "what to_dict() returned."
        )
    return CLASSES[name].from_dict(data)
