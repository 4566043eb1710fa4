"""The model that is left when each block keeps some of its experts.

Which tensors have a dimension of experts is read off the model itself: it is built from
its config with all experts and with those that are kept, and where shapes differ, that
is the dimension. So routers, their biases and corrections need no code for any family.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.errors import PatternError, UnsupportedModelError
from halve.models.experts import ExpertLayers
from halve.models.meta_model import MetaModel, build_meta_model
from halve.untrusted import read_json

# Names under which configs give the number of experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Names under which they give the number of groups of experts, and of those in which a
# token's experts lie (DeepSeek-V3).
_GROUPS, _TOP_GROUPS = "n_group", "topk_group"
# A router of groups adds the scores of the two best experts of each.
_LEAST_IN_GROUP = 2
# Blocks past the last that predict further tokens. transformers does not run them, and
# their experts, which are not scored, would contradict the config.
_FURTHER_BLOCKS = "num_nextn_predict_layers"
# Far below the distance of two fractions of experts: 0.07 * 100 is 7.000000000000001.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class FewerExperts:
    """A model with fewer experts, before it is known which.

    Attributes:
        meta_model: The model with so many experts.
        total: Number of experts of each module of experts before.
        kept: Number that each keeps.
        groups: Number of groups into which the router divides experts; 1 for none.
        modules: Paths of the modules of experts in the model.
        dimensions: Parameter or buffer, of those outside the experts -> its dimension
            of experts.
        changes: Entries of config.json -> new values.
    """

    meta_model: MetaModel
    total: int
    kept: int
    groups: int
    modules: tuple[str, ...]
    dimensions: dict[str, int]
    changes: dict[str, int]

    def module_of(self, name: str) -> str:
        """Return the module of experts that a parameter beside one belongs to."""
        parts = name.split(".")

        def shared(path: str) -> int:
            pairs = zip(path.split("."), parts, strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

        return max(self.modules, key=shared)


def plan_fewer_experts(
    folder: Path,
    meta_model: MetaModel,
    experts: Mapping[str, ExpertLayers],
    fraction: float,
    trust_remote_code: bool = False,
) -> FewerExperts:
    """Build a model that keeps a fraction of the experts of each block.

    Args:
        folder: Where config.json is.
        meta_model: The model with all experts.
        experts: Path of each module of experts in the model -> its layers.
        fraction: In (0, 1). Rounded up to whole experts.
        trust_remote_code: Allow Python code that comes with the model to run.

    Raises:
        UnsupportedModelError: There are no experts; or their number is not one entry of
            the config; or tensors depend on it in a way that is not known.
        PatternError: So few cannot be routed to, or it would be all.
    """
    total = _number_of_experts(meta_model, experts)
    kept = ceil(total * fraction - _ROUNDING)
    groups = _check_routable(meta_model, total, kept)
    _refuse_tables(meta_model, experts)
    changes = _changes(folder, meta_model, total, kept)
    fewer = build_meta_model(folder, trust_remote_code, changes)
    dimensions = dict(_dimensions(meta_model, fewer, (total, kept), experts))
    return FewerExperts(fewer, total, kept, groups, tuple(experts), dimensions, changes)


def _number_of_experts(
    meta_model: MetaModel, experts: Mapping[str, ExpertLayers]
) -> int:
    counts = {layers.count for layers in experts.values()}
    if not counts:
        raise UnsupportedModelError(
            f"{type(meta_model.model).__name__} has no experts to drop: none of its "
            "modules is decorated by use_experts_implementation of transformers.",
            "Omit experts (--experts), or use a mixture of experts.",
        )
    if len(counts) > 1:
        raise UnsupportedModelError(
            f"Blocks of {type(meta_model.model).__name__} have different numbers of "
            f"experts ({', '.join(map(str, sorted(counts)))}), which no single entry "
            "of its config can say.",
            "Omit experts (--experts).",
        )
    return counts.pop()


def _check_routable(meta_model: MetaModel, total: int, kept: int) -> int:
    """Return the number of groups; raise if a router could not choose among so few."""
    if kept == total:
        raise PatternError(
            f"That fraction of {total} experts is all of them.",
            f"Ask for less, such as {100 * (total - 1) // total}% (--experts), or omit "
            "experts.",
        )
    text, top_k = meta_model.config.get_text_config(), meta_model.experts_per_token
    if top_k is None:
        raise UnsupportedModelError(
            "The config does not say how many experts a token gets, under any name "
            "that Halve knows, such as num_experts_per_tok.",
            "Open an issue that names the model.",
        )
    groups = getattr(text, _GROUPS, None) or 1
    routed = min(getattr(text, _TOP_GROUPS, None) or 1, groups) if groups > 1 else 1
    each = kept // groups
    fits = kept % groups == 0 and (groups == 1 or each >= _LEAST_IN_GROUP)
    if not fits or routed * each < top_k:
        least = max(-(-top_k // routed), _LEAST_IN_GROUP if groups > 1 else 1) * groups
        in_groups = f" in {groups} groups of equal size" if groups > 1 else ""
        raise PatternError(
            f"{kept} of {total} experts would be kept, but a router that sends each "
            f"token to {top_k} of them{in_groups} needs {least} at least"
            + (f", and a multiple of {groups}." if groups > 1 else "."),
            "Set experts to such a fraction, as "
            f"{_percent(max(least, -(-kept // groups) * groups), total)} (--experts).",
        )
    return groups


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.6g}%"


def _refuse_tables(meta_model: MetaModel, experts: Mapping[str, ExpertLayers]) -> None:
    """Refuse a router with a table of the experts of each token (DeepSeek-V4)."""
    homes = {path.rpartition(".")[0] for path in experts}
    for name, value in meta_model.model.state_dict().items():
        beside = any(name.startswith(f"{home}.") for home in homes)
        if beside and not value.is_floating_point():
            raise UnsupportedModelError(
                f"{name} ({value.dtype}, {list(value.shape)}) lies beside experts and "
                "is not of floating point: a table that routes tokens to experts by "
                "their numbers, which leaves no choice of experts.",
                "Omit experts (--experts).",
            )


def _changes(
    folder: Path, meta_model: MetaModel, total: int, kept: int
) -> dict[str, int]:
    """Return the entries of config.json to change, with their new values."""
    entries = read_json(folder / "config.json", folder)
    text = meta_model.config.get_text_config()
    own = entries.get("text_config")
    stands = {**entries, **(own if isinstance(own, dict) else {})}
    names = [name for name in _COUNTS if stands.get(name) == total]
    # The class's own name, where config.json leaves it to the default.
    aliases = getattr(text, "attribute_map", {})
    names = names or [
        name
        for name in _COUNTS
        if name not in aliases and getattr(text, name, None) == total
    ]
    if not names:
        raise UnsupportedModelError(
            f"No entry of the config says that there are {total} experts: Halve looked "
            f"for {', '.join(_COUNTS)}.",
            "Open an issue that names the model.",
        )
    further = {_FURTHER_BLOCKS: 0} if stands.get(_FURTHER_BLOCKS) else {}
    return dict.fromkeys(names, kept) | further


def _dimensions(
    full: MetaModel,
    fewer: MetaModel,
    counts: tuple[int, int],
    experts: Mapping[str, ExpertLayers],
) -> Iterator[tuple[str, int]]:
    """Yield what has a dimension of experts, outside the modules of experts.

    Args:
        full: The model with all experts.
        fewer: The model with those that are kept.
        counts: Their numbers.
        experts: The modules of experts, whose parameters are left out.

    Raises:
        UnsupportedModelError: Shapes differ in another way.
    """
    before: dict[str, Any] = full.model.state_dict()
    after: dict[str, Any] = fewer.model.state_dict()
    if before.keys() != after.keys():
        name = min(before.keys() ^ after.keys())
        raise _depends(name, "exists with one number of experts only")
    for name, tensor in before.items():
        owner = name.rpartition(".")[0]
        dimension = _dimension(name, (tensor, after[name]), counts)
        if owner in experts:
            if dimension != 0:
                raise _depends(name, "does not have as many slices as the config says")
        elif dimension is not None:
            yield name, dimension


def _dimension(
    name: str, tensors: tuple[Tensor, Tensor], counts: tuple[int, int]
) -> int | None:
    """Return the dimension in which two tensors differ; None where they do not."""
    before, after = (tensor.shape for tensor in tensors)
    pairs = list(zip(before, after, strict=False))
    differing = [index for index, (a, b) in enumerate(pairs) if a != b]
    if len(before) == len(after) and not differing:
        return None
    known = len(before) == len(after) and len(differing) == 1
    if not known or pairs[differing[0]] != counts:
        raise _depends(
            name,
            f"is {list(before)} with {counts[0]} experts, and "
            f"{list(after)} with {counts[1]}",
        )
    return differing[0]


def _depends(name: str, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The shape of {name} does not follow from the number of experts as Halve "
        f"expects, by one dimension: it {how}.",
        "Omit experts (--experts), and open an issue that names the model.",
    )
