"""Facts of made-up outputs, for tests of reports: a row here is a case."""

from dataclasses import asdict, replace

from halve.records import (
    AllocationRecord,
    BenchRecord,
    BlockRecord,
    ComparisonRecord,
    ContinuationRecord,
    GeneratedToken,
    MachineRecord,
    MatrixRecord,
    MatrixStorage,
    ModelRecord,
    PackRecord,
    PassageToken,
    PerplexityRecord,
    PruneRecord,
    SamplesRecord,
    SpeedRecord,
    TaskScore,
    TasksRecord,
    TrialRecord,
)
from halve.records.measurement import Measurement, kind_of
from halve.reporting import Facts
from halve.reporting.facts import Parts, Sizes

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MACHINE = MachineRecord("A Processor", 8, 2**35, "cpu", 4)
VERSIONS = {"halve": "0.2.0", "torch": "2.13.0", "transformers": "5.23.0"}
FINISHED = "2026-11-28T01:02:03+00:00"
# Right-to-left, four bytes in UTF-8, an override of direction, a control character.
LETTERS = "\u05d0\u05d1 \U0001f600 \u202e \x07"
HOSTILE = '<script>alert("1")</script>&amp;`|' + LETTERS


def matrix(tensor: str, seed: int) -> MatrixRecord:
    """Return a matrix whose numbers differ with the seed."""
    return MatrixRecord(
        tensor,
        rows=64 + 2 * seed % 32,
        columns=96,
        sparsity=0.5 + seed % 7 / 512,
        error=0.004 + seed % 13 / 1024,
        solver="admm",
        held_out=0.006 + seed % 11 / 1024,
        runner_up=0.021 + seed % 5 / 1024,
        pattern="50%",
    )


def block(index: int, names=LLAMA) -> BlockRecord:
    """Return a block with matrices of these names."""
    path = f"model.layers.{index}"
    return BlockRecord(
        path,
        tuple(
            matrix(f"{path}.mlp.{name}.weight", 7 * index + place)
            for place, name in enumerate(names)
        ),
        error=0.01 * (index + 1),
        seconds=3.25,
    )


def pruned(blocks=2, names=LLAMA, **fields) -> PruneRecord:
    """Return the record of a run."""
    identity = {
        "sparsity": "50%",
        "solver": "auto",
        "calibration": "wikitext2",
        "samples": 128,
        "seq_len": 512,
        "seed": 7,
        "calibration_sha256": "ab" * 32,
        "packed": False,
    }
    made = PruneRecord(
        versions=VERSIONS,
        identity=identity,
        blocks=tuple(block(index, names) for index in range(blocks)),
        shards={"model.safetensors": "cd" * 32},
        left_dense=(),
        seconds=20.5,
        finished=FINISHED,
        model=ModelRecord("owner/dense", "0123abcd", "llama", 123_456, 246_912),
        machine=MACHINE,
        bytes_peak=3 * 2**28,
        bytes_foreseen=2**30,
    )
    return replace(made, **fields)


def perplexity(value: float, losses: tuple[float, ...]) -> PerplexityRecord:
    """Return an evaluation."""
    return PerplexityRecord(value, 0.25, 1530, 512, 3, "wikitext2", 4.5, losses=losses)


COMPARISON = ComparisonRecord(
    model=perplexity(29.125, (3.31, 3.4, 3.42)),
    reference=perplexity(27.625, (3.27, 3.33, 3.36)),
    kl_mean=0.0525,
    kl_median=0.03125,
    kl_99=0.4375,
    agreement=0.9125,
    kl_max=3.75,
    kl_error=0.0015,
    agreement_error=0.0055,
    kl_quantiles={"50": 0.03125, "99": 0.4375, "99.9": 1.625, "100": 3.75},
    kl_histogram=(4, *[0] * 20, *range(1, 18), 40, *range(9, 0, -1), 0),
)
SAMPLES = SamplesRecord(
    data="wikitext2",
    passage=(
        PassageToken(5, "The"),
        PassageToken(6, " road\n", 0.0425, " way", " road", False),
        PassageToken(7, " to", 1.75, " to", " to"),
    ),
    continuations=(
        ContinuationRecord(
            "The road",
            (GeneratedToken(1, " to"), GeneratedToken(2, " nowhere")),
            (GeneratedToken(1, " to"), GeneratedToken(3, " Rome")),
        ),
        ContinuationRecord(
            "A road", (GeneratedToken(1, "!"),), (GeneratedToken(1, "!"),)
        ),
    ),
)
BENCH = BenchRecord(
    model="half",
    parameters=123_456,
    sizes={"torch": 246_912, "halve packed": 150_000},
    cpu="A Processor",
    threads=4,
    kernel="avx2",
    bandwidth=2.25e10,
    results=tuple(
        SpeedRecord(backend, test, 1, 64, seconds, 2**20)
        for test in ("pp512", "tg64")
        for backend, seconds in (
            ("torch", (2.0, 2.5)),
            ("halve dense", (1.25, 1.5)),
            ("halve packed", (1.0, 1.125)),
        )
    ),
    footprints={},
)
TASKS = TasksRecord(
    model=(
        TaskScore("piqa", "acc_norm", 0.625, 0.0125, 0, "owner/piqa"),
        TaskScore("arc_easy", "acc", 0.5, 0.0225, 0, "allenai/ai2_arc"),
        TaskScore("lambada", "perplexity", 8.5, 0.5, higher_is_better=False),
        TaskScore("alone", "acc", 0.375),
    ),
    reference=(
        TaskScore("piqa", "acc_norm", 0.75, 0.0135),
        TaskScore("arc_easy", "acc", 0.625, 0.0215),
        TaskScore("lambada", "perplexity", 7.5, 0.25, higher_is_better=False),
    ),
)


def measured(result) -> Measurement:
    """Return a result as it is kept."""
    return Measurement(
        kind=kind_of(result),
        of="ef" * 32,
        reference="owner/dense",
        reference_sha256="",
        data_sha256="",
        record=asdict(result),
        versions=VERSIONS,
        machine=MACHINE,
        finished=FINISHED,
    )


def facts(record: PruneRecord | None, *results, **fields) -> Facts:
    """Return the facts of an output with such measurements."""
    prunable = 1
    if record is not None:
        prunable = sum(m.rows * m.columns for m in record.all_matrices)
    parts = Parts(4096, 2 * prunable, 512)
    made = Facts(
        name="half",
        record_sha256="ef" * 32,
        files=9,
        pruned=record,
        packed=None,
        sizes=Sizes(parts, parts, prunable),
        measurements=tuple(measured(result) for result in results),
    )
    return replace(made, **fields)


def packed(record: PruneRecord) -> PackRecord:
    """Return the record of packing such a model."""
    matrices = tuple(
        MatrixStorage(m.tensor, m.rows, m.columns, m.sparsity, 0, 2000, 1125, True)
        for m in record.all_matrices
    )
    shards = {"model.safetensors": "ab" * 32}
    source = asdict(record)
    return PackRecord("pack", VERSIONS, {}, matrices, shards, source, 1.5, FINISHED)


def hostile() -> Facts:
    """Return facts in which every name and text is an attack."""
    record = pruned(1, (HOSTILE, "q_proj"))
    token = PassageToken(1, HOSTILE, 1.5, HOSTILE, HOSTILE, False)
    text = (GeneratedToken(1, HOSTILE),)
    record = replace(
        record,
        identity=record.identity | {"calibration": HOSTILE, "solver": HOSTILE},
        versions={HOSTILE: HOSTILE},
        finished=HOSTILE,
        model=ModelRecord(HOSTILE, HOSTILE, HOSTILE, 1),
        machine=MachineRecord(HOSTILE, 1, 1, HOSTILE, 1),
        blocks=tuple(replace(b, name=HOSTILE) for b in record.blocks),
    )
    compared = replace(COMPARISON, model=replace(COMPARISON.model, data=HOSTILE))
    samples = SamplesRecord(HOSTILE, (token,), (ContinuationRecord(HOSTILE, text, ()),))
    speeds = tuple(
        replace(result, backend=HOSTILE, test=HOSTILE) for result in BENCH.results
    )
    bench = replace(BENCH, cpu=HOSTILE, kernel=HOSTILE, results=speeds)
    tasks = TasksRecord((TaskScore(HOSTILE, HOSTILE, 0.5, 0.1, 0, HOSTILE),))
    results = (compared, compared.model, samples, bench, tasks)
    return facts(record, *results, name=HOSTILE, license=HOSTILE)


def _allocated() -> PruneRecord:
    trials = (
        TrialRecord(0.0, (0.5, 0.5), 0.0625),
        TrialRecord(0.25, (0.45, 0.55), 0.0525),
    )
    record = pruned(2)
    refined = tuple(
        replace(b, refined=(0.0016, 0.0009), error=0.02) for b in record.blocks
    )
    chosen = AllocationRecord(0.25, (0.45, 0.55), (0.02, 0.03), trials)
    return replace(record, blocks=refined, allocation=chosen)


EVERYTHING = (COMPARISON, SAMPLES, BENCH, TASKS)
CASES = {
    "everything": facts(_allocated(), *EVERYTHING, license="apache-2.0"),
    "nothing measured": facts(pruned()),
    "no record of pruning": facts(None, packed=packed(pruned())),
    "packed": facts(
        pruned(),
        *EVERYTHING,
        packed=packed(pruned()),
        sizes=Sizes(Parts(40, 900, 7), Parts(40, 1600, 7), 800),
    ),
    "size not known": facts(pruned(), sizes=Sizes(Parts(40, 900, 7), None, 800)),
    "one block, one matrix": facts(pruned(1, ("fc1",)), COMPARISON),
    "96 x 7": facts(pruned(96), *EVERYTHING),
    "8 experts": facts(
        pruned(4, [f"experts.{e}.{n}" for e in range(8) for n in ("w1", "w2", "w3")])
    ),
    "no errors": facts(
        pruned(
            blocks=1,
            names=("fc1",),
        )
    ),
    "hostile": hostile(),
}
_BARE = CASES["no errors"].pruned
assert _BARE is not None
CASES["no errors"] = facts(
    replace(
        _BARE,
        blocks=tuple(
            replace(
                b,
                error=None,
                matrices=tuple(
                    replace(m, error=None, held_out=None, runner_up=None, solver="")
                    for m in b.matrices
                ),
            )
            for b in _BARE.blocks
        ),
    )
)
