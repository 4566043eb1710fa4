"""What a command reports or writes to `halve.json`, as plain values. No torch here.

One file for each command, and what they have in common: `codec` (JSON to dataclass),
`checksum`, `version` (the format of `halve.json`) and `provenance`.
"""

from halve.records.bench import BenchRecord, Footprint, SpeedRecord
from halve.records.evaluation import ComparisonRecord, PerplexityRecord
from halve.records.inspection import Inspection, MatrixInspection
from halve.records.origin import MachineRecord, ModelRecord
from halve.records.pack import MatrixStorage, PackRecord
from halve.records.parse import OutputRecord, parse_record, recorded_grids
from halve.records.progress import FinishedBlock, Progress
from halve.records.provenance import now, versions
from halve.records.prune import (
    AllocationRecord,
    BlockRecord,
    ExpertsRecord,
    KeptExpertsRecord,
    MatrixRecord,
    MixRecord,
    MixTrialRecord,
    PairRecord,
    PruneRecord,
    TrialRecord,
    ZerosRecord,
)
from halve.records.recover import RecoverRecord, StateRecord
from halve.records.samples import (
    ContinuationRecord,
    GeneratedToken,
    PassageToken,
    SamplesRecord,
)
from halve.records.tasks import TaskScore, TasksRecord
from halve.records.verification import Finding, Verification
from halve.records.version import RECORD_FORMAT

__all__ = [
    "RECORD_FORMAT",
    "AllocationRecord",
    "BenchRecord",
    "BlockRecord",
    "ComparisonRecord",
    "ContinuationRecord",
    "ExpertsRecord",
    "Finding",
    "FinishedBlock",
    "Footprint",
    "GeneratedToken",
    "Inspection",
    "KeptExpertsRecord",
    "MachineRecord",
    "MatrixInspection",
    "MatrixRecord",
    "MatrixStorage",
    "MixRecord",
    "MixTrialRecord",
    "ModelRecord",
    "OutputRecord",
    "PackRecord",
    "PairRecord",
    "PassageToken",
    "PerplexityRecord",
    "Progress",
    "PruneRecord",
    "RecoverRecord",
    "SamplesRecord",
    "SpeedRecord",
    "StateRecord",
    "TaskScore",
    "TasksRecord",
    "TrialRecord",
    "Verification",
    "ZerosRecord",
    "now",
    "parse_record",
    "recorded_grids",
    "versions",
]
