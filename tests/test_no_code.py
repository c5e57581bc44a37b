"""Data stay data: no module loads what can hold code, and hostile files of each kind do nothing."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import runpy
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from test_bad_input import packed as packed  # a fixture

from gmp_atl import config_files, model_files
from gmp_atl.corpora import read_corpus
from gmp_atl.errors import UserError
from gmp_atl.formats import EXCLUDED
from gmp_atl.stages.archive import MANIFEST, restore
from gmp_atl.stages.pretrained import pretrained

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").glob("*.py")])
LOADERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "code", "runpy", "tarfile"}
"""Modules that are not imported."""
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load", "pd.read_pickle", "pa.deserialize"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen"),
    *("AutoModel.from_pretrained", "faiss.read_index", "ctypes.CDLL"),
}
METHODS = {"extractall", "extract", "unpack_archive", "set_default_tensor_type"}
REVIEWED = {
    ("stages/pretrained.py", "import pickle"): "the class of an error alone; nothing is unpickled",
    ("stages/pretrained.py", "torch.load"): "weights_only=True, and only a file whose SHA-256 the config pins",
    ("config_files.py", "yaml.compose"): "SafeLoader, and only to a tree of nodes: nothing is constructed",
    ("corpora/synthetic.py", "ctypes.CDLL"): "eSpeak NG, a locked package's library, for the demo's corpus",
    ("doctor.py", "yaml.safe_load"): "a user's config, which config_files.check has gone through before",
    ("tools/config_reference.py", "yaml.safe_load"): "our own config.yaml",
}
"""What of it is there: file and use, and why it may."""


def name_of(node: ast.expr) -> str:
    """`a.b.c` of an attribute, `?.c` where it hangs on a call."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def uses(tree: ast.Module) -> Iterator[str]:
    """Everything in a module that loads or runs code, or might."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {each.name}" for each in node.names if each.name.split(".")[0] in LOADERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LOADERS:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            options = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
            if name in CALLS or name.rpartition(".")[2] in METHODS or name.startswith("yaml."):
                yield name
            yield from (f"{key}=True" for key in ("shell", "trust_remote_code", "allow_pickle") if options.get(key))
            if name == "torch.load" and options.get("weights_only") is not True:
                yield "torch.load without weights_only=True"


def test_no_module_loads_or_runs_code_beyond_what_was_reviewed() -> None:
    found = set()
    for path in MODULES:
        place = path.relative_to(ROOT).as_posix().removeprefix("src/gmp_atl/")
        found |= {(place, use) for use in uses(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == set(REVIEWED)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import joblib.numpy_pickle",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "zipfile.ZipFile(path).extractall(folder)",
        "shutil.unpack_archive(path)",
        "os.system(text)",
    ],
)
def test_that_test_notices(line: str) -> None:
    assert set(uses(ast.parse(line))) - {use for _, use in REVIEWED if use != "import pickle"}


def test_rules_call_the_package_alone() -> None:
    """No rule has a script, a notebook or a wrapper fetched from elsewhere; options that are text are quoted."""
    rules = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
    assert rules
    for path in rules:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^ +(script|notebook|wrapper|run|template_engine):|\b(eval|exec)\(", text, re.MULTILINE)
        for option in ("params.config", "params.root", "params.audio_root"):
            assert f"{{{option}}}" not in text, f"{path.name}: {option} is not quoted for the shell"


# Hostile files. Each would make a folder if it were run.


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hostile_weights(kind: str, target: Path, mark: Path) -> None:
    if kind == "pickle":
        target.write_bytes(pickle.dumps({"weight": Code(mark)}))
    else:
        torch.save({"weight": Code(mark)}, target, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_weights_that_hold_code_are_not_run_even_if_they_are_pinned(stages, tmp_path: Path, kind: str) -> None:
    folder, mark = tmp_path / "hub", tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((stages.inputs.encoder / "config.json").read_bytes())
    hostile_weights(kind, folder / "pytorch_model.bin", mark)
    pin = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    settings = {"encoder.source": "directory", "encoder.path": str(folder)}
    for more in ({}, {"encoder.sha256": pin}):
        with pytest.raises(UserError, match=r"pytorch_model\.bin"):
            pretrained(config=stages.config("pretrained", settings | more), output=tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_pickle_under_the_name_of_safetensors_is_not_run(tmp_path: Path, kind: str) -> None:
    hostile_weights(kind, tmp_path / "model.safetensors", tmp_path / "run")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        model_files.load_tensors(tmp_path / "model.safetensors")
    assert not (tmp_path / "run").exists()


def test_yaml_that_constructs_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path / 'run'}]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml:1: python/object/apply:os\.mkdir"):
        config_files.check(path)
    with pytest.raises(yaml.YAMLError):
        yaml.load(path.read_text(), Loader=yaml.FullLoader)  # Snakemake's, which comes first
    assert not (tmp_path / "run").exists()


def with_types(table: pa.Table, path: Path, mark: Path) -> Path:
    """A Parquet file whose types and index are those of a class that a pickle names."""
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Code(mark)),
    }
    fields = [field.with_metadata(extension) for field in table.schema]
    index = {"kind": "range", "name": None, "start": 0, "stop": 10**12, "step": 1}
    columns = [
        {"name": name, "field_name": name, "pandas_type": "object", "numpy_type": "x" * 99, "metadata": None}
        for name in table.column_names
    ]
    pandas = json.dumps({"index_columns": [index], "column_indexes": [], "columns": columns})
    schema = pa.schema(fields, metadata={b"pandas": pandas.encode()})
    pq.write_table(pa.table(table.columns, schema=schema), path)
    return path


def test_parquet_that_names_a_class_of_its_own_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    rows = pa.table({"path": ["a.wav"], "speaker": ["s"], "gender": ["f"], "emotion": ["sad"]})
    path = with_types(rows, tmp_path / "own.parquet", mark)
    assert read_corpus("manifest", path, ["sad", "happy"]).excluded == {"a": "label without audio"}
    path = with_types(
        pa.table({"id": ["u"], "reason": ["r"]}, schema=EXCLUDED.schema), tmp_path / "excluded.parquet", mark
    )
    with pytest.raises(UserError, match="unknown format"):
        EXCLUDED.read(path)
    assert not mark.exists()


def altered(packed: Path, path: Path, entry: zipfile.ZipInfo, data: bytes, *, listed: bool = True) -> Path:
    """The archive with one entry more, listed in its manifest as if it belonged there."""
    with zipfile.ZipFile(packed) as file:
        files = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(files.pop(MANIFEST))
    manifest["files"][entry.filename] = hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(MANIFEST, json.dumps(manifest))
        for name, content in files.items():
            file.writestr(name, content)
        file.writestr(entry, data)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "/x.json",
        "a/../../x.json",
        "a//x.json",
        "./x.json",
        "corpus.parquet/x.json",
        "a\\..\\x.json",
        "C:x.sh",
    ],
)
def test_an_archive_cannot_write_outside_its_folder(packed: Path, tmp_path: Path, name: str) -> None:
    path = altered(packed, tmp_path / "hostile.zip", zipfile.ZipInfo(name), b"{}")
    with pytest.raises(UserError, match=r"hostile\.zip.*not to be trusted"):
        restore(path, tmp_path / "restored")
    assert [each.name for each in tmp_path.iterdir()] == ["hostile.zip"]


def test_a_link_in_an_archive_becomes_a_plain_file(packed: Path, tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("link.json")
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    restore(altered(packed, tmp_path / "hostile.zip", entry, b"/etc/passwd"), tmp_path / "restored")
    link = tmp_path / "restored" / "evaluations" / "link.json"
    assert not link.is_symlink()
    assert link.read_bytes() == b"/etc/passwd"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_unpacks_to_more_than_any_run_is_refused(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int
) -> None:
    monkeypatch.setattr("gmp_atl.stages.archive._LARGEST", 10**6)
    entry = zipfile.ZipInfo("bomb.json")
    entry.compress_type = method
    path = altered(packed, tmp_path / "bomb.zip", entry, bytes(2 * 10**6))
    assert path.stat().st_size < 10**5
    with pytest.raises(UserError, match="would unpack to more than"):
        restore(path, tmp_path / "restored")


def test_an_archive_that_lies_about_its_size_is_refused(packed: Path, tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("bomb.json")
    entry.compress_type = zipfile.ZIP_DEFLATED
    path = altered(packed, tmp_path / "bomb.zip", entry, bytes(10**6))
    true, false = (10**6).to_bytes(4, "little"), (100).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(true, false))
    with pytest.raises(UserError, match="no archive, or a damaged one"):
        restore(path, tmp_path / "restored")


def test_every_locked_package_is_listed_with_its_licence() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "licences.py"))
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["page"](), "run `make licences`"
