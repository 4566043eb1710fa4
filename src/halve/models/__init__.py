"""Build, name and call any causal language model of transformers.

No forward code of a model is written here: blocks, names and calls are found in the
model itself.
"""

from halve.models.cache_width import cache_width
from halve.models.capture import (
    BlockCall,
    CapturedCalls,
    capture_calls,
    run_tail,
    sample_axis,
)
from halve.models.config_tensors import expected_tensors
from halve.models.experts import (
    ExpertLayer,
    ExpertLayers,
    Experts,
    experts_in,
    unfused,
)
from halve.models.fewer_experts import FewerExperts, plan_fewer_experts
from halve.models.matrices import Matrix, is_plain, prunable_matrices
from halve.models.meta_model import (
    MetaModel,
    build_meta_model,
    load_config,
    longest_sequence,
)
from halve.models.names import (
    Place,
    StoredTensor,
    TensorMap,
    match_experts,
    match_names,
)
from halve.models.renaming import key_renamer, merges_experts, unmerged_renamer

__all__ = [
    "BlockCall",
    "CapturedCalls",
    "ExpertLayer",
    "ExpertLayers",
    "Experts",
    "FewerExperts",
    "Matrix",
    "MetaModel",
    "Place",
    "StoredTensor",
    "TensorMap",
    "build_meta_model",
    "cache_width",
    "capture_calls",
    "expected_tensors",
    "experts_in",
    "is_plain",
    "key_renamer",
    "load_config",
    "longest_sequence",
    "match_experts",
    "match_names",
    "merges_experts",
    "plan_fewer_experts",
    "prunable_matrices",
    "run_tail",
    "sample_axis",
    "unfused",
    "unmerged_renamer",
]
