"""From which model, and on which machine, a result was made."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRecord:
    """The dense model of a run.

    Attributes:
        name: As the user gave it: a folder, or a name on the Hub.
        revision: Commit of the Hub's repository; empty for another folder.
        model_type: As in its config.json.
        parameters: Number of elements in all tensors.
        bytes: Size of all tensors when dense; 0 if that is not known.
    """

    name: str
    revision: str
    model_type: str
    parameters: int
    bytes: int = 0


@dataclass(frozen=True)
class MachineRecord:
    """The machine of a run.

    Attributes:
        cpu: Name of the processor, as the machine reports it.
        cores: Number of its logical cores.
        memory: Bytes of its memory.
        device: Device that computed; the GPU's name where it was one.
        threads: Number of torch's threads.
    """

    cpu: str
    cores: int
    memory: int
    device: str
    threads: int
