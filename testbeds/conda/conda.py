"""Stands in for the `conda` command where none can be installed: what Snakemake's `--sdm conda` calls, on py-rattler.

    conda --version | info --json | config --get channel_priority --json
    conda env create --quiet --no-default-packages --file FILE --prefix FOLDER
    conda clean -y --tarballs

Real are the parsing of environment files and match specs, the solve (strict channel priority), the linking, and the
pip step. Channels are folders: the first argument names the installation, and `conda-forge` in a file is `channels/
conda-forge` there (see channel.py); what it does not hold cannot be had.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rattler import Channel, ChannelConfig, Gateway, MatchSpec, Subdir, VirtualPackage, install, solve

VERSION = "24.7.1"
"""The least that Snakemake takes."""
KEYS = {"name", "channels", "dependencies"}


def main(installation: Path, arguments: list[str]) -> None:
    """Answer one command; any that Snakemake does not call is an error."""
    if arguments == ["--version"]:
        print(f"conda {VERSION}")
    elif arguments == ["info", "--json"]:
        print(json.dumps({"conda_prefix": str(installation), "platform": str(Subdir.current())}))
    elif arguments == ["config", "--get", "channel_priority", "--json"]:
        print(json.dumps({"get": {"channel_priority": "strict"}}))
    elif arguments[:2] == ["env", "create"]:
        parser = argparse.ArgumentParser("conda env create")
        parser.add_argument("--quiet", action="store_true")
        parser.add_argument("--no-default-packages", action="store_true")
        parser.add_argument("--file", type=Path, required=True)
        parser.add_argument("--prefix", type=Path, required=True)
        options = parser.parse_args(arguments[2:])
        create(options.file, options.prefix.absolute(), ChannelConfig(f"{(installation / 'channels').as_uri()}/"))
    elif arguments == ["clean", "-y", "--tarballs"]:
        pass  # no package is kept
    else:
        sys.exit(f"conda (stand-in): unknown command {' '.join(arguments)}")


def create(file: Path, prefix: Path, config: ChannelConfig) -> None:
    """Create the environment that a file describes: packages of its channels, then those of its `pip:` list."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if unknown := set(content) - KEYS:
        sys.exit(f"{file}: unknown keys {sorted(unknown)}")
    specs = [MatchSpec(entry, strict=True) for entry in content["dependencies"] if isinstance(entry, str)]
    others: list[dict[str, Any]] = [entry for entry in content["dependencies"] if not isinstance(entry, str)]
    # "nodefaults" is no channel, but says that none is to be added.
    channels = [Channel(name, config) for name in content["channels"] if name != "nodefaults"]
    asyncio.run(link(channels, specs, prefix))
    for entry in others:
        if set(entry) != {"pip"}:
            sys.exit(f"{file}: unknown dependency {entry}")
        pip_install(entry["pip"], prefix)


async def link(channels: list[Channel], specs: list[MatchSpec], prefix: Path) -> None:
    """Solve and link; packages are unpacked anew each time, so that a changed channel is never taken from a cache."""
    records = await solve(
        channels,
        specs,
        gateway=Gateway(),
        platforms=[Subdir.current(), Subdir("noarch")],
        virtual_packages=VirtualPackage.detect(),
    )
    with tempfile.TemporaryDirectory() as cache:
        await install(records, prefix, cache_dir=Path(cache), show_progress=False)


def pip_install(requirements: list[str], prefix: Path) -> None:
    """As conda does it: the list as a requirements file, with the environment's own pip."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements))
        file.flush()
        pip = [str(prefix / "bin/python"), "-m", "pip", "install", "--quiet", "-U", "--exists-action", "b"]
        subprocess.run([*pip, "-r", file.name], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
