"""Runs PEFT's own tests on S2FT: `make test-peft`, or `python tests/peft_suite/run.py [pytest options]`.

The tests come from the source distribution of the installed PEFT and stay outside the repository (build/peft-suite).
`plugin.py` adds S2FT to the lists of methods that they are parametrised over; `hub.py` stands in for the Hub. A first run
needs a package index, later ones nothing.
"""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "peft-suite"
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_low_level_api.py",
    "test_other.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_torch_compile.py",
)


def main() -> int:
    suite = fetch_tests()
    environment = {
        **os.environ,
        "HF_HOME": str(BUILD / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # else PEFT skips its tests of torch.compile
        "PYTHONPATH": os.pathsep.join([str(HERE), str(suite)]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run(
        [sys.executable, "-c", "import hub, os, pathlib; hub.fill(pathlib.Path(os.environ['HF_HOME']) / 'hub')"],
        env=environment,
        check=True,
    )
    options = sys.argv[1:] or ["-q", "-n", "2", "-rfEs", "-p", "no:warnings", "--tb=short"]
    files = [] if any(option.startswith("tests/") for option in options) else [f"tests/{name}" for name in FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir",
        str(suite),
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "-k",
        "S2FT",
    ]
    return subprocess.run([*command, *files, *options], cwd=suite, env=environment, check=False).returncode


def fetch_tests() -> Path:
    """The folder that holds `tests/` of the installed PEFT's source distribution; fetched once."""
    name = f"peft-{version('peft')}"
    suite = BUILD / name
    if not (suite / "tests" / "__init__.py").exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
        ]
        subprocess.run([*pip, "--dest", str(BUILD), name.replace("-", "==")], check=True)
        with tarfile.open(BUILD / f"{name}.tar.gz") as archive:
            members = [member for member in archive.getmembers() if member.name.startswith(f"{name}/tests/")]
            archive.extractall(BUILD, members, filter="data")
        (
            suite / "tests" / "__init__.py"
        ).touch()  # its files import one another relatively; the archive leaves this one out
    return suite


if __name__ == "__main__":
    sys.exit(main())
