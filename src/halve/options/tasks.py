"""Options of tasks of lm-evaluation-harness, named as there."""

from dataclasses import dataclass
from typing import Annotated, TypedDict

from halve.option import TASKS, Option, Options, check_ranges, documented


@documented
@dataclass(frozen=True)
class TaskOptions(Options):
    """Options of tasks of lm-evaluation-harness."""

    num_fewshot: Annotated[
        int | None,
        Option(
            "Number of examples in the prompt of each question.",
            TASKS,
            unset="as each task says",
            minimum=0,
            details="Tasks that say 0 themselves stay without.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        Option(
            "Maximum number of questions of each task, to try it out.",
            TASKS,
            unset="all",
            minimum=1,
            details="Such a score is not that of the task, and cannot be kept.",
        ),
    ] = None
    include_path: Annotated[
        str | None,
        Option(
            "Folder with further tasks, in YAML files.",
            TASKS,
            metavar="FOLDER",
            details="Such a file can name Python code, which then runs.",
        ),
    ] = None
    batch_size: Annotated[
        int,
        Option("Number of sequences that run at once.", TASKS, minimum=1),
    ] = 1

    def check(self) -> None:
        """Raise HalveError on the first option that is invalid."""
        check_ranges(self)


class TaskKeywords(TypedDict, total=False):
    """The fields of `TaskOptions` as keywords."""

    num_fewshot: int | None
    limit: int | None
    include_path: str | None
    batch_size: int
