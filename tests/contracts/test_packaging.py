"""What surrounds the package: wheels, releases, workflows, versions written twice."""

import re
import runpy
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
WHEEL = runpy.run_path(str(REPOSITORY / "tools/check_wheel.py"))
LIBRARY = "halve/libhalve_kernels.so"
LICENSE = "halve-1.dist-info/licenses/LICENSE"


@pytest.mark.parametrize(
    ("tag", "without", "beside", "fault"),
    [
        ("py3-none-manylinux_2_28_x86_64", (), (), ""),
        ("py3-none-any", (), (), "its tag is py3-none-any"),
        ("cp311-cp311-linux_x86_64", (), (), "its tag is cp311"),
        ("py3-none-linux_x86_64", ("halve/py.typed",), (), "py.typed is missing"),
        (
            "py3-none-linux_x86_64",
            ("halve/data/pycode-opt/model.safetensors",),
            (),
            "model.safetensors is missing",
        ),
        (
            "py3-none-linux_x86_64",
            ("halve/reporting/templates/page.html.j2",),
            (),
            "page.html.j2 is missing",
        ),
        ("py3-none-linux_x86_64", (LIBRARY,), (), "library is missing"),
        ("py3-none-linux_x86_64", (LICENSE,), (), "licence is missing"),
        (
            "py3-none-linux_x86_64",
            (),
            ("halve.libs/libgomp-1.so",),
            "libgomp-1.so does not belong",
        ),
        ("py3-none-linux_x86_64", (), ("tests/conftest.py",), "does not belong"),
    ],
)
def test_a_wheel_that_lacks_or_has_too_much_is_refused(
    tag, without, beside, fault, tmp_path
):
    wheel = tmp_path / f"halve-1-{tag}.whl"
    names = {*WHEEL["sources"](), LIBRARY, LICENSE, *beside} - set(without)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    found = WHEEL["faults"](wheel)
    assert len(found) == bool(fault)
    assert fault in "".join(found)


def test_versions_that_are_written_twice_agree():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))[
        "project"
    ]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text("utf-8"))
    pinned = (REPOSITORY / "constraints.txt").read_text("utf-8")
    assert f"\nruff=={hooks['repos'][0]['rev'].removeprefix('v')}\n" in pinned


def test_a_release_without_an_address_or_a_version_is_refused():
    tool = runpy.run_path(str(REPOSITORY / "tools/check_release.py"))
    found = "\n".join(tool["faults"]("v9.9.9"))
    assert "The tag is v9.9.9" in found
    assert "is the version of no release" in found


def test_workflows_run_targets_and_files_that_exist():
    targets = (REPOSITORY / "Makefile").read_text("utf-8")
    for path in (REPOSITORY / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
        steps = [step for job in jobs.values() for step in job.get("steps", ())]
        commands = "\n".join(step.get("run", "") for step in steps)
        for target in re.findall(r"make ([\w-]+)", commands):
            assert f"\n{target}: " in targets or f"\n{target}:\n" in targets, target
        for file in re.findall(r"(?:tools|examples|tests)/[\w/]+\.py", commands):
            assert (REPOSITORY / file).is_file(), file
