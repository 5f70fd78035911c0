"""How much does an app have to ship? Real environments, each made anew, and what pip put into them. One JSON line.

Sizes are those of the files in site-packages, without pip and setuptools, in MB (1e6 bytes). Nothing is timed.

Run: python -m benchmarks.installed_size --torch torch==2.13.0+cpu
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.timing import answer, parser

ROOT = Path(__file__).parent.parent
# What pip and venv bring themselves.
_TOOLS = ("pip", "setuptools", "wheel", "_distutils_hack", "distutils-precedence.pth", "pkg_resources")


def measure_environment(folder, packages):
    """Size of a fresh environment with `packages`, by what is in it."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile", *packages]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    home = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    sizes = {}
    for entry in home.iterdir():
        if not entry.name.startswith(_TOOLS):
            files = [entry] if entry.is_file() else entry.rglob("*")
            sizes[entry.name] = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:6])
    return {"mb": round(sum(sizes.values()), 1), "largest": {k: round(v, 1) for k, v in largest.items()}}


def copy_commit(folder):
    """The project as it is committed: what lies about in a checkout, such as compiled files, might come along."""
    packed = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder)
    return folder


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument(
        "--torch", default="torch", help="what pip installs for torch; its CPU build is far smaller"
    )
    options.add_argument("--project", help="folder or wheel of piflow-edge; else this checkout's commit")
    options.add_argument("--only", nargs="+", help="names of the environments to make, of those below")
    options = options.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        project = options.project or copy_commit(Path(folder) / "project")
        environments = {
            "piflow-edge": [str(project)],
            "piflow-edge[cpu]": [f"{project}[cpu]"],
            "torch": [options.torch, "numpy", "pillow"],
            "torch + diffusers": [
                options.torch,
                "numpy",
                "pillow",
                "diffusers",
                "transformers",
                "accelerate",
            ],
        }
        wanted, sizes = options.only or list(environments), {}
        for name in wanted:
            print(f"making the environment {name}", file=sys.stderr)
            sizes[name] = measure_environment(Path(folder) / name.replace(" ", ""), environments[name])
    small, large = sizes.get("piflow-edge[cpu]"), sizes.get("torch")
    ratio = {"torch / piflow-edge[cpu]": large["mb"] / small["mb"]} if small and large else {}
    answer(options, {"torch": options.torch, "sizes": sizes, **ratio})


if __name__ == "__main__":
    main()
